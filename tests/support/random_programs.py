"""Random programs with attention in them: views, spellings, masks built and written every way, writes at every place.

A program is a graph as Dynamo would give it, each node with its value, and what the definition needs to know of its
attentions: where they stand, on which queries, keys, values and key mask.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tests.support.view_spellings import joined, one_of, part_of, permuted, regrouped, some_way, unsqueezed

BATCH, HEADS, WIDTH, GRID = 2, 2, 16, (2, 4, 5)
TOKENS, CHANNELS = 40, HEADS * WIDTH
SHAPE = (BATCH, HEADS, TOKENS, WIDTH)
aten = torch.ops.aten


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Any = (-1, -1),
) -> Tensor:  # fmt: skip
    """(B, N, H, D) in and out, as flash-attn's."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal).transpose(1, 2)


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None
) -> Tensor:
    """(B, N, H, D) in and out, as xformers'."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_bias, scale=scale).transpose(1, 2)


flash_attn_func.__module__, memory_efficient_attention.__module__ = "flash_attn.flash_attn_interface", "xformers.ops"


@dataclass
class Core:
    """One attention of a program: (B, H, N, D) tensors at its start, and how (B, H, N, D) lies in its result."""

    queries: fx.Node
    keys: fx.Node
    values: fx.Node
    key_mask: fx.Node | None
    scale: float
    causal: bool
    place: Callable[[Tensor], Tensor]
    result: fx.Node
    defined: bool
    """Whether the definition can say what it gives: nothing was written in it, and its mask is one over keys."""


@dataclass
class Program:
    """A graph under construction."""

    draw: random.Random
    writes: float
    per_head: bool = False
    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: list[Tensor] = field(default_factory=list)
    cores: list[Core] = field(default_factory=list)
    gates: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    smooth: bool = False
    """Behind an attention, where a step such as a floor would make a difference of a rounding error."""
    written: int = 0

    def input(self, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        self.inputs.append(value)
        node.meta["example_value"] = value.clone()
        return node

    def _evaluated(self, node: fx.Node) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        with torch.no_grad():
            if node.op == "call_method":
                node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        make: Any = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        return self._evaluated(make(target, args, kwargs))

    def spelled(self, way: Callable[..., Any], *nodes: fx.Node) -> fx.Node:
        """What ``way``, written as on tensors, gives."""
        last = next(iter(reversed(self.graph.nodes)))
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        found: fx.Node = way(*(fx.Proxy(node, tracer) for node in nodes)).node
        while (last := last.next).op != "root":
            self._evaluated(last)
        return found

    def one(self, *ways: Any) -> Any:
        return self.draw.choice(ways)

    def chance(self, probability: float) -> bool:
        return self.draw.random() < probability

    def viewed(self, ways: Any, node: fx.Node) -> fx.Node:
        return self.spelled(some_way(ways, value_of(node), self.draw), node)

    def detour(self, node: fx.Node) -> fx.Node:
        """Views that change nothing in the end."""
        shape = tuple(value_of(node).shape)
        count, axis = len(shape), self.draw.randrange(len(shape))
        kind = self.draw.randrange(6)
        if kind == 0:
            order = self.draw.sample(range(count), count)
            node = self.viewed(permuted(order), node)
            return self.viewed(permuted([order.index(i) for i in range(count)]), node)
        if kind == 1:
            node = self.viewed(unsqueezed(axis, count), node)
            return self.viewed(one_of(axis, 0, value_of(node).shape), node)
        if kind == 2 and shape[axis] % 2 == 0:
            split = [*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :]]
            return self.viewed(regrouped(split, shape), self.viewed(regrouped(shape, split), node))
        if kind == 3 and shape[axis] > 1:
            ends = ((0, 1), (1, shape[axis]))
            parts = [self.viewed(part_of(axis, first, last, shape), node) for first, last in ends]
            return self.spelled(lambda *xs: self.one(*joined(axis, count))(list(xs)), *parts)
        return node

    def maybe_write(self, *nodes: fx.Node) -> None:
        if self.chance(self.writes):
            self.write(self.one(*nodes))

    def write(self, node: fx.Node) -> None:
        """Change ``node`` in place, or a view of it that may be a copy."""
        value = value_of(node)
        self.written += 1
        for _ in range(self.one(0, 1, 1, 2)):
            if value.dim():
                node = self.part(node)
                value = value_of(node)
        if value.dtype == torch.bool:
            other = self.call(torch.ones_like, node)
            targets = [operator.iand, operator.ior, operator.ixor, "logical_and_", "__iand__", aten.bitwise_xor_.Tensor]
            if self.chance(0.3):
                self.call(self.one("logical_not_", "zero_"), node)
            else:
                self.call(self.one(*targets), node, other)
            return
        kind = self.draw.randrange(5)
        rough = () if self.smooth else (operator.ifloordiv, operator.imod, "floor_divide_", "remainder_")
        if kind == 0:
            targets = [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, *rough]
            targets += ["add_", "mul_", "sub_", "__iadd__", "__imul__", aten.add_.Tensor, aten.mul_.Scalar]
            self.call(self.one(*targets), node, self.one(2, 0.5, 3))
        elif kind == 1:
            self.call(self.one("zero_", "neg_", "abs_", "tanh_", torch.relu_, torch.sigmoid_), node)
        elif kind == 2:
            self.call(self.one(F.relu, F.silu, F.elu), node, inplace=True)
        elif kind == 3 and value.dim():
            index: Any = self.one(..., 0, -1, slice(0, 3), (..., slice(1, 4)), slice(None))
            other = self.one(1.0, self.call(torch.ones_like, self.call(operator.getitem, node, index)))
            self.call(operator.setitem, node, index, other)
        else:
            self.call(self.one("copy_", operator.iadd, torch.Tensor.mul_), node, self.call(torch.ones_like, node))

    def part(self, node: fx.Node) -> fx.Node:
        """Some of ``node``, or all of it in another shape; a view of it, or not."""
        shape = value_of(node).shape
        axis = self.draw.randrange(len(shape))
        ways: list[Callable[[Any], Any]] = [
            lambda x: x.reshape(-1),
            lambda x: x.flatten(),
            lambda x: x.contiguous(),
            lambda x: x.transpose(0, -1),
            lambda x: x[..., : max(1, shape[-1] // 2)],
            lambda x: x.select(axis, 0),
            lambda x: x.unbind(axis)[-1],
            lambda x: x.narrow(axis, 0, 1),
            lambda x: x.reshape(shape[0], -1),
            lambda x: x.view_as(x),
            lambda x: x.detach(),
            lambda x: x.to(x.dtype) if False else x.contiguous(),
            lambda x: x[0],
        ]
        return self.spelled(self.draw.choice(ways), node)


def value_of(node: Any) -> Any:
    return node.meta["example_value"] if isinstance(node, fx.Node) else node


Three = tuple[fx.Node, fx.Node, fx.Node]


def projected(p: Program, x: fx.Node, weights: Sequence[fx.Node]) -> Three:
    """Queries, keys and values (B, H, N, D) of ``x`` (B, N, C): packed, or each its own way."""
    if p.chance(0.5):
        packed = p.call(F.linear, x, weights[3])
        split = (BATCH, TOKENS, 3, HEADS, WIDTH)
        packed = p.viewed(
            permuted([2, 0, 3, 1, 4]), p.detour(p.viewed(regrouped(value_of(packed).shape, split), packed))
        )
        sides = [p.viewed(one_of(0, i, value_of(packed).shape), packed) for i in range(3)]
    else:
        sides = [_heads(p, _projection(p, x, weight)) for weight in weights[:3]]
    sides = [p.spelled(p.one(lambda t: t + 0.2, lambda t: t.tanh()), side) if p.chance(0.3) else side for side in sides]
    p.maybe_write(*sides)
    return sides[0], sides[1], sides[2]


def _projection(p: Program, x: fx.Node, weight: fx.Node) -> fx.Node:
    kind = p.draw.randrange(10)
    if kind == 0:
        return p.spelled(lambda t, w: t @ w, x, weight)
    if kind == 1:
        return p.spelled(lambda t, w: torch.einsum("bnc,cd->bnd", t, w), x, weight)
    if kind == 2:
        return p.spelled(lambda t, w: F.conv1d(t.transpose(1, 2), w.unsqueeze(-1)).transpose(1, 2), x, weight)
    if kind == 3:
        return x
    if kind == 4:
        return p.call(F.linear, input=x, weight=weight)
    return p.call(F.linear, x, weight)


def _heads(p: Program, x: fx.Node) -> fx.Node:
    if p.chance(0.2):
        p.maybe_write(x)
    x = p.viewed(regrouped(value_of(x).shape, (BATCH, TOKENS, HEADS, WIDTH)), p.detour(x))
    return p.detour(p.viewed(permuted([0, 2, 1, 3]), x))


@dataclass
class Mask:
    """A mask that broadcasts to (B, H, N, N): True takes part, or added; ``keys`` (B, N) where it is one over keys."""

    node: fx.Node
    keys: fx.Node | None


def mask_of(p: Program, allowed: fx.Node, boolean: bool) -> Mask:
    """A mask from ``allowed`` (B, N) bool, in some way."""
    before = p.written
    p.maybe_write(allowed)
    keys: fx.Node | None = allowed
    fill = p.one(-math.inf, -1e9, -3.0, 2.0)
    if not boolean:
        way = p.one(
            lambda m: m.double().mul(0).masked_fill(~m, fill),
            lambda m: torch.where(m, 0.0, fill).double(),
            lambda m: (1 - m.double()) * max(fill, -1e9),
        )
        keys = p.spelled(way, allowed)
    assert keys is not None
    ways: list[Callable[[Any], Any]] = [
        lambda m: m[:, None, None, :],
        lambda m: m.view(BATCH, 1, 1, TOKENS),
        lambda m: m.unsqueeze(1).unsqueeze(1).expand(BATCH, HEADS, TOKENS, TOKENS),
        lambda m: m[:, None, None].repeat(1, 1, TOKENS, 1),
        lambda m: m[:, None].expand(-1, TOKENS, -1).clone().unsqueeze(1),
        lambda m: m[:, None, None].expand(-1, HEADS, -1, -1).reshape(BATCH * HEADS, 1, TOKENS).unflatten(0, SHAPE[:2]),
        lambda m: m.repeat_interleave(HEADS, 0).view(BATCH, HEADS, 1, TOKENS),
        lambda m: torch.cat([m[:, :9], m[:, 9:]], -1)[:, None, None].expand(-1, HEADS, TOKENS, -1),
        lambda m: torch.cat([m[:, None, None]] * HEADS, 1),
        lambda m: m.view(BATCH, TOKENS, 1).expand(-1, -1, TOKENS).transpose(1, 2)[:, None],
    ]
    if p.chance(0.2):  # two masks over keys
        keys = p.spelled(
            p.one(lambda m: m & m.roll(0), lambda m: m.logical_and(m)) if boolean else lambda m: m + m, keys
        )
    node = p.spelled(p.draw.choice(ways), keys)
    per_query = p.chance(0.25)
    if per_query:
        node = p.spelled(lambda m: m.expand(BATCH, HEADS, TOKENS, TOKENS).clone(), node)
        if boolean:
            lower = p.call("tril", p.call(torch.ones, TOKENS, TOKENS, dtype=torch.bool))
        else:
            lower = p.call(torch.ones, TOKENS, 1, dtype=torch.float64)
            p.call(operator.setitem, lower, slice(0, 5), 3.0)
        kind = p.draw.randrange(4)
        operators = (operator.and_, operator.iand) if boolean else (operator.add, operator.isub)
        if kind == 0:
            node = p.call(operators[0], node, lower)
        elif kind == 3 and boolean:  # as HunyuanVideo's: a query that is padding sees itself alone
            alone = p.call(torch.eye, TOKENS, dtype=torch.bool)
            node = p.spelled(lambda m, one: (m[:, None, None] & m[:, None, :, None]) | one, keys, alone)
        elif kind == 1:
            p.call(operators[1], p.call(operator.getitem, node, (0, p.one(0, slice(None)))), lower)
        else:
            node = p.call(operators[1], node, lower)
    p.maybe_write(node, allowed)
    return Mask(node, None if per_query or p.written > before else keys)


def scored(p: Program, scores: fx.Node, mask: Mask, shape: Sequence[int]) -> fx.Node:
    """``scores`` of ``shape`` with ``mask``, which broadcasts to it."""
    if value_of(mask.node).dtype != torch.bool:
        kind = p.draw.randrange(4)
        if kind == 0:
            return p.spelled(lambda s, m: s - (-m), scores, mask.node)
        return p.call(p.one(operator.add, "add", operator.iadd, "add_", aten.add.Tensor), scores, mask.node)
    fill = p.one(-1e9, -math.inf, -torch.finfo(torch.float32).max, -1e5)
    if p.chance(0.5):
        blocked = p.spelled(p.one(lambda m: ~m, lambda m: m.logical_not(), lambda m: m == False), mask.node)  # noqa: E712
        return p.call(p.one("masked_fill", "masked_fill_", torch.masked_fill), scores, blocked, fill)
    return p.call(torch.where, mask.node, scores, fill)
