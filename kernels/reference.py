"""The definition of Sparse-Linear Attention (arXiv 2509.24006), dense and in plain PyTorch.

For tests alone: it costs a full attention map, differentiates by autograd and is right in float64. It shares
no helper with any kernel. Axes: B batch, H heads, N tokens, D head dimension, Tm = ceil(N / block_q) query
blocks, Tn = ceil(N / block_k) key blocks. ``block_map`` holds M: +1 critical, 0 marginal, -1 negligible.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["classify", "sparse_linear_attention"]


def classify(
    q: Tensor, k: Tensor, *, scale: float, topk: float, bottomk: float, block_q: int, block_k: int
) -> Tensor:
    """M (B, H, Tm, Tn) int8 from q, k (B, H, N, D); no gradient (paper, section 4).

    Each row is ranked by descending score, ties by the lower key block first. The first
    ``max(1, floor(topk * Tn))`` are critical, the last ``floor(bottomk * Tn)`` negligible, the rest marginal.
    """
    with torch.no_grad():
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        pooled_q = torch.stack(
            [block.mean(dim=2) for block in torch.split(q.to(work), block_q, dim=2)], dim=2
        )
        pooled_k = torch.stack(
            [block.mean(dim=2) for block in torch.split(k.to(work), block_k, dim=2)], dim=2
        )
        scores = pooled_q @ pooled_k.mT * scale
        key_blocks = scores.shape[-1]
        critical = max(1, math.floor(Fraction(repr(float(topk))) * key_blocks))
        negligible = min(math.floor(Fraction(repr(float(bottomk))) * key_blocks), key_blocks - critical)
        rank = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
        block_map = torch.zeros_like(rank, dtype=torch.int8)
        block_map[rank < critical] = 1
        block_map[rank >= key_blocks - negligible] = -1
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
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, scale: float, bq: int, bk: int
) -> Tensor:
    """O^s (B, H, N, D): softmax attention of each query over the keys of its critical blocks."""
    tokens = q.shape[2]
    critical = (
        (block_map == 1).repeat_interleave(bq, dim=2).repeat_interleave(bk, dim=3)[:, :, :tokens, :tokens]
    )
    logits = (q @ k.mT * scale).masked_fill(~critical, -math.inf)
    return logits.softmax(dim=-1) @ v


def linear_branch(
    q: Tensor, k: Tensor, v: Tensor, summed: Tensor, feature_map: str, bq: int, bk: int
) -> Tensor:
    """O^l (B, H, N, D): linear attention over the key blocks where summed (B, H, Tm, Tn) is true."""
    phi_q, phi_k = feature(q, feature_map), feature(k, feature_map)
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
    scale: float | None = None,
    topk: float = 0.05,
    bottomk: float = 0.10,
    block_q: int = 64,
    block_k: int = 64,
    feature_map: str = "softmax",
    linear: str = "marginal",
    block_map: Tensor | None = None,
) -> Tensor:
    """O (B, H, N, D) = O^s + O^l weight^T + bias from q, k, v (B, H, N, D) (paper, section 4).

    weight is (D, D) or (H, D, D), bias (D) or (H, D); without weight there is no linear branch. ``linear`` is
    "marginal" (the paper), "all" (the authors' released code: every key block) or "none". A given
    ``block_map`` takes the place of `classify`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if block_map is None:
        block_map = classify(q, k, scale=scale, topk=topk, bottomk=bottomk, block_q=block_q, block_k=block_k)
    out = sparse_branch(q, k, v, block_map, scale, block_q, block_k)
    if linear not in ("marginal", "all", "none"):
        raise ValueError(f"linear={linear!r}: accepted are 'marginal', 'all', 'none'")
    if weight is not None and linear != "none":
        summed = block_map == 0 if linear == "marginal" else torch.ones_like(block_map, dtype=torch.bool)
        out_linear = linear_branch(q, k, v, summed, feature_map, block_q, block_k)
        out = out + out_linear @ weight.to(out.dtype).mT
    if bias is not None:
        out = out + bias.to(out.dtype).reshape(-1, 1, bias.shape[-1])
    return out
