"""Queries, keys and values of a hand-written attention, followed back and brought to (B, H, N, D)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from sla_compile.passes.handwritten_ops import AxisNames, Masked, cast, copied, permutation, regrouped, scaled
from sla_compile.passes.node_ops import is_number, writes
from sla_compile.passes.operands import Source, Step, after, example
from sla_compile.passes.view_axes import same_size

__all__ = ["Inputs", "NamedTensor", "grouped_axes", "same_sizes"]


@dataclass
class NamedTensor:
    """A tensor whose axes have names, and what it was followed back by: a factor, and the nodes passed."""

    node: fx.Node
    axes: AxisNames
    scale: float = 1.0
    passed: list[fx.Node] = field(default_factory=list)

    @property
    def example(self) -> torch.Tensor:
        value: torch.Tensor = example(self.node)
        return value

    def size(self, axis: str) -> Any:
        return self.example.shape[self.axes.index(axis)]

    def ordered(self, axes: AxisNames) -> Iterator[Step]:
        """The steps that put the axes in the order ``axes``."""
        order = tuple(self.axes.index(axis) for axis in axes)
        count = len(order)
        if order == (*range(count - 2), count - 1, count - 2):
            yield Step("transpose", (-2, -1))
        elif order != tuple(range(count)):
            yield Step("permute", order)


_HEADS = ("batch", "head")
_GROUPED = "grouped"


def grouped_axes(shape: Sequence[Any]) -> AxisNames:
    """Names for the axes before the last two of scores of ``shape`` that were regrouped on the way."""
    return tuple(f"{_GROUPED} {i}" for i in range(len(shape) - 2))


def _follow(side: NamedTensor, last: AxisNames, dtype: torch.dtype, *, scales: bool, expand: bool) -> NamedTensor:
    """Undo factors that are numbers, widening casts of a ``dtype``, copies, and, to ``expand``, merged heads."""
    side = replace(side, passed=[])
    while not writes(side.node):
        node, value = side.node, side.example
        source: fx.Node | None = None
        axes = side.axes
        if (way := scaled(node)) is not None:
            if scales and is_number(way[1]) and example(way[0]).dtype == value.dtype:
                source = way[0]
                side.scale *= way[1]
        elif (before := cast(node)) is not None:
            given = example(before).dtype
            wider = scales and given == dtype and given.itemsize < value.dtype.itemsize
            source = before if wider or given == value.dtype else None
        elif (before := copied(node)) is not None:
            source = before
        elif (permuted := permutation(node)) is not None:
            if axes[-2:] != last:
                source, order = permuted
                axes = tuple(axes[order.index(axis)] for axis in range(len(order)))
        elif expand and len(axes) == 3 and axes[0] not in last:
            before = regrouped(node)
            if before is not None and example(before).dim() == 4:
                source, axes = before, (*_HEADS, *axes[1:])
        if source is None:
            break
        side.passed.append(node)
        side.node, side.axes = source, axes
    return side


@dataclass
class Inputs:
    """The three sides in one layout. ``batch`` names the axes before the tokens, two where heads can be told."""

    sides: tuple[NamedTensor, NamedTensor, NamedTensor]
    batch: AxisNames
    tokens: tuple[str, str]
    width: str
    original_batch: AxisNames

    @classmethod
    def of(
        cls,
        query: NamedTensor,
        key: NamedTensor,
        value: NamedTensor,
        *,
        batch: AxisNames,
        tokens: tuple[str, str],
        width: str,
    ) -> Inputs:
        """Follow each side back, to where heads are an axis of their own if all three show them."""
        dtype = value.example.dtype
        given = ((query, (tokens[0], "width")), (key, (tokens[1], "width")), (value, (tokens[1], width)))
        for expand in (len(batch) == 1, False):
            sides = [_follow(side, last, dtype, scales=side is not value, expand=expand) for side, last in given]
            merged = [side for side in sides if _HEADS[0] in side.axes]
            sizes = [[side.size(axis) for axis in _HEADS] for side in merged]
            if len(merged) == 3 and all(same_sizes(sizes[0], other) for other in sizes[1:]):
                return cls((sides[0], sides[1], sides[2]), _HEADS, tokens, width, batch)
            if not merged:
                break
        return cls((sides[0], sides[1], sides[2]), batch, tokens, width, batch)

    @property
    def merged(self) -> bool:
        """Whether one axis stands for batch and heads."""
        return len(self.batch) == 1

    @property
    def expanded(self) -> bool:
        """Whether that axis was seen to be made of two."""
        return self.batch != self.original_batch

    @property
    def scale(self) -> float:
        return self.sides[0].scale * self.sides[1].scale

    @property
    def passed(self) -> list[fx.Node]:
        return [node for side in self.sides for node in side.passed]

    @property
    def _dtype(self) -> torch.dtype:
        return functools.reduce(torch.promote_types, (side.example.dtype for side in self.sides))

    def _source(self, index: int, token: str, width: str) -> Source:
        side = self.sides[index]
        steps = list(side.ordered((*self.batch, token, width)))
        if self.merged:
            steps.append(Step("unsqueeze", (1,)))
        if side.example.dtype != self._dtype:  # the widest decides, as nothing was lost before the products either
            steps.append(Step("to", (self._dtype,)))
        return after(side.node, *steps)

    @property
    def query(self) -> Source:
        return self._source(0, self.tokens[0], "width")

    @property
    def key(self) -> Source:
        return self._source(1, self.tokens[1], "width")

    @property
    def value(self) -> Source:
        return self._source(2, self.tokens[1], self.width)

    def split_heads(self, node: fx.Node, out_axes: AxisNames) -> fx.Node | None:
        """The view of ``node``, the second product, by heads, where that is all that reads it."""
        user = next(iter(node.users), None)
        if not self.expanded or user is None or len(node.users) != 1 or regrouped(user) is not node:
            return None
        wanted = [self.sides[0].size(axis) for axis in (*_HEADS, self.tokens[0])]
        plain = (*self.original_batch, self.tokens[0], self.width)
        return user if plain == out_axes and same_sizes(example(user).shape[:-1], wanted) else None

    def restored(self, end: fx.Node, node: fx.Node, out_axes: AxisNames) -> tuple[Step, ...]:
        """The steps from (B, H, N, D) to ``end``, which is the second product ``node`` or the view of it by heads."""
        plain = (*self.original_batch, self.tokens[0], self.width)
        mixed = any(side.example.dtype != self._dtype for side in self.sides)
        steps = [Step("to", (example(node).dtype,))] if mixed else []
        if end is not node:
            return tuple(steps)
        if self.expanded:
            steps.append(Step("flatten", (0, 1)))
        elif self.merged:
            steps.append(Step("squeeze", (1,)))
        return (*steps, *NamedTensor(node, plain).ordered(out_axes))

    def mask(self, mask: Masked, axes: AxisNames, scale: float) -> Source | None:
        """``attn_mask`` of scaled_dot_product_attention: boolean (True takes part) or added; None if unclear."""
        value = example(mask.mask)
        plain = (*self.original_batch, *self.tokens)
        steps: list[Step] = []
        by_heads = axes[0].startswith(_GROUPED)
        if by_heads:  # the scores themselves were seen by heads
            sizes = example(mask.source).shape
            if len(self.batch) != 2 or axes != (*grouped_axes(sizes), *self.tokens):
                return None
            if not same_sizes(sizes[:-2], [self.sides[0].size(axis) for axis in self.batch]):
                return None
        elif axes != plain:
            if value.dim() != len(axes):
                return None
            steps += NamedTensor(mask.mask, axes).ordered(plain)
        if len(self.original_batch) == 1 and not by_heads and value.dim() == 3:
            leading = value.shape[0]
            if not self.expanded:
                steps.append(Step("unsqueeze", (1,)))
            elif not same_size(leading, 1):
                steps.append(Step("unflatten", (0, (-1, self.sides[0].size("head")))))
        if mask.fill is not None:
            if mask.fill * scale > -1e3:  # scaled down to where it leaves weight
                return None
            if not mask.keeps:
                steps.append(Step("logical_not"))
        elif not value.is_floating_point():  # True that is added is 1, not leave to take part
            steps += [Step("to", (self._dtype,)), Step("mul", (scale,))]
        elif scale != 1.0:
            steps.append(Step("mul", (scale,)))
        return after(mask.mask, *steps)


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are equal, provably."""
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right, strict=True))
