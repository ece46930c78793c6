"""What the op asks of the kernels of a device: two functions with one signature, whatever the device.

Axes: B batch, H heads, Hk heads of keys and values, Lq queries, Lk keys, D head dimension, Tm = ceil(Lq / block_q),
Tn = ceil(Lk / block_k).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from sla_compile.common.blocks import num_blocks
from sla_compile.common.limits import TAYLOR
from sla_compile.common.options import AttentionOptions, BackwardOptions

__all__ = [
    "AttentionInputs",
    "ForwardResult",
    "Gradients",
    "Kernels",
    "has_linear_branch",
    "kept_numbers",
    "kept_rows",
]


class AttentionInputs(NamedTuple):
    """The tensors of one call, any strides, in the order of the op's schema."""

    q: Tensor
    """(B, H, Lq, D)."""
    k: Tensor
    """(B, Hk, Lk, D), as ``v``; both in the dtype of ``q``. Hk divides H: query head h has key head h // (H / Hk)."""
    v: Tensor
    weight: Tensor | None
    """The gate's weight (D, D) or (H, D, D), any floating dtype; None: no linear branch."""
    bias: Tensor | None
    """The gate's bias (D) or (H, D), any floating dtype; None: zero."""
    key_mask: Tensor | None = None
    """(B, Lk) or (1, Lk): bool, true where a key is attended to, or added to the logits."""
    sparsity: Tensor | None = None
    """int64 (2,), or (H, 2) for each head: topk and bottomk in millionths, which take the options' place. The backward
    does not read it."""
    shift: Tensor | None = None
    """With ``linear="taylor"``, (H), any floating dtype: added to the logits of the virtual keys; None: zero."""


class ForwardResult(NamedTuple):
    """What a forward returns; all but ``out`` is for the backward alone."""

    out: Tensor
    """(B, H, Lq, D) over (B, Lq, H, D) memory, in the dtype of q."""
    linear_out: Tensor
    """The linear branch before the gate, as ``out``; with ``linear="taylor"`` on CUDA float32 (`kept_numbers`,); else
    of shape (0,)."""
    lse: Tensor
    """(B, H, Lq): natural logarithm of the softmax's denominator, that is over the critical keys and any virtual ones;
    -inf for a query without a key. float64 for float64 inputs, else float32."""
    block_map: Tensor
    """int8 (B, H, Tm, Tn): 1 critical, 0 marginal, -1 negligible."""
    state_sums: Tensor | None = None
    """H, (B, H, `kept_rows`, D, D up to a multiple of 8), bfloat16 for 16-bit inputs, else float32. Without a row, or
    None, the backward makes it again."""
    normalizer_sums: Tensor | None = None
    """Z beside it, float32 (B, H, `kept_rows`, D)."""


class Gradients(NamedTuple):
    """dq, dk, dv (B, H or Hk, L, D) over (B, L, H or Hk, D) memory; dweight, dbias and dshift like weight, bias and
    shift, or of shape (0,)."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dweight: Tensor
    dbias: Tensor
    dshift: Tensor


class Kernels(Protocol):
    """The kernels of one kind of device; a module with these two functions is one."""

    def forward(self, inputs: AttentionInputs, options: AttentionOptions) -> ForwardResult: ...

    def backward(
        self, grad_out: Tensor, inputs: AttentionInputs, result: ForwardResult, options: BackwardOptions
    ) -> Gradients:
        """Gradients at ``grad_out`` (B, H, Lq, D), any strides, of the call that gave ``result``."""


def has_linear_branch(weight: Tensor | None, options: BackwardOptions) -> bool:
    """Whether a call has a linear branch: a gate to let it in, and blocks that it sums."""
    return weight is not None and options.linear not in ("none", TAYLOR)


def kept_rows(q: Tensor, weight: Tensor | None, options: BackwardOptions) -> int:
    """Of how many rows a forward on a GPU keeps H and Z for its backward: all where they take no more memory than q,
    the one row where all have the same, else 0."""
    if not has_linear_branch(weight, options):
        return 0
    if options.linear == "all" and not options.causal:
        return 1
    pitch = -(-q.shape[3] // 8) * 8
    return num_blocks(q.shape[2], options.block_q) if pitch <= options.block_q else 0


def kept_numbers(q: Tensor, options: BackwardOptions) -> int:
    """How many numbers the CUDA kernels of a call keep for its backward in place of ``linear_out``: with "taylor", the
    means of q and of q^2 by blocks, and a number for each query; else none."""
    if options.linear != TAYLOR:
        return 0
    batch, heads, tokens, head_dim = q.shape
    numbers: int = batch * heads * (2 * num_blocks(tokens, options.block_q) * head_dim + tokens)
    return numbers
