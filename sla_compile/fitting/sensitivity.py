"""The measurements behind `allocate`: errors of each attention, and of the model's output, at several topks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sla_compile.common.blocks import MILLION, num_blocks, num_critical
from sla_compile.fitting.observer import Arguments, GatedCall, Topk, gated_calls
from sla_compile.fitting.output_error import OutputError
from sla_compile.fitting.ranks import sum_tensors, total
from sla_compile.fitting.regression import TOKENS_PER_CHUNK
from sla_compile.gate import Gate

__all__ = ["OutputErrors", "SiteSensitivity", "measure_sites"]


@dataclass
class SiteSensitivity:
    """The error of one attention at each of several topks, its rungs, summed over calls."""

    path: str
    """Module path of the gate."""
    topk_before: float
    """That of the gate; of heads with their own the mean."""
    bottomk: float
    rungs: tuple[float, ...]
    """The topks, ascending."""
    squared_errors: Tensor
    """float64 (rungs, H): ||O - dense||^2 of each head."""
    block_k: int
    dense_square: float = 0.0
    """||dense||^2."""
    work: float = 0.0
    """Pairs of query and key tokens, times B and H."""
    critical: list[float] = field(default_factory=list)
    """For each rung, how much of ``work`` lies in critical blocks."""
    calls: int = 0
    by_head: bool = False
    """Whether each head gets a topk."""
    topks_before: tuple[float, ...] | None = None
    """Of each head, where they have their own."""
    own_errors: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """float64 (H): ||O - dense||^2 of each head with ``topks_before``, where there are any."""
    effect: float | None = None
    """Relative squared error of the model's output per unit of this attention's; None: not measured."""

    @classmethod
    def of_gate(cls, path: str, gate: Gate, budget: float, ladder: Sequence[float]) -> SiteSensitivity:
        """Nothing measured yet. The rungs are ``ladder`` times ``budget``, the budget, and the one topk of the gate.

        Raises ValueError if ``budget`` is above the gate's ``max_topk`` or what its bottomk leaves.
        """
        topk, bottomk = gate.shares()
        most = min(1.0 if gate.config.max_topk is None else gate.config.max_topk, 1 - bottomk)
        if budget > most:
            raise ValueError(f"{path}: got budget={budget}; accepted: up to {most}, for its max_topk and bottomk")
        wanted = {round(rung * budget * MILLION) / MILLION for rung in ladder}
        topks = _topks_of_heads(gate)
        rungs = sorted({rung for rung in wanted if 0 < rung <= most} | {budget} | ({topk} if topks is None else set()))
        zeros = torch.zeros(len(rungs) + 1, gate.heads, dtype=torch.float64, device=gate.device)
        return cls(
            path=path,
            topk_before=topk,
            topks_before=topks,
            bottomk=bottomk,
            rungs=tuple(rungs),
            squared_errors=zeros[1:],
            own_errors=zeros[0],
            block_k=gate.config.block_k,
            critical=[0.0] * len(rungs),
            by_head=gate.config.topk_by == "head",
        )

    def add(self, call: GatedCall) -> None:
        """Measure ``call`` at every rung."""
        batch, heads, queries, _ = call.query.shape
        blocks = num_blocks(call.key.shape[2], self.block_k)
        work = float(batch * heads * queries * call.key.shape[2])
        for i, rung in enumerate(self.rungs):
            out = call.output_with_sparsity(rung, min(self.bottomk, 1 - rung))
            self.squared_errors[i] += _squared_distance(out, call.dense)
            self.critical[i] += work * num_critical(rung, blocks) / blocks
        if self.topks_before is not None:
            self.own_errors += _squared_distance(call.output_with_gate(*call.gate.parameters()), call.dense)
        self.dense_square += _squared_distance(call.dense, None).sum().item()
        self.work += work
        self.calls += 1

    def sum_over_ranks(self) -> None:
        """Make these the sums over the calls of all ranks that measure together."""
        sum_tensors([self.squared_errors, self.own_errors])
        self.dense_square, self.work, self.calls = total(self.dense_square), total(self.work), int(total(self.calls))
        self.critical = [total(work) for work in self.critical]

    def relative_losses(self, head: int | None = None) -> list[float]:
        """||O - dense||^2 / ||dense||^2 at each rung, or the part of it that is of ``head``; ValueError if one is not
        finite."""
        errors = self.squared_errors.sum(dim=1) if head is None else self.squared_errors[:, head]
        losses: list[float] = (errors / max(self.dense_square, torch.finfo(torch.float64).tiny)).tolist()
        if not all(map(math.isfinite, losses)):
            raise ValueError(f"{self.path}: attention, dense or sparse, is not finite on these batches")
        return losses

    def relative_loss(self, topk: Topk) -> float:
        """The same with these topks, each one of the rungs."""
        if not isinstance(topk, tuple):
            return self.relative_losses()[self.rungs.index(topk)]
        return sum(self.relative_losses(head)[self.rungs.index(own)] for head, own in enumerate(topk))

    def loss_before(self) -> float:
        """The same with the topk, or topks, of the gate."""
        if self.topks_before is None:
            return self.relative_loss(self.topk_before)
        return self.own_errors.sum().item() / max(self.dense_square, torch.finfo(torch.float64).tiny)

    def of_heads(self, topk: Topk) -> tuple[float, ...]:
        """``topk`` as one for each head."""
        return topk if isinstance(topk, tuple) else (topk,) * self.squared_errors.shape[1]

    def critical_work(self, topk: Topk) -> float:
        """How much of ``work`` lies in critical blocks with these topks."""
        own = topk if isinstance(topk, tuple) else (topk,)
        return sum(self.critical[self.rungs.index(rung)] for rung in own) / len(own)


def _topks_of_heads(gate: Gate) -> tuple[float, ...] | None:
    """The topk in force of each head of ``gate``, where they have their own; else None."""
    if gate.sparsity is None or gate.sparsity.dim() == 1:
        return None
    return tuple(min(topk / MILLION, gate.config.max_topk or 1.0) for topk in gate.sparsity[:, 0].tolist())


def _squared_distance(a: Tensor, b: Tensor | None) -> Tensor:
    """||a - b||^2, or ||a||^2 without b, of tensors (B, H, N, D): float64 (H), summed a chunk at a time."""
    total = torch.zeros(a.shape[1], dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[2], TOKENS_PER_CHUNK):
        rows = slice(start, start + TOKENS_PER_CHUNK)
        part = a[:, :, rows].double()
        total += (part if b is None else part - b[:, :, rows].double()).square().sum((0, 2, 3))
    return total


@torch.no_grad()
def measure_sites(model: nn.Module, batches: Iterable[Arguments], sites: Mapping[str, SiteSensitivity]) -> int:
    """Run ``model``, dense, on ``batches`` and measure every call of ``sites`` (by gate path); how many batches."""

    def observe(call: GatedCall) -> Tensor:
        sites[call.path].add(call)
        return call.dense

    count = 0
    with gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
            count += 1
    for site in sites.values():
        site.sum_over_ranks()
    return int(total(count))


class OutputErrors:
    """Errors of the model's output, on a few batches, while some of its attentions are sparse."""

    def __init__(self, model: nn.Module, batches: Sequence[Arguments], sites: Mapping[str, SiteSensitivity]) -> None:
        self.sites, self.error = sites, OutputError(model, batches)

    def relative_loss(self, topks: Mapping[str, Topk]) -> float:
        """||output - dense output||^2 / ||dense output||^2 with ``topks`` by gate path, all other attention dense.

        Raises ValueError if it is not finite.
        """

        def attend(call: GatedCall) -> Tensor:
            if call.path not in topks:
                return call.dense
            topk = topks[call.path]
            largest = max(topk) if isinstance(topk, tuple) else topk
            return call.output_with_sparsity(topk, min(self.sites[call.path].bottomk, 1 - largest))

        loss = self.error.of(attend)
        if not math.isfinite(loss):
            raise ValueError(f"{type(self.error.model).__name__}: its output is not finite on the first batches")
        return loss

    def measure_effects(self, budget: float) -> None:
        """Set the ``effect`` of each site, from the output's error with topk=``budget`` at that site alone.

        If the output depends on none of them, all stay None.
        """
        effects = {}
        for path, site in self.sites.items():
            loss = site.relative_losses()[site.rungs.index(budget)]
            effects[path] = self.relative_loss({path: budget}) / loss if loss > 0 else 0.0
        if any(effects.values()):
            for path, effect in effects.items():
                self.sites[path].effect = effect
