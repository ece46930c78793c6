"""The definition of Sparse-Linear Attention (arXiv 2509.24006), dense and in plain PyTorch.

For tests alone: it costs a full attention map, differentiates by autograd and is right in float64. It shares
no helper with any kernel. Axes: B batch, H heads, Lq queries, Lk keys (N where they are as many), D head
dimension, Tm = ceil(Lq / block_q) query blocks, Tn = ceil(Lk / block_k) key blocks. ``block_map`` holds M: +1
critical, 0 marginal, -1 negligible. A mask gives key j the weight exp(b_j) in every branch. With fewer heads of k and
v, Hk, query head h has the keys of head h // (H / Hk).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["classify", "sparse_linear_attention"]


def key_bias(key_mask: Tensor | None, k: Tensor) -> Tensor:
    """b (B or 1, Lk) from a mask (B or 1, Lk), bool or additive: at most 0, -inf at masked keys; 0 without one.

    Attention does not change when b shifts, so its maximum over a row is taken off. What then lies below -64,
    a weight of 1e-28, is masked.
    """
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    if key_mask is None:
        return torch.zeros(1, k.shape[2], dtype=work, device=k.device)
    if key_mask.dtype == torch.bool:
        return torch.zeros(key_mask.shape, dtype=work, device=k.device).masked_fill(~key_mask, -math.inf)
    bias = key_mask.detach().to(work)
    largest = bias.amax(dim=-1, keepdim=True)
    bias = bias - largest.masked_fill(largest == -math.inf, 0)
    return bias.masked_fill(bias < -64, -math.inf)


def block_means(x: Tensor, block: int) -> Tensor:
    """(B, H, T, D) of x (B, H, L, D): the mean of each block over its true length."""
    return torch.stack([part.mean(dim=2) for part in torch.split(x, block, dim=2)], dim=2)


class KeyBlocks(NamedTuple):
    """The moments of key blocks under the weights of their keys; 0 where these are all 0."""

    total: Tensor
    """n (B or 1, Tn): the sum of weights, the number of keys where there is no mask."""
    mean: Tensor
    """kbar (B, H, Tn, D)."""
    variance: Tensor
    """(B, H, Tn, D): the mean of (k - kbar)^2."""
    value: Tensor | None
    """vbar (B, H, Tn, D)."""
    slope: Tensor | None
    """C (B, H, Tn, D, D): the mean of (k - kbar) v^T."""

    @classmethod
    def of(cls, k: Tensor, v: Tensor | None, weights: Tensor, block: int) -> KeyBlocks:
        """From k and v (B, H, Lk, D) and weights (B or 1, Lk)."""
        total = torch.stack([part.sum(dim=-1) for part in torch.split(weights, block, dim=-1)], dim=-1)
        shares = weights / total.masked_fill(total == 0, 1).repeat_interleave(block, dim=1)[:, : k.shape[2]]
        parts = [part[:, None, :, None].to(k.dtype) for part in torch.split(shares, block, dim=-1)]
        blocks = list(zip(parts, torch.split(k, block, dim=2), strict=True))
        mean = torch.stack([(share * k_j).sum(dim=2) for share, k_j in blocks], dim=2)
        off = [k_j - mean[:, :, j, None] for j, (_, k_j) in enumerate(blocks)]
        variance = torch.stack([(share * o**2).sum(dim=2) for share, o in zip(parts, off, strict=True)], dim=2)
        if v is None:
            return cls(total, mean, variance, None, None)
        values = [share * v_j for share, v_j in zip(parts, torch.split(v, block, dim=2), strict=True)]
        value = torch.stack([v_j.sum(dim=2) for v_j in values], dim=2)
        slope = torch.stack([o.mT @ v_j for o, v_j in zip(off, values, strict=True)], dim=2)
        return cls(total, mean, variance, value, slope)

    def log_weight(self, squares: Tensor, scale: float) -> Tensor:
        """ln n_j + w_ij (B, H, Tm, Tn) of the mean squares (B, H, Tm, D) of query blocks; -inf where n_j = 0.

        w_ij is `spread`, at most ln n_j: a mean weight is at most the largest.
        """
        size = self.total.log()[:, None, None, :].to(squares.dtype)
        return size + torch.minimum(self.spread(squares, scale), size.clamp(min=0))

    def spread(self, squares: Tensor, scale: float) -> Tensor:
        """1/2 scale^2 sum_c mean_i(q_c^2) var_j(k_c) (B, H, Tm, Tn) of the mean squares (B, H, Tm, D) of query blocks:
        what the spread of the keys adds to the logarithm of their mean weight, at second order."""
        return squares @ self.variance.mT * scale**2 / 2


def budgets(
    blocks: list[int], topk: float, bottomk: float, sparsity: Tensor | None, least: int
) -> tuple[list[int], list[int]]:
    """Critical and negligible key blocks of each row from how many its budgets are shares of; exact floors."""
    share, dropped = Fraction(repr(float(topk))), Fraction(repr(float(bottomk)))
    if sparsity is not None:
        millionths = [max(0, int(part)) for part in sparsity]
        share, dropped = min(share, Fraction(millionths[0], 10**6)), Fraction(millionths[1], 10**6)
    critical = [max(least, math.floor(share * n)) for n in blocks]
    return critical, [math.floor(dropped * n) for n in blocks]


def classify(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    topk: float,
    bottomk: float,
    block_q: int,
    block_k: int,
    key_mask: Tensor | None = None,
    sparsity: Tensor | None = None,
    causal: bool = False,
    always_critical: list[int] | None = None,
    by_mass: bool = False,
) -> Tensor:
    """M (B, H, Tm, Tn) int8 from q (B, H, Lq, D) and k (B, Hk, Lk, D); no gradient (paper, section 4).

    Each row is ranked by descending score, the product of block means, or with ``by_mass`` the logarithm of the
    mass that a block is expected to have, without a bound on w; ties by the lower key block first. The first
    ``max(1, floor(topk * Tn))`` are critical, the last ``floor(bottomk * Tn)`` negligible, the rest marginal;
    blocks with no key to attend to rank last and are negligible in any case. Blocks that touch a range
    [start, stop) of ``always_critical`` are critical beside the budget. With ``causal``, blocks above the
    diagonal are negligible, blocks on it critical, and the budgets are shares of the blocks below it, without
    the least of one. ``sparsity`` (2) or, for each head, (H, 2) holds topk, at most the given one, and bottomk in
    millionths.
    """
    with torch.no_grad():
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        weights = key_bias(key_mask, k).exp()
        keys = KeyBlocks.of(k.to(work), None, weights, block_k)
        live = (keys.total > 0)[:, None, None, :]
        queries = block_means(q.to(work), block_q)
        scores = queries @ keys.mean.mT * scale
        if by_mass:
            spread = keys.spread(block_means(q.to(work) ** 2, block_q), scale)
            scores = scores + keys.total.log()[:, None, None, :].to(work) + spread

        rows, columns = scores.shape[2:]
        first_query = torch.arange(rows, device=q.device)[:, None] * block_q
        first_key = torch.arange(columns, device=q.device) * block_k
        last_query = (first_query + block_q).clamp(max=q.shape[2]) - 1
        last_key = (first_key + block_k).clamp(max=k.shape[2]) - 1
        below = last_key < first_query if causal else torch.ones_like(last_key < first_query)
        above = first_key > last_query if causal else torch.zeros_like(below)
        always = torch.zeros(columns, dtype=torch.bool, device=q.device)
        for start, stop in zip((always_critical or [])[::2], (always_critical or [])[1::2], strict=True):
            start, stop, _ = slice(start, stop).indices(k.shape[2])
            always |= (last_key >= start) & (first_key < stop) & (start < stop)

        heads = [None] if sparsity is None else list(sparsity.view(-1, 2))
        sizes, least = below.sum(dim=1).tolist(), 0 if causal else 1
        counts = torch.tensor([budgets(sizes, topk, bottomk, head, least) for head in heads], device=q.device)
        critical, negligible = counts[:, 0, :, None], counts[:, 1, :, None]
        chosen = (always | ~below) & ~above & live
        candidates = below & ~always & live
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        candidates, chosen = candidates.expand_as(scores), chosen.expand_as(scores)
        in_order = candidates.gather(-1, order).cumsum(dim=-1) - 1
        rank = torch.empty_like(order).scatter_(-1, order, in_order)
        dead = (below & ~live).sum(dim=-1, keepdim=True)
        kept = candidates.sum(dim=-1, keepdim=True) - (negligible - dead).clamp(min=0)
        block_map = torch.full_like(rank, -1, dtype=torch.int8)
        block_map[candidates & (rank < kept)] = 0
        block_map[chosen | (candidates & (rank < critical))] = 1
        return block_map


def feature(x: Tensor, feature_map: str) -> Tensor:
    """phi of x (..., D): over the head dimension for "softmax", else per element."""
    if feature_map == "softmax":
        return x.softmax(dim=-1)
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "relu":
        return x.relu()
    raise ValueError(f"feature_map={feature_map!r}: accepted are 'softmax', 'elu', 'relu'")


def sparse_branch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, block_map: Tensor, scale: float, bq: int, bk: int, causal: bool
) -> Tensor:
    """O^s (B, H, Lq, D): softmax attention of each query over the keys of its critical blocks; 0 without any."""
    critical = (block_map == 1).repeat_interleave(bq, dim=2).repeat_interleave(bk, dim=3)
    allowed = critical[:, :, : q.shape[2], : k.shape[2]] & (bias > -math.inf)[:, None, None, :]
    if causal:
        allowed = allowed.tril()
    empty = ~allowed.any(dim=-1, keepdim=True)
    logits = q @ k.mT * scale + bias.masked_fill(bias == -math.inf, 0)[:, None, None, :].to(q.dtype)
    logits = logits.masked_fill(~allowed, -math.inf).masked_fill(empty, 0)
    return logits.softmax(dim=-1).masked_fill(empty, 0) @ v


def linear_branch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, summed: Tensor, feature_map: str, bq: int, bk: int
) -> Tensor:
    """O^l (B, H, Lq, D): linear attention over the key blocks where summed (B, H, Tm, Tn) is true."""
    phi_q = feature(q, feature_map)
    phi_k = feature(k, feature_map) * bias.exp()[:, None, :, None].to(k.dtype)
    # h_j = phi(K_j)^T V_j and z_j = phi(K_j)^T 1
    pairs = zip(torch.split(phi_k, bk, dim=2), torch.split(v, bk, dim=2), strict=True)
    h = torch.stack([phi_k_j.mT @ v_j for phi_k_j, v_j in pairs], dim=2)
    z = torch.stack([phi_k_j.sum(dim=2) for phi_k_j in torch.split(phi_k, bk, dim=2)], dim=2)
    # H_i = sum of h_j and Z_i = sum of z_j over the summed blocks of row i
    big_h = torch.einsum("bhij,bhjde->bhide", summed.to(h.dtype), h)
    big_z = torch.einsum("bhij,bhjd->bhid", summed.to(z.dtype), z)
    # O^l_i = phi(Q_i) H_i / (phi(Q_i) Z_i), and 0 where nothing is summed or the denominator is 0
    blocks = []
    for i, phi_q_i in enumerate(torch.split(phi_q, bq, dim=2)):
        numerator = phi_q_i @ big_h[:, :, i]
        denominator = phi_q_i @ big_z[:, :, i, :, None]
        zero = denominator == 0
        blocks.append((numerator / denominator.masked_fill(zero, 1)).masked_fill(zero, 0))
    return torch.cat(blocks, dim=2)


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    block_map: Tensor,
    scale: float,
    bq: int,
    bk: int,
    causal: bool,
) -> Tensor:
    """O (B, H, Lq, D): one softmax over the keys of critical blocks and a virtual key for each marginal block.

    The sum over a marginal block of exp(scale q.k) v, around its mean key to first order in the values and to second
    order in the weight, is exp(l) (vbar_j + scale C_j^T q) with l = scale q.kbar_j + ln n_j + w_ij: a key kbar_j with
    the value in brackets. C_j is replaced by its mean S_i over the blocks of a row under the softmax of the mean
    query's logits. shift (H) is added to all l of a head. (Piecewise Sparse Attention, arXiv 2602.01077, whose one
    matrix of all blocks this S_i replaces.)
    """
    keys = KeyBlocks.of(k, v, bias.exp(), bk)
    assert keys.value is not None
    assert keys.slope is not None
    critical = (block_map == 1).repeat_interleave(bq, dim=2).repeat_interleave(bk, dim=3)
    allowed = critical[:, :, : q.shape[2], : k.shape[2]] & (bias > -math.inf)[:, None, None, :]
    if causal:
        allowed = allowed.tril()
    exact = q @ k.mT * scale + bias.masked_fill(bias == -math.inf, 0)[:, None, None, :].to(q.dtype)
    exact = exact.masked_fill(~allowed, -math.inf)

    log_weight = keys.log_weight(block_means(q**2, bq), scale)
    if shift is not None:
        log_weight = log_weight + shift.to(q.dtype)[:, None, None]
    log_weight = log_weight.masked_fill(block_map != 0, -math.inf)
    virtual = q @ keys.mean.mT * scale + log_weight.repeat_interleave(bq, dim=2)[:, :, : q.shape[2]]
    logits = torch.cat([exact, virtual], dim=-1)
    empty = (logits == -math.inf).all(dim=-1, keepdim=True)
    p = logits.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
    p_exact, p_virtual = torch.split(p, [k.shape[2], keys.mean.shape[2]], dim=-1)

    row_logits = block_means(q, bq) @ keys.mean.mT * scale + log_weight
    none = (row_logits == -math.inf).all(dim=-1, keepdim=True)
    mixture = row_logits.masked_fill(none, 0).softmax(dim=-1).masked_fill(none, 0)
    slope = torch.einsum("bhij,bhjde->bhide", mixture, keys.slope)
    first_order = [part @ slope[:, :, i] for i, part in enumerate(torch.split(q, bq, dim=2))]
    share = p_virtual.sum(dim=-1, keepdim=True)
    return p_exact @ v + p_virtual @ keys.value + share * scale * torch.cat(first_order, dim=2)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    sparsity: Tensor | None = None,
    shift: Tensor | None = None,
    scale: float | None = None,
    topk: float = 0.05,
    bottomk: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    feature_map: str = "softmax",
    linear: str = "marginal",
    causal: bool = False,
    always_critical: list[int] | None = None,
    block_map: Tensor | None = None,
) -> Tensor:
    """O (B, H, Lq, D) = O^s + O^l weight^T + bias from q (B, H, Lq, D), k, v (B, Hk, Lk, D) (paper, section 4).

    weight is (D, D) or (H, D, D), bias (D) or (H, D); without weight there is no linear branch. ``linear`` is
    "marginal" (the paper), "all" (the authors' released code: every key block, with ``causal`` every one below
    the diagonal) or "none"; or "taylor", `taylor_attention` with ``shift`` (H), without gate. ``key_mask`` (B or 1, Lk)
    is `key_bias`'s; the other options are those of `classify`, whose place a given ``block_map`` takes. Without
    ``bottomk`` it is 0 with "taylor", else 0.1, or 1 - topk where that is less, in decimals.
    """
    if bottomk is None:
        left = float(1 - Fraction(repr(float(topk))))
        bottomk = 0.0 if linear == "taylor" else min(0.1, left)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if block_map is None:
        block_map = classify(
            q,
            k,
            scale=scale,
            topk=topk,
            bottomk=bottomk,
            block_q=block_q,
            block_k=block_k,
            key_mask=key_mask,
            sparsity=sparsity,
            causal=causal,
            always_critical=always_critical,
            by_mass=linear == "taylor",
        )
    log_weights = key_bias(key_mask, k)
    if linear == "taylor":
        assert weight is None
        assert bias is None
        return taylor_attention(q, k, v, log_weights, shift, block_map, scale, block_q, block_k, causal)
    out = sparse_branch(q, k, v, log_weights, block_map, scale, block_q, block_k, causal)
    if linear not in ("marginal", "all", "none"):
        raise ValueError(f"linear={linear!r}: accepted are 'marginal', 'all', 'none', 'taylor'")
    if weight is not None and linear != "none":
        summed = block_map == 0
        if linear == "all":
            last_key = torch.arange(1, block_map.shape[3] + 1, device=q.device) * block_k - 1
            first_query = torch.arange(block_map.shape[2], device=q.device)[:, None] * block_q
            summed = torch.ones_like(summed) & ((last_key < first_query) if causal else True)
        out_linear = linear_branch(q, k, v, log_weights, summed, feature_map, block_q, block_k)
        out = out + out_linear @ weight.to(out.dtype).mT
    if bias is not None:
        out = out + bias.to(out.dtype).reshape(-1, 1, bias.shape[-1])
    return out
