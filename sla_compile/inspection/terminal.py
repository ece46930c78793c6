"""What looks inside, as rich draws it: tables where the terminal is wide enough, else lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from sla_compile.reporting.path_patterns import grouped_paths
from sla_compile.reporting.terminal import TABLE_WIDTH, quantity

if TYPE_CHECKING:
    from sla_compile.inspection.comparison import ComparisonReport, Errors, Forward
    from sla_compile.inspection.doctor import DoctorReport

__all__ = ["ComparisonView", "DoctorView"]


def rows_of(
    title: str, columns: tuple[str, ...], rows: list[tuple[Text | str, ...]], width: int
) -> Iterator[RenderableType]:
    """A table of ``rows`` under ``title``; on a narrow terminal each row as lines, "name: value"."""
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
        for name, cell in zip(columns[1:], row[1:], strict=True):
            if str(cell):
                text.append(f"\n  {name}: ").append(cell if isinstance(cell, Text) else Text(cell))
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
            error = test.message or f"{test.error:.1e} of {test.budget:.0e}"
            rows.append((f"{test.device}, {test.dtype}, mask {test.mask}", verdict, error, f"{test.seconds:.2f} s"))
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
        columns = ("attention", "sparse only", "gates as they are", "fitted gates")
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
    memory = "not counted on a CPU" if forward.peak_bytes is None else f"{quantity(forward.peak_bytes)}B"
    return f"{forward.milliseconds:.4g} ms", f"{forward.slowest:.4g} ms", memory
