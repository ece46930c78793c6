"""What looks inside, as matplotlib draws it. It is imported when something is drawn: the extra ``bench``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sla_compile.inspection.comparison import ComparisonReport

__all__ = ["comparison_figure", "new_figure", "write"]

DRAWN = (".png", ".svg", ".pdf")
DENSE, SPARSE, NOW, FITTED = "0.6", "#cc6677", "#332288", "#44aa99"
"""Colours that are told apart by the colour-blind too."""


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` of this size in inches, outside pyplot's state.

    Raises ImportError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a figure needs matplotlib: pip install "sla-compile[bench]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def write(path: str | Path, makers: Mapping[str, Callable[[], Any]]) -> None:
    """Write to ``path`` what one of ``makers`` gives: "figure" for .png, .svg and .pdf, else by the ending itself.

    Raises ValueError, before anything is made, for another ending.
    """
    path = Path(path)
    kind = "figure" if path.suffix in DRAWN else path.suffix.removeprefix(".")
    if kind not in makers:
        accepted = ", ".join([*DRAWN, *(f".{name}" for name in makers if name != "figure")])
        raise ValueError(f"path: got {str(path)!r}; accepted: a name that ends in one of {accepted}")
    made = makers[kind]()
    if kind == "figure":
        made.savefig(path, dpi=150)
    else:
        path.write_text(made, encoding="utf-8")


def comparison_figure(report: ComparisonReport) -> Any:
    """Errors by site beside the output's, then bars of time and of memory where they were measured."""
    costs: list[tuple[str, list[float]]] = []
    if report.dense is not None and report.sla is not None:
        pair = report.dense, report.sla
        costs.append(("ms of a forward", [forward.milliseconds for forward in pair]))
        peaks = [forward.peak_bytes for forward in pair]
        if None not in peaks:
            costs.append(("GiB at peak", [(peak or 0) / 2**30 for peak in peaks]))
    figure = new_figure(5 + 2.2 * len(costs), 1.6 + 0.35 * (len(report.sites) + 1))
    axes = figure.subplots(1, 1 + len(costs), width_ratios=[5, *[1.6] * len(costs)], squeeze=False)[0]
    _error_bars(axes[0], report)
    for place, (label, values) in zip(axes[1:], costs, strict=True):
        bars = place.bar(["dense", "SLA"], values, color=[DENSE, NOW])
        place.bar_label(bars, fmt="%.3g")
        place.set_title(label, fontsize="medium")
        place.margins(y=0.15)
    figure.suptitle(f"{report.model} on {report.device}", fontsize="medium")
    return figure


def _error_bars(axes: Any, report: ComparisonReport) -> None:
    names = [*(site.path.removesuffix(".sla") for site in report.sites), "output"]
    errors = [*(site.errors for site in report.sites), report.output]
    places = [-i for i in range(len(names))]
    for shift, label, colour, field in (
        (0.25, "sparse only", SPARSE, "sparse_only"),
        (0.0, "gates as they are", NOW, "now"),
        (-0.25, "fitted gates", FITTED, "fitted"),
    ):
        values = [getattr(error, field) for error in errors]
        axes.barh([place + shift for place in places], values, height=0.24, label=label, color=colour)
    axes.set_yticks(places, names)
    axes.set_xlabel("relative error against dense")
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
