"""``reorder``: the op, the rewrite, the grid given or seen in the model, and what the report and files say of it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import sla_compile
from sla_compile import TokenOrderWarning
from sla_compile.__main__ import main
from sla_compile.checkpoints.gate_files import read_gate_file
from sla_compile.common.token_orders import Placement, block_ranges, positions
from sla_compile.kernels import reference
from sla_compile.ops.reorder import arguments, reorder
from sla_compile.passes.decide import Rewrite
from tests.support.capture import HEAD_DIM, Capture, run
from tests.support.closeness import assert_close, relative_error
from tests.support.models import OPTIONS, WIDTH, Attention, Block, CheckpointedModel, Model, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID, TOKENS = (4, 5, 6), 120
TILES: dict[str, Any] = {"reorder": "tiles", "grid": GRID}
EXACT: dict[str, Any] = {"topk": 1.0, "bottomk": 0.0}
BLOCKS: dict[str, Any] = {name: OPTIONS[name] for name in ("topk", "bottomk", "block_q", "block_k")}
sdpa = F.scaled_dot_product_attention


def qkv(queries: int = TOKENS, keys: int | None = None, heads: int = 2) -> list[Tensor]:
    shapes = (2, queries), (heads, keys or queries), (heads, keys or queries)
    return [torch.randn(2, *shape, HEAD_DIM, dtype=torch.float64, requires_grad=True) for shape in shapes]


def by_hand(q: Tensor, k: Tensor, v: Tensor, queries: Placement | None, keys: Placement | None, **told: Any) -> Tensor:
    """The definition on tokens gathered by plain indexing, and its output scattered back."""
    rows = torch.tensor(positions(queries, q.shape[2]) if queries else range(q.shape[2]))
    columns = torch.tensor(positions(keys, k.shape[2]) if keys else range(k.shape[2]))
    out = reference.sparse_linear_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], **{**BLOCKS, **told})
    return out[:, :, rows.argsort()]


def placement(kind: str = "tiles", start: int = 0) -> Placement:
    return Placement(kind, GRID, start, (16, 16))


def order_of(capture: Capture) -> Any:
    (decision,) = (site.decision for site in capture.sites)
    assert isinstance(decision, Rewrite)
    return decision.order


Call = Callable[..., Tensor]
SELF = {
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
    "no grid": (sdpa, TOKENS, {"grid": None}, "no grid of tokens was seen in the model; give one by grid=(T, H, W)"),
}


@pytest.mark.parametrize("why", KEPT)
def test_what_has_no_sure_order_keeps_the_models_and_says_why(why: str) -> None:
    call, tokens, settings, reason = KEPT[why]
    inputs = qkv(tokens)
    capture, output = run(call, *inputs, **{**TILES, **settings})
    assert (capture.rewritten, capture.count(torch.ops.sla.reorder.default)) == (1, 0)
    assert (order_of(capture).queries, order_of(capture).keys, order_of(capture).obstacle) == (None, None, reason)
    told = {"causal": True} if why == "causal" else {}
    assert_close("output", output, by_hand(*inputs, None, None, **told), 1e-11)


class Joined(Attention):
    """Text and image tokens with projections of their own, joined for the attention, as in double-stream blocks."""

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        sides = [self.heads(text).unbind(0), self.heads(image).unbind(0)]
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*sides, strict=True))
        return sdpa(q, k, v).transpose(1, 2).flatten(2)


def test_a_grid_is_found_among_the_parts_that_a_graph_joins() -> None:
    model = nn.ModuleDict({"joined": Joined().double()})
    model.forward = lambda text, image: model["joined"](text, image)  # type: ignore[method-assign]
    text, image = torch.randn(2, 2, 1, 40, WIDTH, dtype=torch.float64)[0], torch.randn(2, TOKENS, WIDTH).double()
    text = text[0].expand(2, -1, -1)
    capture = Capture(**TILES)
    torch.compile(model["joined"], backend=capture)(text, image)
    assert order_of(capture).queries == placement(start=40)
    torch._dynamo.reset()
    twice = Capture(**TILES)
    torch.compile(model["joined"], backend=twice)(image, image)  # which of two parts is not known
    assert order_of(twice).queries is None


# The op.


@pytest.mark.parametrize("shape", [(2, 3, 130, 5), (2, 130, 1)])
def test_the_op_gathers_forth_and_back_and_passes_torchs_own_check(shape: tuple[int, ...]) -> None:
    placed = placement(start=7)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = reorder(x, placed)
    assert torch.equal(y, x[..., list(positions(placed, 130)), :])
    assert torch.equal(reorder(y, placed, inverse=True), x)
    torch.library.opcheck(torch.ops.sla.reorder.default, (x, *arguments(placed)))
    cotangent = torch.randn(shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    assert torch.equal(gradient, reorder(cotangent, placed, inverse=True))
    with torch.inference_mode():
        assert torch.equal(reorder(x, placed), y)


def kernels_of(model: nn.Module, order: str) -> list[str]:
    """The names of Inductor's loops in the compiled model, which is checked against dense attention."""
    x = torch.randn(1, TOKENS, WIDTH)
    torch._dynamo.reset()
    sla_compile.detach(model)
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, **TILES, **EXACT, "reorder": order})
    with torch.no_grad():
        output, codes = run_and_get_code(compiled, x)
        assert_close("output", output, model(x), 1e-5)
    assert "sla.forward.default(" in codes[-1]
    assert "sla.reorder.default(" not in codes[-1]
    return re.findall(r"^(\w+fused\w+) = async_compile", codes[-1], re.MULTILINE)


class Unprojected(Attention):
    """Queries and keys straight from a norm, the output straight into a function."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.cat([x.sin(), x.cos(), x + 1], dim=-1).unflatten(-1, (3, 2, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, (HEAD_DIM,)), F.rms_norm(k, (HEAD_DIM,))
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2).tanh())


def test_inductor_fuses_gathers_into_what_stands_next_to_them() -> None:
    kernels = kernels_of(nn.Sequential(Unprojected()), "tiles")
    assert any("rsqrt" in name and "reorder" in name for name in kernels)
    assert any("tanh" in name and "reorder" in name for name in kernels)


class Rotary(Block):
    """A norm, projections, a rotary embedding that is written half by half, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.rand(1, TOKENS, 1, HEAD_DIM // 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (side.unflatten(-1, (2, -1)) for side in self.attention.qkv(y).chunk(3, dim=-1))
        q, k = (self.rotated(side).type_as(v).transpose(1, 2) for side in (q, k))
        return x + self.attention(q, k, v.transpose(1, 2)).type_as(q)

    def rotated(self, side: Tensor) -> Tensor:
        one, other = side.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(side)
        out[..., 0::2] = one * self.angles.cos() - other * self.angles.sin()
        out[..., 1::2] = one * self.angles.sin() + other * self.angles.cos()
        return out


class Inner(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["plain", "rotary"])
def test_gathers_move_out_of_the_way_and_cost_no_loop(kind: str) -> None:
    model = Model(1)
    if kind == "rotary":
        model.blocks[0] = Rotary()
        model.blocks[0].attention = Inner()
    tiles, raster = kernels_of(model, "tiles"), kernels_of(model, "raster")
    assert len(tiles) == len(raster)
    assert any("norm" in name and "reorder" in name for name in tiles)  # before the projections
    assert "reorder" in tiles[-1]  # after the last one, in the residual sum
    assert "add" in tiles[-1]


class Modulated(Block):
    """Shift, scale and gate of all tokens, whose gradients are sums over tokens in the model's order."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(3, 1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        shift, scale, gate = self.modulation
        return x + gate * self.attention(self.norm(x) * scale + shift)


def table_loads(code: str) -> int:
    """Where Inductor's loops look a token up."""
    loads = 0
    for kernel in code.split("async_compile.cpp")[1:]:
        for table in re.findall(r"const int32_t\* (in_ptr\d+)", kernel):
            loads += len(re.findall(rf"= {table}\[", kernel))
    return loads


def test_a_backward_gathers_once_what_it_sums_over_tokens() -> None:
    """There are two such sums for every norm with shift and scale; inlined, each looks every token up again."""
    model, x = Model(1), torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    model.blocks[0] = Modulated()
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, **TILES, **EXACT})
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(lambda: compiled(x).square().sum().backward())
    parameters = {name: p for name, p in model.named_parameters() if ".sla." not in name}
    expected = torch.autograd.grad(model(x).square().sum(), [*parameters.values()])
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        assert_close(name, parameter.grad, gradient, 1e-4)
    # before the projections and in the residual sum, each forth and back
    assert [table_loads(code) for code in codes] == [2, 2]


class Leaking(Attention):
    """Something else reads the values, in the model's order: gathers stay at the attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        out = sdpa(q, k, v)
        return self.out((out + v.flip(2)).transpose(1, 2).flatten(2))


class Random(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.dropout(self.heads(x), 0.5)
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


class Normed(Attention):
    """A norm over tokens and channels has a weight for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(TOKENS, self.qkv.out_features))

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, tuple(self.weight.shape), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.normed(self.qkv(x)).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


class RMSNormed(Normed):
    def normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, tuple(self.weight.shape), self.weight)


class GroupNormed(Normed):
    """Groups of tokens, which it takes for channels."""

    def normed(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2)


@pytest.mark.parametrize("kind", [Leaking, Random, Normed, RMSNormed, GroupNormed])
def test_gathers_stay_where_something_else_reads_the_same_tokens(kind: type[Attention]) -> None:
    model, x = nn.Sequential(kind()).double(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    capture = Capture(**TILES, **EXACT)
    torch.manual_seed(1)
    output = torch.compile(model, backend=capture)(x)
    assert capture.graph is not None
    (forward,) = (n for n in capture.graph.graph.nodes if n.target is torch.ops.sla.forward.default)
    assert [n.target for n in forward.args[:3]] == [torch.ops.sla.reorder.default] * 3
    torch.manual_seed(1)
    assert_close("output", output, model(x), 1e-11)


def test_moved_gathers_follow_the_definition_with_every_gradient() -> None:
    model, x = Model(2).double(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, **TILES, "inner": "aot_eager"})
    compiled(x)
    randomize_gates(model)

    def defined(x: Tensor) -> Tensor:
        for block in model.blocks:
            q, k, v = block.attention.heads(block.norm(x))
            gate = block.attention.sla
            y = by_hand(q, k, v, placement(), placement(), weight=gate.weight, bias=gate.bias)
            x = x + block.attention.out(y.transpose(1, 2).flatten(2))
        return x

    named = {"input": x, **dict(model.named_parameters())}
    results = []
    for function in (compiled, defined):
        output = function(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), list(named.values()))))
    for name, actual, expected in zip(("output", *named), *results, strict=True):
        assert_close(name, actual, expected, 1e-10)


# The grid as seen in the model.


class Patches(nn.Module):
    """A patch embedding, blocks of attention, and a token in front where ``text`` is asked for."""

    def __init__(self, text: int = 0, shuffled: bool = False, blocks: int = 2, block: type[nn.Module] = Attention):
        super().__init__()
        self.text, self.shuffled = text, shuffled
        self.embed = nn.Conv3d(3, WIDTH, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.blocks = nn.ModuleList(block() for _ in range(blocks))

    def forward(self, video: Tensor) -> Tensor:
        x = self.embed(video).flatten(2).transpose(1, 2)
        if self.text:
            x = torch.cat([x.new_ones(x.shape[0], self.text, WIDTH), x], dim=1)
        if self.shuffled:
            x = x[:, torch.arange(x.shape[1] - 1, -1, -1)]
        for block in self.blocks:
            x = x + block(F.layer_norm(x, (WIDTH,)))
        return x[:, self.text :] * 2


def video(grid: tuple[int, ...] = GRID) -> Tensor:
    return torch.randn(1, 3, grid[0], 2 * grid[1], 2 * grid[2])


def orders(model: nn.Module) -> list[dict[str, Any]]:
    return [site.order for site in sla_compile.report(model).sites]


SEEN = {"kind": "tiles", "grid": list(GRID), "start": 0}
SETTINGS = {**OPTIONS, "reorder": "tiles", "inner": "aot_eager"}


def test_the_grid_is_seen_in_a_whole_model_and_the_result_is_dense_at_topk_of_one() -> None:
    model, x = Patches(), video()
    dense = model(x)
    compiled = torch.compile(model, backend="sla", options={**SETTINGS, **EXACT})
    assert_close("topk=1", compiled(x), dense, 1e-5)
    assert orders(model) == [SEEN, SEEN]
    parameters = [p for n, p in model.named_parameters() if ".sla." not in n]
    gradients = [torch.autograd.grad(run(x).square().mean(), parameters) for run in (compiled, model)]
    for actual, expected in zip(*gradients, strict=True):
        assert_close("gradient", actual, expected, 1e-4)


def test_text_in_front_moves_the_grid() -> None:
    model = Patches(text=9)
    torch.compile(model, backend="sla", options=SETTINGS)(video())
    assert orders(model) == [{**SEEN, "start": 9}] * 2


class Frames(Patches):
    """Each frame is embedded by itself, as an image; text stands in front of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, kernel_size=2, stride=2)  # type: ignore[assignment]

    def forward(self, video: Tensor) -> Tensor:
        frames = video.transpose(1, 2)
        x = self.embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        x = x.flatten(3).transpose(2, 3).flatten(1, 2)
        x = torch.cat([x.new_ones(x.shape[0], 7, WIDTH), x], dim=1)
        for block in self.blocks:
            x = x + block(F.layer_norm(x, (WIDTH,)))
        return x


def test_frames_that_are_embedded_one_by_one_are_a_grid_with_time() -> None:
    model, x = Frames(), torch.cat([video(), video()])
    compiled = torch.compile(model, backend="sla", options={**SETTINGS, **EXACT})
    assert_close("topk=1", compiled(x), model(x), 1e-5)
    assert orders(model) == [{**SEEN, "start": 7}] * 2


def test_a_grid_that_is_not_sure_to_be_in_raster_order_is_not_used() -> None:
    model = Patches(shuffled=True)
    torch.compile(model, backend="sla", options=SETTINGS)(video())
    reason = "no grid of tokens was seen in the model; give one by grid=(T, H, W)"
    assert orders(model) == [{"kind": "raster", "reason": reason}] * 2


def test_blocks_compiled_by_themselves_know_the_grid_from_prepare_through_copies_and_files(tmp_path: Path) -> None:
    model, x = Patches(), video()
    sla_compile.prepare(model, (x,), config={**SETTINGS, **EXACT})
    sla_compile.save(model, tmp_path / "gates")
    loaded = sla_compile.load(Patches(), tmp_path / "gates")
    loaded.load_state_dict(model.state_dict())
    for one in (model, copy.deepcopy(model), loaded):
        torch._dynamo.reset()
        dense = one(x)
        for block in one.blocks:
            block.compile(backend="sla", options={"inner": "eager"})
        assert_close("topk=1", one(x), dense, 1e-5)
        assert orders(one) == [SEEN, SEEN]
    smaller = video((2, 5, 6))  # the model's own order: what was seen is not the grid of these
    one(smaller)
    assert {order["kind"] for order in orders(one)} == {"raster"}
    assert all("symbolic" in order["reason"] or "was seen in 120" in order["reason"] for order in orders(one))


def test_blocks_compiled_by_themselves_without_prepare_say_that_they_saw_no_grid() -> None:
    model = Patches()
    for block in model.blocks:
        block.compile(backend="sla", options={**SETTINGS, "inner": "eager"})
    with pytest.warns(TokenOrderWarning, match="reorder='tiles', but its tokens stay in the model's order: no grid"):
        model(video())
    assert [order["kind"] for order in orders(model)] == ["raster", "raster"]
    assert all("no grid of tokens was seen" in order["reason"] for order in orders(model))


def test_another_size_takes_the_grid_of_its_own_graph() -> None:
    model = Patches()
    compiled = torch.compile(model, backend="sla", options={**SETTINGS, **EXACT}, dynamic=False)
    for grid in (GRID, (2, 4, 10)):
        x = video(grid)
        assert_close("topk=1", compiled(x), model(x), 1e-5)
        assert [order["grid"] for order in orders(model)] == [list(grid)] * 2


def test_a_symbolic_number_of_tokens_keeps_the_models_order() -> None:
    model = Patches()
    compiled = torch.compile(model, backend="sla", options={**SETTINGS, **EXACT}, dynamic=True)
    for grid in (GRID, (2, 4, 10)):
        x = video(grid)
        assert_close("topk=1", compiled(x), model(x), 1e-5)
    assert {order["kind"] for order in orders(model)} == {"raster"}
    assert all("symbolic" in order["reason"] for order in orders(model))


def test_activation_checkpointing_with_given_grid() -> None:
    model, x = CheckpointedModel().double(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, **TILES, **EXACT})
    results = [(y := f(x), torch.autograd.grad(y.square().sum(), model.blocks[0].attention.qkv.weight)[0])
               for f in (compiled, Model.forward.__get__(model))]  # fmt: skip
    for name, actual, expected in zip(("output", "gradient"), *results, strict=True):
        assert_close(name, actual, expected, 1e-10)
    assert orders(model) == [SEEN, SEEN]


# Report, files, other doors.


def test_the_report_says_which_order() -> None:
    model, x = Model(1), torch.randn(1, TOKENS, WIDTH)
    report = sla_compile.explain(model, (x,), config={**OPTIONS, **TILES})
    assert report.to_dict()["sites"][0]["order"] == SEEN
    assert "tiles of 4 x 5 x 6 tokens" in str(report).replace("\n", " ")
    (norm, *_), diff = [line for line in report.sites[0].diff if "sla::reorder" in line], report.sites[0].diff
    assert re.fullmatch(r"\+ \w+ = sla::reorder\(\w+, tiles, \[4, 5, 6\], 0, \[16, 16\], False\)", norm)
    assert diff[-1].startswith("+ ")
    assert diff[-1].endswith("True)")
    report = sla_compile.explain(model, (x,), config={**OPTIONS, "reorder": "hilbert"})
    assert "tokens in the model's order: no grid of tokens was seen" in str(report).replace("\n", " ")
    json.dumps(report.to_dict())
    assert sla_compile.explain(model, (x,), config=OPTIONS).sites[0].order == {"kind": "raster"}


def test_a_file_of_another_order_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(1, TOKENS, WIDTH)
    tiles = sla_compile.prepare(Model(), (x,), config={**OPTIONS, **TILES})
    sla_compile.save(tiles, tmp_path / "gates")
    assert read_gate_file(tmp_path / "gates").config.grid == GRID
    assert main(["show", str(tmp_path / "gates")]) == 0
    assert "tiles of 4 x 5 x 6 tokens" in " ".join(capsys.readouterr().out.split())
    plain = sla_compile.prepare(Model(), (x,), config=OPTIONS)
    with pytest.raises(ValueError, match="reorder is 'tiles' in the file, 'raster' in the model"):
        sla_compile.load(plain, tmp_path / "gates")
    with pytest.raises(ValueError, match="reorder='hilbert' here, 'tiles' in its gate"):
        torch.compile(tiles, backend="sla", options={"inner": "eager", "reorder": "hilbert"})(x)


def test_calibration_and_allocation_see_the_attention_in_its_order() -> None:
    """At topk=1 nothing is missed, and below it the sparse branch is that of the order."""
    model, x = Model(1).double(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    errors = {}
    for order in ("raster", "tiles"):
        prepared = sla_compile.prepare(sla_compile.detach(model), (x,), config={**OPTIONS, **TILES, "reorder": order})
        (site,) = sla_compile.calibrate(prepared, [(x,)]).sites
        errors[order] = site.sparse_only
        sla_compile.detach(model)
        exact = sla_compile.prepare(model, (x,), config={**OPTIONS, **TILES, **EXACT, "reorder": order})
        (site,) = sla_compile.calibrate(exact, [(x,)]).sites
        assert site.sparse_only < 1e-10
    assert errors["raster"] != errors["tiles"]


def test_exported_programs_keep_the_order() -> None:
    model, x = Model(1).double(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    sla_compile.prepare(model, (x,), config={**OPTIONS, **TILES, "inner": "eager"})
    randomize_gates(model)
    program = sla_compile.export(model, (x,))
    assert sum(node.target is torch.ops.sla.reorder.default for node in program.graph.nodes) == 4
    compiled = torch.compile(model, backend="sla", options={"inner": "eager"})
    assert_close("program", program.module()(x), compiled(x), 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_on_a_gpu_and_in_a_cuda_graph_it_is_dense_attention_at_topk_of_one(mode: str | None) -> None:
    model, grid = Model(2).cuda(), (4, 12, 16)
    x = torch.randn(2, 768, WIDTH, device="cuda")
    exact = model.double()(x.double())
    model.float()
    options = {"min_tokens": 0, "reorder": "tiles", "grid": grid, **EXACT}
    compiled = torch.compile(sla_compile.prepare(model, (x,), config=options), backend="sla", mode=mode)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        output = compiled(x)
        gradient = torch.autograd.grad(output.square().sum(), model.blocks[0].attention.qkv.weight)[0].clone()
    assert_close("output", output, exact, 1e-3)
    wanted = torch.autograd.grad(model(x).square().sum(), model.blocks[0].attention.qkv.weight)[0]
    assert_close("gradient", gradient, wanted, 1e-2)
    assert orders(model) == [{"kind": "tiles", "grid": list(grid), "start": 0}] * 2
