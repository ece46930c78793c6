"""``allocate``: choose a topk for each attention from data, so that hard ones get more blocks at the same total cost.

For each attention its error is measured at several topks, the rungs of a ladder, and how much of that error reaches the
model's output. Then all start at the lowest rung, and one after the other the raise that removes most error for its
cost is made, as long as the budget has room.
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
from sla_compile.compat import fully_sharded
from sla_compile.compiler.preparation import prepare, unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.observer import Arguments, Topk, no_gated_call_message, peek_first, prepared_or_rolled_back
from sla_compile.fitting.ranks import over_ranks, refuse_distributed
from sla_compile.fitting.sensitivity import OutputErrors, SiteSensitivity, measure_sites
from sla_compile.fitting.traced_calls import kept_traces
from sla_compile.fitting.water_fill import water_fill
from sla_compile.gate import gates, model_config, owner_path

__all__ = ["LADDER", "AllocationReport", "SiteAllocation", "allocate", "choose"]

OBJECTIVES = ("output", "attention")
OUTPUT_BATCHES = 4
"""How many batches, the first ones, errors of the model's output are measured on."""

LADDER = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""topks to choose from, in units of the budget."""


@dataclass(frozen=True)
class SiteAllocation:
    """The topk that one attention was given; errors are ||O - dense|| / ||dense|| over all tokens of the batches."""

    path: str
    """Module path of the gate."""
    topk_before: float
    """Of heads with their own the mean."""
    topk: float
    before: float
    """Error with the topk, or topks, it had."""
    uniform: float
    """Error with the budget as the topk of every attention."""
    after: float
    """Error with ``topk``."""
    work: float
    """Its share of the pairs of query and key tokens of all attentions."""
    calls: int
    """How often it was called."""
    effect: float | None = None
    """Relative squared error of the model's output per unit of this attention's; None for objective="attention"."""
    topks: tuple[float, ...] | None = None
    """Of each head with ``topk_by="head"``; ``topk`` is then their mean."""
    topks_before: tuple[float, ...] | None = None
    """The same before."""


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
    """The same as allocated: at most ``critical_uniform``."""
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
    group: Any = None,
) -> AllocationReport:
    """Choose a topk for each attention of ``model`` that keeps errors small, at a mean of ``budget``; no training.

    The model runs eagerly and dense, in the mode (train or eval) it is in. At each attention that has a gate, the
    output with the gate as it is, at each topk of the ladder, is compared with the dense one; a few sums per topk are
    all that is kept. There are never more critical blocks in total than with ``topk=budget`` everywhere, and if no
    better allocation is found, each attention gets ``budget``.

    - ``objective="output"`` minimises the error of the model's output. How much of an attention's error reaches it is
      measured on the first four batches, which should differ in their diffusion times, at a forward per attention.
    - ``objective="attention"`` minimises the sum over attentions of the squared relative error.

    With ``max_topk`` the topks, one for each head with ``topk_by="head"``, go to the gates' buffers. Otherwise the
    model is prepared again with overrides, one topk for each module, and recompiles at its next call.

    Args:
        model: any module, prepared, compiled, or neither; without gates it is prepared with the first batch.
        batches: an iterable of tuples of positional, or mappings of keyword, arguments of the model; or one such batch.
        budget: mean topk, weighted by each attention's work (its pairs of tokens).
        config: settings for ``prepare``; by default those the model has been prepared with.
        max_batches: how many batches to use at most; None: all of them.
        ladder: topks to choose from, in units of the budget; those beyond a site's range are left out.
        objective: "output" or "attention".
        group: ranks with batches of their own, all to get the same topks; by default those of DDP or FSDP2.

    Raises:
        TypeError: ``model`` is no module, ``group`` no group, or a batch is neither a tuple nor a mapping.
        ValueError: a refused setting, a budget above a site's ``max_topk`` or 1 - bottomk, no batch, no gate reached,
            not all by a first batch to prepare again with, or numbers not finite. The model is then as it was.
    """
    check_spending(budget, ladder)
    _check_objective(objective)
    model = unwrapped(model)
    first, stream = peek_first(batches, max_batches)
    first_batches = list(islice(stream, OUTPUT_BATCHES))
    refuse_distributed(model, parameters=True)
    _refuse_sharded(model)
    again = not at_run_time(model)
    with (
        over_ranks(model, group) as model,
        prepared_or_rolled_back(model, first, config, again=again),
        kept_traces(model),
    ):
        known = {path: SiteSensitivity.of_gate(path, gate, budget, ladder) for path, gate in gates(model).items()}
        count = measure_sites(model, chain(first_batches, stream), known)
        if not any(site.calls for site in known.values()):
            raise ValueError(no_gated_call_message(model, first))
        report, chosen = choose(model, first_batches, known, count, budget, objective)
        _set_topks(model, first, chosen)
    return report


def choose(
    model: nn.Module,
    first_batches: Sequence[Arguments],
    known: Mapping[str, SiteSensitivity],
    count: int,
    budget: float,
    objective: str = "output",
) -> tuple[AllocationReport, Mapping[str, Topk]]:
    """What `allocate` does with the measured ``known`` of ``count`` batches: its report, and a topk by gate path.

    It changes nothing but the effects in ``known``. Of ``first_batches`` those are used that errors of the output are
    measured on.
    """
    reached = {path: site for path, site in known.items() if site.calls}
    uniform = dict.fromkeys(reached, budget)
    outputs = OutputErrors(model, first_batches[:OUTPUT_BATCHES], reached)
    if objective == "output":
        outputs.measure_effects(budget)
    chosen: Mapping[str, Topk] = water_fill([list(reached.values())], budget, at_run_time(model))[0]
    losses = outputs.relative_loss(uniform), outputs.relative_loss(chosen)
    if objective == "output" and losses[1] > losses[0]:
        chosen, losses = uniform, (losses[0], losses[0])
    return _report(model, count, budget, objective, losses, reached, chosen, known), chosen


def at_run_time(model: nn.Module) -> bool:
    """Whether the topk of every gate is in its buffer."""
    return all(gate.sparsity is not None for gate in gates(model).values())


def _refuse_sharded(model: nn.Module) -> None:
    """Raise ValueError where ``model`` would have to be prepared again and cannot be."""
    path = next((path for path, gate in gates(model).items() if fully_sharded(gate)), None)
    if path is not None and not at_run_time(model):
        raise ValueError(
            f"{path}: got a gate in fully_shard with a topk that is compiled in, which cannot be prepared again; "
            f"accepted: gates prepared with max_topk, whose topk is in a buffer, or allocate before fully_shard"
        )


def check_spending(budget: float, ladder: Sequence[float]) -> None:
    """Raise ValueError where ``budget`` is no topk, or ``ladder`` not made of finite numbers above 0."""
    SLAConfig.check_value("topk", budget)
    if not ladder or not all(0 < rung < math.inf for rung in ladder):
        raise ValueError(f"ladder: got {ladder!r}; accepted: at least one finite number above 0")


def _check_objective(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: got {objective!r}; accepted: one of {OBJECTIVES}")


def _report(
    model: nn.Module,
    count: int,
    budget: float,
    objective: str,
    output_losses: tuple[float, float],
    reached: Mapping[str, SiteSensitivity],
    chosen: Mapping[str, Topk],
    known: Iterable[str],
) -> AllocationReport:
    """``output_losses``: relative losses of the output with the budget everywhere, and as chosen."""
    total = sum(site.work for site in reached.values())
    sites: list[SiteAllocation] = []
    uniform = critical = 0.0
    for path, site in reached.items():
        topk = chosen[path]
        uniform += site.critical_work(budget) / total
        critical += site.critical_work(topk) / total
        before, even, after = map(math.sqrt, (site.loss_before(), *map(site.relative_loss, (budget, topk))))
        topks = topk if isinstance(topk, tuple) else None
        mean = sum(topk) / len(topk) if isinstance(topk, tuple) else topk
        sites.append(
            SiteAllocation(
                path=path,
                topk_before=site.topk_before,
                topk=mean,
                before=before,
                uniform=even,
                after=after,
                work=site.work / total,
                calls=site.calls,
                effect=site.effect,
                topks=topks,
                topks_before=site.topks_before,
            )
        )
    return AllocationReport(
        model=type(model).__name__,
        batches=count,
        budget=budget,
        critical_uniform=uniform,
        critical=critical,
        objective=objective,
        output_uniform=math.sqrt(output_losses[0]),
        output=math.sqrt(output_losses[1]),
        sites=tuple(sites),
        unreached=tuple(path for path in known if path not in reached),
    )


def _set_topks(model: nn.Module, first: Arguments, chosen: Mapping[str, Topk]) -> None:
    """Give each gate its chosen topk: in its buffer where all have one, else by overrides of the settings."""
    found, config = gates(model), model_config(model)
    if at_run_time(model):
        with torch.no_grad():
            for path, topk in chosen.items():
                sparsity = found[path].sparsity
                if sparsity is not None:  # one topk goes to all heads
                    own = [to_millionths(one) for one in topk] if isinstance(topk, tuple) else to_millionths(topk)
                    sparsity[..., 0] = sparsity.new_tensor(own)
        return
    assert config is not None  # a gate has one
    overrides = {pattern: dict(fields) for pattern, fields in config.overrides.items()}
    for path, topk in chosen.items():
        site = owner_path(path)
        pattern = glob.escape(site)
        # This override goes last and so wins: the other fields it has get the values that were in force.
        kept = {name: getattr(config.for_site(site), name) for name in overrides.pop(pattern, {})}
        overrides[pattern] = {**kept, "topk": topk}
    prepare(model, *first, config=dataclasses.replace(config, overrides=overrides))
