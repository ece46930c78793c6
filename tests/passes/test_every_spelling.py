"""Random chains of views around an attention: however they are spelled, the verdict and the numbers are the same."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import sla_compile.ops  # noqa: F401  the op that orders tokens
from sla_compile.common.limits import DTYPES
from sla_compile.common.token_orders import Placement
from sla_compile.passes.decide import Decision, Requirements, Rewrite, decide
from sla_compile.passes.find_attention import AttentionCall, find_attention
from sla_compile.passes.operands import build
from sla_compile.passes.token_order import Wanted, back
from tests.support.capture import run
from tests.support.closeness import assert_close
from tests.support.view_spellings import (
    View,
    graph_of,
    joined,
    one_of,
    part_of,
    permuted,
    regrouped,
    some_way,
    unsqueezed,
)

BATCH, HEADS, WIDTH, TEXT, GRID = 2, 2, 16, 8, (2, 4, 4)
VIDEO = 32
TOKENS = TEXT + VIDEO
REQUIREMENTS = Requirements(0, DTYPES, order=Wanted("tiles", GRID, None, (16, 16)))
PLACED = Placement("tiles", GRID, TEXT, (16, 16))
SECONDS = 4.0

Plan = list[tuple[str, tuple[Any, ...]]]
"""What is done to a tensor, whatever it is spelled as."""


def detour(shape: Sequence[int], draw: random.Random) -> Plan:
    """Steps that change nothing in the end."""
    count, axis = len(shape), draw.randrange(len(shape))
    order = draw.sample(range(count), count)
    kinds: list[Plan] = [
        [("permute", (order,)), ("permute", ([order.index(i) for i in range(count)],))],
        [("unsqueeze", (axis,)), ("select", (axis, 0))],
        [],
    ]
    if shape[axis] % 2 == 0:
        split = [*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :]]
        kinds.append([("regroup", (split,)), ("regroup", (list(shape),))])
    return draw.choice(kinds)


def plan_of_heads(tokens: int, draw: random.Random) -> tuple[Plan, int, int]:
    """From (B, N, 3 * H * D) to (B, H, N, D), where on the way parts may be joined, and along which axis."""
    split, packed = (BATCH, tokens, 3, HEADS, WIDTH), (3, BATCH, HEADS, tokens, WIDTH)
    plan = detour((BATCH, tokens, 3 * HEADS * WIDTH), draw)
    places = [(0, 1), (len(plan), 1)]
    plan = [*plan, ("regroup", (list(split),)), *detour(split, draw)]
    places.append((len(plan), 1))
    plan += [("permute", ([2, 0, 3, 1, 4],))]
    places.append((len(plan), 3))
    plan += [*detour(packed, draw), ("select", (0, None))]
    places.append((len(plan), 2))
    return plan, *draw.choice(places)


def resized(plan: Plan, tokens: int) -> Plan:
    """``plan`` for another number of tokens than TOKENS, which is no other size in it."""
    sizes = {TOKENS: tokens, TOKENS // 2: tokens // 2}
    return [
        (step, ([sizes.get(size, size) for size in arguments[0]],) if step == "regroup" else arguments)
        for step, arguments in plan
    ]


def splits_tokens(plan: Plan) -> bool:
    """Whether tokens are split and joined again: that they are the same is known of whole axes only."""
    return any(step == "regroup" and TOKENS // 2 in arguments[0] for step, arguments in plan)


def ways(step: str, arguments: tuple[Any, ...], value: Tensor) -> Iterator[View]:
    if step == "permute":
        return permuted(*arguments)
    if step == "regroup":
        return regrouped(value.shape, *arguments)
    if step == "unsqueeze":
        return unsqueezed(arguments[0], value.dim())
    axis, place = arguments
    return one_of(axis, place, value.shape)


def spelled(plan: Plan, value: Tensor, which: int, draw: random.Random) -> tuple[View, Tensor]:
    """``plan`` in some spelling, and what it makes of ``value``; ``which`` of queries, keys and values is selected."""
    steps = []
    for step, arguments in plan:
        arguments = tuple(which if argument is None else argument for argument in arguments)
        steps.append(some_way(ways(step, arguments, value), value, draw))
        value = steps[-1](value)

    def all_steps(x: Any) -> Any:
        for step in steps:
            x = step(x)
        return x

    return all_steps, value


def model(
    plan: Plan, place: int, axis: int, kind: str, inputs: Sequence[Tensor], draw: random.Random
) -> Callable[..., Any]:
    """An attention of joined text and video tokens by ``plan``, in some spelling."""
    sides, values = [], []
    for which in range(3):
        ways_in, parts = [], []
        for part, tokens in zip(inputs, (TEXT, VIDEO), strict=False):
            way = some_way(part_of(1, 3, 3 + tokens, part.shape), part, draw)
            before, value = spelled(resized(plan[:place], tokens), way(part), which, draw)
            ways_in.append(lambda x, way=way, before=before: before(way(x)))
            parts.append(value)
        join = draw.choice(list(joined(axis, parts[0].dim())))
        behind, value = spelled(plan[place:], join(parts), which, draw)
        values.append(value)

        def side(*xs: Any, ways_in: Any = tuple(ways_in), join: Any = join, behind: Any = behind) -> Any:
            return behind(join([way(x) for way, x in zip(ways_in, xs, strict=False)]))

        sides.append(side)
    attend = attention(kind, values, inputs[-1], draw)
    return lambda *xs: attend(*(side(*xs) for side in sides), xs[-1])


def attention(kind: str, values: Sequence[Tensor], mask: Tensor, draw: random.Random) -> Callable[..., Any]:
    if kind == "masked":
        queries = some_way(unsqueezed(1, 2), mask, draw)
        heads = some_way(unsqueezed(1, 3), queries(mask), draw)
        return lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, heads(queries(m)).repeat(1, 1, TOKENS, 1))
    if kind == "by hand":
        transposed = some_way(permuted([0, 1, 3, 2]), values[1], draw)
        products: list[Callable[[Any, Any], Any]] = [
            lambda a, b: a @ b,
            torch.matmul,
            lambda a, b: a.matmul(b),
            lambda a, b: torch.matmul(a, other=b),
        ]
        scales: list[View] = [
            lambda x: x * 0.3,
            lambda x: 0.3 * x,
            lambda x: x.mul(0.3),
            lambda x: torch.multiply(x, 0.3),
        ]
        scales += [lambda x: x / (1 / 0.3), lambda x: torch.ops.aten.mul.Tensor(x, 0.3)]
        softmaxes: list[View] = [lambda x: x.softmax(-1), lambda x: F.softmax(x, dim=3), lambda x: torch.softmax(x, -1)]
        one, other = draw.choice(products), draw.choice(products)
        scale, softmax = draw.choice(scales), draw.choice(softmaxes)
        return lambda q, k, v, m: other(softmax(scale(one(q, transposed(k)))), v)
    calls = [
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v, m: F.scaled_dot_product_attention(value=v, query=q, key=k),
        lambda q, k, v, m: torch.ops.aten.scaled_dot_product_attention.default(q, k, v),
    ]
    return draw.choice(calls)


def inputs_of() -> list[Tensor]:
    """Text and video, in longer tensors, and a mask over keys."""
    parts = [torch.randn(BATCH, 3 + n + 4, 3 * HEADS * WIDTH, dtype=torch.float64) for n in (TEXT, VIDEO)]
    mask = torch.rand(BATCH, TOKENS) < 0.7
    mask[:, 0] = True
    return [*parts, mask]


def decided(module: fx.GraphModule) -> tuple[AttentionCall, Decision]:
    (call,) = find_attention(module)
    return call, decide(call, REQUIREMENTS)


def assert_operands_are_right(
    module: fx.GraphModule, call: AttentionCall, found: Rewrite, inputs: list[Tensor]
) -> None:
    """Attention of what the rewrite would give the op, and put back, is what the graph gives."""
    graph = module.graph
    output = graph.output_node()
    with graph.inserting_before(output):
        query, key, value, *mask = build(graph, (*found.operands(call), *found.masks()))
        over_keys = [graph.call_method("unsqueeze", (graph.call_method("unsqueeze", (m, 1)), 1)) for m in mask]
        made = graph.call_function(
            F.scaled_dot_product_attention, (query, key, value, *over_keys), {"scale": found.scale}
        )
        (restored,) = build(graph, (back(made, found.order.queries, *call.restore),))
    output.args = ((call.node, restored),)
    expected, actual = fx.Interpreter(module).run(*inputs)
    assert_close("output", actual, expected, 1e-12)


@pytest.mark.parametrize("kind", ["called", "by hand", "masked"])
def test_every_spelling_gets_the_same_verdict_and_numbers(kind: str) -> None:
    draw = random.Random(kind)
    torch.manual_seed(0)
    end, plans = time.monotonic() + SECONDS, 0
    while time.monotonic() < end or plans < 3:
        plans += 1
        plan, place, axis = plan_of_heads(TOKENS, draw)
        inputs = inputs_of()
        verdicts = set()
        for _ in range(3):
            module = graph_of(model(plan, place, axis, kind, inputs, draw), *inputs)
            call, found = decided(module)
            assert isinstance(found, Rewrite), (found, plan, str(module.graph))
            assert (found.key_mask is not None) == (kind == "masked")
            assert found.scale == pytest.approx(0.3 if kind == "by hand" else WIDTH**-0.5)
            verdicts.add((found.order, found.key_mask is None, call.merged_heads))
            assert_operands_are_right(module, call, found, inputs)
        assert len(verdicts) == 1, (verdicts, plan, place)
        ((order, *_),) = verdicts
        if not splits_tokens(plan):
            assert (order.queries, order.keys) == (PLACED, PLACED), (order, plan, place)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["called", "by hand", "masked"])
def test_compiled_it_is_dense_attention_at_topk_of_one(kind: str) -> None:
    draw = random.Random(kind)
    for _ in range(2):
        plan, place, axis = plan_of_heads(TOKENS, draw)
        while splits_tokens(plan):
            plan, place, axis = plan_of_heads(TOKENS, draw)
        inputs = inputs_of()
        call = model(plan, place, axis, kind, inputs, draw)
        capture, output = run(call, *inputs, topk=1.0, bottomk=0.0, reorder="tiles", grid=GRID)
        assert (capture.rewritten, capture.sites[0].decision.order.queries.start) == (1, TEXT)  # type: ignore[union-attr]
        assert_close("topk=1", output, call(*inputs), 1e-12)
        torch._dynamo.reset()
