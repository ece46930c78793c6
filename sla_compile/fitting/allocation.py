"""``allocate``: a topk for each attention, chosen from data, so that hard layers get more blocks at the same total.

Each attention's error is measured at a small ladder of topk values, and how much of it reaches the model's output. Then
every attention starts at the lowest rung, and the raise that takes away most error for its cost is made as long as the
budget has room for one.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from sla_compile.common.blocks import to_millionths
from sla_compile.compiler.preparation import prepare, unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.observer import Arguments, first_of, nothing_gated, prepared_for
from sla_compile.fitting.sensitivity import Measured, Outputs, measure
from sla_compile.gate import gates, model_config

__all__ = ["AllocationReport", "SiteAllocation", "allocate"]

OBJECTIVES = ("output", "attention")
_HELD_BATCHES = 4

LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Rungs, in units of the budget."""


@dataclass(frozen=True)
class SiteAllocation:
    """What one attention was given; errors are ||O - dense|| / ||dense|| over all tokens of the batches."""

    path: str
    """Module path of the gate."""
    topk_before: float
    topk: float
    before: float
    """Error with the topk it had."""
    uniform: float
    """Error with the budget as the topk of every attention."""
    after: float
    work: float
    """Its share of the work of all attentions, if all were dense."""
    calls: int
    effect: float | None = None
    """||output - dense output||^2 / ||dense output||^2 of the model for each unit of this attention's squared error."""


@dataclass(frozen=True, repr=False)
class AllocationReport:
    """Which topk each attention was given, and its error before and after; prints as a table, ``to_dict`` for tools."""

    model: str
    """Class of the model."""
    batches: int
    budget: float
    critical_uniform: float
    """Share of all pairs of blocks that is critical with the budget as topk everywhere."""
    critical: float
    """The same as allocated: at most that of ``critical_uniform``."""
    objective: str
    output_uniform: float
    """||output - dense output|| / ||dense output|| on the first four batches with the budget as topk."""
    output: float
    """The same as allocated."""
    sites: tuple[SiteAllocation, ...]
    """In the order in which a forward calls them."""
    unreached: tuple[str, ...] = ()
    """Gates whose attention no batch reached; they are as they were."""

    @property
    def mean_topk(self) -> float:
        """Mean of the topks, weighted by each attention's work."""
        return sum(site.topk * site.work for site in self.sites)

    def mean(self, name: str) -> float:
        """Root mean square over the sites of ``before``, ``uniform`` or ``after``."""
        return math.sqrt(sum(getattr(site, name) ** 2 for site in self.sites) / len(self.sites))

    @property
    def title(self) -> str:
        """One line: the budget, and the error of the output that it leaves spread evenly and as allocated."""
        return (
            f"{self.model}: {len(self.sites)} attention(s), topk {self.budget:g} on average, {self.batches} batch(es): "
            f"output error {self.output_uniform:.4f} spread evenly, {self.output:.4f} as allocated"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields, ``mean_topk`` and the mean errors."""
        means = {name: self.mean(name) for name in ("before", "uniform", "after")}
        lists = {"sites": [dataclasses.asdict(site) for site in self.sites], "unreached": list(self.unreached)}
        return {**dataclasses.asdict(self), **lists, "mean_topk": self.mean_topk, "mean": means}

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> Any:
        from sla_compile.reporting.fit_tables import AllocationView

        return AllocationView(self.title, self.sites, self.unreached)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import plain_text

        return plain_text(self.__rich__(), width=100)

    def __repr__(self) -> str:
        errors = f"{self.output_uniform:.3g} spread evenly, {self.output:.3g} allocated"
        return f"<AllocationReport of {self.model}: output error {errors}>"


def allocate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float = 0.05,
    config: SLAConfig | Mapping[str, Any] | None = None,
    max_batches: int | None = None,
    ladder: Sequence[float] = LADDER,
    objective: str = "output",
) -> AllocationReport:
    """Give each attention of ``model`` the topk that makes most of ``budget``; no training.

    The model runs eagerly and dense, in the mode (train or eval) it is in. At each attention that has a gate, the
    output with the gate as it is, at each rung of the ladder, is compared with the dense one; numbers per rung are
    all that is kept. There are never more critical blocks in all than ``topk=budget`` everywhere has, and where no
    allocation that is found is better than that, that it is.

    - ``objective="output"``: the model's output error is made small. How much of an attention's error reaches it is
      measured on the first four batches, which should differ in their diffusion times, at a forward per attention.
    - ``objective="attention"``: the sum over attentions of the squared relative error is.

    In a model prepared with ``max_topk`` the topks go to the gates' buffers, as `set_sparsity` does. Otherwise the
    model is prepared again with an override for each module, and compiles anew at its next call. Two attentions of
    one module then get one topk.

    Args:
        model: any module, prepared, compiled, or neither; without gates it is prepared with the first batch.
        batches: an iterable of tuples of positional, or mappings of keyword, arguments of the model.
        budget: mean topk, weighted by each attention's work (its pairs of tokens).
        config: settings for ``prepare``; by default those the model has been prepared with.
        max_batches: how many batches to use at most; None: all of them.
        ladder: topks to choose from, in units of the budget; those beyond a site's range are left out.
        objective: as above.

    Raises:
        TypeError: ``model`` is no module, or a batch is neither a tuple nor a mapping.
        ValueError: a refused setting, a budget that a site's ``max_topk`` or ``bottomk`` has no room for, no batch,
            no attention with a gate was reached, or numbers that are not finite. The model is then as it was.
    """
    _check(budget, ladder, objective, max_batches)
    model = unwrapped(model)
    first, stream = first_of(batches, max_batches)
    held = list(islice(stream, _HELD_BATCHES))
    with prepared_for(model, first, config):
        at_run_time = all(gate.sparsity is not None for gate in gates(model).values())
        measured = {path: Measured.of(path, gate, budget, ladder) for path, gate in gates(model).items()}
        count = measure(model, chain(held, stream), measured)
        reached = {path: site for path, site in measured.items() if site.calls}
        if not reached:
            raise ValueError(nothing_gated(model, first))
        evenly, outputs = dict.fromkeys(reached, budget), Outputs(model, held, reached)
        if objective == "output":
            outputs.weigh(budget)
        chosen = _water_fill(list(reached.values()), budget, at_run_time)
        errors = outputs.squared(evenly), outputs.squared(chosen)
        if objective == "output" and errors[1] > errors[0]:
            chosen, errors = evenly, (errors[0], errors[0])
        report = _report(model, count, budget, objective, errors, reached, chosen, measured)
        _set(model, first, chosen, at_run_time)
    return report


@dataclass
class _Group:
    """Attentions that share one topk: loss and cost at each rung, and the rung they are on."""

    members: list[Measured]
    rungs: tuple[float, ...]
    loss: list[float]
    cost: list[float]
    rung: int = 0

    @classmethod
    def of(cls, members: list[Measured]) -> _Group:
        shared = set(members[0].rungs).intersection(*(member.rungs for member in members))
        rungs = tuple(sorted(shared))
        places = [[member.rungs.index(rung) for rung in rungs] for member in members]
        weights = [1.0 if member.effect is None else member.effect for member in members]
        losses = [[w * loss for loss in member.losses()] for w, member in zip(weights, members, strict=True)]
        loss = [sum(own[p[i]] for own, p in zip(losses, places, strict=True)) for i in range(len(rungs))]
        cost = [sum(m.critical[p[i]] for m, p in zip(members, places, strict=True)) for i in range(len(rungs))]
        return cls(members, rungs, loss, cost)

    def best_raise(self, room: float) -> tuple[float, int] | None:
        """Loss taken away per cost, and the rung, of the best raise that costs at most ``room``."""
        raises: list[tuple[float, int]] = []
        for rung in range(self.rung + 1, len(self.rungs)):
            gain, cost = self.loss[self.rung] - self.loss[rung], self.cost[rung] - self.cost[self.rung]
            if gain > 0 and cost <= room:
                raises.append((gain / cost if cost > 0 else math.inf, rung))
        return max(raises, default=None)


def _check(budget: float, ladder: Sequence[float], objective: str, max_batches: int | None) -> None:
    SLAConfig.check_value("topk", budget)
    if not ladder or not all(0 < rung < math.inf for rung in ladder):
        raise ValueError(f"ladder: got {ladder!r}; accepted: at least one finite number above 0")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: got {objective!r}; accepted: one of {OBJECTIVES}")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: got {max_batches}; accepted: an integer of at least 1, or None")


def _water_fill(sites: list[Measured], budget: float, at_run_time: bool) -> dict[str, float]:
    """topk by gate path."""
    together: dict[str, list[Measured]] = {}
    for site in sites:
        together.setdefault(site.path if at_run_time else site.path.rpartition(".")[0], []).append(site)
    groups = [_Group.of(members) for members in together.values()]
    room = sum(group.cost[group.rungs.index(budget)] for group in groups)
    slack = 1e-9 * room  # sums of the same numbers in another order
    room += slack - sum(group.cost[0] for group in groups)
    while True:
        raises = [(found, group) for group in groups if (found := group.best_raise(room)) is not None]
        if not raises:
            break
        (_, rung), group = max(raises, key=lambda item: item[0][0])
        room -= group.cost[rung] - group.cost[group.rung]
        group.rung = rung
    uniform = sum(group.loss[group.rungs.index(budget)] for group in groups)
    if sum(group.loss[group.rung] for group in groups) > uniform:
        return {site.path: budget for site in sites}
    return {site.path: group.rungs[group.rung] for group in groups for site in group.members}


def _report(
    model: nn.Module,
    count: int,
    budget: float,
    objective: str,
    outputs: tuple[float, float],
    reached: Mapping[str, Measured],
    chosen: Mapping[str, float],
    known: Iterable[str],
) -> AllocationReport:
    total = sum(site.work for site in reached.values())
    sites, uniform, critical = [], 0.0, 0.0
    for path, site in reached.items():
        error = {rung: math.sqrt(loss) for rung, loss in zip(site.rungs, site.losses(), strict=True)}
        share = dict(zip(site.rungs, site.critical, strict=True))
        uniform += share[budget] / total
        critical += share[chosen[path]] / total
        errors = (error[site.topk_before], error[budget], error[chosen[path]])
        sites.append(
            SiteAllocation(path, site.topk_before, chosen[path], *errors, site.work / total, site.calls, site.effect)
        )
    return AllocationReport(
        model=type(model).__name__,
        batches=count,
        budget=budget,
        critical_uniform=uniform,
        critical=critical,
        objective=objective,
        output_uniform=math.sqrt(outputs[0]),
        output=math.sqrt(outputs[1]),
        sites=tuple(sites),
        unreached=tuple(path for path in known if path not in reached),
    )


def _set(model: nn.Module, first: Arguments, chosen: Mapping[str, float], at_run_time: bool) -> None:
    found, config = gates(model), model_config(model)
    if at_run_time:
        with torch.no_grad():
            for path, topk in chosen.items():
                sparsity = found[path].sparsity
                if sparsity is not None:
                    sparsity[0] = to_millionths(topk)
        return
    assert config is not None  # a gate has one
    overrides = {pattern: dict(fields) for pattern, fields in config.overrides.items()}
    for path, topk in chosen.items():
        site = path.rpartition(".")[0]
        pattern = glob.escape(site)
        # The last override wins, so this one keeps what the others have made of the fields it had.
        kept = {name: getattr(config.for_site(site), name) for name in overrides.pop(pattern, {})}
        overrides[pattern] = {**kept, "topk": topk}
    prepare(model, *first, config=dataclasses.replace(config, overrides=overrides))
