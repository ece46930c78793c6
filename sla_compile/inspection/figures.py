"""What looks inside, as matplotlib draws it. It is imported when something is drawn: the extra ``bench``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_compile.inspection.timing import digits

if TYPE_CHECKING:
    from sla_compile.inspection.atlas import Atlas
    from sla_compile.inspection.benchmark import BenchReport
    from sla_compile.inspection.comparison import ComparisonReport
    from sla_compile.inspection.site_atlas import HeadAtlas, SiteAtlas

__all__ = ["bench_figure", "checked_kind", "comparison_figure", "new_figure", "sheet", "site_page", "write"]

DRAWN = (".png", ".svg", ".pdf")
DENSE, SPARSE, NOW, FITTED = "0.6", "#cc6677", "#332288", "#44aa99"
"""Colours that are told apart by the colour-blind too."""
CLASSES = {"critical": "#cc3355", "marginal": "#88ccee", "negligible": "0.9"}
_HEADS_PER_ROW, _MOST_NAMES = 6, 10


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` of this size in inches, outside pyplot's state.

    Raises ImportError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a figure needs matplotlib: pip install "sla-compile[bench]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def checked_kind(path: str | Path, kinds: Collection[str]) -> str:
    """Which of ``kinds`` the ending of ``path`` asks for: "figure" for .png, .svg and .pdf, else the ending itself.

    Raises ValueError for one that is not among them.
    """
    suffix = Path(path).suffix
    kind = "figure" if suffix in DRAWN else suffix.removeprefix(".")
    if kind not in kinds:
        accepted = ", ".join([*DRAWN, *(f".{name}" for name in kinds if name != "figure")])
        raise ValueError(f"path: got {str(path)!r}; accepted: a name that ends in one of {accepted}")
    return kind


def write(path: str | Path, makers: Mapping[str, Callable[[], Any]]) -> None:
    """Write to ``path`` what the one of ``makers`` gives that `checked_kind` names.

    Raises ValueError, before anything is made, for another ending.
    """
    path, kind = Path(path), checked_kind(path, makers)
    made = makers[kind]()
    if kind == "figure":
        made.savefig(path, dpi=120)
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
    figure = new_figure(5.5 + 2.2 * len(costs), 1.6 + min(0.35, 6 / len(report.sites)) * (len(report.sites) + 1))
    axes = figure.subplots(1, 1 + len(costs), width_ratios=[5, *[2] * len(costs)], squeeze=False)[0]
    _error_bars(axes[0], report)
    for place, (label, values) in zip(axes[1:], costs, strict=True):
        bars = place.bar(["dense", "SLA"], values, color=[DENSE, NOW])
        place.bar_label(bars, fmt=digits, fontsize="small")
        place.set_title(label, fontsize="small")
        place.margins(y=0.15)
    figure.suptitle(f"{report.model} on {report.device}", fontsize="medium")
    return figure


def _error_bars(axes: Any, report: ComparisonReport) -> None:
    names = [*(site.path.removesuffix(".sla") for site in report.sites), "output"]
    errors = [*(site.errors for site in report.sites), report.output]
    places = [-i for i in range(len(names))]
    for shift, label, colour, field in (
        (0.25, "gates of zero", SPARSE, "sparse_only"),
        (0.0, "gates as they are", NOW, "now"),
        (-0.25, "fitted gates", FITTED, "fitted"),
    ):
        values = [getattr(error, field) for error in errors]
        axes.barh([place + shift for place in places], values, height=0.24, label=label, color=colour)
    axes.set_yticks(places, names, fontsize="small" if len(names) <= 12 else 6)
    axes.margins(y=0.01)
    axes.set_xlabel("relative error against dense")
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)


def bench_figure(report: BenchReport) -> Any:
    """Bars of a forward, and of one with its backward, by arm, with their spread."""
    figure = new_figure(9, 1.3 + 0.45 * len(report.arms))
    for place, (what, title) in zip(
        figure.subplots(1, 2, sharey=True), (("forward", "forward"), ("both", "forward and backward")), strict=True
    ):
        times = [getattr(arm, what) for arm in report.arms]
        medians = [time.median for time in times]
        spread = [
            [time.median - time.low for time in times],
            [time.high - time.median for time in times],
        ]
        colours = [DENSE if arm.is_dense else NOW for arm in report.arms]
        bars = place.barh([arm.name for arm in report.arms], medians, xerr=spread, color=colours, capsize=3)
        ratios = (report.speedup(arm, what) for arm in report.arms)
        labels = [f"{digits(time.median)} ms, {ratio:.2g}x" for time, ratio in zip(times, ratios, strict=True)]
        place.bar_label(bars, labels, padding=6, fontsize="small")
        place.set_title(title, fontsize="medium")
        place.set(xlabel="ms", xlim=(0, 1.5 * max(medians)))
    place.invert_yaxis()  # dense on top; the axes share it
    figure.get_layout_engine().set(wspace=0.05)
    figure.suptitle(report.title, fontsize="small", wrap=True)
    return figure


def sheet(atlas: Atlas) -> Any:
    """One sheet for a model: attention by class, errors, curves of error against topk, and topks as suggested."""
    figure = new_figure(12, 5.5)
    (mass, errors), (curves, topks) = figure.subplots(2, 2)
    places = list(range(len(atlas.sites)))
    names = [site.path.removesuffix(".sla") for site in atlas.sites]
    below = [0.0] * len(places)
    for kind, colour in CLASSES.items():
        shares = [100 * site.mean("mass", kind) for site in atlas.sites]
        mass.bar(places, shares, bottom=below, color=colour, label=kind)
        below = [a + b for a, b in zip(below, shares, strict=True)]
    best = [100 * site.mean("best_mass") for site in atlas.sites]
    mass.plot(places, best, "k_", label="best choice")
    mass.set(title="true attention by class of block", ylabel="%")
    # the sum of an untrained gate is the sparse branch: it lies inside the wide line
    for field, colour, width in (("sparse", SPARSE, 5.0), ("linear", DENSE, 1.5), ("sum", NOW, 1.5)):
        values = [math.nan if (e := getattr(site.errors, field)) is None else e for site in atlas.sites]
        if not all(map(math.isnan, values)):  # virtual keys have no branches
            errors.plot(places, values, "o-", color=colour, label=field, linewidth=width, markersize=4 + width)
    errors.plot(places, [site.fitted for site in atlas.sites], "o-", color=FITTED, label="fitted gate")
    errors.set(title="relative error against dense", ylim=(0, None))
    _curves(curves, atlas)
    topks.bar(places, [100 * (s.topk if s.suggested is None else s.suggested) for s in atlas.sites], color=NOW)
    topks.axhline(100 * atlas.budget, color=SPARSE, linestyle="--", label="budget")
    topks.set(title="topk, as allocate would set it" if atlas.allocation else "topk", ylabel="%")
    step = -(-len(names) // _MOST_NAMES)
    for axes in (mass, errors, topks):
        axes.set_xticks(places[::step], names[::step], rotation=30, ha="right", fontsize=7)
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.suptitle(atlas.title, fontsize="medium", wrap=True)
    return figure


def _curves(axes: Any, atlas: Atlas) -> None:
    from matplotlib import colormaps

    for i, site in enumerate(atlas.sites):
        colour = colormaps["viridis"](i / max(1, len(atlas.sites) - 1))
        label = site.path.removesuffix(".sla") if i in (0, len(atlas.sites) - 1) else None
        axes.plot(*zip(*((100 * topk, error) for topk, error in site.curve), strict=True), color=colour, label=label)
    axes.axvline(100 * atlas.budget, color=SPARSE, linestyle="--")
    axes.set(title="error against topk, first to last attention", xlabel="topk, %", ylim=(0, None))
    axes.legend(fontsize="x-small", loc="upper right", frameon=False)


def site_page(site: SiteAtlas) -> Any:
    """One page for an attention: for each head its attention by blocks, and under it the classes of the blocks."""
    from matplotlib.patches import Patch

    columns = min(_HEADS_PER_ROW, len(site.heads))
    lines = -(-len(site.heads) // columns)
    figure = new_figure(max(5.0, 2.3 * columns), 1 + 4.6 * lines)
    axes = figure.subplots(2 * lines, columns, squeeze=False)
    for number in range(lines * columns):
        line, column = divmod(number, columns)
        pair = axes[2 * line][column], axes[2 * line + 1][column]
        if number < len(site.heads):
            _head_maps(pair, number, site.heads[number])
        else:
            for place in pair:
                place.set_axis_off()
    figure.suptitle(f"{site.path}: attention by block (logarithmic), and its class", fontsize="medium", wrap=True)
    patches = [Patch(color=colour, label=kind) for kind, colour in CLASSES.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


def _head_maps(pair: tuple[Any, Any], number: int, head: HeadAtlas) -> None:
    from matplotlib.colors import LogNorm, to_rgb

    largest = max(max(row) for row in head.map.mass) or 1.0
    cut = [[max(value, largest / 1e4) for value in row] for row in head.map.mass]
    pair[0].imshow(cut, norm=LogNorm(largest / 1e4, largest), cmap="magma", interpolation="nearest")
    colours = [to_rgb(colour) for colour in CLASSES.values()]
    mixed = [
        [
            [sum(w * c[i] for w, c in zip(_weights(*cell), colours, strict=True)) for i in range(3)]
            for cell in zip(*rows, strict=True)
        ]
        for rows in zip(head.map.critical, head.map.negligible, strict=True)
    ]
    pair[1].imshow(mixed, interpolation="nearest")
    pair[0].set_title(f"head {number}: recall {100 * head.recall:.0f}%", fontsize="small")
    held = f"{100 * head.mass['critical']:.0f}% of attention critical\nerror {head.errors.sum:.3f}"
    pair[1].set_xlabel(held, fontsize="small")
    for place in pair:
        place.set_xticks([])
        place.set_yticks([])


def _weights(critical: float, negligible: float) -> tuple[float, float, float]:
    """How much of each class's colour a cell gets, for its shares: of a cell of many blocks, few critical ones show."""
    red = math.sqrt(min(max(critical, 0.0), 1.0))
    grey = (1 - red) * math.sqrt(min(max(negligible, 0.0), 1.0))
    return red, 1 - red - grey, grey
