"""The values of tensors that a graph makes of constants alone, as a mask over frames: found while it is compiled.

A mask of N x N elements is never built. Along each axis neighbours that are equal are one run, so that a mask of frames
has one value for each pair of frames. What is not known here gives None: a value is right, or it is not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from sla_compile.passes.node_ops import ELEMENTWISE, VIEWS, NodeOp, read, whole_index
from sla_compile.passes.operands import Operand, example, memory
from sla_compile.passes.overwritten import writes_of_parts

__all__ = ["Known", "known_values"]

MOST_VALUES = 2**24
"""How many values a tensor may have, a run counted once."""
SMALL = 2**20
"""Up to so many elements, an operation is simply computed."""

_FILLS = {"zeros": 0, "ones": 0, "full": 1, "new_zeros": 1, "new_ones": 1, "new_full": 2}
_FILLS |= {"zeros_like": 0, "ones_like": 0, "full_like": 1}
"""Operations that give one value everywhere; of the full ones, the place of it among the arguments."""

_MADE = {*_FILLS, "arange", "tensor", "as_tensor", "new_tensor"}
_PURE = ELEMENTWISE | VIEWS | _MADE | {"repeat", "repeat_interleave", "cat", "stack", "cumsum", "tril", "triu", "flip"}
_COPIES = {"to", "contiguous", "clone", "detach"}


@dataclass(frozen=True)
class Known:
    """A tensor on the CPU: ``values`` has one place for each run along an axis, ``ends`` where the runs of it end."""

    values: Tensor
    ends: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Known:
        """``tensor`` with its runs."""
        return cls(tensor, tuple(tuple(range(1, size + 1)) for size in tensor.shape)).shortened()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(ends[-1] if ends else 0 for ends in self.ends)

    def shortened(self) -> Known:
        """The same in as few runs as there can be."""
        values, found = self.values, []
        for axis, ends in enumerate(self.ends):
            if len(ends) > 1:
                before, behind = (values.narrow(axis, first, len(ends) - 1) for first in (0, 1))
                others = [i for i in range(values.dim()) if i != axis]
                changes = before != behind
                last = (changes.any(dim=others) if others else changes).nonzero().flatten().tolist()
                kept = [*last, len(ends) - 1]
                values = values.index_select(axis, torch.tensor(kept, device=values.device))
                ends = tuple(ends[i] for i in kept)
            found.append(ends)
        return Known(values, tuple(found))

    def cut(self, axis: int, ends: Sequence[int]) -> Known:
        """The same with runs along ``axis`` that end at ``ends``, those of now among them."""
        places = torch.searchsorted(torch.tensor(self.ends[axis]), torch.tensor(ends))
        values = self.values.index_select(axis, places)
        return Known(values, (*self.ends[:axis], tuple(ends), *self.ends[axis + 1 :]))

    def filled(self, part: Sequence[Any], value: Tensor) -> Known | None:
        """The same with ``value`` in a part, given as an index of a slice or number for each axis."""
        filled, places = self, []
        for axis, entry in enumerate(part):
            size = self.shape[axis]
            first, last, step = (entry, entry + 1, 1) if isinstance(entry, int) else entry.indices(size)
            if step != 1 or first >= last:
                return self if step == 1 else None
            ends = tuple(sorted({*self.ends[axis], first, last} - {0}))
            filled = filled.cut(axis, ends)
            places.append(slice(ends.index(first) + 1 if first else 0, ends.index(last) + 1))
        if filled.values.numel() > MOST_VALUES:
            return None
        values = filled.values.clone()
        values[tuple(places)] = value.to(values.dtype)
        return Known(values, filled.ends).shortened()

    def whole(self) -> Tensor:
        """Every element."""
        full = self
        for axis, size in enumerate(self.shape):
            full = full.cut(axis, range(1, size + 1))
        return full.values


def known_values(source: Any, end: fx.Node) -> Known | None:
    """The values that ``source``, a node, an operand or a tensor of an eager call, has where the node ``end`` reads it.

    None where a run alone knows them.
    """
    with torch.no_grad():
        found = _Finder().of(source, end)
    return None if found is None else found.shortened()


class _Finder:
    """Finds the values that tensors have where a node, ``end``, reads them."""

    def __init__(self) -> None:
        self.found: dict[tuple[fx.Node, fx.Node], Known | None] = {}

    def of(self, source: Any, end: fx.Node) -> Known | None:
        if isinstance(source, Tensor):
            return Known.of(source.detach())
        if isinstance(source, Operand):
            return self._find(source, end)
        if not isinstance(source, fx.Node):
            return None
        if (source, end) not in self.found:
            writes = writes_of_parts(source)
            found = None if writes is None else self._find(source, end)
            for write in writes or ():
                if found is not None and write < end:
                    found = self._written(found, write)
            self.found[source, end] = found
        return self.found[source, end]

    def _find(self, source: fx.Node | Operand, end: fx.Node) -> Known | None:
        """The values that its operation makes, before anything is written into them."""
        op = read(source)
        if op.word not in _PURE or op.in_place or not isinstance(op.result, Tensor) or not _plain_sizes(op.result):
            return None
        if isinstance(source, fx.Node) and not any(_same_memory(op.result, given) for given in source.all_input_nodes):
            end = source  # no view: what is written later into its arguments does not change it
            if (source, end) not in self.found:
                self.found[source, end] = self._made(source, op, end)
            return self.found[source, end]
        return self._made(source, op, end)

    def _made(self, source: fx.Node | Operand, op: NodeOp, end: fx.Node) -> Known | None:
        if op.word in _COPIES:
            before = self.of(op.input, end)
            return before and replace(before, values=before.values.to(op.result.dtype))
        shape = tuple(op.result.shape)
        if op.word in _FILLS:
            return _filled(op, shape)
        if op.result.numel() <= SMALL:
            return self._computed(source, op, end)
        if op.word in ELEMENTWISE:
            return self._element_by_element(source, op, end)
        before = self.of(op.input, end)
        if before is None:
            return None
        if op.word in ("expand", "repeat"):
            return _repeated(before, shape)
        if op.word == "repeat_interleave":
            return _interleaved(before, op.arguments.get("repeats"), op.dim())
        if op.word == "permute":
            dims = op.arguments.get("dims")
            return None if dims is None else Known(before.values.permute(dims), tuple(before.ends[d] for d in dims))
        # of an index, only one that takes everything
        return _regrouped(before, shape) if op.word in VIEWS and prod(before.shape) == prod(shape) else None

    def _written(self, known: Known, write: fx.Node) -> Known | None:
        """``known`` after ``x[part] = value``."""
        part, value = whole_index(write.args[1], example(write.args[0])), write.args[2]
        if part is None or not all(isinstance(entry, int | slice) for entry in part):
            return None
        given = self.of(value, write) if isinstance(value, fx.Node) else Known.of(torch.tensor(value))
        if given is None or (given.values.numel() > 1 and prod(known.shape) > SMALL):
            return None
        if prod(known.shape) <= SMALL:
            whole = known.whole().clone()
            whole[part] = given.whole().to(whole.dtype)
            return Known.of(whole)
        return known.filled(part, given.values.reshape(()))

    def _computed(self, source: Any, op: NodeOp, end: fx.Node) -> Known | None:
        """Of a tensor of few elements: the operation itself, on its arguments."""
        value = self._called(source, op, end, lambda known: known.whole() if prod(known.shape) <= MOST_VALUES else None)
        return None if value is None or value.shape != op.result.shape else Known.of(value)

    def _element_by_element(self, source: Any, op: NodeOp, end: fx.Node) -> Known | None:
        """Of a broadcast: on one element of each run of all arguments."""
        shape = op.result.shape
        parts = [self.of(given, end) for given in op.read_from if isinstance(example(given), Tensor)]
        if any(part is None for part in parts):
            return None
        ends: list[tuple[int, ...]] = []
        for back, size in enumerate(reversed(shape), 1):
            along = [part.ends[-back] for part in parts if part and back <= len(part.ends)]
            ends.append(tuple(sorted({size}.union(*(runs for runs in along if runs[-1] == size)))))
        if prod(map(len, ends)) > MOST_VALUES:
            return None

        def aligned(known: Known) -> Tensor:
            for back, size in enumerate(reversed(known.shape), 1):
                if size == shape[-back]:
                    known = known.cut(len(known.ends) - back, ends[back - 1])
            return known.values

        value = self._called(source, op, end, aligned)
        wanted = tuple(reversed(ends))
        if value is None or value.shape != tuple(map(len, wanted)):
            return None
        return Known(value, wanted).shortened()

    def _called(self, source: Any, op: NodeOp, end: fx.Node, values: Any) -> Tensor | None:
        """What the call gives where ``values`` stand for its tensors; None where one of them is not known."""
        unknown = False

        def argument(given: Any) -> Any:
            nonlocal unknown
            if isinstance(given, torch.device):
                return torch.device("cpu")
            if not isinstance(given, fx.Node | Operand | torch.SymInt):
                return given
            known = self.of(given, end) if isinstance(example(given), Tensor) else None
            value = values(known) if known is not None else None
            unknown = unknown or value is None
            return value

        if isinstance(source, Operand):
            step = source.steps[-1]
            target: Any = step.target
            args, kwargs = (op.input, *step.arguments), dict(step.keywords)
        else:
            target, args, kwargs = source.target, source.args, dict(source.kwargs)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = map_aggregate(args, argument), map_aggregate(kwargs, argument)
        if unknown:
            return None
        function = getattr(Tensor, target) if isinstance(target, str) else target
        try:
            with torch.device("cpu"):
                result = function(*args, **kwargs)
        except (RuntimeError, IndexError):  # which the run will tell
            return None
        return result if isinstance(result, Tensor) and result.device.type == "cpu" else None


def _same_memory(value: Tensor, node: fx.Node) -> bool:
    """Whether ``value`` may be a view of what ``node`` gives."""
    given = example(node)
    return isinstance(given, Tensor) and (memory(given) is None or memory(given) == memory(value))


def _plain_sizes(value: Tensor) -> bool:
    return all(isinstance(size, int) and size > 0 for size in value.shape)


def _filled(op: NodeOp, shape: tuple[int, ...]) -> Known | None:
    """Of a tensor that is one value everywhere."""
    value: Any = 0 if "zeros" in op.word else 1
    if "full" in op.word:
        value = op.arguments.get("fill_value", op.arguments.get(str(_FILLS[op.word])))
    if type(value) not in (int, float, bool):
        return None
    return Known(torch.full([1] * len(shape), value, dtype=op.result.dtype, device="cpu"), tuple((n,) for n in shape))


def _repeated(known: Known, shape: tuple[int, ...]) -> Known | None:
    """``known`` over and over along its axes, and along new ones before them."""
    new = len(shape) - len(known.ends)
    values = known.values[(None,) * new]
    found: list[tuple[int, ...]] = [(size,) for size in shape[:new]]
    for axis, (ends, size) in enumerate(zip(known.ends, shape[new:], strict=True), new):
        times = size // ends[-1]
        if len(ends) == 1:
            found.append((size,))
            continue
        if times * values.numel() > MOST_VALUES:
            return None
        values = values.repeat([times if i == axis else 1 for i in range(values.dim())])
        found.append(tuple(turn * ends[-1] + end for turn in range(times) for end in ends))
    return Known(values, tuple(found))


def _interleaved(known: Known, repeats: Any, axis: int | None) -> Known | None:
    """``known`` with each element along ``axis`` repeated on the spot."""
    if type(repeats) is not int or axis is None:
        return None
    longer = tuple(end * repeats for end in known.ends[axis])
    return Known(known.values, (*known.ends[:axis], longer, *known.ends[axis + 1 :]))


def _regrouped(known: Known, shape: tuple[int, ...]) -> Known | None:
    """``known`` as a tensor of another shape with the same elements, in row-major order."""
    plain = _without_ones(known)
    wanted = [size for size in shape if size != 1]
    for axis, size in enumerate(wanted):
        while axis < len(plain.ends) and plain.shape[axis] < size and axis + 1 < len(plain.ends):
            merged = _merged(plain, axis)
            if merged is None:
                return None
            plain = merged
        if axis >= len(plain.ends) or plain.shape[axis] % size:
            return None
        if plain.shape[axis] > size:
            split = _split(plain, axis, size)
            if split is None:
                return None
            plain = split
    if list(plain.shape) != wanted:
        return None
    values, ends = plain.values, list(plain.ends)
    for place, size in enumerate(shape):
        if size == 1:
            values = values.unsqueeze(place)
            ends.insert(place, (1,))
    return Known(values, tuple(ends))


def _without_ones(known: Known) -> Known:
    kept = [axis for axis, ends in enumerate(known.ends) if ends != (1,)]
    values = known.values.reshape([len(known.ends[axis]) for axis in kept])
    return Known(values, tuple(known.ends[axis] for axis in kept))


def _merged(known: Known, axis: int) -> Known | None:
    """``axis`` and the next one as one."""
    outer, inner = known.ends[axis], known.ends[axis + 1]
    if len(inner) == 1:
        ends = tuple(end * inner[-1] for end in outer)
    elif outer[-1] * len(inner) * known.values.numel() > MOST_VALUES * len(outer) * len(inner):
        return None
    else:
        known = known.cut(axis, range(1, outer[-1] + 1))
        ends = tuple(turn * inner[-1] + end for turn in range(outer[-1]) for end in inner)
    return Known(known.values.flatten(axis, axis + 1), (*known.ends[:axis], ends, *known.ends[axis + 2 :]))


def _split(known: Known, axis: int, size: int) -> Known | None:
    """``axis`` as one of ``size`` and one of the rest."""
    ends = known.ends[axis]
    rest = ends[-1] // size
    if len(ends) == 1:
        return Known(known.values.unsqueeze(axis), (*known.ends[:axis], (size,), (rest,), *known.ends[axis + 1 :]))
    if ends[-1] * known.values.numel() > MOST_VALUES * len(ends):
        return None
    values = known.cut(axis, range(1, ends[-1] + 1)).values
    values = values.reshape(*values.shape[:axis], size, rest, *values.shape[axis + 1 :])
    each = tuple(tuple(range(1, n + 1)) for n in (size, rest))
    return Known(values, (*known.ends[:axis], *each, *known.ends[axis + 1 :])).shortened()
