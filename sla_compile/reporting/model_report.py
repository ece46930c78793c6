"""``explain`` and ``report``: which attention would be, or was, rewritten, which stays dense, why, and the cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sla_compile.compiler.compiled_sites import compiled_breaks, compiled_sites
from sla_compile.compiler.example_call import example_call
from sla_compile.compiler.outside_graphs import outside_graphs
from sla_compile.compiler.patterns import warn_unmatched
from sla_compile.compiler.preparation import dry_run, unwrapped
from sla_compile.compiler.site_report import GraphBreak, SiteReport
from sla_compile.compiler.sites import Settings
from sla_compile.config import SLAConfig
from sla_compile.gate import gates, model_config

__all__ = ["Report", "Totals", "explain", "report"]

VERSION = 1
"""Version of the dictionary form."""

STATUSES = EXPLAINED, NOT_COMPILED, PREPARED, COMPILED_IN_PART, COMPILED, RAN_DENSE = (
    "explained",
    "not compiled",
    "prepared, not compiled",
    "compiled in part",
    "compiled",
    "compiled, but the last call ran dense",
)
"""What `Report.status` can be; the first is of `explain` alone."""


@dataclass(frozen=True)
class Totals:
    """Sums over the attention calls of one forward; FLOPs and bytes over those whose sizes are known.

    Where a site was compiled for sizes that give different outcomes, what was compiled last counts."""

    attentions: int
    rewritten: int
    kept: int
    not_compiled: int
    """Prepared, but not compiled yet."""
    ran_dense: int
    """Compiled, but dense in the last call; counted above too, as they were compiled."""
    sizes_unknown: int
    """In none of the sums below."""
    flops_before: int
    flops_after: int
    bytes_before: int
    bytes_after: int
    gate_parameters: int
    """Numbers in all gates, each gate counted once however often its module is called."""


@dataclass(frozen=True, repr=False)
class Report:
    """What ``backend="sla"`` does to the attention of a model; prints as a table, ``to_dict`` for tools."""

    model: str
    """Class of the model."""
    compiled: bool
    """True: what was compiled, from `report`. False: what would be, from `explain`."""
    sites: tuple[SiteReport, ...]
    """Every attention call: from `explain` in the order of the trace, from `report` in that of the modules."""
    graph_breaks: tuple[GraphBreak, ...] = ()
    untrained_gates: tuple[str, ...] = ()
    """Module paths of the model's gates that are still zero."""
    outside_graphs: tuple[str, ...] = ()
    """Paths of modules whose code names an attention function, and of which no graph holds one: dense, if called."""

    @property
    def status(self) -> str:
        """What became of this very model, as one of `STATUSES`."""
        totals = self.totals
        if not self.compiled:
            return EXPLAINED
        if totals.ran_dense:
            return RAN_DENSE
        if totals.not_compiled:
            return PREPARED if totals.not_compiled == totals.attentions else COMPILED_IN_PART
        return COMPILED if totals.attentions else NOT_COMPILED

    @property
    def totals(self) -> Totals:
        """Sums over all sites."""
        sites = [site for site in self.sites if site.current]
        known = [site for site in sites if site.flops_before is not None]
        sums = {
            name: sum(getattr(site, name) for site in known)
            for name in ("flops_before", "flops_after", "bytes_before", "bytes_after")
        }
        return Totals(
            attentions=len(sites),
            rewritten=sum(site.rewritten for site in sites),
            kept=sum(site.compiled and not site.rewritten for site in sites),
            not_compiled=sum(not site.compiled for site in sites),
            ran_dense=sum(site.ran_dense for site in sites),
            sizes_unknown=len(sites) - len(known),
            gate_parameters=sum({site.gate_path: site.gate_parameters for site in self.sites}.values()),
            **sums,
        )

    def without_diffs(self) -> Report:
        """The same report without the graphs around each site."""
        sites = tuple(dataclasses.replace(site, diff=()) for site in self.sites)
        return dataclasses.replace(self, sites=sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: version, model, compiled, status, and the lists and sums that a `Report` has."""
        return {
            "version": VERSION,
            "model": self.model,
            "compiled": self.compiled,
            "status": self.status,
            "sites": [site.to_dict() for site in self.sites],
            "totals": dataclasses.asdict(self.totals),
            "graph_breaks": [dataclasses.asdict(found) for found in self.graph_breaks],
            "untrained_gates": list(self.untrained_gates),
            "outside_graphs": list(self.outside_graphs),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> Any:
        from sla_compile.reporting.terminal import ReportView

        return ReportView(self)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import ReportView, plain_text

        return plain_text(ReportView(self), width=100)

    def __repr__(self) -> str:
        totals = self.totals
        return f"<Report of {self.model}: {totals.rewritten} of {totals.attentions} attentions rewritten>"


def explain(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    call: Callable[[], Any] | None = None,
    config: SLAConfig | Mapping[str, Any] | None = None,
) -> Report:
    """What ``torch.compile(model, backend="sla")`` would do to each attention of ``model``, and why.

    Nothing in the model changes: no gate, hook, parameter or random state. It is traced, not executed. If its Python
    code, after a graph break, reads a value that only a run computes, the report ends there and says so.

    Args:
        model: any module, prepared, compiled, or neither.
        args, kwargs: an example call, ``model(*args, **kwargs)``, with the shapes it will be used at.
        call: instead of them, a function that calls ``model``: it runs up to its first call, which is the example.
        config: an ``SLAConfig`` or a mapping of its fields; by default the one the model was prepared with.

    Raises:
        TypeError: ``model`` is no module, or ``args`` no tuple.
        ValueError: a setting is refused, or ``call`` does not call the model.
    """
    model = unwrapped(model)
    settings = Settings.of(config if config is not None else model_config(model))
    run = dry_run(model, *example_call(model, args, kwargs, call), settings)
    if run.stopped is None and config is not None:
        warn_unmatched(model, settings.config, {site.path for site in run.sites})
    return Report(
        model=type(model).__name__,
        compiled=False,
        sites=tuple(run.sites),
        graph_breaks=tuple(run.graph_breaks),
        untrained_gates=_untrained(model),
        outside_graphs=tuple(outside_graphs(model, (site.path for site in run.sites))),
    )


def report(model: nn.Module) -> Report:
    """What ``backend="sla"`` did to each attention of ``model`` when it was last compiled; and gates not compiled yet.

    Args:
        model: a module after its first call with ``backend="sla"``; compiled whole or by blocks.

    Raises:
        TypeError: ``model`` is no module.
    """
    model = unwrapped(model)
    sites = tuple(compiled_sites(model))
    return Report(
        model=type(model).__name__,
        compiled=True,
        sites=sites,
        graph_breaks=tuple(compiled_breaks(model)),
        untrained_gates=_untrained(model),
        outside_graphs=tuple(outside_graphs(model, (site.path for site in sites))),
    )


def _untrained(model: nn.Module) -> tuple[str, ...]:
    return tuple(path for path, gate in gates(model).items() if gate.silent())
