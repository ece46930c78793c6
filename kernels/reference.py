"""The definition of Sparse-Linear Attention (arXiv 2509.24006), dense and in plain PyTorch.

For tests alone: it costs a full attention map, differentiates by autograd and is right in float64. It shares
no helper with any kernel. Axes: B batch, H heads, Lq queries, Lk keys (N where they are as many), D head
dimension, Tm = ceil(Lq / block_q) query blocks, Tn = ceil(Lk / block_k) key blocks. ``block_map`` holds M: +1
critical, 0 marginal, -1 negligible. A mask gives key j the weight w_j = exp(b_j) in every branch.
"""

from __future__ import annotations

import math
from fractions import Fraction

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
) -> Tensor:
    """M (B, H, Tm, Tn) int8 from q (B, H, Lq, D) and k (B, H, Lk, D); no gradient (paper, section 4).

    Each row is ranked by descending score, ties by the lower key block first. The first
    ``max(1, floor(topk * Tn))`` are critical, the last ``floor(bottomk * Tn)`` negligible, the rest marginal;
    blocks with no key to attend to rank last and are negligible in any case. Blocks that touch a range
    [start, stop) of ``always_critical`` are critical beside the budget. With ``causal``, blocks above the
    diagonal are negligible, blocks on it critical, and the budgets are shares of the blocks below it, without
    the least of one. ``sparsity`` holds topk, at most the given one, and bottomk in millionths.
    """
    with torch.no_grad():
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        weights = key_bias(key_mask, k).exp()
        total = torch.stack([block.sum(dim=-1) for block in torch.split(weights, block_k, dim=-1)], dim=-1)
        live = (total > 0)[:, None, None, :]
        weighted = k.to(work) * weights[:, None, :, None]
        pooled_q = torch.stack([block.mean(dim=2) for block in torch.split(q.to(work), block_q, dim=2)], dim=2)
        summed_k = torch.stack([block.sum(dim=2) for block in torch.split(weighted, block_k, dim=2)], dim=2)
        scores = pooled_q @ (summed_k / total.masked_fill(total == 0, 1)[:, None, :, None]).mT * scale

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

        critical, negligible = (
            torch.tensor(counts, device=q.device)[:, None]
            for counts in budgets(below.sum(dim=1).tolist(), topk, bottomk, sparsity, 0 if causal else 1)
        )
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


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    sparsity: Tensor | None = None,
    scale: float | None = None,
    topk: float = 0.05,
    bottomk: float = 0.10,
    block_q: int = 64,
    block_k: int = 64,
    feature_map: str = "softmax",
    linear: str = "marginal",
    causal: bool = False,
    always_critical: list[int] | None = None,
    block_map: Tensor | None = None,
) -> Tensor:
    """O (B, H, Lq, D) = O^s + O^l weight^T + bias from q (B, H, Lq, D), k, v (B, H, Lk, D) (paper, section 4).

    weight is (D, D) or (H, D, D), bias (D) or (H, D); without weight there is no linear branch. ``linear`` is
    "marginal" (the paper), "all" (the authors' released code: every key block, with ``causal`` every one below
    the diagonal) or "none". ``key_mask`` (B or 1, Lk) is `key_bias`'s; the other options are those of
    `classify`, whose place a given ``block_map`` takes.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
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
        )
    log_weights = key_bias(key_mask, k)
    out = sparse_branch(q, k, v, log_weights, block_map, scale, block_q, block_k, causal)
    if linear not in ("marginal", "all", "none"):
        raise ValueError(f"linear={linear!r}: accepted are 'marginal', 'all', 'none'")
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
