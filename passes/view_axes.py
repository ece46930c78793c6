"""What a view does to axes: where each axis of its result lies in its input. The one place that says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.passes.node_ops import ELEMENTWISE, VIEWS, NodeOp, pieces, read, tensor, whole_index

__all__ = ["Origin", "origins", "origins_of_pieces", "origins_of_write", "same_size", "split_off"]


@dataclass(frozen=True)
class Origin:
    """Where one axis of a result lies in the input."""

    axis: int | None = None
    """The axis of the input, from 0; None for a new axis, along which nothing changes."""
    part: slice | None = None
    """What is taken of that axis; None for all of it."""
    repeated: bool = False
    """The axis has one position in the input, which is repeated."""
    fastest: Any = None
    """Only the fastest-varying factor of the axis, of this size: the heads of an axis of batch and heads."""

    @property
    def whole(self) -> bool:
        """Whether the axis is that of the input, as it was."""
        return self.axis is not None and self.part is None and not self.repeated and self.fastest is None


Origins = tuple[Origin | None, ...]
"""One for each axis of a result; None where it is made of several axes or not known."""


def origins(op: NodeOp) -> Origins | None:
    """Where each axis of what ``op`` gives lies in its input; None where it is no view, or not known as one."""
    if op.word not in VIEWS or op.tensor is None or op.in_place:
        return None
    shape = op.tensor.shape
    if not shape and op.word == "squeeze":
        return ()
    if op.word == "permute":
        dims = op.arguments.get("dims")
        return None if dims is None else tuple(Origin(axis) for axis in dims)
    if op.word == "getitem":
        index = op.arguments.get("index")
        return _indexed(index) if isinstance(index, tuple) and _names_each_axis(index, len(shape)) else None
    result = getattr(op.result, "shape", None)
    if result is None:
        return None
    if op.word == "unsqueeze":
        axis = op.arguments.get("dim")
        if type(axis) is not int:
            return None
        kept = [Origin(i) for i in range(len(shape))]
        return (*kept[: axis % len(result)], Origin(), *kept[axis % len(result) :])
    if op.word == "squeeze":
        return _squeezed(op, shape, len(result))
    return _expanded(shape, result) if op.word == "expand" else _regrouped(shape, result)


def origins_of_pieces(op: NodeOp) -> list[Origins] | None:
    """The same for each tensor that chunk, split or unbind gives."""
    found = pieces(op) if op.word in ("split", "unbind") else None
    return None if found is None else [_indexed(index) for index in found]


def split_off(source: Any, axes: Sequence[int], *, beside: int | None = None) -> int | None:
    """The one of ``axes`` of ``source`` that a regrouping split off another axis; None where none, or several, were.

    As the axis of heads, from the channels of a projection. It is followed back through views and element by element.
    With ``beside`` only where the axis of that number is what is left of the other one, as the channels of a head are.
    """
    places = {axis: axis for axis in (*axes, *(() if beside is None else (beside,)))}
    while (op := read(source)).word in VIEWS | ELEMENTWISE | {"layer_norm", "rms_norm"} and op.tensor is not None:
        here, source = tensor(source), op.input
        if op.word not in VIEWS:
            if here is None or here.dim() != op.tensor.dim():
                return None
            continue
        found = origins(op)
        if found is None:
            return None
        split = [axis for axis in axes if found[places[axis]] is None]
        if split:
            if beside is not None and places[beside] != places[split[0]] + 1:
                return None
            return split[0] if len(split) == 1 and op.word == "reshape" else None
        for axis, place in places.items():
            origin = found[place]
            if origin is None or origin.axis is None:
                return None
            places[axis] = origin.axis
    return None


def origins_of_write(op: NodeOp) -> Origins | None:
    """Where each axis of the part that ``x[...] = value`` writes lies in x; None where it is not known."""
    index = None if op.tensor is None else whole_index(op.arguments.get("index"), op.tensor)
    return None if index is None else _indexed(index)


def _names_each_axis(index: Sequence[Any], count: int) -> bool:
    return sum(entry is not None for entry in index) == count and not any(entry is ... for entry in index)


def _indexed(index: Iterable[Any]) -> Origins:
    """Of an index with an entry for each axis."""
    found = []
    axis = 0
    for entry in index:
        if entry is None:
            found.append(Origin())
            continue
        if isinstance(entry, slice):
            found.append(Origin(axis, None if entry == slice(None) else entry))
        axis += 1
    return tuple(found)


def _squeezed(op: NodeOp, shape: Sequence[Any], count: int) -> Origins | None:
    given = op.arguments.get("dim")
    axes = range(len(shape)) if given is None else given if isinstance(given, tuple | list) else (given,)
    if not all(type(axis) is int for axis in axes):
        return None
    gone = {axis % len(shape) for axis in axes if same_size(shape[axis], 1)}
    kept = tuple(Origin(axis) for axis in range(len(shape)) if axis not in gone)
    return kept if len(kept) == count else None


def _expanded(shape: Sequence[Any], result: Sequence[Any]) -> Origins:
    new = len(result) - len(shape)
    kept = (Origin(axis, repeated=not same_size(result[new + axis], size)) for axis, size in enumerate(shape))
    return (*[Origin()] * new, *kept)


def _regrouped(shape: Sequence[Any], result: Sequence[Any]) -> Origins:
    """Of a row-major regrouping: an axis is where as many elements lie behind it in the input as in the result."""
    return tuple(_regrouped_axis(shape, size, _product(result[axis + 1 :])) for axis, size in enumerate(result))


def _regrouped_axis(shape: Sequence[Any], size: Any, inner: Any) -> Origin | None:
    for axis in reversed(range(len(shape))):
        if not same_size(_product(shape[axis + 1 :]), inner):
            continue
        if same_size(shape[axis], size):
            return Origin(axis)
        if not same_size(size, 0) and same_size(shape[axis] % size, 0):
            return Origin(axis, fastest=size)
    return None


def _product(sizes: Iterable[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are equal, provably."""
    return bool(statically_known_true(left == right))
