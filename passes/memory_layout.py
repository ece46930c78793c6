"""Does anything depend on how the result of a rewritten attention lies in memory?

Values are the same in any layout; what is a view of which memory is not. A write through ``o.reshape(-1)`` reaches
``o`` only where that is a view, and ``o.view(...)`` works only in some layouts. So what follows the attention is run
once more, on traced values, with its result laid out as the rewrite gives it. Where a write, an output of the graph
or a function of another package would see a difference, the result has to lie as the dense one did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

import torch
from torch import fx

from sla_compile.passes.node_ops import read, writes
from sla_compile.passes.operands import Step, example, memory
from sla_compile.passes.view_axes import same_size

__all__ = ["REWRITTEN_FROM", "in_any_layout", "laid_out_as"]

REWRITTEN_FROM = "sla_rewritten_from"
"""Key in the meta of a node whose target was changed: the target it had."""

_MOST_NODES = 400
_BY_ADDRESS = {"as_strided", "set", "view_dtype", "view_as_real", "view_as_complex"}
_KNOWN = ("sla::", "einops.")
_AS_RESHAPES: dict[Any, Any] = {
    "view": "reshape",
    "view_as": "reshape_as",
    torch.ops.aten.view: torch.ops.aten.reshape,
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
}


def in_any_layout(node: fx.Node, value: torch.Tensor) -> bool:
    """Whether all that reads ``node`` gives the same if its result lies in memory as ``value``.

    Then that is noted: nodes get their new traced values, and views that would not be legal become reshapes. Else the
    graph is left as it is.
    """
    changed: dict[fx.Node, Any] = {node: value}
    targets: dict[fx.Node, Any] = {}
    pending = set(node.users)
    step = node
    while pending:
        step = step.next
        if step not in pending:
            continue
        pending.discard(step)
        target, result = _again(step, changed)
        if target is None or len(changed) > _MOST_NODES:
            return False
        if result is not None and _differs(step, result, changed):
            changed[step] = result
            pending.update(step.users)
        if target is not step.target:
            targets[step] = target
    for step, target in targets.items():
        step.meta[REWRITTEN_FROM], step.target = step.target, target
    for step, result in changed.items():
        step.meta["example_value"] = result
    return True


def _again(step: fx.Node, changed: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
    """(target, result) of ``step`` with the values ``changed``; no target where it would see the difference.

    No result where nothing of it depends on the layout.
    """
    if step.op == "output":
        return (step.target, None) if _same_outputs(step, changed) else (None, None)
    written = {node for argument in writes(step) for node in _nodes(argument)}
    if written:
        return (None, None) if written & changed.keys() else (step.target, None)
    word = read(step).word
    elsewhere = ("::" in word or "." in word) and not word.startswith(_KNOWN)
    higher_order = isinstance(step.target, torch._ops.HigherOrderOperator)
    if word in _BY_ADDRESS or not word or elsewhere or higher_order or "unbacked_bindings" in step.meta:
        return None, None
    for target in dict.fromkeys((step.target, _AS_RESHAPES.get(step.target))):
        try:
            return target, None if target is None else _run(step, target, changed)
        except Exception:  # not possible in this layout
            continue
    return None, None


def _run(step: fx.Node, target: Any, changed: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((step.args, step.kwargs), lambda node: changed.get(node, example(node)))
    with torch.no_grad():
        if step.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


def _differs(step: fx.Node, result: Any, changed: Mapping[fx.Node, Any]) -> bool:
    """Whether ``result`` lies otherwise than what ``step`` gave, or shares memory with what does."""
    inputs = [node for node in step.all_input_nodes if node in changed]
    shared = {place for node in inputs for value in (changed[node], example(node)) for place in _memories(value)}
    before, after = list(_tensors(example(step))), list(_tensors(result))
    if len(before) != len(after) or {*shared, None} & {*_memories(before), *_memories(after)}:
        return True
    return not all(map(_same_strides, before, after))


def _same_outputs(output: fx.Node, changed: Mapping[fx.Node, Any]) -> bool:
    """Whether who gets the outputs of the graph sees no difference: in strides, or in what shares memory."""
    seen = [node for node in output.all_input_nodes if node in changed]
    pairs = [pair for node in seen for pair in zip(_tensors(example(node)), _tensors(changed[node]), strict=True)]
    return len(seen) <= 1 and all(_same_strides(*pair) for pair in pairs)


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _memories(value: Any) -> set[int | None]:
    return {memory(tensor) for tensor in _tensors(value)}


def _same_strides(left: torch.Tensor, right: torch.Tensor) -> bool:
    axes = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(same_size(size, 1) or same_size(one, other) for size, one, other in axes)


def laid_out_as(value: torch.Tensor) -> tuple[Step, ...]:
    """The steps that copy a tensor of the shape of ``value`` into fresh memory, laid out as that."""
    order, room = _order_in_memory(value)
    back = tuple(order.index(axis) for axis in range(len(order)))
    width = value.shape[order[-1]]
    copy = [Step("clone", (), (("memory_format", torch.contiguous_format),))]
    if room is not None:  # as attention whose head dimension was padded for its kernel
        copy = [Step(torch.nn.functional.pad, ((0, room - width),)), Step("narrow", (-1, 0, width))]
    moved = order != tuple(range(len(order)))
    return (*[Step("permute", (order,))][:moved], *copy, *[Step("permute", (back,))][:moved])


def _order_in_memory(value: torch.Tensor) -> tuple[tuple[int, ...], int | None]:
    """Its axes, the slowest first; and how much room the fastest has, where that is more than its size."""
    for padded in (False, True):
        for order in permutations(range(value.dim())):
            inner: Any = 1
            room = None
            for axis in reversed(order):
                size, stride = value.shape[axis], value.stride(axis)
                if padded and axis == order[-2:-1][0] and isinstance(stride, int) and stride > inner:
                    inner = room = stride
                if not same_size(size, 1) and not same_size(stride, inner):
                    break
                inner = inner * size
            else:
                return order, room
    return tuple(range(value.dim())), None
