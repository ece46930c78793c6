"""A self-test of some seconds: the op, forward and backward, against its definition, in small shapes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sla_compile.common.kernel_interface import AttentionInputs
from sla_compile.common.limits import DTYPES, TAYLOR
from sla_compile.common.options import AttentionOptions

# The one import of the definition outside tests: a self-test is a test.
from sla_compile.kernels import reference
from sla_compile.kernels.triton.compile_process import OpCall, TensorForm

__all__ = ["BUDGETS", "SelfTest", "calls_to_compile", "errors_by_definition", "self_tests"]

BUDGETS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Largest relative error, by dtype, that rounding explains."""

_SIZES = {"tokens": 200, "heads": 2, "dim": 64}  # the last blocks are short
_OPTIONS: dict[str, Any] = {"topk": 0.3, "bottomk": 0.2, "block_q": 64, "block_k": 32}
_FORMS, _MASKS = ("marginal", TAYLOR), ("none", "keys", "causal")


@dataclass(frozen=True)
class SelfTest:
    """One call and its gradients against the definition in float64."""

    device: str
    dtype: str
    linear: str
    mask: str
    error: float
    """Largest relative error ||actual - expected|| / ||expected|| of the output and all gradients; nan if it raised."""
    worst: str
    """Which of them it is of: "out", "dq", ..."""
    budget: float
    seconds: float
    message: str = ""
    """What it raised; empty where it ran."""

    @property
    def passed(self) -> bool:
        return not self.message and self.error <= self.budget

    @property
    def call(self) -> str:
        """What was called, in words."""
        return f"{self.device}, {self.dtype}, linear {self.linear}, mask {self.mask}"


def self_tests(device: torch.device, masks: Sequence[str] = _MASKS) -> list[SelfTest]:
    """A test for each dtype that ``device`` takes, form of ``linear`` and one of ``masks``; the random state stays."""
    return [_run(device, *kind) for kind in _kinds(device, masks)]


def calls_to_compile(device: torch.device) -> list[OpCall]:
    """What ``self_tests`` calls on ``device``, so that the kernels can be compiled before, all at once."""
    return [_call(device, *kind) for kind in _kinds(device)]


def _call(device: torch.device, dtype: torch.dtype, linear: str, mask: str) -> OpCall:
    tensors = AttentionInputs(**_inputs(device, dtype, **_SIZES, mask=mask, linear=linear))
    forms = tuple(None if x is None else TensorForm.of(x) for x in tensors)
    return OpCall(forms, AttentionOptions(**_options(_SIZES["dim"], mask, linear, _OPTIONS)), backward=True)


def _kinds(device: torch.device, masks: Sequence[str] = _MASKS) -> list[tuple[torch.dtype, str, str]]:
    return [*itertools.product(DTYPES[device.type], _FORMS, masks)]


def _run(device: torch.device, dtype: torch.dtype, linear: str, mask: str) -> SelfTest:
    start, error, worst, message = time.perf_counter(), float("nan"), "", ""
    try:
        errors = errors_by_definition(device, dtype, **_SIZES, mask=mask, linear=linear, **_OPTIONS)
        worst, error = max(errors.items(), key=lambda item: item[1])
    except Exception as raised:  # whatever a broken set-up raises belongs into the report
        message = f"{type(raised).__name__}: {next(iter(str(raised).splitlines()), '')}"
    seconds = time.perf_counter() - start
    name = str(dtype).removeprefix("torch.")
    return SelfTest(str(device), name, linear, mask, error, worst, BUDGETS[dtype], seconds, message)


def errors_by_definition(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    heads: int,
    dim: int,
    mask: str = "none",
    linear: str,
    **options: Any,
) -> dict[str, float]:
    """Relative errors of the op against its definition in float64: of "out", and of the gradients "dq", "dk", ...

    ``mask`` is "none", "keys" or "causal"; ``options`` are topk, bottomk, block_q, block_k and feature_map.
    """
    inputs = _inputs(device, dtype, tokens=tokens, heads=heads, dim=dim, mask=mask, linear=linear)
    options = _options(dim, mask, linear, options)
    key_mask = inputs.pop("key_mask")
    given = {name: x for name, x in inputs.items() if x is not None}
    upstream = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    absent = dict.fromkeys(("weight", "bias", "shift", "sparsity"))
    with torch.enable_grad():
        out, _, _, block_map, *_ = torch.ops.sla.forward.default(**{**absent, **leaves}, key_mask=key_mask, **options)
        actual = (out, *torch.autograd.grad(out, list(leaves.values()), upstream))
        exact: dict[str, Any] = {name: x.double().requires_grad_() for name, x in given.items()}
        # With the op's own classes: two scores that rounding makes equal are no mistake.
        expected_out = reference.sparse_linear_attention(**exact, **options, key_mask=key_mask, block_map=block_map)
        expected = (expected_out, *torch.autograd.grad(expected_out, list(exact.values()), upstream.double()))
    names = ("out", *(f"d{name}" for name in leaves))
    return {name: _relative(a, e) for name, a, e in zip(names, actual, expected, strict=True)}


def _inputs(
    device: torch.device, dtype: torch.dtype, *, tokens: int, heads: int, dim: int, mask: str, linear: str
) -> dict[str, Any]:
    """The tensors of a call, random, by their names in `AttentionInputs`."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    inputs: dict[str, Any] = {name: random(1, heads, tokens, dim) for name in "qkv"}
    has_gate = linear not in (TAYLOR, "none")
    return inputs | {
        "weight": random(dim, dim) / dim**0.5 if has_gate else None,
        "bias": random(dim) if has_gate else None,
        "shift": random(heads) if linear == TAYLOR else None,
        "key_mask": torch.arange(tokens, device=device)[None] < tokens - 20 if mask == "keys" else None,
    }


def _options(dim: int, mask: str, linear: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call that are not tensors."""
    given = {"scale": dim**-0.5, "causal": mask == "causal", "linear": linear}
    return {"feature_map": "softmax", **options, **given}


def _relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.detach().double() - expected.detach()).norm() / expected.detach().norm()
    return float("inf") if not bool(torch.isfinite(difference)) else float(difference)
