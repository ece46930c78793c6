"""Sparse-Linear Attention on the CPU, forward and explicit backward, at a cost that falls with topk.

For one head, with the block map M (+1 critical, 0 marginal, -1 negligible):

    O^s_i = softmax(scale Q_i K_c^T) V_c         over the tokens c of the critical blocks of row i
    h_j = phi(K_j)^T V_j,  z_j = phi(K_j)^T 1    one state per key block
    H = [M = 0] h,  Z = [M = 0] z                one matrix product over blocks
    O^l_i = phi(Q_i) H_i / (phi(Q_i) Z_i)
    O = O^s + O^l weight^T + bias

A key mask adds b_c to the scores of key c and multiplies phi(K_c) by exp(b_c).

Work goes by groups of heads, so that copies of K and V (padding, casts, strided views) stay small, and within
a group by chunks of query blocks, so that gathered keys and scores stay in cache. No buffer has Lq x Lk
elements. Axes: B batch, H heads, Lq queries, Lk keys, D head dimension, Tm and Tn query and key blocks, G heads
of a group, C query blocks of a chunk. 16-bit inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult, Gradients, has_linear_branch
from sla_compile.common.options import AttentionOptions, BackwardOptions

from .classify import Choice, blocks_of, classify, key_bias, pool, pool_weighted, wholly_below

__all__ = ["backward", "forward"]

_ELEMENTS_PER_CHUNK = 1 << 19
"""Most elements of the largest buffer of a chunk of query blocks, so that it stays in cache."""
_ROWS_PER_GROUP = 128
"""Most query blocks of a group of several heads."""
_VANISHING_POWER = 0.8
"""Of a dtype's least normal number: a denominator below that says nothing, and its gradient would overflow."""


def forward(inputs: AttentionInputs, options: AttentionOptions) -> ForwardResult:
    """Output, and what its backward needs, of one call (paper, section 4)."""
    q, k, v, weight, bias, key_mask, sparsity = inputs
    block_q, block_k, feature_map = options.block_q, options.block_k, options.feature_map
    batch, heads, tokens, dim = q.shape
    work = _work_dtype(q)
    query_blocks, key_blocks = -(-tokens // block_q), -(-k.shape[2] // block_k)
    branch = has_linear_branch(weight, options)
    out = _token_major(q)
    linear_out = _token_major(q) if branch else q.new_empty(0)
    lse = q.new_empty(batch, heads, tokens, dtype=work)
    block_map = q.new_empty(batch, heads, query_blocks, key_blocks, dtype=torch.int8)
    shares = None if sparsity is None else sparsity.tolist()
    for group in _groups(batch, heads, query_blocks):
        key_scores_bias = _bias_of(key_mask, group[0], block_k, work)
        choice = Choice.of(
            tokens,
            k.shape[2],
            None if key_scores_bias is None else key_scores_bias.amax(dim=1) > float("-inf"),
            shares,
            options,
        )
        ranked = classify(_block_scores(q[group], k[group], key_scores_bias, options), choice)
        block_map[group] = ranked
        keys = _key_side(k[group], v[group], work, key_scores_bias, options, branch)
        keys.phi = None  # only its states are needed from here on
        lists = _Lists.of(ranked, choice.candidates is None)
        summed = _summed_blocks(ranked, work, options) if branch else None
        for rows in _chunks(query_blocks, ranked.shape[0] * dim * max(dim, block_q)):
            span = slice(rows.start * block_q, min(rows.stop * block_q, tokens))
            width = span.stop - span.start
            queries = blocks_of(q[group][:, span], block_q, work)
            sparse, chunk_lse = _sparse_forward(queries * options.scale, keys, lists.rows(rows))
            mixed = sparse[:, :width]
            if summed is not None and weight is not None:
                phi = _feature(queries, feature_map)
                marginal = _linear_forward(phi, keys, summed[:, rows])
                linear_out[group][:, span] = marginal[:, :width]
                mixed = mixed + marginal[:, :width] @ _of_heads(weight, 2, group).to(work).mT
            if bias is not None:
                mixed = mixed + _of_heads(bias, 1, group).to(work).unsqueeze(-2)
            out[group][:, span] = mixed
            lse[group][:, span] = chunk_lse[:, :width]
        del keys  # or it would lie in memory beside the next group's
    return ForwardResult(out, linear_out, lse, block_map)


def backward(grad_out: Tensor, inputs: AttentionInputs, result: ForwardResult, options: BackwardOptions) -> Gradients:
    """Gradients at grad_out of the call that gave ``result`` (paper, section 4).

    ``result.out`` and ``lse`` are not read: the probabilities of a chunk are normalised anew, which is as cheap here
    and rounds less.
    """
    q, k, v, weight, bias, key_mask, _ = inputs
    linear_out, block_map = result.linear_out, result.block_map
    block_q, block_k, feature_map = options.block_q, options.block_k, options.feature_map
    batch, heads, tokens, dim = q.shape
    work = _work_dtype(q)
    branch = has_linear_branch(weight, options)
    dq, dk, dv = (_token_major(x) for x in (q, k, v))
    dweight = torch.zeros(weight.shape if weight is not None else 0, dtype=work, device=q.device)
    dbias = torch.zeros(bias.shape if bias is not None else 0, dtype=work, device=q.device)
    for group in _groups(batch, heads, block_map.shape[2]):
        ranked = block_map[group]
        key_scores_bias = _bias_of(key_mask, group[0], block_k, work)
        keys = _key_side(k[group], v[group], work, key_scores_bias, options, branch)
        grads = _KeyGradients.zeros(keys)
        lists = _Lists.of(ranked)
        summed = _summed_blocks(ranked, work, options) if branch else None
        for rows in _chunks(block_map.shape[2], ranked.shape[0] * dim * max(dim, block_q)):
            span = slice(rows.start * block_q, min(rows.stop * block_q, tokens))
            width = span.stop - span.start
            queries = blocks_of(q[group][:, span], block_q, work)
            upstream = blocks_of(grad_out[group][:, span], block_q, work)
            dqueries = _sparse_backward(upstream, queries, options.scale, keys, lists.rows(rows), grads)
            if summed is not None and weight is not None:
                marginal = blocks_of(linear_out[group][:, span], block_q, work)
                gate = _of_heads(weight, 2, group).to(work)
                dqueries += _linear_backward(
                    upstream, marginal, gate, queries, feature_map, keys, summed[:, rows], grads
                )
                _accumulate(dweight, upstream.flatten(1, 2).mT @ marginal.flatten(1, 2), 2, group)
            if bias is not None:
                _accumulate(dbias, upstream.sum(dim=(1, 2)), 1, group)
            dq[group][:, span] = dqueries.flatten(1, 2)[:, :width]
        grads.finish(keys, feature_map)
        dk[group] = grads.k.flatten(1, 2)[:, : k.shape[2]]
        dv[group] = grads.v.flatten(1, 2)[:, : k.shape[2]]
        del keys, grads  # or they would lie in memory beside the next group's
    dweight = dweight if weight is None else dweight.to(weight.dtype)
    dbias = dbias if bias is None else dbias.to(bias.dtype)
    return Gradients(dq, dk, dv, dweight, dbias)


def _token_major(q: Tensor) -> Tensor:
    """An empty (B, H, N, D) whose memory is (B, N, H, D)."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _groups(batch: int, heads: int, query_blocks: int) -> Iterator[tuple[int, slice]]:
    """Indices (batch, heads) of groups: one head of a long sequence, several of a short one."""
    size = max(1, _ROWS_PER_GROUP // query_blocks)
    for b in range(batch):
        for first in range(0, heads, size):
            yield b, slice(first, min(first + size, heads))


def _chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    """Slices of rows whose largest buffer, of elements_per_row each, stays in cache."""
    size = max(1, _ELEMENTS_PER_CHUNK // elements_per_row)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _of_heads(gate: Tensor, shared_dims: int, group: tuple[int, slice]) -> Tensor:
    """The gate of a group's heads: itself where the heads share it."""
    return gate if gate.dim() == shared_dims else gate[group[1]]


def _accumulate(total: Tensor, per_head: Tensor, shared_dims: int, group: tuple[int, slice]) -> None:
    if total.dim() == shared_dims:
        total += per_head.sum(dim=0)
    else:
        total[group[1]] += per_head


def _bias_of(key_mask: Tensor | None, batch: int, block: int, dtype: torch.dtype) -> Tensor | None:
    """The mask of one batch row as a bias (Tn, block) of the scores."""
    return None if key_mask is None else key_bias(key_mask[batch if key_mask.shape[0] > 1 else 0], block, dtype)


def _block_scores(q: Tensor, k: Tensor, bias: Tensor | None, options: AttentionOptions) -> Tensor:
    """pool(Q) pool(K)^T scale, (G, Tm, Tn)."""
    work = _work_dtype(q)
    pooled = pool(k, options.block_k, work) if bias is None else pool_weighted(k, bias.exp())
    return (pool(q, options.block_q, work) @ pooled.mT).mul_(options.scale)


@dataclass
class _Lists:
    """Critical key blocks (G, C, width) of query blocks ``first`` to first + C, as rows of G * Tn key blocks.

    Ascending; where rows have unequal numbers, other blocks follow, and ``absent`` is true there.
    """

    blocks: Tensor
    absent: Tensor | None
    first: int

    @classmethod
    def of(cls, block_map: Tensor, equal: bool | None = None) -> _Lists:
        """From a block map (G, Tm, Tn); ``equal``: whether all rows have as many, None where that is to be seen."""
        group, query_blocks, key_blocks = block_map.shape
        member, absent = block_map == 1, None
        if equal is None:
            counts = member.sum(dim=2)
            equal = bool((counts == counts[0, 0]).all()) and int(counts[0, 0]) > 0
        if equal:
            lists = member.nonzero()[:, 2].view(group, query_blocks, -1)
        else:
            counts = member.sum(dim=2, keepdim=True)
            width = max(1, int(counts.max()))
            lists = member.to(torch.int8).sort(dim=2, descending=True, stable=True).indices[:, :, :width]
            absent = torch.arange(width, device=lists.device) >= counts
        return cls(lists + torch.arange(group, device=lists.device).view(-1, 1, 1) * key_blocks, absent, 0)

    def rows(self, rows: slice) -> _Lists:
        """Those of some query blocks, as wide as the longest."""
        blocks, absent, first = self.blocks[:, rows], self.absent, self.first + rows.start
        if absent is not None:
            absent = absent[:, rows]
            width = max(1, int((~absent).sum(dim=2).max()))
            blocks, absent = blocks[..., :width], absent[..., :width]
        return _Lists(blocks, absent, first)


def _summed_blocks(block_map: Tensor, dtype: torch.dtype, options: BackwardOptions) -> Tensor:
    """(G, Tm, Tn) of 1 where the linear branch sums the block: the marginal ones, or all."""
    if options.linear == "marginal":
        return (block_map == 0).to(dtype)
    if options.causal:
        below = wholly_below(block_map.shape[1], block_map.shape[2], options.block_q, options.block_k)
        return below.to(dtype).expand(block_map.shape)
    return torch.ones_like(block_map, dtype=dtype)


@dataclass
class _Keys:
    """k, v, phi (G, Tn, block_k, D), h (G, Tn, D, D), z (G, Tn, D); tokens missing in the last block.

    bias (Tn, block_k): of the scores, -inf at masked and missing tokens; None where only the last block's
    missing tokens are to be masked. phi is not weighted, h and z are.
    """

    k: Tensor
    v: Tensor
    missing: int
    bias: Tensor | None
    weights: Tensor | None
    causal: bool
    phi: Tensor | None = None
    h: Tensor | None = None
    z: Tensor | None = None


def _key_side(
    k: Tensor, v: Tensor, dtype: torch.dtype, bias: Tensor | None, options: BackwardOptions, branch: bool
) -> _Keys:
    """Blocks of k, v (G, T, D), and their linear states where there is a linear branch."""
    block = options.block_k
    missing = -k.shape[1] % block
    weights = None if bias is None else bias.exp().unsqueeze(-1)
    # every block is gathered many times: one copy of these heads costs less than strided reads
    dense_k, dense_v = (blocks_of(x, block, dtype).contiguous() for x in (k, v))
    keys = _Keys(dense_k, dense_v, missing, bias, weights, options.causal)
    if branch:
        keys.phi = _feature(keys.k, options.feature_map)
        keys.phi[:, -1, block - missing :] = 0
        weighted = keys.phi if weights is None else keys.phi * weights
        keys.h = weighted.mT @ keys.v
        keys.z = weighted.sum(dim=2)
    return keys


def _gather(blocks: Tensor, lists: Tensor) -> Tensor:
    """blocks (G, Tn, block_k, D) at lists (G, C, width): (G * C, width * block_k, D)."""
    rows = blocks.flatten(0, 1).index_select(0, lists.flatten())
    return rows.view(-1, lists.shape[-1] * blocks.shape[2], blocks.shape[3])


def _score_chunks(queries: Tensor, keys: _Keys, lists: _Lists) -> Iterator[slice]:
    """Slices of C whose scores, of queries (G, C, block_q, D) at their lists, stay in cache."""
    group, rows, width = lists.blocks.shape
    return _chunks(rows, group * width * queries.shape[2] * keys.k.shape[2])


def _probabilities(scaled: Tensor, gathered: Tensor, keys: _Keys, lists: _Lists) -> tuple[Tensor, Tensor]:
    """Scores (G * C, block_q, width * block_k), -inf at absent tokens, and their softmax; 0 without any token."""
    scores = scaled @ gathered.mT
    if keys.bias is not None or lists.absent is not None or keys.causal:
        _mask_scores(scores, keys, lists)
        # a query without a key: the softmax would be 0 / 0
        empty = scores.amax(dim=-1, keepdim=True) == float("-inf")
        return scores, scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill_(empty, 0)
    if keys.missing:
        group, key_blocks = keys.k.shape[:2]
        last = torch.arange(1, group + 1, device=scores.device).view(-1, 1) * key_blocks - 1
        # lists ascend, so the short block can only be the last of its row
        short = (lists.blocks[..., -1] == last).view(-1, 1, 1)
        scores[..., -keys.missing :].masked_fill_(short, float("-inf"))
    return scores, scores.softmax(dim=-1)


def _mask_scores(scores: Tensor, keys: _Keys, lists: _Lists) -> None:
    """Add the bias to scores (G * C, block_q, width * block_k), and -inf where a key is absent or not yet there."""
    key_blocks, block_k = keys.k.shape[1:3]
    group, rows, _ = lists.blocks.shape
    blocks = lists.blocks % key_blocks
    if keys.bias is not None:
        bias = keys.bias[blocks]
    else:
        bias = scores.new_zeros(*blocks.shape, block_k)
        last = (blocks == key_blocks - 1).unsqueeze(-1)
        bias[..., block_k - keys.missing :].masked_fill_(last, float("-inf"))
    if lists.absent is not None:
        bias = bias.masked_fill(lists.absent.unsqueeze(-1), float("-inf"))
    scores += bias.view(group * rows, 1, -1)
    if keys.causal:
        block_q = scores.shape[1]
        key = (blocks.unsqueeze(-1) * block_k + torch.arange(block_k)).view(group, rows, 1, -1)
        query = torch.arange(lists.first * block_q, (lists.first + rows) * block_q).view(1, rows, block_q, 1)
        scores.masked_fill_((key > query).view(scores.shape), float("-inf"))


def _sparse_forward(scaled: Tensor, keys: _Keys, lists: _Lists) -> tuple[Tensor, Tensor]:
    """O^s (G, C * block_q, D) and lse (G, C * block_q) of scaled queries (G, C, block_q, D)."""
    sparse, lse = torch.empty_like(scaled), scaled.new_empty(scaled.shape[:3])
    for rows in _score_chunks(scaled, keys, lists):
        shape, part = scaled[:, rows].shape, lists.rows(rows)
        scores, p = _probabilities(scaled[:, rows].flatten(0, 1), _gather(keys.k, part.blocks), keys, part)
        largest = scores.amax(dim=-1)
        # the largest probability is 1 / sum(exp(score - max))
        lse[:, rows] = torch.where(largest > float("-inf"), largest - p.amax(dim=-1).log_(), largest).view(shape[:3])
        sparse[:, rows] = (p @ _gather(keys.v, part.blocks)).view(shape)
    return sparse.flatten(1, 2), lse.flatten(1, 2)


def _sparse_backward(
    upstream: Tensor, queries: Tensor, scale: float, keys: _Keys, lists: _Lists, grads: _KeyGradients
) -> Tensor:
    """dQ (G, C, block_q, D) of the sparse branch; adds to dK and dV."""
    dqueries = torch.empty_like(queries)
    for rows in _score_chunks(queries, keys, lists):
        part = lists.rows(rows)
        scaled, dout = (queries[:, rows] * scale).flatten(0, 1), upstream[:, rows].flatten(0, 1)
        gathered = _gather(keys.k, part.blocks)
        _, p = _probabilities(scaled, gathered, keys, part)
        _scatter_add(grads.v, part.blocks, p.mT @ dout)
        dp = dout @ _gather(keys.v, part.blocks).mT
        dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
        _scatter_add(grads.k, part.blocks, dscores.mT @ scaled)
        dqueries[:, rows] = (dscores @ gathered).mul_(scale).view(queries[:, rows].shape)
    return dqueries


def _scatter_add(total: Tensor, lists: Tensor, gathered: Tensor) -> None:
    """Add gathered (G * C, width * block_k, D) to total (G, Tn, block_k, D), in the order of the lists."""
    rows = total.view(total.shape[0] * total.shape[1], -1)
    rows.index_add_(0, lists.flatten(), gathered.view(-1, rows.shape[1]))


def _feature(x: Tensor, feature_map: str) -> Tensor:
    """phi(x), over the last axis for "softmax", else per element."""
    if feature_map == "softmax":
        return x.softmax(dim=-1)
    return F.elu(x).add_(1) if feature_map == "elu" else x.relu()


def _feature_backward(dphi: Tensor, phi: Tensor, feature_map: str) -> Tensor:
    """dx from dphi and phi(x)."""
    if feature_map == "softmax":
        return torch._softmax_backward_data(dphi, phi, -1, phi.dtype)
    # elu'(x) is 1 above 0 and exp(x) = phi(x) below
    return dphi * (phi.clamp(max=1) if feature_map == "elu" else (phi > 0))


def _linear_forward(phi_q: Tensor, keys: _Keys, summed: Tensor) -> Tensor:
    """O^l (G, C * block_q, D) of phi_q (G, C, block_q, D) and summed (G, C, Tn)."""
    rows = _Rows.of(phi_q, keys, summed)
    return (phi_q @ rows.h).mul_(rows.inverse).flatten(1, 2)


@dataclass
class _Rows:
    """H (G, C, D, D), Z (G, C, D) and 1 / (phi(Q) Z) (G, C, block_q, 1), 0 where the denominator vanishes."""

    h: Tensor
    z: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, phi_q: Tensor, keys: _Keys, summed: Tensor) -> _Rows:
        assert keys.h is not None
        assert keys.z is not None
        z = summed @ keys.z
        h = (summed @ keys.h.flatten(2)).view(*z.shape, -1)
        denominator = phi_q @ z.unsqueeze(-1)
        vanishing = denominator <= torch.finfo(phi_q.dtype).tiny ** _VANISHING_POWER
        return cls(h, z, denominator.reciprocal_().masked_fill_(vanishing, 0))


def _linear_backward(
    upstream: Tensor,
    marginal: Tensor,
    gate: Tensor,
    queries: Tensor,
    feature_map: str,
    keys: _Keys,
    summed: Tensor,
    grads: _KeyGradients,
) -> Tensor:
    """dQ (G, C, block_q, D) of the linear branch; adds to dh and dz."""
    assert grads.h is not None
    assert grads.z is not None
    phi_q = _feature(queries, feature_map)
    rows = _Rows.of(phi_q, keys, summed)
    dmarginal = (upstream.flatten(1, 2) @ gate).view(upstream.shape)
    delta = (dmarginal * marginal).sum(dim=-1, keepdim=True)
    dphi_q = (dmarginal @ rows.h.mT).sub_(delta * rows.z.unsqueeze(-2)).mul_(rows.inverse)
    normalised = phi_q * rows.inverse
    grads.h.baddbmm_(summed.mT, (normalised.mT @ dmarginal).flatten(2))
    grads.z.baddbmm_(summed.mT, (normalised.mT @ delta).squeeze(-1), alpha=-1)
    return _feature_backward(dphi_q, phi_q, feature_map)


@dataclass
class _KeyGradients:
    """dk, dv (G, Tn, block_k, D) and, with a linear branch, dh (G, Tn, D * D) and dz (G, Tn, D)."""

    k: Tensor
    v: Tensor
    h: Tensor | None
    z: Tensor | None

    @classmethod
    def zeros(cls, keys: _Keys) -> _KeyGradients:
        dense_k, dense_v = (torch.zeros(keys.k.shape, dtype=keys.k.dtype, device=keys.k.device) for _ in range(2))
        if keys.h is None or keys.z is None:
            return cls(dense_k, dense_v, None, None)
        return cls(dense_k, dense_v, torch.zeros_like(keys.h.flatten(2)), torch.zeros_like(keys.z))

    def finish(self, keys: _Keys, feature_map: str) -> None:
        """Carry dh and dz on to dk and dv."""
        if keys.phi is None or self.h is None or self.z is None:
            return
        dh = self.h.view(*self.z.shape, -1)
        weighted, dphi = keys.phi, (keys.v @ dh.mT).add_(self.z.unsqueeze(-2))
        if keys.weights is not None:
            weighted, dphi = keys.phi * keys.weights, dphi.mul_(keys.weights)
        self.v += weighted @ dh
        self.k += _feature_backward(dphi, keys.phi, feature_map)
