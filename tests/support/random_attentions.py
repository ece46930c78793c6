"""Attentions of random programs, in every spelling, and whole programs of one or two of them."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tests.support.random_programs import (
    BATCH,
    CHANNELS,
    HEADS,
    SHAPE,
    TOKENS,
    WIDTH,
    Core,
    Mask,
    Program,
    Three,
    flash_attn_func,
    mask_of,
    memory_efficient_attention,
    projected,
    scored,
    value_of,
)
from tests.support.view_spellings import permuted, regrouped, unflattened

__all__ = ["program"]

LETTERS = "bhijd"


def program(seed: str, writes: float, per_head: bool) -> Program:
    """The program of ``seed``; ``writes`` is how probable one is at each place, ``per_head`` how its gates are."""
    p = Program(random.Random(seed), writes, per_head)
    torch.manual_seed(p.draw.randrange(10**6))
    x = p.input(torch.randn(BATCH, TOKENS, CHANNELS, dtype=torch.float64))
    shapes = [(CHANNELS, CHANNELS)] * 3 + [(3 * CHANNELS, CHANNELS), (CHANNELS, CHANNELS)]
    weights = [p.input(torch.randn(shape, dtype=torch.float64) * 0.3) for shape in shapes]
    allowed = torch.rand(BATCH, TOKENS) < 0.6
    allowed[:, 0] = True
    mask = p.input(allowed)
    empty = p.input(allowed & torch.tensor([[True], [False]]))  # no key for the second item
    of_gate = ((HEADS, WIDTH, WIDTH), (HEADS, WIDTH)) if per_head else ((WIDTH, WIDTH), (WIDTH,))
    for _ in range(2):
        p.gates.append(tuple(p.input(torch.randn(shape, dtype=torch.float64) * 0.3) for shape in of_gate))  # type: ignore[arg-type]
    outputs: list[fx.Node] = []
    x = p.call(operator.mul, x, 1.0)
    mask, empty = p.call("clone", mask), p.call("clone", empty)
    for _ in range(p.one(1, 1, 1, 2)):
        sides = projected(p, x, weights)
        out = attention(p, sides, mask, empty)
        p.smooth = True
        x, seen = behind(p, out, sides, x, weights[4])
        outputs += seen
    p.graph.output(tuple(dict.fromkeys([x, *outputs])))
    return p


def attention(p: Program, sides: Three, mask: fx.Node, empty: fx.Node) -> fx.Node:
    """The result (B, H, N, D) of an attention of ``sides``, (B, H, N, D) each."""
    kind = p.one("sdpa", "sdpa", "by heads", "by heads", "merged", "merged", "einsum", "flash", "xformers")
    if kind == "sdpa":
        return _sdpa(p, sides, mask)
    if kind in ("flash", "xformers"):
        return _library(p, sides, kind)
    return _by_hand(p, sides, p.one(mask, mask, empty), kind)


def _finish(
    p: Program, sides: Three, result: fx.Node, scale: float, place: Any, **more: Any
) -> fx.Node:  # fmt: skip
    mask: Mask | None = more.get("mask")
    keys = None if mask is None else mask.keys
    core = Core(*sides, keys, scale, more.get("causal", False), place, result, more.get("defined", True))
    core.defined &= mask is None or keys is not None
    p.cores.append(core)
    return result


def _sdpa(p: Program, sides: Three, allowed: fx.Node) -> fx.Node:
    given: dict[str, Any] = {}
    mask = None
    if p.chance(0.4):
        mask = mask_of(p, allowed, boolean=p.chance(0.6))
        given["attn_mask"] = mask.node
    elif p.chance(0.3):
        given["is_causal"] = True
    if p.chance(0.5):
        given["scale"] = 0.3
    swapped = mask is None and p.chance(0.1)  # heads where the batch should be
    if swapped:
        inner = [p.spelled(lambda t: t.transpose(0, 1), side) for side in sides]
    else:
        inner = [p.detour(side) for side in sides]
    if p.chance(0.3):
        query, key, value = inner
        result = p.call(F.scaled_dot_product_attention, value=value, query=query, key=key, **given)
    else:
        target = p.one(F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
        result = p.call(target, *inner, **given)
    place: Callable[[Tensor], Tensor] = (lambda t: t.transpose(0, 1)) if swapped else (lambda t: t)
    causal = "is_causal" in given
    # which axis has the heads can be seen in the views behind, or not at all
    told = {"mask": mask, "causal": causal, "defined": not (swapped and p.per_head)}
    out = _finish(p, sides, result, given.get("scale", WIDTH**-0.5), place, **told)
    return p.spelled(lambda t: t.transpose(0, 1), out) if swapped else out


aten = torch.ops.aten


def _library(p: Program, sides: Three, kind: str) -> fx.Node:
    inner = [p.spelled(lambda t: t.transpose(1, 2), side) for side in sides]
    given: dict[str, Any] = {}
    if kind == "flash":
        target: Any = flash_attn_func
        scale = "softmax_scale"
        if p.chance(0.3):
            given["causal"] = True
        if p.chance(0.3):
            given["window_size"] = p.one([-1, -1], (-1, -1))
    else:
        target, scale = memory_efficient_attention, "scale"
    if p.chance(0.5):
        given[scale] = 0.3
    result = p.call(target, *inner, **given)
    place = lambda t: t.transpose(1, 2)  # noqa: E731
    causal = given.get("causal", False)
    out = _finish(p, sides, result, given.get(scale, WIDTH**-0.5), place, causal=causal)
    return p.viewed(permuted([0, 2, 1, 3]), out)


def _by_hand(p: Program, sides: Three, allowed: fx.Node, kind: str) -> fx.Node:
    mask = mask_of(p, allowed, boolean=p.chance(0.6)) if p.chance(0.5) else None
    if mask is not None and mask.keys is not None and not bool(value_of(allowed).any(-1).all()):
        mask.keys = None
    before = p.written
    scale = 1.0
    inner, names = _arranged(p, sides, kind)
    query, key, value = inner
    p.maybe_write(*sides, *inner)
    if p.chance(0.3):
        way = p.one(lambda t: t * 0.5, lambda t: 0.5 * t, lambda t: t / 2, lambda t: torch.mul(t, 0.5))
        query, scale = p.spelled(way, query), scale * 0.5
    if p.chance(0.2):
        key, scale = p.spelled(lambda t: t * 2.0, key), scale * 2
    inner = query, key, value
    p.maybe_write(*sides, *inner)
    scores, factor = _first_product(p, inner, names, mask)
    scale *= factor
    order = names[3]
    pool = [*sides, *inner, scores] + ([mask.node] if mask is not None else [])
    p.maybe_write(*pool)
    if p.chance(0.6):
        way = p.one("mul", "mul_", operator.imul, operator.mul, torch.multiply)
        scores, scale = p.call(way, scores, 0.5), scale * 0.5
    scores, order = _masked(p, scores, order, kind, mask)
    p.maybe_write(*pool, scores)
    axis = order.index("j")
    axis = p.one(axis, axis - len(order))
    softmaxes: list[Any] = [
        lambda s: s.softmax(axis),
        lambda s: F.softmax(s, dim=axis),
        lambda s: torch.softmax(s, axis),
        lambda s: F.softmax(s, axis, dtype=torch.float64),
    ]
    weights = p.spelled(p.draw.choice(softmaxes), scores)
    if p.chance(0.2):
        weights = p.spelled(p.one(lambda t: F.dropout(t, 0.0), lambda t: F.dropout(t, 0.5, False)), weights)
    p.maybe_write(*pool, weights)
    result, out_order = _second_product(p, weights, order, inner[2], names)
    swapped = kind == "merged" and names[4] == "hb"
    if kind == "merged":
        place: Any = (lambda t: t.transpose(0, 1).flatten(0, 1)) if swapped else (lambda t: t.flatten(0, 1))
    else:
        place = lambda t: t.permute(["bhid".index(letter) for letter in out_order])  # noqa: E731
    # of heads before the batch, the mask is one of another axis
    defined = p.written == before and not (swapped and (p.per_head or mask is not None))
    out = _finish(p, sides, result, scale, place, mask=mask, defined=defined)
    p.maybe_write(*sides, *inner, out)
    if kind != "merged":
        return p.viewed(permuted([out_order.index(letter) for letter in "bhid"]), out)
    split = p.one(list(regrouped(value_of(out).shape, SHAPE)), list(unflattened(0, list(SHAPE[:2]), 3)))
    out = p.viewed(iter(split), out)
    p.maybe_write(*sides, *inner, out)
    return p.spelled(lambda t: t.transpose(0, 1), out) if swapped else out


def _arranged(p: Program, sides: Three, kind: str) -> tuple[Three, tuple[str, ...]]:
    """The sides as they go into the products, with the letters of their axes, of the scores, and of merged heads."""
    if kind == "merged":
        heads = p.one("bh", "bh", "hb")
        ways: list[Callable[[Any], Any]] = [lambda t: t.flatten(0, 1), lambda t: t.reshape(-1, TOKENS, WIDTH)]
        if heads == "hb":
            ways = [lambda t: t.transpose(0, 1).reshape(-1, TOKENS, WIDTH), lambda t: torch.cat(t.unbind(1), 0)]
        way = p.draw.choice(ways)
        inner = [p.spelled(way, p.detour(side)) for side in sides]
        return (inner[0], inner[1], inner[2]), ("xid", "xjd", "xjd", "xij", heads)
    if kind == "by heads":
        inner = [p.detour(side) for side in sides]
        return (inner[0], inner[1], inner[2]), ("bhid", "bhjd", "bhjd", "bhij", "")
    letters = []
    inner = []
    for side, axes in zip(sides, ("bhid", "bhjd", "bhjd"), strict=True):
        order = p.one([0, 1, 2, 3], [0, 2, 1, 3], [1, 0, 2, 3])
        letters.append("".join(axes[axis] for axis in order))
        inner.append(p.viewed(permuted(order), side))
    scores = "".join(p.draw.sample("bhij", 4)) if p.chance(0.5) else p.one("bhij", "hbij", "bijh")
    return (inner[0], inner[1], inner[2]), (*letters, scores, "")


def _first_product(p: Program, inner: Three, names: tuple[str, ...], mask: Mask | None) -> tuple[fx.Node, float]:
    query, key, _ = inner
    if len(names[0]) == 4 and ((names[0], names[1], names[3]) != ("bhid", "bhjd", "bhij") or p.chance(0.3)):
        equation = f"{names[0]},{names[1]}->{names[3]}"
        return p.spelled(lambda q, k: torch.einsum(equation, q, k), query, key), 1.0
    ways: list[Callable[[Any], Any]] = [lambda t: t.mT, lambda t: t.transpose(-2, -1), lambda t: t.transpose(-1, -2)]
    transposed = p.spelled(p.draw.choice(ways), key)
    if len(names[0]) == 3:
        kind = p.draw.randrange(3)
        if kind == 0:
            return p.call(torch.bmm, query, transposed), 1.0
        if kind == 1:
            empty = p.call(torch.zeros, BATCH * HEADS, TOKENS, TOKENS, dtype=torch.float64)
            return p.call(torch.baddbmm, empty, query, transposed, beta=0, alpha=0.5), 0.5
    return p.call(p.one(operator.matmul, torch.matmul, "matmul"), query, transposed), 1.0


def _masked(p: Program, scores: fx.Node, order: str, kind: str, mask: Mask | None) -> tuple[fx.Node, str]:
    """Scores with the mask, or without one, and their axes' order; on the way they may be seen otherwise."""
    if kind == "merged":
        if mask is None and p.chance(0.7):
            return scores, order
        shape = (BATCH, HEADS, TOKENS, TOKENS)
        if mask is not None and p.chance(0.4):
            flat = p.spelled(lambda m: m.expand(shape).reshape(-1, TOKENS, TOKENS), mask.node)
            return scored(p, scores, Mask(flat, mask.keys), value_of(scores).shape), order
        scores = p.viewed(regrouped(value_of(scores).shape, shape), scores)
        trap = p.chance(0.2)
        if trap:
            scores = p.spelled(lambda s: s.transpose(0, 1), scores)
        if mask is not None:
            scores = scored(p, scores, mask, shape)
        if trap and p.chance(0.3):
            scores = p.spelled(lambda s: s.transpose(0, 1), scores)
        merged = p.spelled(lambda s: s.reshape(-1, TOKENS, TOKENS), scores)
        return merged, order
    if p.chance(0.2):
        new = "".join(p.draw.sample(order, 4))
        scores, order = p.viewed(permuted([order.index(letter) for letter in new]), scores), new
    if mask is not None:
        # the mask is (B, H, N, N) by broadcasting
        places = ["bhij".index(letter) for letter in order]
        node = mask.node if order == "bhij" else p.spelled(lambda m: m.permute(places), mask.node)
        scores = scored(p, scores, Mask(node, mask.keys), value_of(scores).shape)
    return scores, order


def _second_product(
    p: Program, weights: fx.Node, order: str, value: fx.Node, names: tuple[str, ...]
) -> tuple[fx.Node, str]:
    if order == "xij":
        ways = [torch.bmm, torch.matmul, operator.matmul]
        if p.writes and p.chance(0.1):
            buffer = p.call(torch.zeros, 2, BATCH * HEADS, TOKENS, WIDTH, dtype=torch.float64)
            place = p.call(operator.getitem, buffer, 0)
            p.call(torch.bmm, weights, value, out=place)
            return place, ""
        return p.call(p.draw.choice(ways), weights, value), ""
    if order == "bhij" and names[2] == "bhjd" and p.chance(0.7):
        return p.call(p.one(operator.matmul, torch.matmul, "matmul"), weights, value), "bhid"
    out = p.one("bhid", "bihd", "hbid")
    return p.spelled(lambda w, v: torch.einsum(f"{order},{names[2]}->{out}", w, v), weights, value), out


def behind(
    p: Program, out: fx.Node, sides: Three, x: fx.Node, weight: fx.Node
) -> tuple[fx.Node, list[fx.Node]]:  # fmt: skip
    """(B, N, C) made of ``out`` (B, H, N, D), and what else is read at the end."""
    seen: list[fx.Node] = []
    for _ in range(p.one(0, 1, 1, 2)):
        kind = p.draw.randrange(7)
        p.maybe_write(out, out, out, *sides, x)
        if kind == 0:
            out = p.spelled(p.one(lambda t: t * 0.5, lambda t: t.tanh(), lambda t: t.clone(), lambda t: t + 1), out)
        elif kind == 1:
            out = p.spelled(lambda t: t.contiguous(), out)
        elif kind == 2:
            out = p.detour(out)
        elif kind == 3:
            buffer = p.call(torch.zeros_like, sides[0])
            p.call("copy_", buffer, out)
            seen.append(buffer)
        elif kind == 4:
            out = p.spelled(lambda a, b: a + b, out, sides[2])
        elif kind == 5 and p.writes:
            p.call(operator.iadd, out, sides[0])
        elif kind == 6:
            seen.append(p.part(out))
    if p.chance(0.3):
        seen.append(out)
    if p.chance(0.2):
        seen.append(p.one(*sides))
    tokens = p.viewed(permuted([0, 2, 1, 3]), out)
    tokens = p.spelled(p.one(lambda t: t.flatten(2), lambda t: t.reshape(BATCH, TOKENS, -1)), tokens)
    p.maybe_write(tokens, out)
    if p.chance(0.6):
        tokens = p.call(F.linear, tokens, weight)
    if p.chance(0.5):
        tokens = p.call(p.one(operator.add, operator.iadd) if p.writes else operator.add, tokens, x)
    return tokens, seen
