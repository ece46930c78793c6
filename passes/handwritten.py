"""Find attention that a model writes out by hand, softmax(q k^T * scale [+ mask]) v, and give it in normal form.

The search starts at the second product and follows its probabilities back to the first. Every node between must
be one that is known, and be used by the next one alone; axes are followed by name, so that any order of them, any
einsum and any transpose is the same pattern. What differs in anything is not touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sla_compile.passes.attention_call import AttentionCall, Obstacle, module_stack
from sla_compile.passes.handwritten_inputs import Inputs, NamedTensor, grouped_axes, same_sizes
from sla_compile.passes.handwritten_ops import (
    AxisNames,
    Masked,
    Product,
    cast,
    copied,
    dropout,
    masked,
    permutation,
    product,
    regrouped,
    scaled,
    softmax_axis,
)
from sla_compile.passes.node_ops import ELEMENTWISE, VIEWS, disturbs, is_number, read, tensor
from sla_compile.passes.operands import Source, example

__all__ = ["scaled_matmul_softmax_matmul"]

_PATTERN = "scaled_matmul_softmax_matmul"
_HARMLESS = VIEWS | ELEMENTWISE | {"mean", "sum", "amax"}


@dataclass
class _Trail:
    """The way from the second product back to the first: the axes of the tensor it has reached, what it passed."""

    axes: AxisNames
    precision: torch.dtype
    passed: list[fx.Node] = field(default_factory=list)
    unread: list[fx.Node] = field(default_factory=list)
    """What is made of these and read by nobody, last ones first."""
    scale: Any = 1.0
    mask: Masked | None = None
    mask_axes: AxisNames = ()
    mask_scale: float = 1.0
    dropout_p: float = 0.0
    before_grouping: tuple[AxisNames, torch.Size] | None = None
    obstacle: Obstacle | None = None

    def refuse(self, reason: str, value: str, accepted: str) -> None:
        self.obstacle = self.obstacle or Obstacle(reason, value, accepted)

    def passes(self, node: fx.Node, name: str) -> None:
        """Go by ``node``, which has to have one user that is read; where it has more, that is the obstacle."""
        unread = [_unread(user) for user in node.users]
        self.unread += [other for found in unread for other in found]
        if unread.count([]) > 1:
            users = ", ".join(sorted(user.name for user, found in zip(node.users, unread, strict=True) if not found))
            self.refuse(f"the attention {name} are used elsewhere too", users, f"{name} that only the next step reads")
        self.passed.append(node)

    def layout_step(self, node: fx.Node) -> fx.Node | None:
        """The input where ``node`` changes only dtype or order of axes; the names of axes go with it."""
        value = tensor(node)
        if (source := cast(node)) is not None and value is not None:
            return source if value.dtype == torch.float32 or value.dtype.itemsize >= self.precision.itemsize else None
        if (source := copied(node)) is not None:
            return source
        if (permuted := permutation(node)) is not None:
            source, order = permuted
            self.axes = tuple(self.axes[order.index(axis)] for axis in range(len(order)))
            return source
        if (source := regrouped(node)) is not None:
            return source if self._regroup(source, node) else None
        return None

    def _regroup(self, source: fx.Node, node: fx.Node) -> bool:
        before, result = example(source).shape, example(node).shape
        if self.before_grouping is None:
            self.before_grouping = self.axes, result
            self.axes = (*grouped_axes(before), *self.axes[-2:])
            return not any(axis.startswith("grouped") for axis in self.axes[-2:])
        axes, shape = self.before_grouping
        if not same_sizes(before, shape) or self.axes[-2:] != axes[-2:] or self.axes[:-2] != grouped_axes(result):
            return False
        self.axes, self.before_grouping = axes, None
        return True


def scaled_matmul_softmax_matmul(node: fx.Node, module: fx.GraphModule) -> AttentionCall | None:
    """The attention whose second product is ``node``; None where that is not what it is."""
    second = product(node)
    if second is None or second.addend is not None or (summed := second.contracted()) is None:
        return None
    sides = (second.left, second.left_axes), (second.right, second.right_axes)
    for (weights, weight_axes), (value, value_axes) in (sides, sides[::-1]):
        value_example = tensor(value)
        if value_example is None or weights is value:
            continue
        trail = _Trail(weight_axes, value_example.dtype)
        softmax = _probabilities(weights, trail, summed)
        first = _scores(softmax, trail) if softmax is not None else None
        if first is None:
            continue
        call = _normal_form(node, module, trail, first, summed, NamedTensor(value, value_axes), second.out_axes)
        if call is not None:
            return call
    return None


def _normal_form(
    node: fx.Node,
    module: fx.GraphModule,
    trail: _Trail,
    first: Product,
    summed: str,
    value: NamedTensor,
    out_axes: AxisNames,
) -> AttentionCall | None:
    """The call, from the way between its products: ``summed`` names the axis of the keys' tokens."""
    names = dict(zip(first.out_axes, trail.axes, strict=True))
    names[first.contracted() or ""] = "width"
    query = NamedTensor(first.left, tuple(names.get(axis, "") for axis in first.left_axes))
    key = NamedTensor(first.right, tuple(names.get(axis, "") for axis in first.right_axes))
    if summed in query.axes:
        query, key = key, query
    own = [axis for axis in query.axes if axis not in key.axes]
    # in the order of the queries: (batch, heads), however the scores have them
    batch = tuple(axis for axis in query.axes if axis in key.axes and axis in trail.axes)
    if "" in query.axes + key.axes or len(own) != 1 or own[0] in value.axes or not batch:
        return None
    if not {*batch, summed} <= {*value.axes} or summed in query.axes or summed not in key.axes:
        return None
    width = next(axis for axis in value.axes if axis not in (*batch, summed))
    every = (query.axes, key.axes, value.axes, trail.axes, out_axes)
    orders = {tuple(axis for axis in axes if axis in batch) for axes in every}
    inputs = Inputs.of(query, key, value, batch=batch, tokens=(own[0], summed), width=width)
    interior = tuple(dict.fromkeys([*trail.passed, *inputs.passed]))
    if {query.node, key.node, value.node} & {*trail.passed} or _disturbed(node, {*interior}):
        return None
    user = inputs.split_heads(node, out_axes)
    # what is read at ``user`` in the place of ``node`` must be then what it was
    end = user if user is not None and not _disturbed(user, {node}) else node
    restore = inputs.restored(end, node, out_axes)
    mask = trail.mask
    attn_mask: Source | None = None
    if mask is not None and trail.obstacle is None:
        attn_mask = inputs.mask(mask, trail.mask_axes, trail.mask_scale)
        if attn_mask is None:
            trail.refuse("attention mask", f"{mask.mask.name}, in another layout than the scores", "attn_mask=None")
    return AttentionCall(
        node=end,
        module=module,
        stack=module_stack(node),
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        attn_mask=attn_mask,
        dropout_p=trail.dropout_p,
        scale=trail.scale * inputs.scale,
        pattern=_PATTERN,
        restore=restore,
        interior=(*trail.unread, *(interior if end is node else (node, *interior))),
        merged_heads=inputs.merged,
        mixed_heads=len(orders) > 1,
        mean_if_masked=mask is not None and mask.fill is not None and math.isfinite(mask.fill),
        obstacle=trail.obstacle,
    )


def _unread(node: fx.Node) -> list[fx.Node]:
    """``node`` and all that is made of it, last ones first, where nobody reads that: a mean of weights, say."""
    found = {node: None}
    pending = [node]
    while pending:
        made = pending.pop()
        if made.op == "output" or read(made).word not in _HARMLESS or disturbs(made):
            return []
        pending += [user for user in made.users if user not in found]
        found.update(dict.fromkeys(made.users))
    return sorted(found, reverse=True)


def _disturbed(node: fx.Node, own: set[fx.Node]) -> bool:
    """Whether anything between the first of ``own`` and ``node`` writes to a tensor or changes a mode."""
    # A permuted view shows what its source holds at any time, so nothing is moved with it.
    pending = {other for other in own if permutation(other) is None}
    step = node.prev
    while pending and step.op != "root":
        if step not in own and disturbs(step):
            return True
        pending.discard(step)
        step = step.prev
    return bool(pending)


def _probabilities(node: fx.Node, trail: _Trail, summed: str) -> fx.Node | None:
    """Follow the probabilities back through casts and dropout; the softmax's input, if it is over ``summed``."""
    while True:
        found = softmax_axis(node)
        trail.passes(node, "probabilities")
        if found is not None:
            return found[0] if trail.axes[found[1]] == summed else None
        if (dropped := dropout(node)) is not None:
            node, trail.dropout_p = dropped[0], max(trail.dropout_p, dropped[1])
            continue
        before = trail.layout_step(node)
        if before is None:
            return None
        node = before


def _scores(node: fx.Node, trail: _Trail) -> Product | None:
    """Follow the scores back through scale, mask and casts; the first product."""
    while True:
        trail.passes(node, "scores")
        if (first := product(node)) is not None:
            return _first_product(node, first, trail)
        if (way := scaled(node)) is not None:
            node = way[0]
            _scale(trail, way[1])
            continue
        ways = [way for way in masked(node) if _leads_to_product(way.source)]
        if ways:
            node = ways[0].source
            _mask(trail, ways[0])
            continue
        before = trail.layout_step(node)
        if before is None:
            return None
        node = before


def _first_product(node: fx.Node, first: Product, trail: _Trail) -> Product | None:
    if trail.before_grouping is not None or len(first.out_axes) != len(trail.axes) or first.contracted() is None:
        return None
    if first.addend is not None and first.addend_factor != 0:
        _mask(trail, Masked(node, first.addend, factor=first.addend_factor))
    elif first.addend is not None and first.addend.target in (torch.empty, torch.zeros):
        trail.passed.append(first.addend)
    _scale(trail, first.factor)
    return first


def _scale(trail: _Trail, factor: Any) -> None:
    if not is_number(factor):
        value = tensor(factor)
        text = f"a tensor {tuple(value.shape)}" if value is not None else str(example(factor))
        trail.refuse("scale is not a fixed number", text, "a finite number or None")
        return
    trail.scale *= factor


def _mask(trail: _Trail, mask: Masked) -> None:
    """Take note of a mask at the scores as they are here, on the way back: scales already seen come after it."""
    shape = tensor(mask.mask)
    if trail.mask is not None:
        trail.refuse("more than one attention mask", mask.mask.name, "one mask")
    if shape is None or shape.dim() > len(trail.axes):
        trail.refuse("the attention mask is no tensor of the scores' axes", mask.mask.name, "a tensor")
    trail.mask, trail.mask_axes, trail.mask_scale = mask, trail.axes, trail.scale * mask.factor


def _leads_to_product(node: fx.Node, masks: int = 2) -> bool:
    """Whether the scores can be what ``node`` gives: a first product is behind it, and no more masks than these."""
    while True:
        if product(node) is not None:
            return True
        way = scaled(node)
        permuted = permutation(node)
        source = way[0] if way else permuted[0] if permuted else cast(node) or copied(node) or regrouped(node)
        if source is None:
            return masks > 0 and any(_leads_to_product(other.source, masks - 1) for other in masked(node))
        node = source
