"""Reports and gate files as rich draws them, on a terminal of any width: tables where they fit, else lists."""

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

from sla_compile.common.limits import TAYLOR
from sla_compile.compiler.site_report import SiteReport
from sla_compile.reporting.path_patterns import grouped_paths, patterns_with_paths, without_numbers

if TYPE_CHECKING:
    from sla_compile.reporting.model_report import Report

__all__ = [
    "TABLE_WIDTH",
    "GatesView",
    "ReportView",
    "SiteRow",
    "group_sites",
    "plain_text",
    "quantity",
]

TABLE_WIDTH = 88
"""Terminals with fewer columns get a list instead of a table."""

_FRAMES = 16
"""Columns that frames and padding of the table of sites take."""
_GATE_COLUMN = 10
_MAX_ROWS_WITH_LINES = 19
"""Up to so many rows of sites have lines between them."""

_STYLES = {"rewritten": "green", "kept": "yellow", "prepared": "cyan"}
_DIFF_STYLES = {"-": "red", "+": "green"}


def plain_text(view: Any, width: int) -> str:
    """``view``, anything rich can print, as ASCII text of at most ``width`` columns, with no colours."""
    buffer = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(view)
    buffer.seek(0)
    return "\n".join(line.rstrip() for line in buffer.read().splitlines())


def quantity(number: float) -> str:
    """``number`` to three digits with an SI prefix: 1.23 T."""
    for size, prefix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * size:  # 999.5 k rounds to 1.00 M
            return f"{number / size:#.3g}".rstrip(".") + prefix
    return f"{number:.0f}"


def before_and_after(before: float, after: float, unit: str = "") -> str:
    """``before -> after (ratio)``; without the ratio if one is zero, and only one number if they are equal."""
    if before == after:
        return f"{quantity(before)}{unit}"
    text = f"{quantity(before)}{unit} -> {quantity(after)}{unit}"
    if not before or not after:
        return text
    ratio = before / after
    return f"{text} ({ratio:.1f}x less)" if ratio > 1 else f"{text} ({1 / ratio:.1f}x more)"


@dataclass(frozen=True)
class SiteRow:
    """Sites that differ in nothing but their paths, shown as one row."""

    pattern: str
    """All their paths: ``blocks.{0..29}.attn1``."""
    first: SiteReport
    count: int
    """Calls, of all their modules; of one module several where its call site is in a loop, or it is called again."""
    modules: int


def group_sites(sites: Sequence[SiteReport]) -> list[SiteRow]:
    """One row for each set of sites alike but for their paths, ordered by the first site of each."""
    groups: dict[Any, list[SiteReport]] = {}
    for site in sites:
        value = "" if site.value == site.path else site.value
        without_path = dataclasses.replace(site, path="", gate_path="", diff=(), value=value)
        key = without_numbers(site.path), json.dumps(without_path.to_dict(), sort_keys=True)
        groups.setdefault(key, []).append(site)
    rows = []
    for members in groups.values():
        calls = Counter(site.path for site in members)
        for pattern, paths in patterns_with_paths(list(calls)):
            first = next(site for site in members if site.path == paths[0])
            rows.append(SiteRow(pattern, first, sum(calls[path] for path in paths), len(paths)))
    return rows


class ReportView:
    """A ``Report`` for rich to draw."""

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
        yield from self._outside()
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
        if totals.ran_dense:
            text += f"; {totals.ran_dense} of them ran dense in the last call"
        return title.append(text, style="not bold")

    def _table(self, width: int) -> Table:
        modules = [_module(row) for row in self.rows]
        free = width - _FRAMES
        first = min(max(module.cell_len for module in modules), free // 3)
        rest = free - first - _GATE_COLUMN
        table = Table(show_lines=len(self.rows) <= _MAX_ROWS_WITH_LINES)
        for name, max_width in (
            ("module", first),
            ("B x H x N x d", rest * 3 // 11),
            ("decision", rest * 5 // 11),
            ("FLOPs of each", rest * 3 // 11),
            ("gate parameters", _GATE_COLUMN),
        ):
            table.add_column(name, overflow="fold", max_width=max_width)
        for row, module in zip(self.rows, modules, strict=True):
            site = row.first
            table.add_row(module, _shape(site), _decision(site), _flops(site), _gate_parameters(site))
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
                ("gate parameters: ", _gate_parameters(site)),
            ):
                if part:
                    text.append(f"  {label}").append_text(part).append("\n")
        return Padding(text, (1, 0, 0, 0))

    def _totals(self) -> Text:
        totals = self.report.totals
        text = Text(overflow="fold")
        if totals.flops_before:
            text.append(
                f"attention of one forward: {before_and_after(totals.flops_before, totals.flops_after)} FLOPs, "
            )
            text.append(f"memory traffic {before_and_after(totals.bytes_before, totals.bytes_after, 'B')}\n")
        if totals.sizes_unknown:
            text.append(f"sizes unknown, not in these sums: {totals.sizes_unknown}\n")
        if totals.gate_parameters:
            text.append(f"gate parameters: {totals.gate_parameters:,}\n")
        return text

    def _formulas(self) -> Iterator[Text]:
        """Each distinct formula of FLOPs once, under the settings it is for."""
        lines: dict[str, None] = {}  # an ordered set
        for site in (row.first for row in self.rows):
            if site.formula_before:
                keys = " (L keys)" if "key_tokens" in site.shape else ""
                causal = " (causal)" if site.causal else ""
                lines[f"dense{keys}{causal}: {site.formula_before}"] = None
        for site in (row.first for row in self.rows):
            if site.settings:
                lines[_settings_line(site.settings, site.critical_tokens) + _token_order(site.order)] = None
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
            times = f" ({count} times)" if count > 1 else ""
            text.append(f"{found.reason}{place}{times}\n")
        text.rstrip()
        yield Panel(text, title=f"graph breaks: {sum(counts.values())}", border_style="yellow")

    def _outside(self) -> Iterator[Panel]:
        if paths := self.report.outside_graphs:
            names = ", ".join(path or "the model itself" for path in grouped_paths(paths))
            text = Text(f"{names}. It runs dense, if it is called.", overflow="fold")
            yield Panel(text, title=f"attention that no graph holds: {len(paths)}", border_style="yellow")

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


def _module(row: SiteRow) -> Text:
    site = row.first
    text = Text(row.pattern or ("the model itself" if site.owner else "a plain function"), style="bold")
    notes = [f"attention {site.ordinal + 1} in it"] if site.ordinal else []
    notes += [f"{row.modules} sites"] if row.modules > 1 else []
    notes += [f"{row.count} calls"] if row.count > row.modules else []
    return text.append(f" ({', '.join(notes)})" if notes else "", style="not bold dim")


def _shape(site: SiteReport) -> Text:
    shape = site.shape
    if not shape:
        return Text()
    names = ("batch", "heads", "tokens", "head_dim")
    text = " x ".join(str(shape[name]) for name in names) + f" {shape['dtype']} on {shape['device']}"
    if "key_tokens" in shape:
        text += f", {shape['key_tokens']} keys"
    if "key_heads" in shape:
        text += f", {shape['key_heads']} head(s) of keys"
    if site.causal:
        text += ", causal"
    if site.mask:
        text += f", mask {site.mask}"
    symbols = [f"{shape[name]} = {value}" for name, value in site.traced.items() if shape[name] != value]
    return Text(text + (f" (traced at {', '.join(symbols)})" if symbols else ""))


def _decision(site: SiteReport) -> Text:
    if site.rewritten:
        text = Text("rewritten", style=_STYLES["rewritten"]).append(f": {site.reason}, {site.value}", style="default")
        text.append(_when(site), style="default")
        return text.append("; the last call was not compiled, and ran dense" if site.ran_dense else "", style="yellow")
    kept = "kept: " if site.compiled else ""
    text = Text(f"{kept}{site.reason}", style=_STYLES["kept" if site.compiled else "prepared"])
    text.append(f": {site.value}" if site.value and site.value != site.path else "", style="default")
    text.append(_when(site), style="default")
    label = "accepted" if site.compiled else "next"
    return text.append(f" ({label}: {site.accepted})" if site.accepted else "", style="dim")


def _when(site: SiteReport) -> str:
    """For which calls this is the decision."""
    condition = f", while {site.condition}" if site.condition else ""
    return condition if site.current else f"{condition} (compiled before, for calls of these sizes)"


def _flops(site: SiteReport) -> Text:
    if site.flops_before is None or site.flops_after is None:
        return Text("unknown" if site.compiled else "", style="dim")
    return Text(before_and_after(site.flops_before, site.flops_after))


def _gate_parameters(site: SiteReport) -> Text:
    if not site.gate_parameters:
        return Text()
    scaled = ", with scale" if site.settings["sparse_scale"] else ""
    return Text(f"{site.gate_parameters:,}, {_gate_form(site.settings)}{scaled}")


def _gate_form(settings: dict[str, Any]) -> str:
    """Whose the numbers of a gate are. Virtual keys have one for each head, whatever form a weight would have."""
    return "one per head" if settings["linear"] == TAYLOR else str(settings["gate"]).replace("_", " ")


def _settings_line(settings: dict[str, Any], critical_tokens: Sequence[int] = ()) -> str:
    always = _always_critical(settings["always_critical"], critical_tokens)
    scaled = ", sparse branch scaled by head" if settings["sparse_scale"] else ""
    features = "" if settings["linear"] == TAYLOR else f"feature map {settings['feature_map']}, "
    least = "" if not settings["min_tokens"] else f", from {settings['min_tokens']} tokens on"
    limit = "" if settings["max_topk"] is None else f" (at most {100 * settings['max_topk']:g}%)"
    return (
        f"sparse-linear: topk {100 * settings['topk']:g}%{limit}, bottomk {100 * settings['bottomk']:g}%, blocks "
        f"{settings['block_q']}x{settings['block_k']}, {features}"
        f"linear {settings['linear']}{scaled}{always}{least}"
    )


def _always_critical(ranges: str | Sequence[Sequence[int | None]], found: Sequence[int]) -> str:
    """``found`` are the tokens, start, stop, start, stop, ..., that a word in place of ``ranges`` came to."""
    named = isinstance(ranges, str)
    pairs = zip(found[::2], found[1::2], strict=True) if isinstance(ranges, str) else ranges
    texts = [f"{start} to {'the end' if stop is None else stop}" for start, stop in pairs]
    tokens = f"key tokens {', '.join(texts)}" if texts else ""
    if named:
        return f", {ranges} always critical" + (f" ({tokens})" if tokens else "")
    return f", {tokens} always critical" if tokens else ""


def _token_order(order: dict[str, Any]) -> str:
    if "grid" in order:
        start = f" from token {order['start']} on" if order["start"] else ""
        return f", {order['kind']} of {' x '.join(map(str, order['grid']))} tokens{start}"
    return f", tokens in the model's order: {order['reason']}" if "reason" in order else ""


def _reorder_setting(config: dict[str, Any]) -> str:
    if config["reorder"] == "raster":
        return ""
    grid = "the grid seen in the model" if config["grid"] is None else " x ".join(map(str, config["grid"])) + " tokens"
    return f", {config['reorder']} of {grid}"


class GatesView:
    """The gates of a file for rich to draw, each a dictionary as ``python -m sla_compile show --json`` prints it."""

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
        for settings in dict.fromkeys(
            _settings_line(gate["config"]) + _reorder_setting(gate["config"]) for gate in self.gates
        ):
            yield Text(settings, overflow="fold")

    def _table(self) -> Table:
        table = Table()
        for name in ("gate", "parameters", "values", "settings"):
            table.add_column(name, overflow="fold")
        for gate in self.gates:
            table.add_row(Text(gate["path"], style="bold"), *map(Text, _gate_cells(gate)))
        return table


def _gate_cells(gate: dict[str, Any]) -> tuple[str, str, str]:
    config = gate["config"]
    return (
        " x ".join(map(str, gate["shape"])) + f" {gate['dtype']}, {_gate_form(config)}",
        _values(gate),
        f"topk {100 * config['topk']:g}%, {gate['heads']} heads",
    )


def _values(gate: dict[str, Any]) -> str:
    parts = [f"{name} {gate[f'{name}_norm']:.4g}" for name in ("weight", "bias") if f"{name}_norm" in gate]
    for name in ("scale", "shift"):
        if values := gate.get(name):
            parts.append(f"{name} {min(values):.4g} to {max(values):.4g}")
    return ", ".join(parts)
