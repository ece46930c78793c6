"""``linear="taylor"`` on the GPU: the sparse branch's kernels for critical keys, and around them those of virtual keys.

forward:  moments -> logits of blocks -> classes, lists -> rows -> S -> attention to critical keys -> to virtual ones.
backward: moments of keys, rows and S again -> dQ of all keys and dS -> the virtual keys' gradients and dl -> those of
rows and moments -> what they add to dQ; dK and dV of critical keys and moments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult, Gradients, kept_numbers
from sla_compile.common.options import AttentionOptions, BackwardOptions

from ..steps import KernelInputs, KeyMoments, MomentGradients, Steps, Upstream, VirtualKeys
from . import virtual_keys
from .classify import classes, critical_lists
from .moments import add_query_gradients, fill_query_moments
from .states import sum_of_states
from .tiles import ceil_div, stacked

__all__ = ["backward", "forward"]


class _Kept(NamedTuple):
    """What the forward keeps of the queries for the backward: little, and slow to make again."""

    moments: torch.Tensor
    """The means of q and of q^2 by blocks, float32 (2, B, H, Tm, D)."""
    shares: torch.Tensor
    """`VirtualKeys.shares`."""

    @classmethod
    def of(cls, numbers: torch.Tensor, q: torch.Tensor, block_q: int) -> _Kept:
        """Views of the `kept_numbers`."""
        batch, heads, tokens, head_dim = q.shape
        shape = (2, batch, heads, ceil_div(tokens, block_q), head_dim)
        count = numbers.shape[0] - batch * heads * tokens
        return cls(numbers[:count].view(shape), numbers[count:].view(batch, heads, tokens))


class _Blocks(NamedTuple):
    """What is known of the blocks of a call before their classes are."""

    kept: _Kept
    moments: KeyMoments
    logits: torch.Tensor
    spreads: torch.Tensor
    ranks: torch.Tensor | None
    """What blocks are ranked by, of a forward."""

    @classmethod
    def of(cls, kept: _Kept, operands: KernelInputs, options: BackwardOptions, steps: Steps, ranked: bool) -> _Blocks:
        moments = steps.key_moments(operands, options)
        return cls(kept, moments, *virtual_keys.virtual_logits(kept.moments, moments, options.scale, ranked))

    def virtual(self, block_map: torch.Tensor, shift: torch.Tensor | None) -> tuple[VirtualKeys, torch.Tensor]:
        """The virtual keys at the marginal blocks, and how rows mix their slopes."""
        moments = self.moments
        rows = virtual_keys.virtual_rows(self.logits, self.spreads, moments, block_map, shift)
        slopes = sum_of_states(rows.mixture, moments.slopes, block_map.shape[1])
        return VirtualKeys(moments.keys, moments.values, rows.bias, slopes, self.kept.shares), rows.mixture


def forward(inputs: AttentionInputs, operands: KernelInputs, options: AttentionOptions, steps: Steps) -> ForwardResult:
    """Output, and what its backward needs, of one call; ``operands`` have no gate."""
    q = operands.q
    numbers = torch.empty(kept_numbers(q, options), dtype=torch.float32, device=q.device)
    kept = _Kept.of(numbers, q, options.block_q)
    fill_query_moments(q, kept.moments, options.block_q)
    blocks = _Blocks.of(kept, operands, options, steps, ranked=True)
    assert blocks.ranks is not None
    block_map, lists = classes(blocks.ranks, operands, inputs.sparsity, options)
    virtual, _ = blocks.virtual(block_map, inputs.shift)
    out, lse = steps.virtual_forward(operands, lists, virtual, options)
    return ForwardResult(out, numbers, lse, block_map)


def backward(
    upstream: Upstream,
    block_map: torch.Tensor,
    shift: torch.Tensor | None,
    operands: KernelInputs,
    options: BackwardOptions,
    steps: Steps,
) -> Gradients:
    """Gradients of the call with this ``block_map``, which is a constant."""
    q, key_heads = operands.q, operands.k.shape[1]
    kept = _Kept.of(upstream.linear_out, q, options.block_q)
    blocks = _Blocks.of(kept, operands, options, steps, ranked=False)
    moments = blocks.moments
    virtual, mixture = blocks.virtual(block_map, shift)
    rows = critical_lists(block_map, by_column=False, weights=operands.key_weights)
    by_query = steps.virtual_backward_query(upstream, operands, rows, virtual, options)
    of_keys, of_values, grad_bias = steps.virtual_key_gradients(
        upstream, operands, virtual, by_query.virtual_statistics, options
    )
    del virtual
    by_rows = virtual_keys.mixture_backward(
        mixture, _of_mixture(by_query.slopes, moments.slopes), grad_bias, blocks.spreads, moments, options.scale
    )
    tiles = by_query.slopes.shape[2] // block_map.shape[2]
    if tiles > 1:
        mixture = mixture.repeat_interleave(tiles, dim=1)
    of_queries, of_spans = virtual_keys.span_gradients(by_rows.of_spans, kept.moments, moments, of_keys)
    of_slopes = sum_of_states(mixture, by_query.slopes, key_heads, transpose=True)
    of_moments = MomentGradients(of_spans, of_values, of_slopes)
    add_query_gradients(q, of_queries, by_query.dq, options.block_q)

    columns = critical_lists(block_map, by_column=True, group=operands.group)
    order = steps.column_order(operands, columns, options)
    dk, dv = steps.virtual_backward_key(
        upstream, operands, columns, order, by_query.statistics, moments, of_moments, options
    )
    dshift = q.new_empty(0) if shift is None else by_rows.of_shift.sum(dim=(0, 2)).to(shift.dtype)
    return Gradients(by_query.dq, dk, dv, q.new_empty(0), q.new_empty(0), dshift)


def _of_mixture(grad_slopes: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """The products of each dS with each C: (B*H, tiles, Tn up to a multiple of 8)."""
    batch, heads, tiles = grad_slopes.shape[:3]
    left, right = (x.flatten(3).flatten(0, 1) for x in (stacked(grad_slopes, slopes.shape[1]), slopes))
    products = left.new_empty(*left.shape[:2], right.shape[1])
    # out= keeps an enclosing autocast from changing the type of the product
    torch.bmm(left, right.mT, out=products)
    return products.view(batch * heads, tiles, right.shape[1])
