"""A self-test of some seconds: the op, forward and backward, against its definition, in small shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sla_compile.common.limits import DTYPES, TAYLOR

# The one import of the definition outside tests: a self-test is a test.
from sla_compile.kernels import reference

__all__ = ["BUDGETS", "SelfTest", "errors_by_definition", "self_tests"]

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
    return [_run(device, dtype, linear, mask) for dtype in DTYPES[device.type] for linear in _FORMS for mask in masks]


def _run(device: torch.device, dtype: torch.dtype, linear: str, mask: str) -> SelfTest:
    start, error, message = time.perf_counter(), float("nan"), ""
    try:
        errors = errors_by_definition(device, dtype, **_SIZES, mask=mask, linear=linear, **_OPTIONS)
        error = max(errors.values())
    except Exception as raised:  # whatever a broken set-up raises belongs into the report
        message = f"{type(raised).__name__}: {next(iter(str(raised).splitlines()), '')}"
    seconds = time.perf_counter() - start
    name = str(dtype).removeprefix("torch.")
    return SelfTest(str(device), name, linear, mask, error, BUDGETS[dtype], seconds, message)


def errors_by_definition(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    heads: int,
    dim: int,
    mask: str = "none",
    linear: str = "marginal",
    **options: Any,
) -> dict[str, float]:
    """Relative errors of the op against its definition in float64: of "out", and of the gradients "dq", "dk", ...

    ``mask`` is "none", "keys" or "causal"; ``options`` are topk, bottomk, block_q, block_k and feature_map.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    inputs = {name: random(1, heads, tokens, dim) for name in "qkv"}
    if linear == TAYLOR:
        inputs["shift"] = random(heads)
    elif linear != "none":
        inputs |= {"weight": random(dim, dim) / dim**0.5, "bias": random(dim)}
    upstream = random(1, heads, tokens, dim)
    key_mask = torch.arange(tokens, device=device)[None] < tokens - 20 if mask == "keys" else None
    options = {"feature_map": "softmax", **options, "scale": dim**-0.5, "causal": mask == "causal", "linear": linear}
    options["key_mask"] = key_mask
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    absent = dict.fromkeys(("weight", "bias", "shift", "sparsity"))
    with torch.enable_grad():
        out, _, _, block_map = torch.ops.sla.forward.default(**{**absent, **leaves}, **options)
        actual = (out, *torch.autograd.grad(out, list(leaves.values()), upstream))
        exact: dict[str, Any] = {name: x.double().requires_grad_() for name, x in inputs.items()}
        # With the op's own classes: two scores that rounding makes equal are no mistake.
        expected_out = reference.sparse_linear_attention(**exact, **options, block_map=block_map)
        expected = (expected_out, *torch.autograd.grad(expected_out, list(exact.values()), upstream.double()))
    names = ("out", *(f"d{name}" for name in leaves))
    return {name: _relative(a, e) for name, a, e in zip(names, actual, expected, strict=True)}


def _relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.detach().double() - expected.detach()).norm() / expected.detach().norm()
    return float("inf") if not bool(torch.isfinite(difference)) else float(difference)
