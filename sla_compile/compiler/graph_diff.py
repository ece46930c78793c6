"""The graph before and after around one rewritten site, as a few readable lines.

It is made after the rewrite, when the markers that bound the gates are gone. A parameter goes by its module path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from sla_compile.compiler.marking import GATE_TENSOR
from sla_compile.compiler.sites import Site
from sla_compile.passes.hoist_gathers import MOVED_HERE
from sla_compile.passes.memory_layout import REWRITTEN_FROM
from sla_compile.passes.operands import REPLACED_BY, Operand

__all__ = ["site_diff"]

_LINES_BEFORE, _LINES_AFTER = 3, 2
_MOST_ARGUMENTS = 12


def site_diff(site: Site) -> tuple[str, ...]:
    """Lines that start with "- ", "+ " or two blanks, of a site whose graph was rewritten; none of a kept one."""
    added = [node for node in site.call.node.meta.get(REPLACED_BY, ()) if not node._erased]
    if not added or site.marker is None:
        return ()
    gate = {name: getattr(site.marker, name) for name in ("weight", "bias", "log_scale", "shift")}
    names = {node: f"{site.gate_path}.{name}" for name, node in gate.items() if node is not None}

    def after(node: fx.Node) -> str:
        return names.get(node) or _label(node)

    def before(node: fx.Node) -> str:
        while MOVED_HERE in node.meta and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return site.call.node.name if node is added[-1] else after(node)

    def window(nodes: Iterable[fx.Node]) -> list[str]:
        lines: list[str] = []
        minus: list[str] = []
        plus: list[str] = []
        for node in nodes:
            old = _line(node, before, node.meta.get(REWRITTEN_FROM, node.target))
            new = _line(node, after)
            if old == new and MOVED_HERE not in node.meta:
                lines += [*minus, *plus, f"  {new}"]
                minus, plus = [], []
                continue
            if MOVED_HERE not in node.meta:
                minus.append(f"- {old}")
            plus.append(f"+ {new}")
        return [*lines, *minus, *plus]

    near = [*_around(added[0], _LINES_BEFORE, backwards=True)], [*_around(added[-1], _LINES_AFTER, backwards=False)]
    moved = [n for n in added[0].graph.nodes if n.meta.get(MOVED_HERE) in added and n not in (*near[0], *near[1])]
    early = [f"+ {_line(node, after)}" for node in moved if node < added[0]]
    late = [f"+ {_line(node, after)}" for node in moved if added[0] < node]
    gap = "  ..."
    lines = [*early, gap, *window(near[0])] if early else window(near[0])
    lines.append(f"- {site.call.node.name} = {_original(site, after)}")
    lines += [f"+ {_line(node, after)}" for node in added]
    lines += window(near[1])
    return tuple([*lines, gap, *late] if late else lines)


def _around(node: fx.Node, count: int, *, backwards: bool) -> Iterator[fx.Node]:
    """Up to ``count`` nodes before or after ``node`` in graph order, without inputs, gates and outputs."""
    found: list[fx.Node] = []
    step = node.prev if backwards else node.next
    while len(found) < count and step.op not in ("root", "output", "placeholder") and GATE_TENSOR not in step.meta:
        found.append(step)
        step = step.prev if backwards else step.next
    return reversed(found) if backwards else iter(found)


def _original(site: Site, label: Callable[[fx.Node], str]) -> str:
    """The attention that was replaced, by its pattern, with the arguments that are not at their defaults."""
    call = site.call
    positional = [_text(argument, label) for argument in (call.query, call.key, call.value)]
    keywords = [] if call.scale is None else [f"scale={_text(call.scale, label)}"]
    return f"{call.pattern}({', '.join(positional + keywords)})"


def _line(node: fx.Node, label: Callable[[fx.Node], str], target: Any = None) -> str:
    """``node`` as ``name = operation(arguments)``, with another ``target`` than its own if given."""
    target = node.target if target is None else target
    arguments = [_text(argument, label) for argument in node.args]
    by_kind = sorted(node.kwargs.items(), key=lambda item: not isinstance(item[1], fx.Node))  # tensors are not cut off
    keywords = [f"{name}={_text(value, label)}" for name, value in by_kind]
    if node.op == "get_attr":
        return f"{label(node)} = {target}"
    if node.op == "call_method":
        return f"{label(node)} = {arguments[0]}.{target}({_shortened(arguments[1:] + keywords)})"
    return f"{label(node)} = {_operation(target)}({_shortened(arguments + keywords)})"


def _operation(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default").replace(".", "::", 1)
    return str(target) if isinstance(target, str) else getattr(target, "__name__", str(target))


def _shortened(arguments: list[str]) -> str:
    if len(arguments) > _MOST_ARGUMENTS:
        arguments = [*arguments[: _MOST_ARGUMENTS - 1], f"... {len(arguments) - _MOST_ARGUMENTS + 1} more"]
    return ", ".join(arguments)


def _text(argument: Any, label: Callable[[fx.Node], str]) -> str:
    if isinstance(argument, fx.Node):
        return label(argument)
    if isinstance(argument, Operand):
        text = label(argument.source)
        for step in argument.steps:
            text = step.text(text, lambda value: _text(value, label))
        return text
    if isinstance(argument, tuple | list):
        inner = _shortened([_text(item, label) for item in argument])
        return f"[{inner}]" if isinstance(argument, list) else f"({inner}{',' * (len(argument) == 1)})"
    return f"{argument:.6g}" if isinstance(argument, float) else str(argument)


def _label(node: fx.Node) -> str:
    """A node's name; of an input that Dynamo lifted from a module, or of a gate's tensor, its path there."""
    if node.op != "placeholder":
        return str(node.meta.get(GATE_TENSOR, node.name))
    # L_self_modules_blocks_modules_0_modules_ff_parameters_weight_ is blocks.0.ff.weight
    match = re.fullmatch(r"[lg]_.*?_?(?:modules_(.+))?_(?:parameters|buffers)_(.+?)_*", node.name)
    if match is None:
        return node.name
    owner, name = match.groups()
    return ".".join([*re.split(r"_?_modules_", owner), name] if owner else [name])
