"""How the CPU path goes through an attention: groups of heads, chunks of query blocks, and gathered critical blocks.

Axes as in `attention`: G heads of a group and Gk of their keys, Tm and Tn query and key blocks, C query blocks of a
chunk, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .classify import blocks_of, key_bias

__all__ = [
    "Keys",
    "Lists",
    "accumulate",
    "add_onto_keys",
    "bias_of",
    "chunks",
    "gather",
    "groups",
    "key_side",
    "listed_scores",
    "log_sum",
    "of_heads",
    "of_key_heads",
    "scatter_add",
    "score_chunks",
    "softmax",
    "token_major",
    "work_dtype",
]

_ELEMENTS_PER_CHUNK = 1 << 19
"""Most elements of the largest buffer of a chunk of query blocks, so that it stays in cache."""
_ROWS_PER_GROUP = 128
"""Most query blocks of a group of several heads."""


def token_major(q: Tensor) -> Tensor:
    """An empty (B, H, N, D) whose memory is (B, N, H, D)."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


Group = tuple[int, slice]
"""An index (batch, heads)."""


def groups(q: Tensor, k: Tensor, query_blocks: int) -> Iterator[tuple[Group, Group]]:
    """Groups of heads of q (B, H, Lq, D), and those of k (B, Hk, Lk, D) that they have: one key head of a long
    sequence, several of a short one."""
    batch, heads = k.shape[:2]
    each = q.shape[1] // max(1, heads)
    size = max(1, _ROWS_PER_GROUP // (query_blocks * max(1, each)))
    for b in range(batch):
        for first in range(0, heads, size):
            last = min(first + size, heads)
            yield (b, slice(first * each, last * each)), (b, slice(first, last))


def of_key_heads(rows: Tensor, keys: Tensor, out: Tensor | None = None) -> Tensor:
    """rows (G, C, ..., n) times what each key head has, keys (Gk, n, m): (G, C, ..., m).

    ``out`` may be a slice of a larger tensor along its last axis.
    """
    flat = rows.reshape(keys.shape[0], -1, rows.shape[-1])
    if out is None:
        return torch.bmm(flat, keys).view(*rows.shape[:-1], keys.shape[-1])
    torch.bmm(flat, keys, out=out.view(keys.shape[0], -1, keys.shape[-1]))
    return out


def add_onto_keys(total: Tensor, rows: Tensor, others: Tensor, factor: float = 1) -> None:
    """Add to total (Gk, n, m) rows (G, C, ..., n), transposed, times others (G, C, ..., m) and a factor."""
    left, right = (x.reshape(total.shape[0], -1, x.shape[-1]) for x in (rows, others))
    # not baddbmm_, whose FLOPs torch does not count
    torch.baddbmm(total, left.mT, right, alpha=factor, out=total)


def chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    """Slices of rows whose largest buffer, of elements_per_row each, stays in cache."""
    size = max(1, _ELEMENTS_PER_CHUNK // elements_per_row)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def bias_of(key_mask: Tensor | None, batch: int, block: int, dtype: torch.dtype) -> Tensor | None:
    """The mask of one batch row as a bias (Tn, block) of the scores."""
    return None if key_mask is None else key_bias(key_mask[batch if key_mask.shape[0] > 1 else 0], block, dtype)


@dataclass
class Lists:
    """Critical key blocks (G, C, width) of query blocks ``first`` to first + C, as rows of Gk * Tn key blocks.

    Ascending; where rows have unequal numbers, other blocks follow, and ``absent`` is true there.
    """

    blocks: Tensor
    absent: Tensor | None
    first: int

    @classmethod
    def of(cls, block_map: Tensor, key_heads: int, equal: bool | None = None) -> Lists:
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
        head = torch.arange(group, device=lists.device) // (group // key_heads)
        return cls(lists + head.view(-1, 1, 1) * key_blocks, absent, 0)

    def may_be_empty(self, keys: Keys) -> bool:
        """Whether a query may have no key."""
        return keys.bias is not None or self.absent is not None or keys.causal

    def rows(self, rows: slice) -> Lists:
        """Those of some query blocks, as wide as the longest."""
        blocks, absent, first = self.blocks[:, rows], self.absent, self.first + rows.start
        if absent is not None:
            absent = absent[:, rows]
            width = max(1, int((~absent).sum(dim=2).max()))
            blocks, absent = blocks[..., :width], absent[..., :width]
        return Lists(blocks, absent, first)


@dataclass
class Keys:
    """k, v (Gk, Tn, block_k, D); tokens missing in the last block.

    bias (Tn, block_k): of the scores, -inf at masked and missing tokens; None where only the last block's missing
    tokens are to be masked. weights (Tn, block_k, 1): exp(bias).
    """

    k: Tensor
    v: Tensor
    missing: int
    bias: Tensor | None
    weights: Tensor | None
    causal: bool


def key_side(k: Tensor, v: Tensor, block: int, dtype: torch.dtype, bias: Tensor | None, causal: bool) -> Keys:
    """Blocks of k, v (Gk, T, D) in ``dtype``."""
    weights = None if bias is None else bias.exp().unsqueeze(-1)
    # every block is gathered many times: one copy of these heads costs less than strided reads
    dense_k, dense_v = (blocks_of(x, block, dtype).contiguous() for x in (k, v))
    return Keys(dense_k, dense_v, -k.shape[1] % block, bias, weights, causal)


def gather(blocks: Tensor, lists: Tensor) -> Tensor:
    """blocks (Gk, Tn, block_k, D) at lists (G, C, width): (G * C, width * block_k, D)."""
    rows = blocks.flatten(0, 1).index_select(0, lists.flatten())
    return rows.view(-1, lists.shape[-1] * blocks.shape[2], blocks.shape[3])


def score_chunks(queries: Tensor, keys: Keys, lists: Lists) -> Iterator[slice]:
    """Slices of C whose scores, of queries (G, C, block_q, D) at their lists, stay in cache."""
    group, rows, width = lists.blocks.shape
    return chunks(rows, group * width * queries.shape[2] * keys.k.shape[2])


def listed_scores(scaled: Tensor, gathered: Tensor, keys: Keys, lists: Lists, out: Tensor | None = None) -> Tensor:
    """Scores (G * C, block_q, width * block_k) of scaled queries (G * C, block_q, D), -inf at absent tokens.

    ``out`` may be a slice of a larger tensor.
    """
    scores = torch.bmm(scaled, gathered.mT, out=out)
    if lists.may_be_empty(keys):
        _mask_scores(scores, keys, lists)
    elif keys.missing:
        key_blocks = keys.k.shape[1]
        # lists ascend, so the short block can only be the last of its row
        short = (lists.blocks[..., -1] % key_blocks == key_blocks - 1).view(-1, 1, 1)
        scores[..., -keys.missing :].masked_fill_(short, float("-inf"))
    return scores


def log_sum(scores: Tensor, p: Tensor) -> Tensor:
    """log sum exp over the last axis of scores, whose softmax is p; -inf for a query without a key."""
    largest = scores.amax(dim=-1)
    # the largest probability is 1 / sum(exp(score - max))
    return torch.where(largest > float("-inf"), largest - p.amax(dim=-1).log_(), largest)


def softmax(scores: Tensor) -> Tensor:
    """Over the last axis; 0 for a query without a key, where it would be 0 / 0."""
    empty = scores.amax(dim=-1, keepdim=True) == float("-inf")
    return scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill_(empty, 0)


def _mask_scores(scores: Tensor, keys: Keys, lists: Lists) -> None:
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


def scatter_add(total: Tensor, lists: Tensor, gathered: Tensor) -> None:
    """Add gathered (G * C, width * block_k, D) to total (Gk, Tn, block_k, D), in the order of the lists."""
    rows = total.view(total.shape[0] * total.shape[1], -1)
    rows.index_add_(0, lists.flatten(), gathered.view(-1, rows.shape[1]))


def of_heads(tensor: Tensor | None, shared_dims: int, group: Group) -> Any:
    """The part of a group's heads (G, ...) of ``tensor``: itself where the heads share it, and so without that axis."""
    return tensor if tensor is None or tensor.dim() == shared_dims else tensor[group[1]]


def accumulate(total: Tensor, per_head: Tensor, shared_dims: int, group: Group) -> None:
    """Add the part of a group's heads (G, ...) to ``total``, which has ``shared_dims`` axes where heads share it."""
    if total.dim() == shared_dims:
        total += per_head.sum(dim=0)
    else:
        total[group[1]] += per_head
