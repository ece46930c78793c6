"""The reports of `calibrate`, `distill`, `allocate` and `choose_orders`, drawn by rich: one row for each attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from sla_compile.reporting.path_patterns import grouped_paths
from sla_compile.reporting.terminal import TABLE_WIDTH

if TYPE_CHECKING:
    from sla_compile.fitting.allocation import SiteAllocation
    from sla_compile.fitting.calibration import CalibratedSite, SiteError
    from sla_compile.fitting.orders import SiteOrder
    from sla_compile.fitting.sparsity_plan import PlanLevel, SparsityPlan

__all__ = ["AllocationView", "CalibrationView", "ErrorsView", "OrderView", "PlanView"]


class _SitesView:
    """A table of sites where the terminal is wide enough, else a list of sentences."""

    caption: str
    columns: tuple[str, ...]
    """Headings, after that of the path."""

    def __init__(self, title: str, sites: Sequence[Any], unreached: Sequence[str]) -> None:
        self.title = title
        self.sites = sites
        self.unreached = unreached

    def cells(self, site: Any) -> tuple[str, ...]:
        """What stands in ``columns`` for ``site``."""
        raise NotImplementedError

    def sentence(self, site: Any) -> str:
        """The same in words, for the list."""
        raise NotImplementedError

    def remarks(self) -> Iterator[RenderableType]:
        """What stands below the sites."""
        return iter(())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text(self.title, style="bold", overflow="fold")
        if options.max_width >= TABLE_WIDTH:
            table = Table(caption=self.caption)
            table.add_column("gate", overflow="fold")
            for name in self.columns:
                table.add_column(name, justify="right")
            for site in self.sites:
                table.add_row(Text(site.path, style="bold"), *map(Text, self.cells(site)))
            yield table
        else:
            for site in self.sites:
                text = Text(site.path, style="bold", overflow="fold")
                yield text.append(f"\n  {self.sentence(site)}", style="not bold")
        yield from self.remarks()
        if self.unreached:
            text = Text("not reached, left as they were: ", style="yellow", overflow="fold")
            yield text.append(", ".join(grouped_paths(self.unreached)))


class ErrorsView(_SitesView):
    """The attention error of each site before and after its gate was fitted or trained."""

    caption = "relative attention error; closed: share of that with gates of zero that is gone"
    columns: tuple[str, ...] = ("gates of zero", "before", "after", "closed")

    def cells(self, site: SiteError) -> tuple[str, ...]:
        return f"{site.sparse_only:.4f}", f"{site.before:.4f}", f"{site.after:.4f}", f"{100 * site.closed:.1f}%"

    def sentence(self, site: SiteError) -> str:
        zero, before, after, closed = self.cells(site)
        return f"{zero} with gates of zero, {before} -> {after}, {closed} closed"


class CalibrationView(ErrorsView):
    """The errors of each site, how much of its fit was kept, and why not all."""

    columns = (*ErrorsView.columns, "kept")

    def cells(self, site: SiteError) -> tuple[str, ...]:
        return *super().cells(site), _kept(cast("CalibratedSite", site))

    def sentence(self, site: SiteError) -> str:
        zero, before, after, closed, kept = self.cells(site)
        return f"{zero} with gates of zero, {before} -> {after}, {closed} closed, {kept} of the fit kept"

    def remarks(self) -> Iterator[RenderableType]:
        for site in self.sites:
            if site.reason:
                yield Text(f"{site.path}: {_kept(site)} of the fit kept: {site.reason}", overflow="fold")


def _kept(site: CalibratedSite) -> str:
    if site.factor is None:
        return "none"
    return "scale only" if site.factor == 0 else f"{100 * site.factor:.0f}%"


class AllocationView(_SitesView):
    """The topk that each site was given, and its error."""

    caption = "relative attention error: with the topk it had, the budget as topk, and the topk it has now"
    columns = ("topk", "before", "budget", "now")

    def cells(self, site: SiteAllocation) -> tuple[str, ...]:
        topk = " -> ".join(
            f"{100 * mean:.3g}%" + ("" if heads is None else f" ({100 * min(heads):.3g} to {100 * max(heads):.3g}%)")
            for mean, heads in ((site.topk_before, site.topks_before), (site.topk, site.topks))
        )
        return topk, f"{site.before:.4f}", f"{site.uniform:.4f}", f"{site.after:.4f}"

    def sentence(self, site: SiteAllocation) -> str:
        topk, before, uniform, now = self.cells(site)
        return f"topk {topk}, error {before} -> {now} ({uniform} with the budget as topk)"


class OrderView(_SitesView):
    """The token order that each site was given, and its error with each that was tried."""

    caption = "relative attention error with each order; that of the order it has now is in brackets"

    def __init__(self, title: str, sites: Sequence[SiteOrder], orders: Sequence[str]) -> None:
        super().__init__(title, sites, ())
        by_head = any("," in site.order for site in sites)
        self.columns = (*orders, *(("each head's",) if by_head else ()))

    def cells(self, site: SiteOrder) -> tuple[str, ...]:
        shown = {
            "each head's" if "," in order else order: f"[{error:.4f}]" if order == site.order else f"{error:.4f}"
            for order, error in site.errors.items()
        }
        return tuple(shown.get(column, "-") for column in self.columns)

    def sentence(self, site: SiteOrder) -> str:
        errors = ", ".join(f"{order} {error:.4f}" for order, error in site.errors.items())
        return f"{site.order_before} -> {site.order}, error {errors}"


class PlanView:
    """The levels of a plan: mean, smallest and largest topk, and the error of the model's output."""

    def __init__(self, plan: SparsityPlan) -> None:
        self.plan = plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plan = self.plan
        title = f"topk {plan.mean_topk:.3g} on average over {len(plan.levels)} time(s), budget {plan.budget:g}"
        yield Text(title, style="bold")
        table = Table(
            caption="relative error of the model's output: with the budget as topk everywhere, and as planned"
        )
        for name in ("time", "topk", "least to most", "critical", "budget", "planned"):
            table.add_column(name, justify="right")
        for level in plan.levels:
            table.add_row(*map(Text, self._cells(level)))
        yield table

    def _cells(self, level: PlanLevel) -> tuple[str, ...]:
        topks = [own for topk in level.topks.values() for own in (topk if isinstance(topk, tuple) else (topk,))]
        errors = ("" if error is None else f"{error:.4f}" for error in (level.output_uniform, level.output))
        spread = f"{100 * min(topks):.3g} to {100 * max(topks):.3g}%"
        critical = "" if level.critical is None else f"{100 * level.critical:.3g}%"
        return f"{level.time:g}", f"{100 * level.mean_topk:.3g}%", spread, critical, *errors
