"""Reports and gate files on a terminal of any width: tables where they fit, lists where they do not."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sla_compile.compiler.site_report import SiteReport

if TYPE_CHECKING:
    from sla_compile.reporting.model_report import Report

__all__ = [
    "TABLE_WIDTH",
    "GatesView",
    "ReportView",
    "Row",
    "group_sites",
    "grouped_paths",
    "path_pattern",
    "plain_text",
    "quantity",
]

TABLE_WIDTH = 88
"""Below this many columns a table is a list."""

_STYLES = {"rewritten": "green", "kept": "yellow", "prepared": "cyan"}
_DIFF_STYLES = {"-": "red", "+": "green"}


def plain_text(view: Any, width: int) -> str:
    """``view`` as ASCII text of at most ``width`` columns, without colours or trailing blanks."""
    buffer = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(view)
    buffer.seek(0)
    return "\n".join(line.rstrip() for line in buffer.read().splitlines())


def quantity(number: float) -> str:
    """``number`` to three digits with its prefix: 1.2 T."""
    for size, prefix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + prefix
    return f"{number:.0f}"


def change(before: float, after: float, unit: str = "") -> str:
    """``before -> after (ratio)``, or the one number where nothing changed."""
    if before == after or not before or not after:
        return quantity(before) + unit if before == after else f"{quantity(before)}{unit} -> {quantity(after)}{unit}"
    ratio = before / after
    text = f"{ratio:.1f}x less" if ratio > 1 else f"{1 / ratio:.1f}x more"
    return f"{quantity(before)}{unit} -> {quantity(after)}{unit} ({text})"


@dataclass(frozen=True)
class Row:
    """Sites that differ in nothing but their paths, shown as one."""

    pattern: str
    first: SiteReport
    count: int


def group_sites(sites: Sequence[SiteReport]) -> list[Row]:
    """Identical sites as one row each, in the order of their first."""
    groups: dict[Any, list[SiteReport]] = {}
    for site in sites:
        shape = tuple(part if not part.isdigit() else "" for part in site.path.split("."))
        value = "" if site.value == site.path else site.value
        same = dataclasses.replace(site, path="", gate_path="", diff=(), value=value)
        groups.setdefault((shape, json.dumps(same.to_dict(), sort_keys=True)), []).append(site)
    rows = []
    for members in groups.values():
        calls = Counter(site.path for site in members)
        for pattern, paths in _patterns(list(calls)):
            first = next(site for site in members if site.path == paths[0])
            rows.append(Row(pattern, first, sum(calls[path] for path in paths)))
    return rows


def path_pattern(paths: Sequence[str]) -> list[str]:
    """``paths``, alike but for numbers, in as few patterns as name exactly them: ``blocks.{0..29}.attn1``."""
    return [pattern for pattern, _ in _patterns(list(paths))]


def _patterns(paths: list[str]) -> Iterator[tuple[str, list[str]]]:
    split = [path.split(".") for path in paths]
    columns = [sorted(set(column), key=_number) for column in zip(*split, strict=True)]
    product = 1
    for column in columns:
        product *= len(column)
    if product == len(paths):
        yield ".".join(_braces(column) for column in columns), paths
        return
    first = next(i for i, column in enumerate(columns) if len(column) > 1)
    for value in columns[first]:
        yield from _patterns([path for path, parts in zip(paths, split, strict=True) if parts[first] == value])


def _number(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (-1, part)


def _braces(values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    runs: list[list[int]] = []
    for number in map(int, values):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return "{" + ",".join(texts) + "}"


class ReportView:
    """A ``Report`` as rich renders it."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.rows = group_sites(report.sites)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self._title()
        if self.rows:
            width = options.max_width
            yield self._table(width) if width >= TABLE_WIDTH else self._list()
            yield self._totals()
        yield from self._formulas()
        yield from self._breaks()
        yield from self._untrained()
        yield from self._diffs()

    def _title(self) -> Text:
        report, totals = self.report, self.report.totals
        title = Text(report.model, style="bold")
        if not totals.attentions:
            found = "no call of scaled_dot_product_attention in the traced graphs"
            nothing = 'no attention compiled by backend="sla" yet, and no gate'
            return title.append(f": {nothing if report.compiled else found}", style="not bold")
        verb = "are" if report.compiled else "would be"
        text = f": {totals.rewritten} of {totals.attentions} attentions {verb} sparse-linear"
        if totals.not_compiled:
            text += f", {totals.not_compiled} not compiled yet"
        return title.append(text, style="not bold")

    def _table(self, width: int) -> Table:
        modules = [_module(row) for row in self.rows]
        free = width - 16  # frames and padding of five columns
        first = min(max(module.cell_len for module in modules), free // 3)
        rest = free - first - 10
        table = Table(show_lines=len(self.rows) < 20)
        for name, most in (
            ("module", first),
            ("B x H x N x d", rest * 3 // 11),
            ("decision", rest * 5 // 11),
            ("FLOPs of each", rest * 3 // 11),
            ("gate parameters", 10),
        ):
            table.add_column(name, overflow="fold", max_width=most)
        for row, module in zip(self.rows, modules, strict=True):
            site = row.first
            table.add_row(module, _shape(site), _decision(site), _flops(site), _gate(site))
        return table

    def _list(self) -> Padding:
        text = Text(overflow="fold")
        for row in self.rows:
            site = row.first
            text.append_text(_module(row)).append("\n")
            for label, part in (
                ("", _shape(site)),
                ("", _decision(site)),
                ("FLOPs: ", _flops(site)),
                ("gate parameters: ", _gate(site)),
            ):
                if part:
                    text.append(f"  {label}").append_text(part).append("\n")
        return Padding(text, (1, 0, 0, 0))

    def _totals(self) -> Text:
        totals = self.report.totals
        text = Text(overflow="fold")
        if totals.flops_before:
            text.append(f"attention of one forward: {change(totals.flops_before, totals.flops_after)} FLOPs, ")
            text.append(f"memory traffic {change(totals.bytes_before, totals.bytes_after, 'B')}\n")
        if totals.sizes_unknown:
            text.append(f"sizes unknown, not in these sums: {totals.sizes_unknown}\n")
        if totals.gate_parameters:
            text.append(f"gate parameters: {totals.gate_parameters:,}\n")
        return text

    def _formulas(self) -> Iterator[Text]:
        """The distinct formulas, with the settings that go with them."""
        lines: dict[str, None] = {}
        for site in (row.first for row in self.rows):
            if site.formula_before:
                form = " (L keys)" * ("key_tokens" in site.shape) + " (causal)" * site.causal
                lines[f"dense{form}: {site.formula_before}"] = None
        for site in (row.first for row in self.rows):
            if site.settings:
                lines[_settings(site.settings) + _order(site.order)] = None
                if site.formula_after:
                    where = f", where {', '.join(site.where)}" if site.where else ""
                    lines[f"  FLOPs {site.formula_after}{where}"] = None
        if lines:
            text = Text("FLOPs of one forward, of each attention\n", style="bold", overflow="fold")
            yield text.append("".join(f"{line}\n" for line in lines), style="not bold")

    def _breaks(self) -> Iterator[Panel]:
        counts = Counter(self.report.graph_breaks)
        if not counts:
            return
        text = Text(overflow="fold")
        for found, count in counts.items():
            place = f" at {found.file}:{found.line} in {found.function}" if found.file else ""
            text.append(f"{found.reason}{place}" + f" ({count} times)" * (count > 1) + "\n")
        text.rstrip()
        yield Panel(text, title=f"graph breaks: {sum(counts.values())}", border_style="yellow")

    def _untrained(self) -> Iterator[Panel]:
        paths = self.report.untrained_gates
        if not paths:
            return
        text = Text(overflow="fold")
        text.append(f"{len(paths)} gate(s) still zero: ")
        text.append(", ".join(grouped_paths(paths)))
        text.append(". Fine-tune the model or load trained gates; until then only the sparse branch counts.")
        yield Panel(text, title="untrained gates", border_style="red")

    def _diffs(self) -> Iterator[RenderableType]:
        for row in self.rows:
            if not row.first.diff:
                continue
            more = f" (and {row.count - 1} more like it)" if row.count > 1 else ""
            yield Text(f"graph at {row.first.path or 'the model'}{more}", style="bold", overflow="fold")
            lines = Table.grid(padding=(0, 1, 0, 0))
            lines.add_column(width=1)
            lines.add_column(overflow="fold")
            for line in row.first.diff:
                style = _DIFF_STYLES.get(line[0], "dim")
                lines.add_row(Text(line[0], style=style), Text(line[2:], style=style))
            yield Padding(lines, (0, 0, 1, 0))


def grouped_paths(paths: Sequence[str]) -> list[str]:
    """``path_pattern`` of each group of ``paths`` that are alike but for numbers."""
    groups: dict[Any, list[str]] = {}
    for path in paths:
        groups.setdefault(tuple("" if part.isdigit() else part for part in path.split(".")), []).append(path)
    return [pattern for group in groups.values() for pattern in path_pattern(group)]


def _module(row: Row) -> Text:
    site = row.first
    text = Text(row.pattern or ("the model itself" if site.owner else "a plain function"), style="bold")
    notes = [f"attention {site.ordinal + 1} in it"] if site.ordinal else []
    notes += [f"{row.count} sites"] if row.count > 1 else []
    return text.append(f" ({', '.join(notes)})" if notes else "", style="not bold dim")


def _shape(site: SiteReport) -> Text:
    shape = site.shape
    if not shape:
        return Text()
    names = ("batch", "heads", "tokens", "head_dim")
    text = " x ".join(str(shape[name]) for name in names) + f" {shape['dtype']} on {shape['device']}"
    if "key_tokens" in shape:
        text += f", {shape['key_tokens']} keys"
    if site.causal:
        text += ", causal"
    if site.mask:
        text += f", mask {site.mask}"
    symbols = [f"{shape[name]} = {value}" for name, value in site.traced.items() if shape[name] != value]
    return Text(text + (f" (traced at {', '.join(symbols)})" if symbols else ""))


def _decision(site: SiteReport) -> Text:
    if site.rewritten:
        text = Text("rewritten", style=_STYLES["rewritten"]).append(f": {site.reason}, {site.value}", style="default")
        return text.append(f", while {site.condition}" if site.condition else "", style="default")
    kept = "kept: " if site.compiled else ""
    text = Text(f"{kept}{site.reason}", style=_STYLES["kept" if site.compiled else "prepared"])
    text.append(f": {site.value}" if site.value and site.value != site.path else "", style="default")
    text.append(f", while {site.condition}" if site.condition else "", style="default")
    label = "accepted" if site.compiled else "next"
    return text.append(f" ({label}: {site.accepted})" if site.accepted else "", style="dim")


def _flops(site: SiteReport) -> Text:
    if site.flops_before is None or site.flops_after is None:
        return Text("unknown" if site.compiled else "", style="dim")
    return Text(change(site.flops_before, site.flops_after))


def _gate(site: SiteReport) -> Text:
    if not site.gate_parameters:
        return Text()
    scaled = ", with scale" if site.settings["sparse_scale"] else ""
    return Text(f"{site.gate_parameters:,} {str(site.settings['gate']).replace('_', ' ')}{scaled}")


def _settings(settings: dict[str, Any]) -> str:
    texts = [f"{start} to {'the end' if stop is None else stop}" for start, stop in settings["always_critical"]]
    ranges = ", ".join(texts)
    always = f", key tokens {ranges} always critical" if ranges else ""
    scaled = ", sparse branch scaled by head" if settings["sparse_scale"] else ""
    most = "" if settings["max_topk"] is None else f" (at most {100 * settings['max_topk']:g}%)"
    return (
        f"sparse-linear: topk {100 * settings['topk']:g}%{most}, bottomk {100 * settings['bottomk']:g}%, blocks "
        f"{settings['block_q']}x{settings['block_k']}, feature map {settings['feature_map']}, "
        f"linear {settings['linear']}{scaled}{always}"
    )


def _order(order: dict[str, Any]) -> str:
    if "grid" in order:
        start = f" from token {order['start']} on" if order["start"] else ""
        return f", {order['kind']} of {' x '.join(map(str, order['grid']))} tokens{start}"
    return f", tokens in the model's order: {order['reason']}" if "reason" in order else ""


def _reorder(config: dict[str, Any]) -> str:
    if config["reorder"] == "raster":
        return ""
    grid = "the grid seen in the model" if config["grid"] is None else " x ".join(map(str, config["grid"])) + " tokens"
    return f", {config['reorder']} of {grid}"


class GatesView:
    """The gates of a file, given as dictionaries with path, shape, dtype, weight_norm, bias_norm, config, any scale."""

    def __init__(self, name: str, gates: Sequence[dict[str, Any]]) -> None:
        self.name = name
        self.gates = gates

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text(self.name, style="bold", overflow="fold").append(f": {len(self.gates)} gate(s)", style="not bold")
        if options.max_width >= TABLE_WIDTH:
            yield self._table()
        else:
            text = Text(overflow="fold")
            for gate in self.gates:
                text.append(f"{gate['path']}\n", style="bold")
                text.append("".join(f"  {part}\n" for part in _gate_cells(gate)), style="not bold")
            yield text
        for settings in dict.fromkeys(_settings(gate["config"]) + _reorder(gate["config"]) for gate in self.gates):
            yield Text(settings, overflow="fold")

    def _table(self) -> Table:
        table = Table()
        for name in ("gate", "weight", "norms", "settings"):
            table.add_column(name, overflow="fold")
        for gate in self.gates:
            table.add_row(Text(gate["path"], style="bold"), *map(Text, _gate_cells(gate)))
        return table


def _gate_cells(gate: dict[str, Any]) -> tuple[str, str, str]:
    config = gate["config"]
    return (
        " x ".join(map(str, gate["shape"])) + f" {gate['dtype']}",
        f"weight {gate['weight_norm']:.4g}, bias {gate['bias_norm']:.4g}" + _scale_range(gate.get("scale", [])),
        f"topk {100 * config['topk']:g}%, {config['gate'].replace('_', ' ')}, {gate['heads']} heads",
    )


def _scale_range(scales: Sequence[float]) -> str:
    return f", scale {min(scales):.4g} to {max(scales):.4g}" if scales else ""
