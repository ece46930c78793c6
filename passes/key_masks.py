"""Masks over keys: an attention mask that is the same for every query and every head, as (B or 1, keys).

Whether it is the same is proven, never assumed: by a size of 1, by a stride of 0 (an expand, which Dynamo guards on),
or by the operations that made the mask, followed back through the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.passes.attention_call import AttentionCall, Obstacle
from sla_compile.passes.handwritten_ops import disturbs
from sla_compile.passes.operands import Operand, Source, Step, after, example

__all__ = ["constant_along", "key_mask"]

Axis = int
"""An axis counted from the end, -1 the last, so that broadcasting lines it up."""

Group = Any
"""How many neighbours along the axis are asked to be equal, a size; 0 for all of them."""

Needs = list[tuple[Any, Axis, Group]] | None
"""What has to be constant, along which axis and in which groups, for a result to be; None where that is not known."""

ACCEPTED = "a mask over keys, the same for all queries and heads"


def key_mask(call: AttentionCall) -> Source | Obstacle:
    """The mask of ``call``, whose queries and keys are traced, as (B or 1, keys) bool or floating; or why not."""
    value = example(call.attn_mask)
    if not isinstance(value, torch.Tensor):
        return Obstacle("attention mask that is no tensor", str(value), ACCEPTED)
    text = f"a {str(value.dtype).removeprefix('torch.')} tensor ({', '.join(map(str, value.shape))})"
    batch, keys = example(call.query).shape[0], example(call.key).shape[2]
    dims = value.dim()
    fits = 1 <= dims <= 4 and statically_known_true(value.shape[-1] == keys)
    if not fits or not (value.dtype == torch.bool or value.is_floating_point()):
        return Obstacle("attention mask of another shape", text, f"bool or floating, of {keys} keys")
    output = example(call.node)
    if value.requires_grad and (not isinstance(output, torch.Tensor) or output.requires_grad):
        return Obstacle("attention mask that needs a gradient", text, "a mask without one")
    if dims == 4 and not any(statically_known_true(value.shape[0] == size) for size in (1, batch)):
        return Obstacle("attention mask of another shape", text, f"a mask of {batch} or 1 in the batch")
    for axis, reason in ((-2, "per-query attention mask"), (-3, "per-head attention mask")):
        if not constant_along(call.attn_mask, axis):
            return Obstacle(reason, text, ACCEPTED)
    steps = [Step("select", (-2, 0))] * (dims >= 2) + [Step("select", (-2, 0))] * (dims >= 3)
    return after(call.attn_mask, *steps, *[Step("unsqueeze", (0,))] * (dims < 4))


def constant_along(source: Any, axis: Axis, group: Group = 0) -> bool:
    """Whether the tensor ``source`` provably has the same values all along ``axis``, or within each ``group`` there."""
    value = example(source)
    if not isinstance(value, torch.Tensor):  # a number; None is not known
        return not isinstance(source, fx.Node) or isinstance(value, int | float | torch.SymInt | torch.SymFloat)
    if -axis > value.dim() or statically_known_true(value.shape[axis] == 1):
        return True
    if statically_known_true(value.stride(axis) == 0):
        return True
    if isinstance(source, torch.Tensor):  # an eager call: its values are there
        return bool((value == value.narrow(axis, 0, 1)).all())
    needs = _needs(source, axis, group)
    return needs is not None and all(constant_along(*need) for need in needs)


def _needs(source: Source, axis: Axis, group: Group) -> Needs:
    if isinstance(source, Operand):
        before: Any = after(source.source, *source.steps[:-1])
        step = source.steps[-1]
        name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", "")
        return _rule(name, source, (before, *step.arguments), {}, axis, group)
    if source.op not in ("call_method", "call_function") or _written(source):
        return None
    name = str(source.target) if source.op == "call_method" else getattr(source.target, "__name__", "")
    return _rule(name, source, source.args, source.kwargs, axis, group)


def _written(node: fx.Node) -> bool:
    """Whether anything writes to the memory of ``node`` later, so that its making does not tell its values."""
    memory = example(node).untyped_storage()._cdata
    for user in node.users:
        if disturbs(user):
            return True
        value = example(user)
        if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata == memory and _written(user):
            return True
    return False


_FILLED = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
_OF_ONE = {
    *("to", "float", "double", "half", "bfloat16", "bool", "type", "type_as", "contiguous", "clone", "detach"),
    *("logical_not", "bitwise_not", "invert", "neg", "abs", "exp", "log"),
}
_OF_SEVERAL = {
    *("and_", "or_", "xor", "__and__", "__or__", "logical_and", "logical_or", "bitwise_and", "bitwise_or"),
    *("add", "sub", "rsub", "mul", "div", "truediv", "eq", "ne", "gt", "ge", "lt", "le", "masked_fill", "where"),
    *("__eq__", "__ne__", "__add__", "__sub__", "__rsub__", "__mul__", "__truediv__", "minimum", "maximum", "clamp"),
}
_REPEATING = {"expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave"}


def _rule(name: str, result: Source, args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis, group: Group) -> Needs:
    """What ``result``, made by the operation ``name``, needs to be constant along ``axis``."""
    if name in _FILLED:
        return []
    if name in _OF_SEVERAL:
        return [(argument, axis, group) for argument in (*args, *kwargs.values())]
    if not args or not isinstance(example(args[0]), torch.Tensor):
        return _of_list(args, kwargs, axis, group) if name in ("cat", "concat", "concatenate") else None
    if name in _OF_ONE:
        return [(args[0], axis, group)]
    if name in _REPEATING:
        return _repeated(name, result, args, kwargs, axis, group)
    moved = _MOVES.get(name)
    return None if kwargs or moved is None else moved(result, args, axis, group)


def _repeated(
    name: str, result: Source, args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis, group: Group
) -> Needs:
    """Of an expand or a repetition: the same along an axis that it leaves alone, or that is constant anyway."""
    shape, before = example(result).shape, example(args[0]).shape
    if name == "repeat_interleave":
        given = dict(zip(("input", "repeats", "dim"), args, strict=False)) | kwargs
        count = example(given.get("repeats"))
        if type(given.get("dim")) is not int:  # of all axes, flattened
            return None
        same = given["dim"] % len(shape) == axis % len(shape)
        if same and isinstance(count, int | torch.SymInt) and group and statically_known_true(count == group):
            return []
        return [(args[0], axis, 0 if same else group)]
    kept = -axis <= len(before) and statically_known_true(shape[axis] == before[axis])
    return [(args[0], axis, group if kept else 0)]


def _of_list(args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis, group: Group) -> Needs:
    """Of a concatenation, along another axis than the one that grows."""
    if not args or not isinstance(args[0], list | tuple) or not args[0]:
        return None
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = example(args[0][0])
    if type(dim) is not int or not isinstance(first, torch.Tensor) or dim % first.dim() == axis % first.dim():
        return None
    return [(part, axis, group) for part in args[0]]


def _transposed(result: Source, args: tuple[Any, ...], axis: Axis, group: Group) -> Needs:
    if len(args) != 3 or not all(type(dim) is int for dim in args[1:]):
        return None
    order = list(range(example(result).dim()))
    first, second = args[1:]
    order[first], order[second] = order[second], order[first]
    return [(args[0], order[axis] - len(order), group)]


def _permuted(result: Source, args: tuple[Any, ...], axis: Axis, group: Group) -> Needs:
    order = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    dims = example(result).dim()
    if len(order) != dims or not all(type(dim) is int for dim in order):
        return None
    return [(args[0], order[axis] % dims - dims, group)]


def _unsqueezed(result: Source, args: tuple[Any, ...], axis: Axis, group: Group) -> Needs:
    dims = example(result).dim()
    if len(args) != 2 or type(args[1]) is not int:
        return None
    added = args[1] % dims - dims
    return [] if axis == added else [(args[0], axis if axis > added else axis + 1, group)]


def _indexed(result: Source, args: tuple[Any, ...], axis: Axis, group: Group) -> Needs:
    """Of ``x[...]`` with slices, whole numbers, None and an ellipsis."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(item is None or item is Ellipsis or type(item) in (slice, int) for item in index):
        return None
    dims = example(args[0]).dim()
    free = dims - sum(item is not None and item is not Ellipsis for item in index)
    whole: list[Any] = [slice(None)] * free
    place = index.index(Ellipsis) if Ellipsis in index else len(index)
    index = (*index[:place], *whole, *index[place + 1 :])
    position = 0
    axes: list[tuple[int, Any] | None] = []  # of the input, for each of the result
    for item in index:
        if item is None:
            axes.append(None)
            continue
        if isinstance(item, slice):
            axes.append((position - dims, item))
        position += 1
    found = axes[axis]
    if found is None:
        return []
    return None if group and found[1] != slice(None) else [(args[0], found[0], group)]


def _regrouped(result: Source, args: tuple[Any, ...], axis: Axis, group: Group) -> Needs:
    """Of a view or reshape: along an axis that it leaves as it was, or splits off from a repeated one."""
    shape, before = example(result).shape, example(args[0]).shape
    inner = _product(shape[len(shape) + axis + 1 :])
    for position in range(-1, -len(before) - 1, -1):
        if not statically_known_true(_product(before[len(before) + position + 1 :]) == inner):
            continue
        if statically_known_true(before[position] == shape[axis]):
            return [(args[0], position, group)]
        # split off from a longer axis, as heads from batch and heads; not merged with others
        if not group and statically_known_true(before[position] % shape[axis] == 0):
            return [(args[0], position, shape[axis])]
    return None


def _product(sizes: Iterable[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


_MOVES: dict[str, Callable[[Source, tuple[Any, ...], Axis, Group], Needs]] = {
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transposed),
    "permute": _permuted,
    "unsqueeze": _unsqueezed,
    operator.getitem.__name__: _indexed,
    **dict.fromkeys(("view", "reshape", "unflatten", "flatten"), _regrouped),
}
