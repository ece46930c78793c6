"""``linear="taylor"`` on the GPU: the sparse branch's kernels for critical keys, and around them those of virtual keys.

forward:  moments -> logits of blocks -> classes, lists -> rows -> S -> attention to critical keys -> to virtual ones.
backward: moments, rows and S again -> virtual keys' dQ, dS and dl -> their dK, dV -> of the rows and the moments ->
critical keys' dQ, dK, dV -> what the moments' gradients add.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult, Gradients
from sla_compile.common.options import AttentionOptions, BackwardOptions

from ..steps import BlockLists, KernelInputs, Steps, Upstream, VirtualKeys
from . import virtual_keys
from .classify import classes, critical_lists, longest_first
from .moments import KeyMoments, MomentGradients, add_key_gradients, add_query_gradients, key_moments, query_moments
from .states import sum_of_states

__all__ = ["backward", "forward"]


class _Blocks(NamedTuple):
    """What is known of the blocks of a call before their classes are."""

    queries: torch.Tensor
    """`query_moments`."""
    moments: KeyMoments
    logits: torch.Tensor
    spreads: torch.Tensor

    @classmethod
    def of(cls, operands: KernelInputs, options: BackwardOptions) -> _Blocks:
        queries, moments = query_moments(operands.q, options.block_q), key_moments(operands, options.block_k)
        return cls(queries, moments, *virtual_keys.virtual_logits(queries, moments, options.scale))

    def virtual(self, block_map: torch.Tensor, shift: torch.Tensor | None) -> tuple[VirtualKeys, torch.Tensor]:
        """The virtual keys at the marginal blocks, and how rows mix their slopes."""
        moments = self.moments
        rows = virtual_keys.virtual_rows(self.logits, self.spreads, moments, block_map, shift)
        slopes = sum_of_states(rows.mixture, moments.slopes)
        return VirtualKeys(moments.keys, moments.values, rows.bias, slopes), rows.mixture


def forward(inputs: AttentionInputs, operands: KernelInputs, options: AttentionOptions, steps: Steps) -> ForwardResult:
    """Output, and what its backward needs, of one call; ``operands`` have no gate."""
    blocks = _Blocks.of(operands, options)
    block_map, lists = classes(blocks.logits, operands, inputs.sparsity, options)
    virtual, _ = blocks.virtual(block_map, inputs.shift)
    out, lse = steps.virtual_forward(operands, lists, virtual, options)
    return ForwardResult(out, out.new_empty(0), lse, block_map)


def backward(
    upstream: Upstream,
    block_map: torch.Tensor,
    shift: torch.Tensor | None,
    operands: KernelInputs,
    options: BackwardOptions,
    steps: Steps,
) -> Gradients:
    """Gradients of the call with this ``block_map``, which is a constant."""
    q, scale, block_q = operands.q, options.scale, options.block_q
    blocks = _Blocks.of(operands, options)
    moments = blocks.moments
    virtual, mixture = blocks.virtual(block_map, shift)
    gradients, gains, grad_bias, grad_slopes = virtual_keys.backward_query(upstream, operands, virtual, block_q, scale)
    of_keys, of_values = virtual_keys.backward_key(
        upstream, operands, virtual, gradients.statistics, gains, block_q, scale
    )
    del virtual
    by_rows = virtual_keys.mixture_backward(
        mixture, _of_mixture(grad_slopes, moments.slopes), grad_bias, blocks.spreads, moments, scale
    )
    tiles = grad_slopes.shape[2] // block_map.shape[2]
    if tiles > 1:
        mixture = mixture.repeat_interleave(tiles, dim=1)
    # of gradients alone, so the user's TF32 may round them; classes and logits are made by products of our own
    of_spans = by_rows.of_spans.mT @ blocks.queries
    of_spans[0] += of_keys
    moment_gradients = MomentGradients(
        of_spans,
        of_values,
        sum_of_states(mixture, grad_slopes, transpose=True),
    )
    of_queries = by_rows.of_spans @ moments.spans

    row_lists = BlockLists(*critical_lists(block_map, by_column=False))
    columns, lengths = critical_lists(block_map, by_column=True)
    order = longest_first(lengths, block_map.shape[2])
    steps.attention_backward_query(upstream, operands, row_lists, gradients, options)
    add_query_gradients(q, of_queries, gradients.dq, block_q)
    dk, dv = steps.attention_backward_key(
        upstream, operands, BlockLists(columns, lengths), order, gradients.statistics, None, options
    )
    add_key_gradients(operands, moments, moment_gradients, dk, dv, options.block_k)
    dshift = q.new_empty(0) if shift is None else by_rows.of_shift.sum(dim=(0, 2)).to(shift.dtype)
    return Gradients(gradients.dq, dk, dv, q.new_empty(0), q.new_empty(0), dshift)


def _of_mixture(grad_slopes: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """The products of each dS with each C: (B*H, tiles, Tn)."""
    batch, heads, tiles = grad_slopes.shape[:3]
    left = grad_slopes.view(batch * heads, tiles, -1)
    right = slopes.view(batch * heads, slopes.shape[2], -1)
    products = left.new_empty(batch * heads, tiles, slopes.shape[2])
    # out= keeps an enclosing autocast from changing the type of the product
    return torch.bmm(left, right.mT, out=products)
