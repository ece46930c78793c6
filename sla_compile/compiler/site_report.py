"""The report of one attention site: what was decided, why, and what it costs, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sla_compile.common.blocks import forced_blocks
from sla_compile.common.token_orders import RASTER
from sla_compile.compat import size_hint
from sla_compile.compiler.graph_diff import site_diff
from sla_compile.compiler.sites import Site
from sla_compile.config import SLAConfig
from sla_compile.gate import Gate, owner_path
from sla_compile.passes.attention_call import AttentionCall
from sla_compile.passes.cost import (
    BATCH,
    ELEMENT_BYTES,
    HEAD_DIM,
    HEADS,
    KEY_TOKENS,
    TOKENS,
    Cost,
    dense_cost,
    evaluate,
    sla_cost,
    sla_cost_in_runs,
)
from sla_compile.passes.cross_attention import of_different_tensors
from sla_compile.passes.decide import Decision, Keep, Rewrite, Shape, example_shape
from sla_compile.passes.operands import example
from sla_compile.passes.profitability import default_min_tokens
from sla_compile.passes.segments import Segment, within
from sla_compile.passes.token_order import TokenOrder

__all__ = [
    "GraphBreak",
    "SiteReport",
    "describe",
    "graph_break",
    "not_traced",
    "not_used",
    "prepared_only",
    "with_sparsity_of",
]


@dataclass(frozen=True)
class SiteReport:
    """One attention call. FLOPs and bytes are of one forward; None where the sizes are not known."""

    path: str
    """Module path of the owner, for example ``"blocks.0.attn1"``."""
    owner: str
    """Class of the owner; empty where no module owns the attention."""
    ordinal: int
    """Its number among the attentions of the owner, from 0; calls in a loop have the same."""
    rewritten: bool
    reason: str
    """Why it was rewritten or kept."""
    value: str = ""
    """The value that decided."""
    accepted: str = ""
    """What would have been accepted, where it was kept."""
    by_settings: bool = False
    """True where it was kept because the settings say so, and not for its form."""
    condition: str = ""
    """Guard under which this holds, for a symbolic number of tokens."""
    compiled: bool = True
    """False for a gate whose attention no compile has reached yet."""
    ran_dense: bool = False
    """True for one that was compiled, but ran dense in the last call of its owner: where ``rewritten``, because nothing
    around that call was compiled."""
    current: bool = True
    """False for what was compiled for other sizes before, and may still serve those."""
    mask: str = ""
    """The attention mask, where there is one: dtype and shape."""
    causal: bool = False
    """Whether a query sees only the keys up to its own place."""
    shape: dict[str, int | str] = field(default_factory=dict)
    """batch, heads, tokens, head_dim, dtype, device; key_tokens and key_heads where they differ; a symbolic size is a
    string."""
    traced: dict[str, int] = field(default_factory=dict)
    """The sizes of ``shape`` while it was traced, which the numbers below are for; empty where unknown."""
    settings: dict[str, Any] = field(default_factory=dict)
    """topk, bottomk, block_q, block_k, feature_map, linear, gate, sparse_scale, always_critical, max_topk, min_tokens;
    or empty. min_tokens is the number that was used, the device's default where none was set.

    topk and bottomk are those of now where ``set_sparsity`` can change them."""
    order: dict[str, Any] = field(default_factory=dict)
    """Order of the tokens in the blocks: kind, with grid and start where it is not the model's, and the reason where
    it is but another was asked for; empty where kept."""
    segments: tuple[tuple[int, int, int, int], ...] = ()
    """Where the mask lets runs of queries each see another range of keys: first and last query, first and last key of
    each, without the ends; an attention of its own."""
    critical_tokens: tuple[int, ...] = ()
    """start, stop, start, stop, ... of the key tokens, in that order, that are critical in every row."""
    gate_path: str = ""
    gate_parameters: int = 0
    """Numbers in the gate's parameters."""
    flops_before: int | None = None
    flops_after: int | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    formula_before: str = ""
    """FLOPs in short symbols, which ``where`` explains."""
    formula_after: str = ""
    where: tuple[str, ...] = ()
    expression_before: str = ""
    """FLOPs as an exact sympy expression in B, H, N, d (and L for the keys of a cross-attention)."""
    expression_after: str = ""
    call_site: str = ""
    """Where in the owner's forward it is called: functions, each with a line counted from its ``def``, and a column."""
    diff: tuple[str, ...] = ()
    """The graph around the site: lines that start with "- " (before), "+ " (after) or two blanks (both)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        lists = {name: list(getattr(self, name)) for name in ("where", "diff", "critical_tokens")}
        lists["segments"] = [list(segment) for segment in self.segments]
        return {**dataclasses.asdict(self), **lists}


@dataclass(frozen=True)
class GraphBreak:
    """Where and why Dynamo ended a graph; ``file`` is empty where it does not say."""

    reason: str
    file: str = ""
    line: int = 0
    function: str = ""


def describe(site: Site) -> SiteReport:
    """``site`` as plain data that holds on to no graph and no module."""
    decision = site.decision
    shape = example_shape(site.call)
    gate = site.gate
    keep = decision if isinstance(decision, Keep) else None
    plain, traced = _sizes(shape)
    return SiteReport(
        path=site.path,
        owner=type(site.owner).__name__ if site.owner is not None else "",
        ordinal=site.ordinal,
        rewritten=keep is None,
        reason=_kind(site.call, shape) if keep is None else keep.reason,
        value=_sizes_in_words(plain, _segments(decision)) if keep is None else keep.value,
        accepted=keep.accepted if keep is not None else "",
        by_settings=keep is not None and keep.by_settings,
        condition=decision.condition or "",
        mask=_mask(site.call),
        causal=site.call.is_causal is True,
        shape=plain,
        traced=traced,
        settings=_settings(site.config, shape) if keep is None else {},
        order=_order(decision.order) if isinstance(decision, Rewrite) else {},
        segments=_segments(decision),
        critical_tokens=decision.always_critical if isinstance(decision, Rewrite) else (),
        gate_path=site.gate_path if keep is None else "",
        call_site=site.call_site,
        gate_parameters=_count(gate) if gate is not None and keep is None else 0,
        diff=site_diff(site),
        **(_costs(site, shape, traced) if shape is not None else {}),
    )


def _settings(config: SLAConfig, shape: Shape | None = None) -> dict[str, Any]:
    always = config.always_critical
    ranges = always if isinstance(always, str) else [list(pair) for pair in always]
    form = {"gate": config.gate, "sparse_scale": config.sparse_scale}
    least = config.min_tokens
    if least is None and shape is not None:
        least = default_min_tokens(shape.device.type)
    further = {"always_critical": ranges, "max_topk": config.max_topk, "min_tokens": least}
    return {**config.kernel_options(), **form, **further}


def _order(order: TokenOrder) -> dict[str, Any]:
    placement = order.queries or order.keys
    if placement is None:
        return {"kind": RASTER, **({"reason": order.obstacle} if order.obstacle else {})}
    return {"kind": placement.kind, "grid": list(placement.grid), "start": placement.start}


def _kind(call: AttentionCall, shape: Shape | None) -> str:
    if (shape is not None and shape.keys is not None) or of_different_tensors(call.query, call.key):
        return "cross-attention"
    return "causal self-attention" if call.is_causal is True else "self-attention"


def _sizes_in_words(plain: dict[str, int | str], segments: Sequence[Any]) -> str:
    runs = f", {len(segments)} runs of queries" if segments else ""
    if "key_tokens" in plain:
        return f"{plain['tokens']} queries, {plain['key_tokens']} keys{runs}"
    return f"{plain['tokens']} tokens{runs}"


def _mask(call: AttentionCall) -> str:
    value = example(call.attn_mask)
    if not isinstance(value, torch.Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')} ({', '.join(map(str, value.shape))})"


def _sizes(shape: Shape | None) -> tuple[dict[str, int | str], dict[str, int]]:
    """The sizes as the graph has them, and as they were while it was traced."""
    if shape is None:
        return {}, {}
    sizes = shape.sizes
    plain: dict[str, int | str] = {name: size if isinstance(size, int) else str(size) for name, size in sizes.items()}
    hints = {name: size_hint(size) for name, size in sizes.items()}
    traced = {name: hint for name, hint in hints.items() if hint is not None}
    details = {"dtype": str(shape.dtype).removeprefix("torch."), "device": str(shape.device)}
    return {**plain, **details}, traced if len(traced) == len(sizes) else {}


def _costs(site: Site, shape: Shape, traced: dict[str, int]) -> dict[str, Any]:
    group = 1 if shape.key_heads is None else int(shape.heads) // shape.key_heads
    form = {"cross": shape.keys is not None, "causal": site.call.is_causal is True, "group": group}
    dense = dense_cost(**form)
    after = dense
    if isinstance(site.decision, Rewrite):
        ranges, segments = site.decision.always_critical, _segments(site.decision)
        after = _sparse_cost(_settings(site.config), ranges, traced, form, segments)
    numbers = {**_numbers("before", dense, traced, shape.dtype), **_numbers("after", after, traced, shape.dtype)}
    return {"where": after.where, **numbers}


def _sparse_cost(
    settings: Mapping[str, Any],
    ranges: tuple[int, ...],
    traced: dict[str, int],
    form: dict[str, Any],
    segments: Sequence[tuple[int, int, int, int]],
) -> Cost:
    """The cost with ``settings``, as ``_settings`` gives them; ``traced`` are the sizes, empty where unknown."""
    how = [settings[name] for name in ("topk", "block_q", "block_k", "linear")]
    if segments:
        runs = [
            (
                last - first,
                stop - start,
                _forced(settings, within(ranges, Segment(first, last, start, stop)), stop - start),
            )
            for first, last, start, stop in segments
        ]
        return sla_cost_in_runs(*how, tuple(runs), form["group"])
    return sla_cost(*how, forced=_forced(settings, ranges, traced.get("key_tokens", traced.get("tokens", 0))), **form)


def _forced(settings: Mapping[str, Any], ranges: Sequence[int], keys: int) -> int:
    """The number of key blocks, of ``keys``, that are critical in every row."""
    touched = forced_blocks(list(ranges), keys, settings["block_k"])
    return len({block for first, last in touched for block in range(first, last)})


def _segments(decision: Decision) -> tuple[tuple[int, int, int, int], ...]:
    return () if isinstance(decision, Keep) else tuple(dataclasses.astuple(one) for one in decision.segments)


def _numbers(when: str, cost: Cost, traced: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a report that say ``cost``, before or after."""
    numbers: dict[str, Any] = {f"formula_{when}": cost.formula, f"expression_{when}": cost.expression}
    if traced:
        known = {
            BATCH: traced["batch"],
            HEADS: traced["heads"],
            TOKENS: traced["tokens"],
            KEY_TOKENS: traced.get("key_tokens", traced["tokens"]),
            HEAD_DIM: traced["head_dim"],
            ELEMENT_BYTES: dtype.itemsize,
        }
        numbers[f"flops_{when}"] = evaluate(cost.flops, known)
        numbers[f"bytes_{when}"] = evaluate(cost.bytes, known)
    return numbers


def graph_break(gm: fx.GraphModule) -> GraphBreak | None:
    """The graph break that ended ``gm``; None where it is the end of its function."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return None
    text = next((line.strip() for line in str(reason.reason).splitlines() if line.strip()), "no reason given")
    if not reason.user_stack:
        return GraphBreak(text)
    frame = reason.user_stack[-1]
    return GraphBreak(text, frame.filename, frame.lineno or 0, frame.name)


def with_sparsity_of(report: SiteReport, gate: Gate | None) -> SiteReport:
    """``report`` with the topk and bottomk that ``gate``'s buffer has now, and their cost; as it is without one."""
    if gate is None or gate.sparsity is None or not report.settings:
        return report
    topk, bottomk = gate.shares()
    settings = {**report.settings, "topk": topk, "bottomk": bottomk}
    if not report.traced:
        return dataclasses.replace(report, settings=settings)
    group = report.traced["heads"] // report.traced.get("key_heads", report.traced["heads"])
    form = {"cross": "key_tokens" in report.shape, "causal": report.causal, "group": group}
    after = _sparse_cost(settings, report.critical_tokens, report.traced, form, report.segments)
    dtype = getattr(torch, str(report.shape["dtype"]))
    numbers = _numbers("after", after, report.traced, dtype)
    return dataclasses.replace(report, settings=settings, where=after.where, **numbers)


def prepared_only(gate: Gate, owner: nn.Module) -> SiteReport:
    """The report of a gate whose attention no compile has reached."""
    accepted = 'torch.compile(model, backend="sla") and a call'
    return dataclasses.replace(not_used(gate, owner, "prepared, not compiled yet", accepted), compiled=False)


def not_traced(report: SiteReport) -> SiteReport:
    """``report`` of an attention that the last call of its owner, a compiled one, ran outside every graph."""
    return dataclasses.replace(
        report,
        rewritten=False,
        compiled=True,
        ran_dense=True,
        reason="compiled, but the last call ran dense",
        value="outside every graph",
        accepted="a graph that holds the attention and its owner",
        condition="",
        order={},
        critical_tokens=(),
        flops_after=report.flops_before,
        bytes_after=report.bytes_before,
        formula_after="",
        expression_after=report.expression_before,
        where=(),
        diff=(),
    )


def not_used(gate: Gate, owner: nn.Module, reason: str, accepted: str) -> SiteReport:
    """The report of a ``gate`` without a known attention, for this ``reason``."""
    return SiteReport(
        path=owner_path(gate.path),
        owner=type(owner).__name__,
        ordinal=gate.ordinal,
        rewritten=False,
        reason=reason,
        accepted=accepted,
        settings=_settings(gate.config),
        gate_path=gate.path,
        call_site=gate.call_site,
        gate_parameters=_count(gate),
    )


def _count(gate: Gate) -> int:
    return sum(parameter.numel() for parameter in gate.parameters())
