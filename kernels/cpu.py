"""Sparse-Linear Attention on the CPU, forward and explicit backward, at a cost that falls with topk.

For one head, with the block map M (+1 critical, 0 marginal, -1 negligible):

    O^s_i = softmax(scale Q_i K_c^T) V_c         over the tokens c of the critical blocks of row i
    h_j = phi(K_j)^T V_j,  z_j = phi(K_j)^T 1    one state per key block
    H = [M = 0] h,  Z = [M = 0] z                one matrix product over blocks
    O^l_i = phi(Q_i) H_i / (phi(Q_i) Z_i)
    O = O^s + O^l weight^T + bias

Work goes by groups of heads, so that copies of K and V (padding, casts, strided views) stay small, and within
a group by chunks of query blocks, so that gathered keys and scores stay in cache. No buffer has N x N
elements. Axes: B batch, H heads, N tokens, D head dimension, Tm and Tn query and key blocks, G heads of a
group, C query blocks of a chunk. 16-bit inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["backward", "forward"]

_ELEMENTS_PER_CHUNK = 1 << 19
_ROWS_PER_GROUP = 128


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    scale: float,
    critical: int,
    negligible: int,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, linear_out, lse, block_map) from q, k, v (B, H, N, D) of any strides (paper, section 4).

    out and linear_out (the linear branch before the gate; shape (0,) without one) are (B, H, N, D) views of
    (B, N, H, D) memory; lse (B, H, N) is the natural logarithm of the sparse branch's denominator, with the
    scale in it; block_map (B, H, Tm, Tn) int8. ``critical`` and ``negligible`` count key blocks per row.
    """
    batch, heads, tokens, dim = q.shape
    work = _work_dtype(q)
    query_blocks, key_blocks = -(-tokens // block_q), -(-tokens // block_k)
    branch = weight is not None and linear != "none"
    out = _token_major(q)
    linear_out = _token_major(q) if branch else q.new_empty(0)
    lse = q.new_empty(batch, heads, tokens, dtype=work)
    block_map = q.new_empty(batch, heads, query_blocks, key_blocks, dtype=torch.int8)
    for group in _groups(batch, heads, query_blocks):
        ranked = _classify(q[group], k[group], scale, critical, negligible, block_q, block_k)
        block_map[group] = ranked
        keys = _key_side(k[group], v[group], block_k, work, feature_map if branch else None)
        keys.phi = None  # only its states are needed from here on
        lists = _critical_lists(ranked)
        summed = _summed_blocks(ranked, linear, work) if branch else None
        for rows in _chunks(query_blocks, ranked.shape[0] * dim * max(dim, block_q)):
            span = slice(rows.start * block_q, min(rows.stop * block_q, tokens))
            width = span.stop - span.start
            queries = _blocks(q[group][:, span], block_q, work)
            sparse, chunk_lse = _sparse_forward(queries * scale, keys, lists[:, rows])
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
    return out, linear_out, lse, block_map


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    linear_out: Tensor,
    lse: Tensor,
    block_map: Tensor,
    *,
    scale: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dweight, dbias) from grad_out (B, H, N, D) and what `forward` returned (paper, section 4).

    dq, dk and dv are (B, H, N, D) views of (B, N, H, D) memory; dweight and dbias have the shape and dtype of
    weight and bias, or shape (0,) for one that is None. out and lse are not read: the probabilities of a
    chunk are normalised anew, which is as cheap here and rounds less.
    """
    batch, heads, tokens, dim = q.shape
    work = _work_dtype(q)
    branch = weight is not None and linear != "none"
    dq, dk, dv = (_token_major(q) for _ in range(3))
    dweight = torch.zeros(weight.shape if weight is not None else 0, dtype=work, device=q.device)
    dbias = torch.zeros(bias.shape if bias is not None else 0, dtype=work, device=q.device)
    for group in _groups(batch, heads, block_map.shape[2]):
        ranked = block_map[group]
        keys = _key_side(k[group], v[group], block_k, work, feature_map if branch else None)
        grads = _KeyGradients.zeros(keys)
        lists = _critical_lists(ranked)
        summed = _summed_blocks(ranked, linear, work) if branch else None
        for rows in _chunks(block_map.shape[2], ranked.shape[0] * dim * max(dim, block_q)):
            span = slice(rows.start * block_q, min(rows.stop * block_q, tokens))
            width = span.stop - span.start
            queries = _blocks(q[group][:, span], block_q, work)
            upstream = _blocks(grad_out[group][:, span], block_q, work)
            dqueries = _sparse_backward(upstream, queries, scale, keys, lists[:, rows], grads)
            if summed is not None and weight is not None:
                marginal = _blocks(linear_out[group][:, span], block_q, work)
                gate = _of_heads(weight, 2, group).to(work)
                dqueries += _linear_backward(
                    upstream, marginal, gate, queries, feature_map, keys, summed[:, rows], grads
                )
                _accumulate(dweight, upstream.flatten(1, 2).mT @ marginal.flatten(1, 2), 2, group)
            if bias is not None:
                _accumulate(dbias, upstream.sum(dim=(1, 2)), 1, group)
            dq[group][:, span] = dqueries.flatten(1, 2)[:, :width]
        grads.finish(keys, feature_map)
        dk[group] = grads.k.flatten(1, 2)[:, :tokens]
        dv[group] = grads.v.flatten(1, 2)[:, :tokens]
        del keys, grads  # or they would lie in memory beside the next group's
    dweight = dweight if weight is None else dweight.to(weight.dtype)
    dbias = dbias if bias is None else dbias.to(bias.dtype)
    return dq, dk, dv, dweight, dbias


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


def _blocks(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """x (G, T, D) as (G, ceil(T / block), block, D) in ``dtype``, zeros after the last token."""
    missing = -x.shape[1] % block
    x = x.to(dtype)
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.reshape(x.shape[0], -1, block, x.shape[2])


def _pool(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Block means (G, blocks, D) of x (G, T, D); the last block over its true length."""
    full = x.shape[1] // block
    means = _blocks(x[:, : full * block], block, x.dtype).mean(dim=2, dtype=dtype)
    if x.shape[1] % block == 0:
        return means
    return torch.cat([means, x[:, full * block :].mean(dim=1, keepdim=True, dtype=dtype)], dim=1)


def _classify(q: Tensor, k: Tensor, scale: float, critical: int, negligible: int, block_q: int, block_k: int) -> Tensor:
    """The block map (G, Tm, Tn) int8: first of each ranked row critical, last negligible."""
    work = _work_dtype(q)
    scores = (_pool(q, block_q, work) @ _pool(k, block_k, work).mT).mul_(scale)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    block_map = torch.zeros_like(scores, dtype=torch.int8)
    block_map.scatter_(-1, order[..., :critical], 1)
    block_map.scatter_(-1, order[..., order.shape[-1] - negligible :], -1)
    return block_map


def _critical_lists(block_map: Tensor) -> Tensor:
    """Critical key blocks (G, Tm, critical), ascending, as rows of the group's G * Tn key blocks."""
    group, query_blocks, key_blocks = block_map.shape
    lists = (block_map == 1).nonzero()[:, 2].view(group, query_blocks, -1)
    return lists + torch.arange(group, device=lists.device).view(-1, 1, 1) * key_blocks


def _summed_blocks(block_map: Tensor, linear: str, dtype: torch.dtype) -> Tensor:
    """(G, Tm, Tn) of 1 where the linear branch sums the block: the marginal ones, or all."""
    if linear == "all":
        return torch.ones_like(block_map, dtype=dtype)
    return (block_map == 0).to(dtype)


@dataclass
class _Keys:
    """k, v, phi (G, Tn, block_k, D), h (G, Tn, D, D), z (G, Tn, D); tokens missing in the last block."""

    k: Tensor
    v: Tensor
    missing: int
    phi: Tensor | None = None
    h: Tensor | None = None
    z: Tensor | None = None


def _key_side(k: Tensor, v: Tensor, block: int, dtype: torch.dtype, feature_map: str | None) -> _Keys:
    """Blocks of k, v (G, T, D), and their linear states where there is a feature map."""
    missing = -k.shape[1] % block
    # every block is gathered many times: one copy of these heads costs less than strided reads
    keys = _Keys(_blocks(k, block, dtype).contiguous(), _blocks(v, block, dtype).contiguous(), missing)
    if feature_map is not None:
        keys.phi = _feature(keys.k, feature_map)
        keys.phi[:, -1, block - missing :] = 0
        keys.h = keys.phi.mT @ keys.v
        keys.z = keys.phi.sum(dim=2)
    return keys


def _gather(blocks: Tensor, lists: Tensor) -> Tensor:
    """blocks (G, Tn, block_k, D) at lists (G, C, critical): (G * C, critical * block_k, D)."""
    rows = blocks.flatten(0, 1).index_select(0, lists.flatten())
    return rows.view(-1, lists.shape[-1] * blocks.shape[2], blocks.shape[3])


def _score_chunks(queries: Tensor, keys: _Keys, lists: Tensor) -> Iterator[slice]:
    """Slices of C whose scores, of queries (G, C, block_q, D) at lists (G, C, critical), stay in cache."""
    group, rows, critical = lists.shape
    return _chunks(rows, group * critical * queries.shape[2] * keys.k.shape[2])


def _probabilities(scaled: Tensor, gathered: Tensor, keys: _Keys, lists: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (G * C, block_q, critical * block_k), -inf at absent tokens, and their softmax."""
    scores = scaled @ gathered.mT
    if keys.missing:
        group, key_blocks = keys.k.shape[:2]
        last = torch.arange(1, group + 1, device=lists.device).view(-1, 1) * key_blocks - 1
        # lists ascend, so the short block can only be the last of its row
        short = (lists[..., -1] == last).view(-1, 1, 1)
        scores[..., -keys.missing :].masked_fill_(short, float("-inf"))
    return scores, scores.softmax(dim=-1)


def _sparse_forward(scaled: Tensor, keys: _Keys, lists: Tensor) -> tuple[Tensor, Tensor]:
    """O^s (G, C * block_q, D) and lse (G, C * block_q) of scaled queries (G, C, block_q, D)."""
    sparse, lse = torch.empty_like(scaled), scaled.new_empty(scaled.shape[:3])
    for rows in _score_chunks(scaled, keys, lists):
        shape = scaled[:, rows].shape
        scores, p = _probabilities(scaled[:, rows].flatten(0, 1), _gather(keys.k, lists[:, rows]), keys, lists[:, rows])
        # the largest probability is 1 / sum(exp(score - max))
        lse[:, rows] = (scores.amax(dim=-1) - p.amax(dim=-1).log_()).view(shape[:3])
        sparse[:, rows] = (p @ _gather(keys.v, lists[:, rows])).view(shape)
    return sparse.flatten(1, 2), lse.flatten(1, 2)


def _sparse_backward(
    upstream: Tensor, queries: Tensor, scale: float, keys: _Keys, lists: Tensor, grads: _KeyGradients
) -> Tensor:
    """dQ (G, C, block_q, D) of the sparse branch; adds to dK and dV."""
    dqueries = torch.empty_like(queries)
    for rows in _score_chunks(queries, keys, lists):
        part = lists[:, rows]
        scaled, dout = (queries[:, rows] * scale).flatten(0, 1), upstream[:, rows].flatten(0, 1)
        gathered = _gather(keys.k, part)
        _, p = _probabilities(scaled, gathered, keys, part)
        _scatter_add(grads.v, part, p.mT @ dout)
        dp = dout @ _gather(keys.v, part).mT
        dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
        _scatter_add(grads.k, part, dscores.mT @ scaled)
        dqueries[:, rows] = (dscores @ gathered).mul_(scale).view(queries[:, rows].shape)
    return dqueries


def _scatter_add(total: Tensor, lists: Tensor, gathered: Tensor) -> None:
    """Add gathered (G * C, critical * block_k, D) to total (G, Tn, block_k, D), in the order of the lists."""
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
        # below this the quotient says nothing and its gradient would overflow
        vanishing = denominator <= torch.finfo(phi_q.dtype).tiny ** 0.8
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
        self.v += keys.phi @ dh
        dphi = (keys.v @ dh.mT).add_(self.z.unsqueeze(-2))
        self.k += _feature_backward(dphi, keys.phi, feature_map)
