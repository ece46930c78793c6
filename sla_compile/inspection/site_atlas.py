"""One attention in an `atlas`: what is summed while the model runs, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sla_compile.fitting.observer import GatedCall
from sla_compile.fitting.regression import TOKENS_PER_CHUNK
from sla_compile.fitting.sensitivity import SiteSensitivity
from sla_compile.fitting.statistics import Statistics, statistics_of
from sla_compile.gate import Gate
from sla_compile.inspection.attention_map import HeadMap, HeadSums, measure_call
from sla_compile.inspection.trial import best_gate

__all__ = ["BatchAtlas", "BranchErrors", "HeadAtlas", "SiteAtlas", "SiteSums"]


@dataclass(frozen=True)
class BranchErrors:
    """||x - dense|| / ||dense||, of outputs of one head or of all, for these x."""

    sparse: float | None
    """O^s, attention over the critical blocks; None with ``linear="taylor"``, whose one softmax has no branches."""
    linear: float | None
    """O^l, linear attention over the marginal blocks, before the gate; None without that branch."""
    sum: float
    """The output with the gate as it is: with an untrained one, O^s."""


@dataclass(frozen=True)
class HeadAtlas:
    """One head of one attention, over all calls and the whole batch. Shares are of 1."""

    blocks: dict[str, float]
    """Share of blocks that is ``critical``, ``marginal``, ``negligible``."""
    mass: dict[str, float]
    """Share of the true attention in each of these."""
    best_mass: float
    """What as many critical blocks of each row would hold if they were chosen by the true attention."""
    recall: float
    """Share of the critical blocks that are among those, mean over rows of blocks."""
    above_mean: float
    """Share of weights above 1 / n, n the keys that a query attends to."""
    tiny: float
    """Share of weights below 1 / (100 n)."""
    rest_rank: float
    """Stable rank, ||R||_F^2 / ||R||_2^2, of the map without its critical blocks; from a sketch, so a little above."""
    errors: BranchErrors
    map: HeadMap
    """Of the first item of the first call."""


@dataclass(frozen=True)
class BatchAtlas:
    """One attention in one batch."""

    batch: int
    time: float | None
    """Mean of the denoising time that the batch names; None where it names none."""
    critical_mass: float
    """Share of the true attention in critical blocks, all heads."""
    error: float
    """||O - dense|| / ||dense|| with the gate as it is."""


@dataclass(frozen=True)
class SiteAtlas:
    """One attention of the model; prints as a page."""

    path: str
    """Module path of the gate."""
    calls: int
    shape: tuple[int, int, int, int, int]
    """B, H, N, L, D of the first call."""
    block_shape: tuple[int, int]
    """block_q, block_k."""
    heads: tuple[HeadAtlas, ...]
    errors: BranchErrors
    fitted: float
    """The error with a gate fitted to these batches by least squares: what ``calibrate`` comes to at best."""
    curve: tuple[tuple[float, float], ...]
    """topk and the error with it and the gate as it is; ascending."""
    batches: tuple[BatchAtlas, ...]
    topk: float
    suggested: float | None = None
    """The topk that ``allocate`` would give it, at the same cost in all; None where that was not asked for."""

    def mean(self, name: str, kind: str | None = None) -> float:
        """Mean over the heads of a field of `HeadAtlas`, of its entry ``kind`` where it is a mapping."""
        found = [getattr(head, name) for head in self.heads]
        values: list[float] = found if kind is None else [value[kind] for value in found]
        return sum(values) / len(values)

    def __rich__(self) -> Any:
        from sla_compile.inspection.terminal import SiteView

        return SiteView(self)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import plain_text

        return plain_text(self.__rich__(), width=100)


@dataclass
class SiteSums:
    """What is summed at one attention while the model runs."""

    gate: Gate
    shape: tuple[int, int, int, int, int]
    """B, H, N, L, D."""
    sums: list[HeadSums]
    statistics: Statistics
    calls: int = 0
    maps: list[HeadMap] = field(default_factory=list)
    squares: dict[str, Tensor] = field(default_factory=dict)
    """float64 (H): of each branch's difference from the dense output, and of that."""
    batches: dict[int, list[float]] = field(default_factory=dict)
    """By batch: mass in critical blocks, mass in all, squared error, squared dense output."""

    @classmethod
    def of(cls, call: GatedCall) -> SiteSums:
        """Nothing added yet; ``call`` is the first."""
        batch, heads, queries, dim = call.query.shape
        shape = (batch, heads, queries, call.key.shape[2], dim)
        sums = [HeadSums() for _ in range(heads)]
        return cls(call.gate, shape, sums, statistics_of(call.gate, call.dense.device))

    def add(self, call: GatedCall, batch: int) -> None:
        """Measure ``call``, of the batch with this number."""
        sums, maps = measure_call(call, with_maps=not self.maps)
        self.maps = self.maps or maps
        for mine, found in zip(self.sums, sums, strict=True):
            mine.add(found)
        self.statistics.add(call)
        outputs = {"sum": call.output_with_gate(*call.gate.parameters())}
        if call.gate.shift is None:
            sparse, linear = call.branches()
            outputs |= {"sparse": sparse} if linear is None else {"sparse": sparse, "linear": linear}
        squares = {name: _squares(x, call.dense) for name, x in outputs.items()}
        squares["dense"] = _squares(torch.zeros_like(call.dense), call.dense)
        for name, value in squares.items():
            self.squares[name] = self.squares.get(name, 0) + value
        mass = [found.mass for found in sums]
        here = [sum(m["critical"] for m in mass), sum(sum(m.values()) for m in mass)]
        here += [squares["sum"].sum().item(), squares["dense"].sum().item()]
        self.batches[batch] = [a + b for a, b in zip(self.batches.get(batch, [0.0] * 4), here, strict=True)]
        self.calls += 1

    def atlas(
        self, path: str, sensitivity: SiteSensitivity, suggested: float | None, times: Sequence[float | None]
    ) -> SiteAtlas:
        """What was found; ``times`` are those of the batches."""
        losses = zip(sensitivity.rungs, sensitivity.relative_losses(), strict=True)
        batches = (
            BatchAtlas(number, times[number], _over(mass, total), math.sqrt(_over(error, dense)))
            for number, (mass, total, error, dense) in self.batches.items()
        )
        return SiteAtlas(
            path=path,
            calls=self.calls,
            shape=self.shape,
            block_shape=(self.gate.config.block_q, self.gate.config.block_k),
            heads=tuple(self._head(i) for i in range(len(self.sums))),
            errors=self._errors(slice(None)),
            fitted=self.statistics.error(*best_gate(self.statistics)),
            curve=tuple((topk, math.sqrt(loss)) for topk, loss in losses),
            batches=tuple(batches),
            topk=sensitivity.topk_before,
            suggested=suggested,
        )

    def _head(self, head: int) -> HeadAtlas:
        sums, blocks = self.sums[head], sum(self.sums[head].blocks.values())
        return HeadAtlas(
            blocks={name: _over(count, blocks) for name, count in sums.blocks.items()},
            mass={name: _over(mass, sums.rows) for name, mass in sums.mass.items()},
            best_mass=_over(sums.best, sums.rows),
            recall=_over(sums.recalled, sums.block_rows),
            above_mean=_over(sums.above_mean, sums.weights),
            tiny=_over(sums.tiny, sums.weights),
            rest_rank=_over(sums.rest_rank, sums.rows),
            errors=self._errors(slice(head, head + 1)),
            map=self.maps[head],
        )

    def _errors(self, heads: slice) -> BranchErrors:
        dense = self.squares["dense"][heads].sum().item()
        found = {name: math.sqrt(_over(square[heads].sum().item(), dense)) for name, square in self.squares.items()}
        return BranchErrors(found.get("sparse"), found.get("linear"), found["sum"])


def _over(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _squares(x: Tensor, dense: Tensor) -> Tensor:
    """||x - dense||^2 of each head, float64 (H), of tensors (B, H, N, D), summed a chunk at a time."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[2], TOKENS_PER_CHUNK):
        rows = slice(start, start + TOKENS_PER_CHUNK)
        total += (x[:, :, rows].double() - dense[:, :, rows].double()).square().sum((0, 2, 3))
    return total
