"""What the true attention map of one call looks like, head by head, in chunks of query rows: never all of it.

Axes: B batch, H heads, N queries, L keys, D head dimension, Tm and Tn query and key blocks, R rows of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_compile.common.blocks import num_blocks
from sla_compile.common.limits import MASKED_BELOW
from sla_compile.fitting.observer import GatedCall
from sla_compile.ops.reorder import reorder

__all__ = ["CELLS", "HeadMap", "HeadSums", "measure_call"]

CELLS = 32
"""Most rows and columns of a map that is kept; larger ones are averaged."""
CLASSES = {"critical": 1, "marginal": 0, "negligible": -1}

_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Most elements of a chunk of rows (16 MiB and 256 MiB in float32); a few tensors of that size live at once."""
_SKETCH = 16


@dataclass
class HeadSums:
    """Sums over the calls of one head; on the host."""

    rows: float = 0.0
    """Queries that have a key."""
    block_rows: float = 0.0
    """Rows of the block map with a critical block."""
    mass: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    """Attention of those rows that lies in each class of blocks; together ``rows``."""
    blocks: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    best: float = 0.0
    """Attention that as many blocks of each row, chosen by it, would hold."""
    recalled: float = 0.0
    """Sum over block rows of the share of critical blocks that are among those."""
    weights: float = 0.0
    """Pairs of query and key that attend."""
    above_mean: float = 0.0
    """Those of weight above 1 / n, n the keys that the query attends to."""
    tiny: float = 0.0
    """Those of weight below 1 / (100 n)."""
    rest_rank: float = 0.0
    """Stable rank ||R||_F^2 / ||R||_2^2 of what is not critical, weighed by ``rows``."""

    def add(self, other: HeadSums) -> None:
        """Add the sums of another call."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, dict):
                for key in value:
                    mine[key] += value[key]
            else:
                setattr(self, name, mine + value)


@dataclass(frozen=True)
class HeadMap:
    """The block map of one head, in at most `CELLS` x `CELLS` cells, as rows of columns."""

    mass: list[list[float]]
    """Attention of a block over that of an even spread: 1 is the mean of the map."""
    critical: list[list[float]]
    """Share of the cell's blocks that is critical."""
    negligible: list[list[float]]


@torch.no_grad()
def measure_call(call: GatedCall, with_maps: bool) -> tuple[list[HeadSums], list[HeadMap]]:
    """The sums of each head over the batch; and, if asked for, the maps of the heads of the first item."""
    block_map = torch.ops.sla.forward.default(call.query, call.key, call.value, None, None, **call.options())[3]
    allowed = _AllowedKeys.of(call)
    sums, maps = [HeadSums() for _ in range(call.query.shape[1])], []
    for item in range(call.query.shape[0]):
        for head, total in enumerate(sums):
            mass, found = _measure_head(call, item, head, block_map[item, head], allowed)
            total.add(found)
            if with_maps and item == 0:
                maps.append(_coarse(mass, block_map[item, head]))
    return sums, maps


@dataclass(frozen=True)
class _AllowedKeys:
    """Which keys a query attends to, and what is added to its logits."""

    bias: Tensor | None
    """(B or 1, L), -inf at masked keys."""
    masked_queries: Tensor | None
    """bool (B, N), in the order of the queries."""
    causal: bool

    @classmethod
    def of(cls, call: GatedCall) -> _AllowedKeys:
        bias = masked = None
        if (mask := call.key_mask) is not None:
            if mask.dtype == torch.bool:
                bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf)
            else:
                bias = mask.float() - mask.float().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
                bias = bias.masked_fill(bias < MASKED_BELOW, -math.inf)
        if call.masked_queries is not None:
            batch, _, queries, _ = call.query.shape
            column = call.masked_queries.expand(batch, 1, queries, 1).float()
            placement = call.decision.order.queries
            masked = (column if placement is None else reorder(column, placement))[:, 0, :, 0] > 0.5
        return cls(bias, masked, bool(call.options().get("causal", False)))

    def weights(self, call: GatedCall, item: int, head: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Attention weights (R, L), 0 where a query does not attend; and how many keys each query attends to, (R)."""
        work = torch.float64 if call.query.dtype == torch.float64 else torch.float32
        key = call.key[item, head // (call.query.shape[1] // call.key.shape[1])]
        logits = call.query[item, head, rows].to(work) @ key.to(work).mT * call.scale
        keys = logits.shape[1]
        if self.bias is not None:
            logits += self.bias[item % self.bias.shape[0]].to(work)
        if self.causal:
            first = torch.arange(rows.start, rows.start + logits.shape[0], device=logits.device)
            logits.masked_fill_(torch.arange(keys, device=logits.device) > first[:, None], -math.inf)
        if self.masked_queries is not None:
            logits.masked_fill_(self.masked_queries[item, rows, None], -math.inf)
        counts = (logits > -math.inf).sum(1)
        weights = logits.softmax(1)
        if self.bias is not None or self.masked_queries is not None:
            weights.masked_fill_((counts == 0)[:, None], 0.0)
        return weights, counts


def _measure_head(
    call: GatedCall, item: int, head: int, block_map: Tensor, allowed: _AllowedKeys
) -> tuple[Tensor, HeadSums]:
    """The attention of each block, (Tm, Tn) summed over its queries; and the sums."""
    block_q, block_k = call.gate.config.block_q, call.gate.config.block_k
    queries, keys = call.query.shape[2], call.key.shape[2]
    device = call.query.device
    most = max(1, _ELEMENTS.get(device.type, 1 << 22) // (keys * block_q)) * block_q
    sketch, masses = _Sketch(keys, device), []
    # rows, weights, above_mean, tiny: on the device till the end
    counted = torch.zeros(4, dtype=torch.float64, device=device)
    for start in range(0, queries, most):
        rows = slice(start, min(start + most, queries))
        weights, counts = allowed.weights(call, item, head, rows)
        share = 1.0 / counts.clamp(min=1)[:, None].to(weights.dtype)
        zeros = weights.numel() - counts.sum()  # pairs that do not attend are below any share
        counted += torch.stack(
            [
                (counts > 0).sum(),
                counts.sum(),
                (weights > share).sum(),
                (weights < share / 100).sum() - zeros,
            ]
        )
        masses.append(_block_sums(weights, block_q, block_k))
        classes = block_map[start // block_q : num_blocks(rows.stop, block_q)]
        rest = (classes != 1).repeat_interleave(block_q, 0)[: weights.shape[0]].repeat_interleave(block_k, 1)[:, :keys]
        sketch.add(weights.mul_(rest))
    mass = torch.cat(masses)
    live, pairs, above, tiny = counted.tolist()
    found = HeadSums(rows=live, weights=pairs, above_mean=above, tiny=tiny, rest_rank=live * sketch.stable_rank())
    _add_classes(found, mass, block_map)
    return mass, found


def _block_sums(weights: Tensor, block_q: int, block_k: int) -> Tensor:
    """Sums of ``weights`` (R, L) over blocks: (rows, Tn)."""
    rows, keys = weights.shape
    columns = F.pad(weights, (0, -keys % block_k)).view(rows, -1, block_k).sum(2)
    return F.pad(columns, (0, 0, 0, -rows % block_q)).view(-1, block_q, columns.shape[1]).sum(1)


def _add_classes(found: HeadSums, mass: Tensor, block_map: Tensor) -> None:
    """Into ``found``: mass and number of blocks by class, and how the choice compares with that by ``mass``."""
    for name, value in CLASSES.items():
        chosen = block_map == value
        found.mass[name], found.blocks[name] = mass[chosen].sum().item(), float(chosen.sum())
    critical = block_map == 1
    count = critical.sum(1, keepdim=True)
    order = mass.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mass.shape[1], device=mass.device).expand_as(order))
    best = rank < count
    found.best = mass[best].sum().item()
    found.block_rows = float((count > 0).sum())
    found.recalled = float(((best & critical).sum(1) / count[:, 0].clamp(min=1)).sum())


class _Sketch:
    """The stable rank of a matrix A (rows, L) that comes in chunks of rows, from A^T A times a few random columns.

    Nystroem's approximation of A^T A from them has its largest eigenvalue; it is at most the true one, so that the
    stable rank is overestimated, by little where a few directions stand out.
    """

    def __init__(self, keys: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        columns = torch.randn(keys, min(_SKETCH, keys), generator=generator, dtype=torch.float64)
        self.columns = torch.linalg.qr(columns).Q.float().to(device)
        self.applied = torch.zeros_like(self.columns)
        self.square = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows (R, L)."""
        rows = rows.float()
        self.applied += rows.mT @ (rows @ self.columns)
        self.square += rows.square().sum()

    def stable_rank(self) -> float:
        """||A||_F^2 / ||A||_2^2; 0 where A is 0."""
        if not float(self.square):
            return 0.0
        applied = self.applied.double()
        gram = self.columns.double().mT @ applied
        values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
        kept = values > values[-1] * 1e-6  # what is below is rounding
        half = applied @ (vectors[:, kept] / values[kept].sqrt())
        largest = torch.linalg.eigvalsh(half.mT @ half)[-1]
        return float(self.square / largest)


def _coarse(mass: Tensor, block_map: Tensor) -> HeadMap:
    """A `HeadMap` of mass and classes (Tm, Tn)."""
    shape = min(CELLS, mass.shape[0]), min(CELLS, mass.shape[1])

    def pooled(x: Tensor, digits: int) -> list[list[float]]:
        cells = F.adaptive_avg_pool2d(x.float()[None], shape)[0]
        return [[round(value, digits) for value in row] for row in cells.tolist()]

    mean = mass.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return HeadMap(pooled(mass / mean, 4), pooled(block_map == 1, 3), pooled(block_map == -1, 3))
