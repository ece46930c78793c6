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

from sla_compile.passes.node_ops import ELEMENTWISE, VIEWS, NodeOp
from sla_compile.passes.operands import example
from sla_compile.passes.view_axes import Origins, origins, origins_of_pieces, same_size

__all__ = ["ALIGNED", "Atom", "Axis", "Labels", "is_labels", "same_axis", "size_of", "through", "unknown", "unpacked"]


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


def same_axis(left: Axis, right: Axis) -> bool:
    """Whether two axes are of the same factors, provably: sizes may be symbolic, so ``==`` would ask for a guard."""
    return len(left) == len(right) and all(
        (one.of, one.dim, one.start) == (other.of, other.dim, other.start)
        and same_size(one.size, other.size)
        and same_axis(one.part, other.part)
        for one, other in zip(left, right, strict=True)
    )


def is_labels(value: Any) -> bool:
    if not isinstance(value, tuple):
        return False
    return all(isinstance(axis, tuple) and axis and isinstance(axis[0], Atom) for axis in value)


Known = Callable[[Any], Any]
"""The labels of an argument of an operation, a list of them where it is several tensors, or None."""


def _aligned(op: NodeOp, known: Known, inputs: Sequence[Any] | None = None) -> Labels | None:
    """Labels of a result whose axes are those of its inputs, from the last on, broadcast."""
    if not isinstance(op.result, torch.Tensor):
        return None
    pairs = [(known(given), example(given)) for given in (op.read_from if inputs is None else inputs)]
    tensors = [(axes, value) for axes, value in pairs if isinstance(value, torch.Tensor) and is_labels(axes)]
    found = []
    for back, size in enumerate(reversed(op.result.shape), 1):
        seen = [
            axes[-back]
            for axes, value in tensors
            if back <= value.dim() and same_size(value.shape[-back], size) and any(atom.known for atom in axes[-back])
        ]
        found.append(seen[0] if seen and all(same_axis(axis, seen[0]) for axis in seen) else unknown(size))
    return tuple(reversed(found))


def _regrouped(labels: Labels, shape: Sequence[Any]) -> Labels | None:
    """Row-major regrouping: factors of the old axes are dealt out to the new ones, where the sizes allow."""
    factors = [atom for axis in labels for atom in axis if not same_size(atom.size, 1)]
    found: list[Axis] = []
    for size in shape:
        taken: list[Atom] = []
        while factors and not same_size(size_of(taken), size) and _fits(size_of(taken) * factors[0].size, size):
            taken.append(factors.pop(0))
        if not same_size(size_of(taken), size):  # a factor is split: what is left of it is not known
            if not factors or factors[0].known or not _divides(size, size_of(taken), factors[0].size):
                return None
            factors[0] = Atom(factors[0].size // (size // size_of(taken)))
            taken = [*taken, Atom(size // size_of(taken))]
        found.append(tuple(taken) or unknown(size))
    return tuple(found)


def _fits(size: Any, whole: Any) -> bool:
    return same_size(size, whole) or (isinstance(size, int) and isinstance(whole, int) and whole % size == 0)


def _divides(size: Any, taken: Any, factor: Any) -> bool:
    numbers = all(isinstance(number, int) for number in (size, taken, factor))
    return numbers and size % taken == 0 and factor % (size // taken) == 0


def _all_but_last(op: NodeOp, known: Known) -> Labels | None:
    """As the first argument, but for the last axis: of a matrix product, of a projection, of attention."""
    labels = known(op.arguments.get("query", op.input))
    if not is_labels(labels) or len(labels) != op.result.dim():
        return None
    kept = zip(labels[:-1], op.result.shape[:-1], strict=True)
    return (
        *(axis if same_size(size_of(axis), size) else unknown(size) for axis, size in kept),
        unknown(op.result.shape[-1]),
    )


def _viewed(op: NodeOp, known: Known) -> Any:
    """Of a view; and of one of several results."""
    labels = known(op.input)
    if isinstance(labels, list):
        index = op.arguments.get("index")
        return labels[index] if type(index) is int and -len(labels) <= index < len(labels) else None
    if not is_labels(labels) or not isinstance(op.result, torch.Tensor) or op.in_place:
        return None
    if op.word == "reshape":
        return _regrouped(labels, op.result.shape)
    found = origins(op)
    return None if found is None else _moved(found, labels, op, op.result.shape)


def _moved(found: Origins, labels: Labels, op: NodeOp, shape: Sequence[Any]) -> Labels:
    """The labels of a result whose axes lie in the input as ``found`` says."""
    moved = []
    for origin, size in zip(found, shape, strict=True):
        if origin is not None and origin.axis is not None and op.tensor is not None and not origin.repeated:
            before = op.tensor.shape[origin.axis]
            part = origin.part
            moved.append(labels[origin.axis] if part is None else _sliced(labels[origin.axis], before, part, size))
        else:
            moved.append(unknown(size))
    return tuple(moved)


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


def _sliced(axis: Axis, size: Any, part: slice, left: Any) -> Axis:
    if part == slice(None):
        return axis
    bounds = (part.start, part.stop, part.step)
    if not isinstance(size, int) or not all(bound is None or isinstance(bound, int) for bound in bounds):
        return unknown(left)
    first, last, step = part.indices(size)
    return _slice(axis, left, first, last) if step == 1 else unknown(left)


def _several(op: NodeOp, known: Known) -> list[Labels] | None:
    """chunk, split and unbind along one axis."""
    labels, found = known(op.input), origins_of_pieces(op)
    if not is_labels(labels) or found is None:
        return None
    return [_moved(one, labels, op, piece.shape) for one, piece in zip(found, op.result, strict=True)]


def _joined(op: NodeOp, known: Known) -> Labels | None:
    """cat: the grid of one part, with the tokens of the others before and behind it."""
    given, axis = op.arguments.get("tensors"), op.arguments.get("dim", 0)
    if not isinstance(given, tuple | list) or type(axis) is not int:
        return None
    parts, values = [known(part) for part in given], [example(part) for part in given]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return None
    axis %= op.result.dim()
    aligned = _aligned(op, known, given)
    if aligned is None:
        return None
    joined = unknown(op.result.shape[axis])
    with_grid = [i for i, part in enumerate(parts) if is_labels(part) and any(atom.known for atom in part[axis])]
    lengths = [value.shape[axis] for value in values]
    if len(with_grid) == 1 and all(isinstance(length, int) for length in lengths):
        before = ([0, *accumulate(lengths)])[with_grid[0]]
        start, atoms = unpacked(parts[with_grid[0]][axis])
        joined = _part(atoms, before + start, sum(lengths))
    return (*aligned[:axis], joined, *aligned[axis + 1 :])


_RULES: dict[str, Callable[[NodeOp, Known], Any]] = {
    **dict.fromkeys(VIEWS, _viewed),
    **dict.fromkeys(("linear", "matmul", "scaled_dot_product_attention"), _all_but_last),
    "diffusers.dispatch_attention_fn": _all_but_last,
    **dict.fromkeys(("split", "unbind"), _several),
    "cat": _joined,
}

ALIGNED = ELEMENTWISE | {
    *("layer_norm", "rms_norm", "group_norm", "softmax", "dropout", "mean", "empty_like", "zeros_like", "ones_like")
}
"""Operations whose result has the axes of its inputs, or 1 where one was summed."""


def through(op: NodeOp, known: Known) -> Any:
    """The labels of the result of ``op``; None where they are not known here."""
    rule = _RULES.get(op.word)
    if rule is not None:
        return rule(op, known)
    if op.word not in ALIGNED or not isinstance(op.result, torch.Tensor):
        return None
    kept = op.word != "mean" or (op.tensor is not None and op.result.dim() == op.tensor.dim())
    return _aligned(op, known) if kept else None
