"""What the interpreter and the GPU tests of the Triton kernels share: inputs, one run, its reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import assert_close

from sla_compile.blocks import num_blocks, num_critical, num_negligible
from sla_compile.kernels import reference

NAMES = ("out", "dq", "dk", "dv", "dweight", "dbias")


@dataclass(frozen=True)
class Case:
    """One shape and one setting of the kernels."""

    tokens: int = 200
    head_dim: int = 64
    batch: int = 1
    heads: int = 2
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

    def __str__(self) -> str:
        changed = [
            f"{n}={getattr(self, n)}" for n in self.__dataclass_fields__ if getattr(self, n) != getattr(_BASE, n)
        ]
        return ",".join(changed) or "base"

    @property
    def counts(self) -> tuple[int, int]:
        """Critical and negligible key blocks in a row."""
        key_blocks = num_blocks(self.tokens, self.block_k)
        critical = num_critical(self.topk, key_blocks)
        return critical, num_negligible(self.bottomk, critical, key_blocks)

    @property
    def options(self) -> dict[str, object]:
        """Keywords that both launchers take."""
        return {
            "scale": self.head_dim**-0.5,
            "block_q": self.block_q,
            "block_k": self.block_k,
            "feature_map": self.feature_map,
            "linear": self.linear,
        }


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


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> list[torch.Tensor | None]:
    """q, k, v, weight, bias, grad_out."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v, grad_out = (activation(case, generator, dtype) for _ in range(4))
    gate_dtype = case.gate_dtype or dtype
    dim, heads = case.head_dim, case.heads
    # v off zero: else the linear branch, a mean over many keys, is too small to be seen in the sum
    v += 0.5
    weight = bias = None
    if case.weight != "none":
        shape: tuple[int, ...] = (dim, dim) if case.weight == "shared" else (heads, dim, dim)
        weight = (torch.randn(shape, generator=generator, device=device) * 2 / dim**0.5).to(gate_dtype)
    if case.bias != "none":
        shape = (dim,) if case.bias == "shared" else (heads, dim)
        bias = torch.randn(shape, generator=generator, device=device).to(gate_dtype)
    return [q, k, v, weight, bias, grad_out]


def run_kernels(case: Case, tensors: list[torch.Tensor | None]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The launchers' out and gradients by name, and their block map."""
    from sla_compile.kernels import triton_attention

    *arguments, grad_out = tensors
    out, linear_out, lse, block_map = triton_attention.forward(
        *arguments, topk=case.topk, bottomk=case.bottomk, **case.options
    )
    has_linear = arguments[3] is not None and case.linear != "none"
    assert linear_out.shape == (out.shape if has_linear else (0,))
    assert out.transpose(1, 2).is_contiguous()
    gradients = triton_attention.backward(grad_out, *arguments, None, out, linear_out, lse, block_map, **case.options)
    for tensor, gradient in zip(arguments, gradients, strict=True):
        assert gradient.shape == ((0,) if tensor is None else tensor.shape)
        assert tensor is None or gradient.dtype == tensor.dtype
    return dict(zip(NAMES, (out, *gradients), strict=True)), block_map


def run_reference(case: Case, tensors: list[torch.Tensor | None], block_map: torch.Tensor) -> dict[str, torch.Tensor]:
    """The definition in float64 at the kernels' own classes: out and the gradients that exist."""
    *arguments, grad_out = tensors
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in arguments]
    out = reference.sparse_linear_attention(
        *doubles, topk=case.topk, bottomk=case.bottomk, block_map=block_map, **case.options
    )
    assert grad_out is not None
    present = {n: x for n, x in zip(NAMES[1:], doubles, strict=True) if x is not None}
    gradients = torch.autograd.grad(
        out, list(present.values()), grad_out.double(), allow_unused=True, materialize_grads=True
    )
    return {"out": out.detach(), **dict(zip(present, gradients, strict=True))}


def check(case: Case, tensors: list[torch.Tensor | None], forward_budget: float, gradient_budget: float) -> None:
    """Kernels against the definition, out and every gradient."""
    actual, block_map = run_kernels(case, tensors)
    expected = run_reference(case, tensors, block_map)
    for name, value in expected.items():
        assert_close(name, actual[name], value, forward_budget if name == "out" else gradient_budget)
