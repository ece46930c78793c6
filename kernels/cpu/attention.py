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
elements. Axes: B batch, H heads, Hk heads of keys, Lq queries, Lk keys, D head dimension, Tm and Tn query and key
blocks, G heads of a group and Gk of their keys, C query blocks of a chunk. 16-bit inputs are computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult, Gradients, has_linear_branch
from sla_compile.common.limits import TAYLOR
from sla_compile.common.options import AttentionOptions, BackwardOptions

from . import taylor
from .classify import Choice, blocks_of, classify, pool, pool_weighted, wholly_below
from .gathered import (
    Keys,
    Lists,
    accumulate,
    add_onto_keys,
    bias_of,
    chunks,
    gather,
    groups,
    key_side,
    listed_scores,
    log_sum,
    of_heads,
    of_key_heads,
    scatter_add,
    score_chunks,
    softmax,
    token_major,
    work_dtype,
)

__all__ = ["backward", "forward"]

_VANISHING_POWER = 0.8
"""Of a dtype's least normal number: a denominator below that says nothing, and its gradient would overflow."""


def forward(inputs: AttentionInputs, options: AttentionOptions) -> ForwardResult:
    """Output, and what its backward needs, of one call (paper, section 4)."""
    if options.linear == TAYLOR:
        return taylor.forward(inputs, options)
    q, k, v, weight, bias, key_mask, sparsity, _ = inputs
    block_q, block_k, feature_map = options.block_q, options.block_k, options.feature_map
    batch, heads, tokens, dim = q.shape
    work = work_dtype(q)
    query_blocks, key_blocks = -(-tokens // block_q), -(-k.shape[2] // block_k)
    branch = has_linear_branch(weight, options)
    out = token_major(q)
    linear_out = token_major(q) if branch else q.new_empty(0)
    lse = q.new_empty(batch, heads, tokens, dtype=work)
    block_map = q.new_empty(batch, heads, query_blocks, key_blocks, dtype=torch.int8)
    for group, key_group in groups(q, k, query_blocks):
        key_scores_bias = bias_of(key_mask, group[0], block_k, work)
        choice = Choice.of(
            tokens,
            k.shape[2],
            None if key_scores_bias is None else key_scores_bias.amax(dim=1) > float("-inf"),
            of_heads(sparsity, 1, group),
            options,
        )
        ranked = classify(_block_scores(q[group], k[key_group], key_scores_bias, options), choice)
        block_map[group] = ranked
        keys = _key_side(k[key_group], v[key_group], work, key_scores_bias, options, branch)
        keys.phi = None  # only its states are needed from here on
        lists = Lists.of(ranked, keys.k.shape[0], choice.candidates is None)
        summed = _summed_blocks(ranked, work, options) if branch else None
        for rows in chunks(query_blocks, ranked.shape[0] * dim * max(dim, block_q)):
            span = slice(rows.start * block_q, min(rows.stop * block_q, tokens))
            width = span.stop - span.start
            queries = blocks_of(q[group][:, span], block_q, work)
            sparse, chunk_lse = _sparse_forward(queries * options.scale, keys, lists.rows(rows))
            mixed = sparse[:, :width]
            if summed is not None and weight is not None:
                phi = _feature(queries, feature_map)
                marginal = _linear_forward(phi, keys, summed[:, rows])
                linear_out[group][:, span] = marginal[:, :width]
                mixed = mixed + marginal[:, :width] @ of_heads(weight, 2, group).to(work).mT
            if bias is not None:
                mixed = mixed + of_heads(bias, 1, group).to(work).unsqueeze(-2)
            out[group][:, span] = mixed
            lse[group][:, span] = chunk_lse[:, :width]
        del keys  # or it would lie in memory beside the next group's
    return ForwardResult(out, linear_out, lse, block_map)


def backward(grad_out: Tensor, inputs: AttentionInputs, result: ForwardResult, options: BackwardOptions) -> Gradients:
    """Gradients at grad_out of the call that gave ``result`` (paper, section 4).

    ``result.out`` and ``lse`` are not read: the probabilities of a chunk are normalised anew, which is as cheap here
    and rounds less.
    """
    if options.linear == TAYLOR:
        return taylor.backward(grad_out, inputs, result, options)
    q, k, v, weight, bias, key_mask, _, _ = inputs
    linear_out, block_map = result.linear_out, result.block_map
    block_q, block_k, feature_map = options.block_q, options.block_k, options.feature_map
    tokens, dim = q.shape[2:]
    work = work_dtype(q)
    branch = has_linear_branch(weight, options)
    dq, dk, dv = (token_major(x) for x in (q, k, v))
    dweight = torch.zeros(weight.shape if weight is not None else 0, dtype=work, device=q.device)
    dbias = torch.zeros(bias.shape if bias is not None else 0, dtype=work, device=q.device)
    for group, key_group in groups(q, k, block_map.shape[2]):
        ranked = block_map[group]
        key_scores_bias = bias_of(key_mask, group[0], block_k, work)
        keys = _key_side(k[key_group], v[key_group], work, key_scores_bias, options, branch)
        grads = _KeyGradients.zeros(keys)
        lists = Lists.of(ranked, keys.k.shape[0])
        summed = _summed_blocks(ranked, work, options) if branch else None
        for rows in chunks(block_map.shape[2], ranked.shape[0] * dim * max(dim, block_q)):
            span = slice(rows.start * block_q, min(rows.stop * block_q, tokens))
            width = span.stop - span.start
            queries = blocks_of(q[group][:, span], block_q, work)
            upstream = blocks_of(grad_out[group][:, span], block_q, work)
            dqueries = _sparse_backward(upstream, queries, options.scale, keys, lists.rows(rows), grads)
            if summed is not None and weight is not None:
                marginal = blocks_of(linear_out[group][:, span], block_q, work)
                gate = of_heads(weight, 2, group).to(work)
                dqueries += _linear_backward(
                    upstream, marginal, gate, queries, feature_map, keys, summed[:, rows], grads
                )
                accumulate(dweight, upstream.flatten(1, 2).mT @ marginal.flatten(1, 2), 2, group)
            if bias is not None:
                accumulate(dbias, upstream.sum(dim=(1, 2)), 1, group)
            dq[group][:, span] = dqueries.flatten(1, 2)[:, :width]
        grads.finish(keys, feature_map)
        dk[key_group] = grads.k.flatten(1, 2)[:, : k.shape[2]]
        dv[key_group] = grads.v.flatten(1, 2)[:, : k.shape[2]]
        del keys, grads  # or they would lie in memory beside the next group's
    dweight = dweight if weight is None else dweight.to(weight.dtype)
    dbias = dbias if bias is None else dbias.to(bias.dtype)
    return Gradients(dq, dk, dv, dweight, dbias, q.new_empty(0))


def _block_scores(q: Tensor, k: Tensor, bias: Tensor | None, options: AttentionOptions) -> Tensor:
    """pool(Q) pool(K)^T scale, (G, Tm, Tn)."""
    work = work_dtype(q)
    pooled = pool(k, options.block_k, work) if bias is None else pool_weighted(k, bias.exp())
    return of_key_heads(pool(q, options.block_q, work), pooled.mT).mul_(options.scale)


def _summed_blocks(block_map: Tensor, dtype: torch.dtype, options: BackwardOptions) -> Tensor:
    """(G, Tm, Tn) of 1 where the linear branch sums the block: the marginal ones, or all."""
    if options.linear == "marginal":
        return (block_map == 0).to(dtype)
    if options.causal:
        below = wholly_below(block_map.shape[1], block_map.shape[2], options.block_q, options.block_k)
        return below.to(dtype).expand(block_map.shape)
    return torch.ones_like(block_map, dtype=dtype)


@dataclass
class _Keys(Keys):
    """With phi (Gk, Tn, block_k, D), h (Gk, Tn, D, D) and z (Gk, Tn, D) of the linear branch; h and z are weighted."""

    phi: Tensor | None = None
    h: Tensor | None = None
    z: Tensor | None = None


def _key_side(
    k: Tensor, v: Tensor, dtype: torch.dtype, bias: Tensor | None, options: BackwardOptions, branch: bool
) -> _Keys:
    """Blocks of k, v (Gk, T, D), and their linear states where there is a linear branch."""
    keys = _Keys(**vars(key_side(k, v, options.block_k, dtype, bias, options.causal)))
    if branch:
        keys.phi = _feature(keys.k, options.feature_map)
        keys.phi[:, -1, options.block_k - keys.missing :] = 0
        weighted = keys.phi if keys.weights is None else keys.phi * keys.weights
        keys.h = weighted.mT @ keys.v
        keys.z = weighted.sum(dim=2)
    return keys


def _probabilities(scaled: Tensor, gathered: Tensor, keys: Keys, lists: Lists) -> tuple[Tensor, Tensor]:
    """Scores (G * C, block_q, width * block_k), -inf at absent tokens, and their softmax; 0 without any token."""
    scores = listed_scores(scaled, gathered, keys, lists)
    return scores, softmax(scores) if lists.may_be_empty(keys) else scores.softmax(dim=-1)


def _sparse_forward(scaled: Tensor, keys: Keys, lists: Lists) -> tuple[Tensor, Tensor]:
    """O^s (G, C * block_q, D) and lse (G, C * block_q) of scaled queries (G, C, block_q, D)."""
    sparse, lse = torch.empty_like(scaled), scaled.new_empty(scaled.shape[:3])
    for rows in score_chunks(scaled, keys, lists):
        shape, part = scaled[:, rows].shape, lists.rows(rows)
        scores, p = _probabilities(scaled[:, rows].flatten(0, 1), gather(keys.k, part.blocks), keys, part)
        lse[:, rows] = log_sum(scores, p).view(shape[:3])
        sparse[:, rows] = (p @ gather(keys.v, part.blocks)).view(shape)
    return sparse.flatten(1, 2), lse.flatten(1, 2)


def _sparse_backward(
    upstream: Tensor, queries: Tensor, scale: float, keys: Keys, lists: Lists, grads: _KeyGradients
) -> Tensor:
    """dQ (G, C, block_q, D) of the sparse branch; adds to dK and dV."""
    dqueries = torch.empty_like(queries)
    for rows in score_chunks(queries, keys, lists):
        part = lists.rows(rows)
        scaled, dout = (queries[:, rows] * scale).flatten(0, 1), upstream[:, rows].flatten(0, 1)
        gathered = gather(keys.k, part.blocks)
        _, p = _probabilities(scaled, gathered, keys, part)
        scatter_add(grads.v, part.blocks, p.mT @ dout)
        dp = dout @ gather(keys.v, part.blocks).mT
        dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
        scatter_add(grads.k, part.blocks, dscores.mT @ scaled)
        dqueries[:, rows] = (dscores @ gathered).mul_(scale).view(queries[:, rows].shape)
    return dqueries


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
        z = of_key_heads(summed, keys.z)
        h = of_key_heads(summed, keys.h.flatten(2)).view(*z.shape, -1)
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
    add_onto_keys(grads.h, summed, (normalised.mT @ dmarginal).flatten(2))
    add_onto_keys(grads.z, summed, (normalised.mT @ delta).squeeze(-1), -1)
    return _feature_backward(dphi_q, phi_q, feature_map)


@dataclass
class _KeyGradients:
    """dk, dv (Gk, Tn, block_k, D) and, with a linear branch, dh (Gk, Tn, D * D) and dz (Gk, Tn, D)."""

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
