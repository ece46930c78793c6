"""What looks inside, as rich draws it: tables where the terminal is wide enough, else lists."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sla_compile.inspection.timing import digits
from sla_compile.reporting.path_patterns import grouped_paths
from sla_compile.reporting.terminal import TABLE_WIDTH, quantity

if TYPE_CHECKING:
    from sla_compile.inspection.atlas import Atlas
    from sla_compile.inspection.attention_map import HeadMap
    from sla_compile.inspection.benchmark import BenchReport
    from sla_compile.inspection.comparison import ComparisonReport, Errors, Forward
    from sla_compile.inspection.doctor import DoctorReport
    from sla_compile.inspection.site_atlas import HeadAtlas, SiteAtlas
    from sla_compile.kernels.triton.launches import Launch
    from sla_compile.kernels.triton.tuning import Outcome

__all__ = ["AtlasView", "BenchView", "ComparisonView", "DoctorView", "SiteView", "tuning_table"]

_SHADES = " .:-=+*#%@"
"""From nothing to all, so that a map reads without colours too."""
_COLOURS = ("grey39", "dodger_blue2", "dark_cyan", "green4", "dark_orange3", "red1")
"""The same, from cold to hot; none that is lost on a light or on a dark ground."""


def rows_of(
    title: str, columns: tuple[str, ...], rows: list[tuple[Text | str, ...]], width: int
) -> Iterator[RenderableType]:
    """A table of ``rows`` under ``title``; on a narrow terminal each row as a heading and a line "name: value; ..."."""
    yield Text(f"\n{title}", style="bold", overflow="fold")
    if width >= TABLE_WIDTH:
        table = Table()
        for name in columns:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
        yield table
        return
    for row in rows:
        text = Text(overflow="fold").append(row[0] if isinstance(row[0], Text) else Text(row[0], style="bold"))
        separator = "\n  "
        for name, cell in zip(columns[1:], row[1:], strict=True):
            if str(cell):
                text.append(f"{separator}{name}: ").append(cell if isinstance(cell, Text) else Text(cell))
                separator = "; "
        yield text


class DoctorView:
    """A ``DoctorReport`` for rich to draw: problems last, where a terminal ends."""

    def __init__(self, report: DoctorReport) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        report, width = self.report, options.max_width
        yield Text("this machine", style="bold")
        for name, value in report.versions.items():
            missing = "yellow" if value == "missing" else ""
            yield Text(f"  {name}: ", overflow="fold").append(value, style=missing)
        for device in report.devices:
            yield Text(f"  {device}", overflow="fold")
        for name, folder in report.caches.items():
            yield Text(f"  cache of {name}: {folder}", overflow="fold")
        yield Text(f"  gradients of modulation: {report.gradients}", overflow="fold")
        yield from self._paths(width)
        yield from self._tests(width)
        yield Text()
        for problem in report.problems:
            yield Text("problem: ", style="red", overflow="fold").append(problem, style="default")
        if report.healthy:
            yield Text(f"no problem found, in {report.seconds:.1f} s", style="green")

    def _paths(self, width: int) -> Iterator[RenderableType]:
        for device in dict.fromkeys(path.device for path in self.report.paths):
            usual, *others = (path for path in self.report.paths if path.device == device)
            names = ("dtype", "head_dim", "mask", "block_q", "block_k")
            call = ", ".join(f"{name} {getattr(usual, name)}" for name in names)
            rows: list[tuple[Text | str, ...]] = [("the usual call", usual.path, usual.reason, usual.launch)]
            for path in others:
                changed = [
                    f"{name} {getattr(path, name)}" for name in names if getattr(path, name) != getattr(usual, name)
                ]
                rows.append((", ".join(changed), path.path, path.reason, path.launch))
            if device == "cpu" and {path.path for path in (usual, *others)} == {"cpu"}:
                yield Text(f"\nkernels on cpu: one path for every {', '.join(names)}", style="bold", overflow="fold")
                continue
            columns = ("call", "kernels", "why no faster ones", "forward launch")
            yield from rows_of(f"kernels on {device}; the usual call: {call}", columns, rows, width)

    def _tests(self, width: int) -> Iterator[RenderableType]:
        if not self.report.tests:
            return
        rows: list[tuple[Text | str, ...]] = []
        for test in self.report.tests:
            verdict = Text("passed", style="green") if test.passed else Text("failed", style="red")
            error = test.message or f"{test.error:.1e} of {test.budget:.0e} ({test.worst})"
            rows.append((test.call, verdict, error, f"{test.seconds:.2f} s"))
        title = "self-test: output and gradients against the definition"
        yield from rows_of(title, ("call", "result", "relative error", "time"), rows, width)


class ComparisonView:
    """A ``ComparisonReport`` for rich to draw."""

    def __init__(self, report: ComparisonReport) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        report, width = self.report, options.max_width
        yield Text(report.title, style="bold", overflow="fold")
        rows: list[tuple[Text | str, ...]] = [(site.path, *_errors(site.errors)) for site in report.sites]
        rows.append((Text("output of the model", style="bold"), *_errors(report.output)))
        columns = ("attention", "gates of zero", "gates as they are", "fitted gates")
        yield from rows_of("relative error against dense", columns, rows, width)
        if report.dense is not None and report.sla is not None:
            rows = [("dense", *_forward(report.dense)), ("sparse-linear", *_forward(report.sla))]
            title = f"one forward on {report.device}, compiled by {report.inner}"
            yield from rows_of(title, ("", "median", "slowest", "peak memory"), rows, width)
        if report.kept:
            paths = grouped_paths(list(report.kept))
            yield Text("\nkept dense: ", style="yellow", overflow="fold").append(", ".join(paths), style="default")


def _errors(errors: Errors) -> tuple[str, str, str]:
    return f"{errors.sparse_only:.4f}", f"{errors.now:.4f}", f"{errors.fitted:.4f}"


def _forward(forward: Forward) -> tuple[str, str, str]:
    return f"{digits(forward.milliseconds)} ms", f"{digits(forward.slowest)} ms", _bytes(forward.peak_bytes)


class BenchView:
    """A ``BenchReport`` for rich to draw."""

    def __init__(self, report: BenchReport) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        report = self.report
        yield Text(report.title, style="bold", overflow="fold")
        errors = ", ".join(f"{form} {error:.1e}" for form, error in report.errors.items())
        yield Text(f"torch {report.torch}, sla-compile {report.sla_compile}; errors first checked: {errors}")
        columns = ["", "forward, ms", "x dense", "with backward, ms", "x dense"]
        memory = any(arm.both_bytes is not None for arm in report.arms)
        rows: list[tuple[Text | str, ...]] = []
        for arm in report.arms:
            row: list[Text | str] = [Text(arm.name, style="" if arm.is_dense else "bold")]
            for what in ("forward", "both"):
                row += [str(getattr(arm, what)), _faster(report.speedup(arm, what))]
            rows.append((*row, *((_bytes(arm.forward_bytes), _bytes(arm.both_bytes)) if memory else ())))
        columns += ["peak", "peak, with backward"] if memory else []
        title = "median (20th to 80th percentile); x dense: times as fast as the fastest dense one"
        yield from rows_of(title, tuple(columns), rows, options.max_width)


def _faster(ratio: float) -> Text:
    return Text(f"{ratio:.2f}", style="" if ratio == 1 else "green" if ratio > 1 else "red")


def _bytes(count: int | None) -> str:
    return "not counted on a CPU" if count is None else f"{quantity(count)}B"


def tuning_table(found: Sequence[Outcome], file: str, gpu: str) -> RenderableType:
    """For rich: a table of the launches found, then those dropped and why, then how to use the file."""
    columns = ("kernel", "head dim", "inputs", "shipped, ms", "best, ms", "launch")
    table = Table(*columns, title=f"{gpu}: the directions that the kernel is in")
    for outcome in found:
        kernel, row, precision = outcome.key
        launch = "shipped" if outcome.best == outcome.shipped else _launch_text(outcome.best)
        times = (f"{ms:.3f}" for ms in (outcome.shipped_ms, outcome.best_ms))
        table.add_row(kernel, str(row), precision, *times, launch)
    dropped = [
        f"dropped: {outcome.key[0]} {outcome.key[1]} {outcome.key[2]}, {_launch_text(launch)}: {why}"
        for outcome in found
        for launch, why in outcome.dropped
    ]
    used = f"written to {file}; in force where SLA_COMPILE_LAUNCHES={file}"
    return Group(table, *(Text(line) for line in (*dropped, used)))


def _launch_text(launch: Launch) -> str:
    sizes = f"{launch.tile_q}x{launch.tile_k}, chunk {launch.chunk}"
    return f"{sizes}, {launch.warps} warps, {launch.stages} stages"


class AtlasView:
    """An ``Atlas`` for rich to draw: a table of the attentions, a heat map of all heads, and what to choose."""

    def __init__(self, atlas: Atlas) -> None:
        self.atlas = atlas

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        atlas, width = self.atlas, options.max_width
        yield Text(atlas.title, style="bold", overflow="fold")
        rows: list[tuple[Text | str, ...]] = []
        branches = [
            name for name in ("sparse", "linear") if any(getattr(s.errors, name) is not None for s in atlas.sites)
        ]
        for site in atlas.sites:
            topk = f"{100 * site.topk:.3g}%"
            if site.suggested is not None:
                topk += f" -> {100 * site.suggested:.3g}%"
            mass = f"{_percent(site.mean('mass', 'critical'))} of {_percent(site.mean('best_mass'))}"
            errors = (*(getattr(site.errors, name) for name in branches), site.errors.sum, site.fitted)
            rows.append((site.path, topk, mass, _percent(site.mean("recall")), *map(_error, errors)))
        columns = ("attention", "topk", "critical mass", "recall", *branches, "sum", "fitted")
        title = "attention in critical blocks, of the best choice's; relative errors of branches, sum and fitted gate"
        yield from rows_of(title, columns, rows, width)
        yield from self._heads(width)
        if atlas.unreached:
            text = Text("\nnot reached: ", style="yellow", overflow="fold")
            yield text.append(", ".join(grouped_paths(atlas.unreached)), style="default")

    def _heads(self, width: int) -> Iterator[RenderableType]:
        """A row for each attention, a cell for each head."""
        most = max(len(site.heads) for site in self.atlas.sites)
        cell = max(1, min(3, (width // 2) // most))
        yield Text("\nattention outside the critical blocks, by head", style="bold", overflow="fold")
        for site in self.atlas.sites:
            line = Text("|", no_wrap=True, overflow="crop")
            for head in site.heads:
                line.append_text(_shade(1 - head.mass["critical"], cell))
            yield line.append(f"| {site.path}"[: max(0, width - cell * len(site.heads) - 1)], style="default")
        yield _legend("0%", "100%")


class SiteView:
    """One attention of an ``Atlas`` for rich to draw: its curve, and the maps of its heads."""

    def __init__(self, site: SiteAtlas) -> None:
        self.site = site

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        site, width = self.site, options.max_width
        batch, heads, queries, keys, dim = site.shape
        yield Text(site.path, style="bold", overflow="fold").append(
            f": {batch} x {heads} x {queries} x {dim}, {keys} keys, blocks {site.block_shape[0]}x"
            f"{site.block_shape[1]}, {site.calls} call(s)",
            style="not bold",
        )
        yield Text("\nerror against topk, gate as it is", style="bold", overflow="fold")
        largest = max(error for _, error in site.curve) or 1.0
        for topk, error in site.curve:
            bar = "#" * round((width - 20) * error / largest) if width > 24 else ""
            mark = "*" if topk == site.topk else " "
            yield Text(f"{mark}{100 * topk:7.3g}% {error:8.4f} ", no_wrap=True, overflow="crop").append(
                bar, style="dodger_blue2"
            )
        times = [batch for batch in site.batches if batch.time is not None]
        if len(times) > 1:
            yield Text("\nover denoising times", style="bold")
            for found in sorted(times, key=lambda found: found.time or 0.0):
                line = f"  {found.time:8.4g}: {_percent(found.critical_mass)} critical, error {found.error:.4f}"
                yield Text(line, overflow="fold")
        for number, head in enumerate(site.heads):
            yield from _head(number, head, width)
        yield _legend("no attention", "most of it")


def _head(number: int, head: HeadAtlas, width: int) -> Iterator[RenderableType]:
    held = ", ".join(f"{name} {_percent(share)}" for name, share in head.mass.items())
    yield Text(f"\nhead {number}", style="bold", overflow="fold").append(
        f": attention in {held}; recall {_percent(head.recall)}, best choice {_percent(head.best_mass)}; weights above "
        f"1/n {_percent(head.above_mean)}, below 1/(100 n) {_percent(head.tiny)}; stable rank of the rest "
        f"{head.rest_rank:.1f}; error sparse {_error(head.errors.sparse)}, linear {_error(head.errors.linear)}, sum "
        f"{_error(head.errors.sum)}",
        style="not bold",
    )
    mass_lines, class_lines = list(_mass_lines(head.map)), list(_class_lines(head.map))
    beside = width >= 2 * len(head.map.mass[0]) + 3
    if beside:
        lines = [mass.append("   ").append_text(kinds) for mass, kinds in zip(mass_lines, class_lines, strict=True)]
    else:
        lines = [*mass_lines, Text(), *class_lines]
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
        yield line
    where = ("left", "right") if beside else ("above", "below")
    yield Text(f"{where[0]}: attention; {where[1]}: # critical, + marginal, . negligible", overflow="fold")


def _mass_lines(found: HeadMap) -> Iterator[Text]:
    """The attention of each cell, a character each, in steps of a factor of three up to the largest."""
    largest = max(max(row) for row in found.mass) or 1.0
    for row in found.mass:
        line = Text()
        for value in row:
            share = value / largest
            line.append_text(_shade(1 + math.log(share, 3) / (len(_SHADES) - 1) if share > 0 else 0.0, 1))
        yield line


def _class_lines(found: HeadMap) -> Iterator[Text]:
    """The class that most blocks of each cell have; critical from a third on, for a cell of many blocks."""
    for critical, negligible in zip(found.critical, found.negligible, strict=True):
        line = Text()
        for chosen, skipped in zip(critical, negligible, strict=True):
            if chosen > 1 / 3:
                line.append("#", style="red1")
            elif skipped > 1 / 2:
                line.append(".", style="grey39")
            else:
                line.append("+", style="dark_cyan")
        yield line


def _shade(share: float, cell: int) -> Text:
    """``cell`` characters for a share of 1; outside of 0 to 1 it is cut."""
    share = min(max(share, 0.0), 1.0)
    character = _SHADES[round(share * (len(_SHADES) - 1))]
    return Text(character * cell, style=_COLOURS[round(share * (len(_COLOURS) - 1))])


def _legend(least: str, most: str) -> Text:
    text = Text(f"{least} ", no_wrap=True, overflow="crop")
    for i in range(len(_SHADES)):
        text.append_text(_shade(i / (len(_SHADES) - 1), 1))
    return text.append(f" {most}", style="default")


def _error(error: float | None) -> str:
    return "none" if error is None else f"{error:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
