"""What the tests of the kernels, on the CPU, in Triton's interpreter and on the GPU, share: inputs, one run, its
reference."""

from __future__ import annotations

import importlib.util
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sla_compile.common.blocks import num_blocks, num_critical, num_negligible
from sla_compile.common.kernel_interface import AttentionInputs, Kernels, kept_numbers
from sla_compile.common.limits import TAYLOR
from sla_compile.common.options import AttentionOptions
from sla_compile.kernels import reference
from tests.support.closeness import assert_close
from tests.support.interpreter import INTERPRETED, speed_up_interpreter

NAMES = ("out", "dq", "dk", "dv", "dweight", "dbias")

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]
"""q, k, v, weight, bias, grad_out."""


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    speed_up_interpreter()


@dataclass(frozen=True)
class Case:
    """One shape and one setting of the kernels."""

    tokens: int = 200
    head_dim: int = 64
    batch: int = 1
    heads: int = 2
    group: int = 1
    """Query heads to a head of k and v."""
    block_q: int = 64
    block_k: int = 64
    topk: float = 0.3
    bottomk: float = 0.3
    feature_map: str = "softmax"
    linear: str = "marginal"
    weight: str = "shared"
    bias: str = "shared"
    layout: str = "token_major"
    gate_dtype: torch.dtype | None = None
    keys: int | None = None
    """Tokens of k and v; None: as many as queries."""
    mask: str = "none"
    sparsity: tuple[int, int] | tuple[tuple[int, int], ...] | None = None
    causal: bool = False
    always: tuple[int, ...] = ()
    uneven: bool = False
    """The keys lie the further apart the later they are."""

    def __str__(self) -> str:
        changed = [
            f"{n}={getattr(self, n)}" for n in self.__dataclass_fields__ if getattr(self, n) != getattr(_BASE, n)
        ]
        return ",".join(changed) or "base"

    @property
    def num_keys(self) -> int:
        return self.tokens if self.keys is None else self.keys

    @property
    def counts(self) -> tuple[int, int]:
        """Critical and negligible key blocks in a row, without options that change them."""
        key_blocks = num_blocks(self.tokens, self.block_k)
        critical = num_critical(self.topk, key_blocks)
        return critical, num_negligible(self.bottomk, critical, key_blocks)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the definition that do not decide the classes."""
        return {
            "scale": self.head_dim**-0.5,
            "block_q": self.block_q,
            "block_k": self.block_k,
            "feature_map": self.feature_map,
            "linear": self.linear,
            "causal": self.causal,
        }

    def classes(self, sparsity: torch.Tensor | None) -> dict[str, Any]:
        """Keywords of the definition that decide the classes."""
        shares: dict[str, Any] = {"topk": self.topk, "bottomk": self.bottomk}
        return shares | {"sparsity": sparsity, "always_critical": list(self.always) or None}

    @property
    def attention_options(self) -> AttentionOptions:
        """The options of the kernels."""
        return AttentionOptions(**self.options, topk=self.topk, bottomk=self.bottomk, always_critical=self.always)


_BASE = Case()


def activation(case: Case, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """One of q, k, v, grad_out (B, H, N, D) in the case's memory layout, on the generator's device."""
    shape = {
        "token_major": (case.batch, case.tokens, case.heads, case.head_dim),
        "head_major": (case.batch, case.heads, case.tokens, case.head_dim),
        "packed": (case.batch, case.tokens, 3, case.heads, case.head_dim),
        "dim_before_token": (case.batch, case.heads, case.head_dim, case.tokens),
        "slice": (case.batch, case.tokens, case.heads, case.head_dim // 8 * 8 + 16),
        "off by one": (case.batch, case.tokens, case.heads, case.head_dim + 8),
    }[case.layout]
    x = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
    if case.layout == "token_major":
        return x.transpose(1, 2)
    if case.layout in ("slice", "off by one"):
        # what lies beside the slice must not be read as part of it
        first = 0 if case.layout == "slice" else 1
        x[..., :first] = x[..., first + case.head_dim :] = float("nan")
        return x[..., first : first + case.head_dim].transpose(1, 2)
    if case.layout == "packed":
        return x[:, :, 1].transpose(1, 2)
    return x.mT if case.layout == "dim_before_token" else x


def key_mask(case: Case, device: str) -> torch.Tensor | None:
    """The case's mask, (B, Lk) or (1, Lk): the first batch row attends to more than the last."""
    if case.mask == "none":
        return None
    generator = torch.Generator(device).manual_seed(zlib.crc32(str(case).encode()))
    keys = case.num_keys
    live = torch.ones(case.batch, keys, dtype=torch.bool, device=device)
    # a hole over whole blocks, single tokens here and there, and the end
    live[-1, keys // 8 : keys // 2] = False
    live[-1, ::3] = False
    live[-1, -keys // 8 :] = False
    moderate = torch.randn(live.shape, generator=generator, device=device) * 2
    if case.mask == "bool":
        return live
    if case.mask == "tail":
        return torch.arange(keys, device=device).expand(case.batch, keys) < keys * 9 // 10
    if case.mask == "one key":
        live[-1] = torch.arange(keys, device=device) == keys // 3
        return live
    if case.mask == "one row":
        return live[-1:]
    if case.mask == "dead row":
        live[-1] = False
        return live
    if case.mask == "front":
        live[:, : keys * 2 // 5] = False
        return live
    if case.mask == "-inf":
        return moderate.masked_fill(~live, -math.inf)
    if case.mask == "-10000":
        return torch.where(live, 0.0, -10000.0)
    if case.mask == "all -10000":
        return torch.full_like(moderate, -10000.0)
    assert case.mask == "moderate", case.mask
    return moderate - 3


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Random tensors of the case; with ``linear="taylor"`` there is a shift in the place of the bias."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens = (case.tokens, case.num_keys, case.num_keys, case.tokens)
    heads = (case.heads, *(case.heads // case.group,) * 2, case.heads)
    sizes = zip(tokens, heads, strict=True)
    q, k, v, grad_out = (activation(replace(case, tokens=n, heads=h), generator, dtype) for n, h in sizes)
    if case.uneven:
        k *= torch.linspace(0.5, 3, case.num_keys, device=device, dtype=dtype)[:, None]
    gate_dtype = case.gate_dtype or dtype
    dim = case.head_dim
    # v off zero: else the linear branch, a mean over many keys, is too small to be seen in the sum
    v += 0.5
    weight = bias = None
    if case.weight != "none":
        shape: tuple[int, ...] = (dim, dim) if case.weight == "shared" else (case.heads, dim, dim)
        weight = (torch.randn(shape, generator=generator, device=device) * 2 / dim**0.5).to(gate_dtype)
    if case.linear == TAYLOR:
        weight, bias = None, torch.randn(case.heads, generator=generator, device=device).to(gate_dtype)
    elif case.bias != "none":
        shape = (dim,) if case.bias == "shared" else (case.heads, dim)
        bias = torch.randn(shape, generator=generator, device=device).to(gate_dtype)
    return q, k, v, weight, bias, grad_out


def call_of(case: Case, tensors: Sequence[torch.Tensor | None]) -> AttentionInputs:
    """What the kernels take of ``tensors`` (`inputs`, or its first five), with the case's mask and sparsity."""
    q, k, v, weight, bias = tensors[:5]
    assert q is not None
    assert k is not None
    assert v is not None
    sparsity = None if case.sparsity is None else torch.tensor(case.sparsity, device=q.device)
    mask = key_mask(case, q.device.type)
    if case.linear == TAYLOR:
        return AttentionInputs(q, k, v, None, None, mask, sparsity, bias)
    return AttentionInputs(q, k, v, weight, bias, mask, sparsity)


def run_kernels(
    case: Case, tensors: Sequence[torch.Tensor | None], kernels: Kernels | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The launchers' out and gradients by name, and their block map; ``kernels`` None: Triton's."""
    on_gpu = kernels is None
    if kernels is None:
        from sla_compile.kernels.triton import attention

        kernels = attention

    *arguments, grad_out = tensors
    assert grad_out is not None
    call, options = call_of(case, arguments), case.attention_options
    result = kernels.forward(call, options)
    out, linear_out = result.out, result.linear_out
    has_linear = arguments[3] is not None and case.linear not in ("none", TAYLOR)
    assert linear_out.shape == (out.shape if has_linear else (kept_numbers(call.q, options) if on_gpu else 0,))
    assert out.transpose(1, 2).is_contiguous()
    *gradients, dshift = kernels.backward(grad_out, call, result, options)
    if case.linear == TAYLOR:
        gradients[-1] = dshift
    for tensor, gradient in zip(arguments, gradients, strict=True):
        assert gradient.shape == ((0,) if tensor is None else tensor.shape)
        assert tensor is None or gradient.dtype == tensor.dtype
    return dict(zip(NAMES, (out, *gradients), strict=True)), result.block_map


def run_reference(
    case: Case, tensors: Sequence[torch.Tensor | None], block_map: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The definition in float64 at the kernels' own classes: out and the gradients that exist."""
    *arguments, grad_out = tensors
    assert grad_out is not None
    doubles: list[Any] = [None if x is None else x.detach().double().requires_grad_() for x in arguments]
    mask = key_mask(case, grad_out.device.type)
    gate: dict[str, Any] = (
        {"shift": doubles[4]} if case.linear == TAYLOR else {"weight": doubles[3], "bias": doubles[4]}
    )
    out = reference.sparse_linear_attention(
        doubles[0], doubles[1], doubles[2], **gate, key_mask=mask, block_map=block_map, **case.options
    )
    present = {n: x for n, x in zip(NAMES[1:], doubles, strict=True) if x is not None}
    gradients = torch.autograd.grad(
        out, list(present.values()), grad_out.double(), allow_unused=True, materialize_grads=True
    )
    return {"out": out.detach(), **dict(zip(present, gradients, strict=True))}


def expected_classes(case: Case, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The definition's block map in float64."""
    q, k, grad_out = tensors[0], tensors[1], tensors[-1]
    assert q is not None
    assert k is not None
    assert grad_out is not None
    sparsity = None if case.sparsity is None else torch.tensor(case.sparsity)
    return reference.classify(
        q.double(),
        k.double(),
        scale=case.head_dim**-0.5,
        block_q=case.block_q,
        block_k=case.block_k,
        key_mask=key_mask(case, grad_out.device.type),
        causal=case.causal,
        by_mass=case.linear == TAYLOR,
        **case.classes(sparsity),
    )


def check(
    case: Case,
    tensors: Sequence[torch.Tensor | None],
    forward_budget: float,
    gradient_budget: float,
    kernels: Kernels | None = None,
) -> torch.Tensor:
    """Kernels against the definition, out and every gradient; returns the block map."""
    actual, block_map = run_kernels(case, tensors, kernels)
    expected = run_reference(case, tensors, block_map)
    for name, value in expected.items():
        budget = forward_budget if name == "out" else gradient_budget
        if case.linear == TAYLOR and name == "dbias":
            # of a shift: a sum over all queries, whose terms nearly cancel
            terms = (tensors[-1].double() * expected["out"]).sum(-1).square().sum((0, 2)).sqrt()  # type: ignore[union-attr]
            assert ((actual[name] - value).abs() <= gradient_budget / 2 * terms).all(), "shift"
            continue
        assert_close(name, actual[name], value, budget)
    return block_map


OPTIONS = [
    *(
        Case(tokens=200, batch=2, block_q=32, block_k=16, head_dim=dim, mask=mask)
        for mask, dim in (("bool", 40), ("-inf", 72), ("-10000", 64), ("moderate", 32), ("dead row", 32))
    ),
    Case(tokens=150, batch=2, block_q=64, block_k=32, head_dim=128, mask="bool", weight="per_head", bias="per_head"),
    Case(tokens=150, batch=3, block_k=16, head_dim=32, mask="one row", feature_map="elu", layout="packed"),
    Case(tokens=150, batch=2, block_k=16, head_dim=32, mask="-inf", linear="all", feature_map="relu"),
    Case(tokens=150, batch=2, block_k=16, head_dim=32, mask="moderate", linear="none", bias="none"),
    Case(tokens=150, batch=2, block_k=16, head_dim=32, mask="all -10000", weight="none"),
    # a first tile without a key; with causal, queries without one in a row of blocks that has some
    Case(tokens=200, batch=2, block_q=32, block_k=64, head_dim=32, mask="front", topk=0.5),
    Case(tokens=200, batch=2, block_q=32, block_k=16, head_dim=32, mask="front", causal=True),
    Case(tokens=90, keys=250, batch=2, block_q=32, block_k=16, head_dim=32),
    Case(tokens=250, keys=40, batch=2, block_q=64, block_k=32, head_dim=40, linear="all"),
    Case(tokens=70, keys=333, batch=2, block_q=16, block_k=64, head_dim=72, mask="bool"),
    Case(tokens=200, batch=2, block_q=32, block_k=16, head_dim=32, sparsity=(170_000, 500_000)),
    Case(tokens=200, batch=2, block_q=32, block_k=16, head_dim=32, sparsity=(900_000, 950_000)),
    Case(tokens=200, batch=2, block_q=32, block_k=16, head_dim=32, sparsity=(0, -5), mask="bool"),
    Case(tokens=200, batch=2, block_q=32, block_k=16, head_dim=40, always=(0, 17, -20, 10**9)),
    Case(
        tokens=200,
        batch=2,
        block_q=32,
        block_k=16,
        head_dim=32,
        always=(60, 120),
        mask="bool",
        sparsity=(100_000, 300_000),
    ),
    Case(tokens=80, keys=200, batch=2, block_q=32, block_k=16, head_dim=32, always=(0, 200), bottomk=0.5),
    *(
        Case(tokens=200, batch=2, block_q=q, block_k=k, head_dim=dim, causal=True)
        for q, k, dim in ((32, 16, 40), (16, 64, 32), (64, 64, 64))
    ),
    Case(tokens=129, batch=2, block_q=16, block_k=16, head_dim=128, causal=True, topk=0.5, bottomk=0.5),
    Case(tokens=200, batch=2, block_q=32, block_k=16, head_dim=32, causal=True, linear="all", feature_map="elu"),
    Case(tokens=200, batch=2, block_q=32, block_k=16, head_dim=72, causal=True, mask="-inf", always=(30, 40)),
    Case(
        tokens=200, batch=2, block_q=16, block_k=16, head_dim=32, causal=True, sparsity=(200_000, 100_000), mask="bool"
    ),
    Case(tokens=150, batch=2, block_q=128, block_k=32, head_dim=32, causal=True, linear="all", mask="dead row"),
]
"""Every option, alone and with others, on shapes that no block divides."""

VIRTUAL = [
    Case(tokens=200, batch=2, block_q=32, block_k=16, head_dim=40, topk=0.2, bottomk=0.0, linear=TAYLOR),
    Case(tokens=150, block_q=128, block_k=32, head_dim=72, topk=0.2, linear=TAYLOR, layout="packed"),
    Case(tokens=130, block_q=32, block_k=32, head_dim=32, topk=1.0, bottomk=0.0, linear=TAYLOR),
    Case(tokens=90, keys=250, batch=2, block_q=32, block_k=16, head_dim=32, topk=0.1, linear=TAYLOR),
    *(
        Case(tokens=200, batch=2, block_q=16, block_k=32, head_dim=32, topk=0.2, bottomk=0.0, linear=TAYLOR, mask=mask)
        for mask in ("bool", "moderate", "dead row", "front")
    ),
    Case(tokens=200, batch=2, block_q=32, block_k=16, head_dim=32, causal=True, topk=0.1, linear=TAYLOR),
    Case(tokens=200, batch=2, block_q=16, block_k=64, head_dim=32, causal=True, mask="-inf", linear=TAYLOR),
    Case(tokens=200, block_q=32, block_k=16, head_dim=32, always=(0, 17), sparsity=(100_000, 200_000), linear=TAYLOR),
    Case(tokens=200, block_q=32, block_k=16, head_dim=32, sparsity=((90_000, 0), (300_000, 100_000)), linear=TAYLOR),
    Case(tokens=200, block_q=32, block_k=16, head_dim=32, topk=0.2, bottomk=0.3, linear=TAYLOR, uneven=True),
]
"""Virtual keys: blocks that are short, with masks, causal, with budgets of each head, with w above its bound."""

GROUPED = [
    Case(tokens=150, batch=2, heads=4, group=2, block_q=32, block_k=16, head_dim=32),
    Case(tokens=90, keys=120, heads=4, group=4, block_q=32, block_k=16, head_dim=40, mask="bool", weight="per_head"),
    Case(tokens=100, batch=2, heads=6, group=3, block_q=16, block_k=32, head_dim=32, causal=True, layout="packed"),
    Case(tokens=120, heads=4, group=2, block_q=32, block_k=32, head_dim=32, linear="all"),
    Case(tokens=120, batch=2, heads=4, group=2, block_q=32, block_k=16, head_dim=32, topk=0.2, linear=TAYLOR),
    Case(
        tokens=100,
        heads=4,
        group=2,
        block_q=64,
        block_k=16,
        head_dim=40,
        causal=True,
        mask="bool",
        linear=TAYLOR,
        sparsity=((90_000, 0), (300_000, 100_000), (100_000, 0), (400_000, 200_000)),
    ),
]
"""Grouped queries: every form, and gates, shares and shifts that are those of query heads."""
