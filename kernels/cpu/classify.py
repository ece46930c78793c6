"""The block map on the CPU: how many blocks a row may choose, from which, and the ranking.

Axes as in `attention`: G heads of one batch row, Tm and Tn query and key blocks. A key mask is a bias b of the
logits with weights w = exp(b), in blocks (Tn, block_k), -inf and 0 at masked tokens and at those that the
last block lacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_compile.common.blocks import forced_blocks, num_blocks, shares_of
from sla_compile.common.limits import MASKED_BELOW
from sla_compile.common.options import AttentionOptions

__all__ = ["Choice", "blocks_of", "classify", "key_bias", "pool", "pool_weighted", "wholly_below"]


@dataclass(frozen=True)
class Choice:
    """What every row of one batch row's heads chooses from; ``rows`` is 1 where all rows choose alike.

    forced and candidates (rows, Tn) bool: blocks critical without ranking, and blocks that are ranked, or None
    where nothing is forced and all are ranked alike; critical and negligible (rows, 1), or (G, rows, 1) where heads
    have shares of their own: how many of the candidates.
    """

    forced: Tensor | None
    candidates: Tensor | None
    critical: Tensor
    negligible: Tensor

    @classmethod
    def of(
        cls, queries: int, keys: int, live: Tensor | None, sparsity: Tensor | None, options: AttentionOptions
    ) -> Choice:
        """From token counts, the live key blocks (Tn) bool or None for all, and topk and bottomk in millionths, (2) or
        (G, 2), where ``sparsity`` takes their place in the options."""
        block_q, block_k, causal = options.block_q, options.block_k, options.causal
        columns = num_blocks(keys, block_k)
        least = 0 if causal else 1
        by_head = sparsity is not None and sparsity.dim() == 2
        if live is None and not causal and not options.always_critical and not by_head:
            whole = None if sparsity is None else sparsity.tolist()
            shares = shares_of(columns, options.topk, options.bottomk, whole, least)
            alike = torch.tensor(shares).view(2, 1, 1)
            return cls(None, None, alike[0], alike[1])
        live = torch.ones(columns, dtype=torch.bool) if live is None else live
        scope, crossed = torch.ones(1, columns, dtype=torch.bool), torch.zeros(1, columns, dtype=torch.bool)
        if causal:
            scope = wholly_below(num_blocks(queries, block_q), columns, block_q, block_k)
            last_query = (torch.arange(1, scope.shape[0] + 1).unsqueeze(1) * block_q).clamp(max=queries) - 1
            crossed = ~scope & (torch.arange(columns) * block_k <= last_query)
        always = torch.zeros(columns, dtype=torch.bool)
        for first, last in forced_blocks(options.always_critical, keys, block_k):
            always[first:last] = True
        sizes = scope.sum(dim=1).tolist()
        heads = [None] if sparsity is None else sparsity.view(-1, 2).tolist()
        counts = [[shares_of(n, options.topk, options.bottomk, head, least) for n in sizes] for head in heads]
        critical, negligible = torch.tensor(counts if by_head else counts[0]).unsqueeze(-2).unbind(-1)
        # dead blocks rank last, so they use up the negligible first
        dead = (scope & ~live).sum(dim=1, keepdim=True)
        return cls(
            (crossed | scope & always) & live, scope & ~always & live, critical, (negligible - dead).clamp(min=0)
        )


def classify(scores: Tensor, choice: Choice) -> Tensor:
    """The block map (G, Tm, Tn) int8 of scores (G, Tm, Tn): ties go to the lower key block."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    if choice.candidates is None or choice.forced is None:
        critical, negligible = int(choice.critical), int(choice.negligible)
        block_map = torch.zeros_like(scores, dtype=torch.int8)
        block_map.scatter_(-1, order[..., order.shape[-1] - min(negligible, order.shape[-1] - critical) :], -1)
        return block_map.scatter_(-1, order[..., :critical], 1)
    candidates = choice.candidates.expand_as(scores)
    # a block's place among the candidates alone
    place = torch.empty_like(order).scatter_(-1, order, candidates.gather(-1, order).cumsum(dim=-1) - 1)
    kept = choice.candidates.sum(dim=-1, keepdim=True) - choice.negligible
    block_map = (candidates & (place < kept)).to(torch.int8) - 1
    return block_map.masked_fill_(choice.forced | (candidates & (place < choice.critical)), 1)


def wholly_below(rows: int, columns: int, block_q: int, block_k: int) -> Tensor:
    """(Tm, Tn) bool: key blocks whose every token stands before the row's first query."""
    first_query = torch.arange(rows).unsqueeze(1) * block_q
    return torch.arange(1, columns + 1) * block_k <= first_query


def key_bias(key_mask: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """A mask (Lk), bool or additive, as a bias (Tn, block) of the logits, at most 0, -inf at masked tokens.

    Attention does not change when the bias shifts, so its maximum is taken off; what then is below -64, a
    weight of 1e-28, is masked.
    """
    if key_mask.dtype == torch.bool:
        bias = torch.zeros(key_mask.shape, dtype=dtype).masked_fill_(~key_mask, -math.inf)
    else:
        bias = key_mask.detach().to(dtype)
        bias = bias - bias.max().clamp(min=torch.finfo(dtype).min)
        bias.masked_fill_(bias < MASKED_BELOW, -math.inf)
    return F.pad(bias, (0, -bias.shape[0] % block), value=-math.inf).view(-1, block)


def blocks_of(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """x (G, T, D) as (G, ceil(T / block), block, D) in ``dtype``, zeros after the last token."""
    missing = -x.shape[1] % block
    x = x.to(dtype)
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.reshape(x.shape[0], -1, block, x.shape[2])


def pool(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Block means (G, blocks, D) of x (G, T, D); the last block over its true length."""
    full = x.shape[1] // block
    means = blocks_of(x[:, : full * block], block, x.dtype).mean(dim=2, dtype=dtype)
    if x.shape[1] % block == 0:
        return means
    return torch.cat([means, x[:, full * block :].mean(dim=1, keepdim=True, dtype=dtype)], dim=1)


def pool_weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Block means (G, Tn, D) of x (G, T, D) under weights (Tn, block), in their dtype; 0 where all are 0."""
    sums = (weights.unsqueeze(1) @ blocks_of(x, weights.shape[1], weights.dtype)).squeeze(2)
    total = weights.sum(dim=1, keepdim=True)
    return sums / total.masked_fill(total == 0, 1)
