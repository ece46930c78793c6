"""``allocate_by_time``: a topk for each attention, or head, and diffusion time; one budget for all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sla_compile.compiler.preparation import unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.allocation import LADDER, OUTPUT_BATCHES, at_run_time, check_spending
from sla_compile.fitting.observer import Arguments, Topk, no_gated_call_message, peek_first, prepared_or_rolled_back
from sla_compile.fitting.ranks import over_ranks, refuse_distributed
from sla_compile.fitting.sensitivity import OutputErrors, SiteSensitivity, measure_sites
from sla_compile.fitting.sparsity_plan import PlanLevel, SparsityPlan
from sla_compile.fitting.traced_calls import kept_traces
from sla_compile.fitting.water_fill import water_fill
from sla_compile.gate import gates

__all__ = ["allocate_by_time"]


def allocate_by_time(
    model: nn.Module,
    batches: Mapping[float, Iterable[Any]],
    *,
    budget: float = 0.05,
    weights: Mapping[float, float] | None = None,
    config: SLAConfig | Mapping[str, Any] | None = None,
    ladder: Sequence[float] = LADDER,
    group: Any = None,
) -> SparsityPlan:
    """Choose a topk for each attention of ``model`` at each of several diffusion times, ``budget`` on average.

    Measured at each time is what `allocate` measures. The topks of all times are then chosen together, so that the
    mean over the times of ||output - dense output||^2 is small, by which a flow loss grows. There are never more
    critical blocks in all than with ``topk=budget`` at all times, and if no better choice is found, that is it. No topk
    of ``model`` changes: ``SparsityPlan.set`` does that for a time. With ``topk_by="head"`` each head gets topks.

    Args:
        model: any module, prepared with ``max_topk``, compiled, or neither.
        batches: by time, in any units, what `allocate` takes; the batches of a time should have times near to it, and
            best the same data at all times. Each time counts the same, so take times that stand for equally many steps
            of the sampler: units in which its steps are even make the nearest time the right one.
        budget: mean topk, weighted by each attention's work (its pairs of tokens).
        weights: how much an error counts at some of these times, at others 1: more where fine-tuning repairs less.
        config: settings for ``prepare``, with a first batch that reaches all gates; None: those it was prepared with.
        ladder: topks to choose from, in units of the budget; those beyond a site's range are left out.
        group: ranks with batches of their own, all to get the same topks; by default those of DDP or FSDP2.

    Raises:
        TypeError: ``model`` is no module, ``batches`` no mapping, ``group`` no group, or a batch is neither a tuple nor
            a mapping.
        ValueError: a refused setting or weight, a gate without ``max_topk``, a budget above a site's ``max_topk`` or
            1 - bottomk, no batch, no gate reached at a time, or numbers that are not finite. The model is then as it
            was.
    """
    check_spending(budget, ladder)
    if not isinstance(batches, Mapping) or not batches or not all(isinstance(time, int | float) for time in batches):
        raise TypeError(f"batches: got {type(batches).__name__}; accepted: a mapping from times, numbers, to batches")
    weights = dict(weights or {})
    for time, weight in weights.items():
        if time not in batches or not 0 < weight < math.inf:
            raise ValueError(f"weights: got {weight!r} for {time!r}; accepted: numbers above 0, for times of batches")
    model = unwrapped(model)
    data = {float(time): list(peek_first(batches[time], None)[1]) for time in sorted(batches)}
    first = next(iter(data.values()))[0]
    refuse_distributed(model, parameters=True)
    with over_ranks(model, group) as model, prepared_or_rolled_back(model, first, config), kept_traces(model):
        if not at_run_time(model):
            raise ValueError(
                f"{type(model).__name__}: the topk of a gate is a constant of the compiled graph; accepted: a model "
                f"prepared with max_topk, the most that topk will be: config={{'max_topk': 0.25}}"
            )
        levels = [_measured(model, time, own, budget, ladder) for time, own in data.items()]
        plan = _plan(levels, [weights.get(level.time, 1.0) for level in levels], budget)
        plan.move_to(model)
        return plan


@dataclass
class _Level:
    """What was measured at one time."""

    time: float
    sites: Mapping[str, SiteSensitivity]
    """By gate path, with effects in mean squares of the output's error, and all of their work together 1: so a time
    counts as much as another, however many videos it has."""
    outputs: OutputErrors

    def error(self, topks: Mapping[str, Topk]) -> float:
        """The mean square of the output's error with ``topks``."""
        return self.outputs.relative_loss(topks) * self.outputs.error.mean_square

    def weighted(self, weight: float) -> list[SiteSensitivity]:
        """Its sites, their effects ``weight`` times as large."""
        return [dataclasses.replace(site, effect=weight * (site.effect or 0.0)) for site in self.sites.values()]

    def planned(self, topks: Mapping[str, Topk], budget: float) -> PlanLevel:
        """The level of a plan that gives this time ``topks``."""
        own = {path: site.of_heads(topks[path]) for path, site in self.sites.items()}
        return PlanLevel(
            time=self.time,
            topks={path: topk if self.sites[path].by_head else topk[0] for path, topk in own.items()},
            mean_topk=sum(sum(own[path]) / len(own[path]) * site.work for path, site in self.sites.items()),
            critical=sum(site.critical_work(own[path]) for path, site in self.sites.items()),
            output_uniform=math.sqrt(self.outputs.relative_loss(dict.fromkeys(topks, budget))),
            output=math.sqrt(self.outputs.relative_loss(topks)),
        )


def _measured(
    model: nn.Module, time: float, batches: Sequence[Arguments], budget: float, ladder: Sequence[float]
) -> _Level:
    known = {path: SiteSensitivity.of_gate(path, gate, budget, ladder) for path, gate in gates(model).items()}
    measure_sites(model, batches, known)
    reached = {path: site for path, site in known.items() if site.calls}
    if not reached:
        raise ValueError(f"time {time:g}: {no_gated_call_message(model, batches[0])}")
    outputs = OutputErrors(model, batches[:OUTPUT_BATCHES], reached)
    outputs.measure_effects(budget)
    work = sum(site.work for site in reached.values())
    for site in reached.values():
        site.effect = (site.effect or 0.0) * outputs.error.mean_square
        site.work, site.critical = site.work / work, [critical / work for critical in site.critical]
    return _Level(time, reached, outputs)


def _plan(levels: Sequence[_Level], weights: Sequence[float], budget: float) -> SparsityPlan:
    for level in levels:
        for path in levels[0].sites.keys() ^ level.sites.keys():
            raise ValueError(
                f"{path}: reached at some of the times {levels[0].time:g} and {level.time:g} alone; accepted: batches "
                f"of one kind at all times"
            )
    uniform: list[Mapping[str, Topk]] = [dict.fromkeys(level.sites, budget) for level in levels]
    chosen: list[Mapping[str, Topk]] = [
        *water_fill([level.weighted(own) for level, own in zip(levels, weights, strict=True)], budget, True)
    ]
    errors = [
        sum(weight * level.error(own) for weight, level, own in zip(weights, levels, topks, strict=True))
        for topks in (uniform, chosen)
    ]
    if errors[1] > errors[0]:
        chosen = uniform
    found = [level.planned(topks, budget) for level, topks in zip(levels, chosen, strict=True)]
    return SparsityPlan(budget, tuple(found))
