"""Which order tokens get, from the settings and the graph: numbers in each, and why the model's own is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sla_compile.common.token_orders import Placement, block_ranges, positions
from sla_compile.passes.decide import Rewrite
from tests.support.capture import HEAD_DIM, Capture, run
from tests.support.closeness import assert_close, relative_error
from tests.support.models import WIDTH, Attention
from tests.support.token_grids import (
    EXACT,
    GRID,
    TILES,
    TOKENS,
    by_hand,
    order_of,
    placement,
    qkv,
    sdpa,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


Call = Callable[..., Tensor]


SELF: dict[str, tuple[Call, int, int, dict[str, Any], dict[str, Any]]] = {
    # The call, tokens before and behind the grid, settings, and what the definition is told.
    "tiles": (sdpa, 0, 0, {}, {}),
    "hilbert": (sdpa, 0, 0, {"reorder": "hilbert"}, {}),
    "text before": (sdpa, 9, 0, {"grid_start": -TOKENS}, {}),
    "text before and behind": (sdpa, 9, 21, {"grid_start": 9}, {}),
    "other blocks": (sdpa, 0, 0, {"block_q": 32}, {"block_q": 32}),
    "a scale": (lambda q, k, v: sdpa(q, k, v, scale=0.3), 0, 0, {}, {"scale": 0.3}),
    "by hand": (lambda q, k, v: ((q @ k.mT) * 0.3).softmax(-1) @ v, 0, 0, {}, {"scale": 0.3}),
}


@pytest.mark.parametrize("form", SELF)
def test_it_is_dense_attention_at_topk_of_one_and_the_definition_in_that_order_below(form: str) -> None:
    call, before, behind, settings, told = SELF[form]
    inputs = qkv(before + TOKENS + behind)
    options = {**TILES, **settings}
    placed = Placement(options["reorder"], GRID, before, (settings.get("block_q", 16), 16))
    cotangent = torch.randn_like(inputs[0])
    for exact in (EXACT, {}):
        capture, output = run(call, *inputs, **exact, **options)
        assert (capture.rewritten, capture.count(torch.ops.sla.reorder.default)) == (1, 4)
        assert order_of(capture).queries == order_of(capture).keys == placed
        wanted = call(*inputs) if exact else by_hand(*inputs, placed, placed, **told)
        results = [(result, *torch.autograd.grad(result, inputs, cotangent)) for result in (output, wanted)]
        for name, actual, expected in zip(("output", "dq", "dk", "dv"), *results, strict=True):
            assert_close(name, actual, expected, 1e-11)
    # The nearest other thing: raster order, which gives another result.
    assert relative_error(output, run(call, *inputs, **settings | {"reorder": "raster", "grid": GRID})[1]) > 1e-3


def test_a_key_mask_and_grouped_heads_are_reordered_too() -> None:
    inputs = qkv(heads=1)
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    mask[0, ..., :70] = False
    mask[1, ..., 100:] = False

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

    _, exact = run(call, *inputs, **EXACT, **TILES)
    assert_close("topk=1", exact, call(*inputs), 1e-11)
    _, output = run(call, *inputs, **TILES)
    q, k, v = (x.expand(-1, 2, -1, -1) for x in inputs)
    columns = list(positions(placement(), TOKENS))
    wanted = by_hand(q, k, v, placement(), placement(), key_mask=mask[:, 0, 0][:, columns])
    assert_close("output", output, wanted, 1e-11)


@pytest.mark.parametrize("grid_of", ["queries", "keys"])
def test_cross_attention_reorders_the_side_that_has_the_grid(grid_of: str) -> None:
    inputs = qkv(TOKENS, 50) if grid_of == "queries" else qkv(50, TOKENS)
    capture, output = run(sdpa, *inputs, cross_attention=True, **TILES)
    sides: tuple[Placement | None, Placement | None]
    sides = (placement(), None) if grid_of == "queries" else (None, placement())
    assert (order_of(capture).queries, order_of(capture).keys) == sides
    assert_close("output", output, by_hand(*inputs, *sides), 1e-11)
    _, exact = run(sdpa, *inputs, cross_attention=True, **EXACT, **TILES)
    assert_close("topk=1", exact, sdpa(*inputs), 1e-11)


def test_ranges_of_the_models_tokens_stay_critical() -> None:
    """The text before the grid is where it was; tokens of the grid take their new blocks with them."""
    inputs, start = qkv(10 + TOKENS), 10
    settings = {**TILES, "grid_start": start, "always_critical": ((0, 10), (50, 53))}
    capture, output = run(sdpa, *inputs, **settings)
    placed = placement(start=start)
    ranges = list(block_ranges(placed, 10 + TOKENS, (0, 10, 50, 53), 16))
    (decision,) = (site.decision for site in capture.sites)
    assert isinstance(decision, Rewrite)
    assert list(decision.always_critical) == ranges
    assert_close("output", output, by_hand(*inputs, placed, placed, always_critical=ranges), 1e-11)
    places = [i for i, token in enumerate(positions(placed, 10 + TOKENS)) if token < 10 or 50 <= token < 53]
    assert all(any(a <= i < b for a, b in zip(ranges[::2], ranges[1::2], strict=True)) for i in places)


def test_each_head_has_an_order_of_its_own() -> None:
    """Tokens outside the grid, here at its start and critical, are in the same blocks in every order."""
    inputs, kinds = qkv(16 + TOKENS), ("hilbert", "tiles:2")
    cotangent = torch.randn_like(inputs[0])
    settings = {**TILES, "reorder": kinds, "grid_start": 16, "always_critical": ((0, 16),)}
    for exact in (EXACT, {}):
        capture, output = run(sdpa, *inputs, **exact, **settings)
        assert capture.count(torch.ops.sla.reorder.default) == 4
        placed = order_of(capture).queries
        assert placed == order_of(capture).keys == placement(",".join(kinds), start=16)
        of_heads = []
        for number, head in enumerate(placed.heads):
            q, k, v = (x[:, number : number + 1] for x in inputs)
            of_heads.append(by_hand(q, k, v, head, head, always_critical=[0, 16]))
        wanted = sdpa(*inputs) if exact else torch.cat(of_heads, dim=1)
        results = [(result, *torch.autograd.grad(result, inputs, cotangent)) for result in (output, wanted)]
        for name, actual, expected in zip(("output", "dq", "dk", "dv"), *results, strict=True):
            assert_close(name, actual, expected, 1e-11)


BY_HEAD = {"reorder": ["tiles", "raster"]}
MASK = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)

KEPT: dict[str, tuple[Call, int, dict[str, Any], str]] = {
    "not asked for": (sdpa, TOKENS, {"reorder": "raster"}, ""),
    "causal": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True),
        TOKENS,
        {},
        "causal attention needs the model's own order",
    ),
    "more tokens": (
        sdpa,
        TOKENS + 8,
        {},
        "128 tokens are not a grid of 4 x 5 x 6 = 120; give its first token by grid_start",
    ),
    "fewer tokens": (sdpa, 96, {}, "96 tokens are not a grid of 4 x 5 x 6 = 120"),
    "outside": (
        sdpa,
        TOKENS + 8,
        {"grid_start": 9},
        "a grid of 4 x 5 x 6 = 120 from token 9 on does not lie in 128 tokens",
    ),
    "orders of other heads": (
        sdpa,
        TOKENS,
        {"reorder": "tiles,raster,hilbert"},
        "3 orders, one for each head, for 2 heads of queries, 2 of keys",
    ),
    "grouped heads": (
        lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True),
        TOKENS,
        BY_HEAD,
        "2 orders, one for each head, for 2 heads of queries, 1 of keys",
    ),
    "masked heads": (
        lambda q, k, v: sdpa(q, k, v, attn_mask=MASK),
        TOKENS,
        BY_HEAD,
        "a mask, which is of all heads, needs one order for them",
    ),
    "critical tokens": (
        sdpa,
        TOKENS,
        {**BY_HEAD, "always_critical": ((20, 24),)},
        "tokens that are always critical are in other blocks in each head's order",
    ),
    "no grid": (sdpa, TOKENS, {"grid": None}, "no grid of tokens was seen in the model; give one by grid=(T, H, W)"),
}


@pytest.mark.parametrize("why", KEPT)
def test_what_has_no_sure_order_keeps_the_models_and_says_why(why: str) -> None:
    call, tokens, settings, reason = KEPT[why]
    inputs = qkv(tokens)
    capture, output = run(call, *inputs, **{**TILES, **settings})
    assert (capture.rewritten, capture.count(torch.ops.sla.reorder.default)) == (1, 0)
    assert (order_of(capture).queries, order_of(capture).keys, order_of(capture).obstacle) == (None, None, reason)
    told: dict[str, Any] = {"causal": True} if why == "causal" else {}
    if why == "critical tokens":
        told = {"always_critical": [20, 24]}
    q, k, v = inputs
    if why == "grouped heads":
        k, v = (x[:, :1].expand(-1, 2, -1, -1) for x in (k, v))
    assert_close("output", output, by_hand(q, k, v, None, None, **told), 1e-11)


class Joined(Attention):
    """Text and image tokens with projections of their own, joined for the attention, as in double-stream blocks."""

    def forward(self, text: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        sides = [self.heads(text).unbind(0), self.heads(image).unbind(0)]
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*sides, strict=True))
        return sdpa(q, k, v).transpose(1, 2).flatten(2)


def test_a_grid_is_found_among_the_parts_that_a_graph_joins() -> None:
    model = nn.ModuleDict({"joined": Joined().double()})
    model.forward = lambda text, image: model["joined"](text, image)
    text, image = torch.randn(2, 2, 1, 40, WIDTH, dtype=torch.float64)[0], torch.randn(2, TOKENS, WIDTH).double()
    text = text[0].expand(2, -1, -1)
    capture = Capture(**TILES)
    torch.compile(model["joined"], backend=capture)(text, image)
    assert order_of(capture).queries == placement(start=40)
    torch._dynamo.reset()
    twice = Capture(**TILES)
    torch.compile(model["joined"], backend=twice)(image, image)  # which of two parts is not known
    assert order_of(twice).queries is None


HEADS, TEXT = 2, 16
SPLITS: dict[str, Callable[[Tensor], Tensor]] = {
    "joined by heads": lambda x: x,
    "unflatten": lambda x: x.unflatten(-1, (HEADS, HEAD_DIM)),
    "unflatten, a function": lambda x: torch.unflatten(x, dim=2, sizes=(HEADS, HEAD_DIM)),
    "view": lambda x: x.view(x.shape[0], x.shape[1], HEADS, HEAD_DIM),
    "reshape": lambda x: x.reshape(x.shape[0], -1, HEADS, HEAD_DIM),
}
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(1, 2),
    "swapaxes": lambda x: x.swapaxes(-3, -2),
    "swapdims": lambda x: x.swapdims(1, 2),
    "permute": lambda x: x.permute(0, 2, 1, 3),
    "movedim": lambda x: x.movedim(2, 1),
    "torch.transpose": lambda x: torch.transpose(input=x, dim0=-2, dim1=1),
    "torch.movedim": lambda x: torch.movedim(x, source=-2, destination=-3),
    "torch.permute": lambda x: torch.permute(x, dims=(0, -2, 1, 3)),
    "aten": lambda x: torch.ops.aten.transpose.int(x, 1, 2),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("split", SPLITS)
def test_text_and_video_that_are_joined_have_their_grid_behind_the_text(split: str, order: str) -> None:
    """However heads are split and moved after the join, and whatever that is called."""
    width: tuple[int, ...] = (HEADS, HEAD_DIM) if split == "joined by heads" else (HEADS * HEAD_DIM,)
    parts = [torch.randn(2, tokens, *width, dtype=torch.float64) for tokens in (TEXT, TOKENS) for _ in range(3)]

    def call(*parts: Tensor) -> Tensor:
        pairs = zip(parts[:3], parts[3:], strict=True)
        q, k, v = (ORDERS[order](SPLITS[split](torch.cat([text, video], dim=1))) for text, video in pairs)
        return sdpa(q, k, v)

    capture, output = run(call, *parts, **EXACT, **TILES)
    assert order_of(capture).queries == order_of(capture).keys == placement(start=TEXT)
    assert_close("topk=1", output, call(*parts), 1e-11)
