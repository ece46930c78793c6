"""The axes of tensors, followed through the operations of a graph that are known to keep or to regroup them.

What is not known here forgets them, so that an axis that is found is right, and one that is lost is only not found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["ALIGNED", "Atom", "Axis", "Call", "Labels", "is_labels", "size_of", "through", "unknown", "unpacked"]


@dataclass(frozen=True)
class Atom:
    """A factor of an axis: ``size``, and what it is: the axis ``dim`` of the node ``of``; None where that is not known.

    Or, with ``part``, a whole axis of ``size`` tokens in which a grid starts at token ``start``.
    """

    size: Any
    of: fx.Node | None = None
    dim: int = 0
    part: tuple[Atom, ...] = ()
    start: int = 0

    @property
    def known(self) -> bool:
        return self.of is not None or bool(self.part)


Axis = tuple[Atom, ...]
"""The factors of an axis, the slowest first."""
Labels = tuple[Axis, ...]
"""The axes of a tensor."""


def unknown(size: Any) -> Axis:
    return (Atom(size),)


def unpacked(axis: Axis) -> tuple[int, list[Atom]]:
    """Where the grid of an axis begins, and its factors."""
    if len(axis) == 1 and axis[0].part:
        return axis[0].start, list(axis[0].part)
    return 0, list(axis)


def size_of(atoms: Sequence[Atom]) -> Any:
    return prod(atom.size for atom in atoms)


def _same(left: Any, right: Any) -> bool:
    return bool(statically_known_true(left == right))


@dataclass(frozen=True)
class Call:
    """One operation: labels (or plain values) of its arguments, their traced values, and the traced result."""

    labels: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: tuple[Any, ...]
    result: Any

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        if position < len(self.values):
            return self.values[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    @property
    def first(self) -> Labels | None:
        return self.labels[0] if isinstance(self.labels[0], tuple) and is_labels(self.labels[0]) else None

    def dim(self, position: int, default: int, *names: str) -> int:
        found = self.argument(position, *names, default=default)
        return found % self.values[0].dim() if isinstance(found, int) else -1


def is_labels(value: Any) -> bool:
    if not isinstance(value, tuple):
        return False
    return all(isinstance(axis, tuple) and axis and isinstance(axis[0], Atom) for axis in value)


def _aligned(call: Call, pairs: Sequence[tuple[Any, Any]] | None = None) -> Labels | None:
    """Labels of a result whose axes are those of its inputs, from the last on, broadcast."""
    if not isinstance(call.result, torch.Tensor):
        return None
    pairs = list(zip(call.labels, call.values, strict=True)) if pairs is None else pairs
    tensors = [(axes, value) for axes, value in pairs if isinstance(value, torch.Tensor) and is_labels(axes)]
    found = []
    for back, size in enumerate(reversed(call.result.shape), 1):
        known = {
            axes[-back]
            for axes, value in tensors
            if back <= value.dim() and _same(value.shape[-back], size) and any(atom.known for atom in axes[-back])
        }
        found.append(known.pop() if len(known) == 1 else unknown(size))
    return tuple(reversed(found))


def _regrouped(call: Call) -> Labels | None:
    """Row-major regrouping: factors of the old axes are dealt out to the new ones, where the sizes allow."""
    if call.first is None:
        return None
    factors = [atom for axis in call.first for atom in axis if not _same(atom.size, 1)]
    found: list[Axis] = []
    for size in call.result.shape:
        taken: list[Atom] = []
        while factors and not _same(size_of(taken), size) and _fits(size_of(taken) * factors[0].size, size):
            taken.append(factors.pop(0))
        if not _same(size_of(taken), size):  # a factor is split: what is left of it is not known
            if not factors or factors[0].known or not _divides(size, size_of(taken), factors[0].size):
                return None
            factors[0] = Atom(factors[0].size // (size // size_of(taken)))
            taken = [*taken, Atom(size // size_of(taken))]
        found.append(tuple(taken) or unknown(size))
    return tuple(found)


def _fits(size: Any, whole: Any) -> bool:
    return _same(size, whole) or (isinstance(size, int) and isinstance(whole, int) and whole % size == 0)


def _divides(size: Any, taken: Any, factor: Any) -> bool:
    numbers = all(isinstance(number, int) for number in (size, taken, factor))
    return numbers and size % taken == 0 and factor % (size // taken) == 0


def _transposed(call: Call) -> Labels | None:
    if call.first is None:
        return None
    axes = list(call.first)
    one, other = call.dim(1, 0, "dim0", "axis0"), call.dim(2, 1, "dim1", "axis1")
    axes[one], axes[other] = axes[other], axes[one]
    return tuple(axes)


def _permuted(call: Call) -> Labels | None:
    order = call.argument(1, "dims")
    order = order if isinstance(order, tuple | list) else call.values[1:]
    if call.first is None or not all(isinstance(axis, int) for axis in order) or len(order) != len(call.first):
        return None
    return tuple(call.first[axis] for axis in order)


def _all_but_last(call: Call) -> Labels | None:
    """As the first argument, but for the last axis: of a matrix product, of a projection, of attention."""
    if call.first is None or len(call.first) != call.result.dim():
        return None
    return (*call.first[:-1], unknown(call.result.shape[-1]))


def _unsqueezed(call: Call) -> Labels | None:
    if call.first is None or not isinstance(axis := call.argument(1, "dim"), int):
        return None
    axes = list(call.first)
    axes.insert(axis % call.result.dim(), unknown(1))
    return tuple(axes)


def _slice(axis: Axis, size: Any, first: Any, last: Any) -> Axis:
    """The tokens from ``first`` to ``last`` of an axis: its grid, where that is whole."""
    start, atoms = unpacked(axis)
    if not all(isinstance(number, int) for number in (first, last, size_of(atoms))) or not any(a.known for a in axis):
        return unknown(size)
    if first > start or start + size_of(atoms) > last:
        return unknown(size)
    return _part(atoms, start - first, last - first)


def _part(atoms: Sequence[Atom], start: int, size: int) -> Axis:
    return tuple(atoms) if size == size_of(atoms) else (Atom(size, part=tuple(atoms), start=start),)


def _got(call: Call) -> Any:
    """``x[index]``, of a tensor or of a tuple of tensors."""
    if isinstance(call.labels[0], list):
        index = call.values[1]
        return call.labels[0][index] if isinstance(index, int) and index < len(call.labels[0]) else None
    if call.first is None or not isinstance(call.result, torch.Tensor):
        return None
    index = call.values[1] if isinstance(call.values[1], tuple | list) else (call.values[1],)
    if not all(part is None or part is ... or isinstance(part, int | slice) for part in index):
        return None
    named = sum(part is not None and part is not ... for part in index)
    whole = [slice(None)] * (len(call.first) - named)
    place = next((i for i, part in enumerate(index) if part is ...), len(index))
    parts = [*index[:place], *whole, *index[place + 1 :]]
    axes, sizes, found = iter(call.first), iter(call.values[0].shape), []
    for part in parts:
        if part is None:
            found.append(unknown(1))
            continue
        axis, size = next(axes), next(sizes)
        if isinstance(part, slice):
            found.append(_sliced(axis, size, part, call.result.shape[len(found)]))
    return tuple(found)


def _sliced(axis: Axis, size: Any, part: slice, left: Any) -> Axis:
    if part == slice(None):
        return axis
    bounds = (part.start, part.stop, part.step)
    if not isinstance(size, int) or not all(bound is None or isinstance(bound, int) for bound in bounds):
        return unknown(left)
    first, last, step = part.indices(size)
    return _slice(axis, left, first, last) if step == 1 else unknown(left)


def _pieces(call: Call) -> list[Labels] | None:
    """chunk, split and unbind along one axis."""
    if call.first is None or not isinstance(call.result, tuple | list):
        return None
    axis = call.dim(2, 0, "dim")
    first, found = 0, []
    for piece in call.result:
        size = piece.shape[axis]
        last = first + size if isinstance(first, int) else None
        found.append((*call.first[:axis], _slice(call.first[axis], size, first, last), *call.first[axis + 1 :]))
        first = last
    return found


def _unbound(call: Call) -> list[Labels] | None:
    if call.first is None or not isinstance(call.result, tuple | list):
        return None
    axis = call.dim(1, 0, "dim")
    return [(*call.first[:axis], *call.first[axis + 1 :])] * len(call.result)


def _joined(call: Call) -> Labels | None:
    """cat: the grid of one part, with the tokens of the others before and behind it."""
    parts, values = call.labels[0], call.values[0]
    axis = call.argument(1, "dim", "axis", default=0)
    if not isinstance(parts, list) or not isinstance(axis, int) or not all(isinstance(v, torch.Tensor) for v in values):
        return None
    axis %= call.result.dim()
    aligned = _aligned(call, list(zip(parts, values, strict=True)))
    if aligned is None:
        return None
    joined = unknown(call.result.shape[axis])
    with_grid = [i for i, part in enumerate(parts) if is_labels(part) and any(atom.known for atom in part[axis])]
    lengths = [value.shape[axis] for value in values]
    if len(with_grid) == 1 and all(isinstance(length, int) for length in lengths):
        before = ([0, *accumulate(lengths)])[with_grid[0]]
        start, atoms = unpacked(parts[with_grid[0]][axis])
        joined = _part(atoms, before + start, sum(lengths))
    return (*aligned[:axis], joined, *aligned[axis + 1 :])


_RULES: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze"), _regrouped),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transposed),
    **dict.fromkeys(("linear", "matmul", "scaled_dot_product_attention", "dispatch_attention_fn"), _all_but_last),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _pieces),
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    "permute": _permuted,
    "unsqueeze": _unsqueezed,
    "getitem": _got,
    "unbind": _unbound,
}

ALIGNED = {
    *("add", "iadd", "add_", "sub", "isub", "sub_", "rsub", "mul", "imul", "mul_", "multiply", "addcmul", "lerp"),
    *("div", "truediv", "itruediv", "div_", "divide", "neg", "pow", "square", "rsqrt", "sqrt", "reciprocal", "abs"),
    *("exp", "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "relu", "where", "clamp", "masked_fill", "nan_to_num"),
    *("layer_norm", "rms_norm", "group_norm", "softmax", "dropout", "mean", "expand", "contiguous", "clone", "detach"),
    *("to", "float", "half", "double", "bfloat16", "type", "type_as", "empty_like", "zeros_like", "ones_like"),
}
"""Operations whose result has the axes of its inputs, or 1 where one was summed."""


def through(name: str, call: Call) -> Any:
    """The labels of one operation's result; None where it is not known here."""
    rule = _RULES.get(name)
    if rule is not None:
        return rule(call)
    if name in ALIGNED and isinstance(call.result, torch.Tensor):
        kept = name not in ("mean",) or call.result.dim() == call.values[0].dim()
        return _aligned(call) if kept else None
    return None
