"""What one node is in an attention that a model writes out: a product, a scale, a mask, a softmax, a layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sla_compile.passes.node_ops import is_number, read, tensor
from sla_compile.passes.view_axes import origins, same_size

__all__ = ["AxisNames", "Masked", "Product", "cast", "copied", "dropout", "masked"]
__all__ += ["permutation", "product", "regrouped", "scaled", "softmax_axis"]

AxisNames = tuple[str, ...]
"""The names of a tensor's axes. Names of batch axes are numbers or letters of an einsum."""


@dataclass(frozen=True)
class Product:
    """A product of two tensors over one axis, each axis named. ``addend`` and ``factor`` are of baddbmm."""

    left: fx.Node
    right: fx.Node
    left_axes: AxisNames
    right_axes: AxisNames
    out_axes: AxisNames
    factor: float = 1.0
    addend: fx.Node | None = None
    addend_factor: float = 0.0

    def contracted(self) -> str | None:
        """The axis that is summed over, where there is one, and each side has one axis of its own."""
        left, right, out = set(self.left_axes), set(self.right_axes), set(self.out_axes)
        sizes = [len(axes) for axes in (self.left_axes, self.right_axes, self.out_axes)]
        summed = left & right - out
        own = (left - right, right - left)
        plain = sizes == [len(left), len(right), len(out)] and out == (left | right) - summed
        return next(iter(summed)) if plain and len(summed) == 1 and len(own[0]) == len(own[1]) == 1 else None


def product(node: fx.Node) -> Product | None:
    """``node`` as a product: matmul, bmm, baddbmm or einsum of two tensors of at least three axes."""
    op = read(node)
    given = op.arguments
    if op.in_place:
        return None
    if op.word == "einsum":
        return _einsum(given.get("equation"), given.get("operands", ()))
    more: dict[str, Any] = {}
    if op.word == "matmul":
        left, right = op.input, given["other"]
    elif op.word == "baddbmm":
        left, right = given["batch1"], given["batch2"]
        factor, addend_factor = given.get("alpha", 1), given.get("beta", 1)
        if not is_number(factor) or not is_number(addend_factor):
            return None
        more = {"factor": float(factor), "addend": op.input, "addend_factor": float(addend_factor)}
    else:
        return None
    shapes = tensor(left), tensor(right)
    if shapes[0] is None or shapes[1] is None or not 3 <= shapes[0].dim() == shapes[1].dim():
        return None
    batch = tuple(str(i) for i in range(shapes[0].dim() - 2))
    return Product(left, right, (*batch, "r", "s"), (*batch, "s", "c"), (*batch, "r", "c"), **more)


def _einsum(equation: Any, operands: tuple[Any, ...]) -> Product | None:
    inputs, arrow, out = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    ranks = [value.dim() for operand in operands if (value := tensor(operand)) is not None]
    if not arrow or not len(terms) == len(operands) == len(ranks) == 2:
        return None
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    if hidden[0] != hidden[1] or any(hidden[0] and "..." not in term for term in (*terms, out)):
        return None

    def axes(term: str) -> AxisNames:
        before, dots, rest = term.partition("...")
        return (*before, *(str(i) for i in range(hidden[0] if dots else 0)), *rest)

    left, right = operands
    return Product(left, right, axes(terms[0]), axes(terms[1]), axes(out))


def scaled(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """(x, factor) where ``node`` is x times or through something; a factor that is no number is given as it is."""
    op = read(node)
    if op.word not in ("mul", "div") or op.arguments.keys() != {"input", "other"}:
        return None
    left, right = op.input, op.arguments["other"]
    if tensor(left) is not None and is_number(right):
        factor = right if op.word == "mul" else 1.0 / right if right else None
        return None if factor is None else (left, factor)
    if op.word == "mul" and tensor(right) is not None and is_number(left):
        return right, left
    return (left, right) if isinstance(left, fx.Node) else None


@dataclass(frozen=True)
class Masked:
    """Scores with a mask: ``fill`` for a mask whose True is forbidden, else ``mask`` times ``factor`` was added."""

    source: fx.Node
    mask: fx.Node
    fill: float | None = None
    keeps: bool = False
    """With ``fill``, that the mask's True is what takes part."""
    factor: float = 1.0


def masked(node: fx.Node) -> list[Masked]:
    """The ways to read ``node`` as scores with a mask: a sum may be read either way round, a difference only one."""
    op = read(node)
    given = op.arguments
    if op.word in ("add", "sub") and given.keys() == {"input", "other"}:
        pair = op.input, given["other"]
        if tensor(pair[0]) is None or tensor(pair[1]) is None:
            return []
        if op.word == "sub":
            return [Masked(*pair, factor=-1.0)]
        ways = [pair] if op.in_place else [pair, pair[::-1]]
        return [Masked(source, mask) for source, mask in ways]
    if op.word == "masked_fill":
        return _filled(op.input, given.get("mask"), given.get("value"), keeps=False)
    if op.word == "where" and given.keys() == {"condition", "input", "other"}:
        mask, first, second = given["condition"], op.input, given["other"]
        return _filled(first, mask, second, keeps=True) or _filled(second, mask, first, keeps=False)
    return []


def _filled(source: Any, mask: Any, fill: Any, *, keeps: bool) -> list[Masked]:
    # Anything this low leaves no weight to a key, unless the whole row is masked.
    low = is_number(fill) and fill <= -1e4
    readable = low and tensor(source) is not None and tensor(mask) is not None
    return [Masked(source, mask, float(fill), keeps)] if readable else []


def softmax_axis(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(input, axis) where ``node`` is a softmax; the axis counts from 0."""
    op = read(node)
    axis = op.dim()
    return (op.input, axis) if op.word == "softmax" and axis is not None and not op.in_place else None


def dropout(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(input, probability) where ``node`` is a dropout; 0 where it is not in training."""
    op = read(node)
    training, probability = op.arguments.get("training", True), op.arguments.get("p", 0.5)
    if op.word != "dropout" or not isinstance(op.input, fx.Node):
        return None
    if not is_number(probability) or not isinstance(training, bool):
        return None
    return op.input, float(probability) if training else 0.0


def cast(node: fx.Node) -> fx.Node | None:
    """The input where ``node`` only changes a floating dtype to another (or the same)."""
    op = read(node)
    before, result = op.tensor, op.result
    if op.word != "to" or op.in_place or before is None or not isinstance(result, torch.Tensor):
        return None
    if before.device != result.device or "memory_format" in op.arguments:
        return None
    source: fx.Node = op.input
    return source if before.is_floating_point() and result.is_floating_point() else None


def copied(node: fx.Node) -> fx.Node | None:
    """The input where ``node`` only makes it contiguous."""
    op = read(node)
    return op.input if op.word == "contiguous" else None


def permutation(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """(input, order) where ``node`` permutes axes: its axis ``a`` is the input's axis ``order[a]``."""
    op = read(node)
    found = origins(op) if op.word == "permute" else None
    return None if found is None else (op.input, tuple(axis.axis for axis in found if axis and axis.axis is not None))


def regrouped(node: fx.Node) -> fx.Node | None:
    """The input where ``node`` only regroups the axes before the last two, such as (B, H) to (B*H)."""
    op = read(node)
    before, result = op.tensor, op.result
    if op.word != "reshape" or before is None or not isinstance(result, torch.Tensor):
        return None
    if min(before.dim(), result.dim()) < 3:
        return None
    same = all(same_size(before.shape[axis], result.shape[axis]) for axis in (-2, -1))
    source: fx.Node = op.input
    return source if same else None
