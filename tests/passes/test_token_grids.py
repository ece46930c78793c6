"""The grid of tokens as seen in a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from sla_compile import TokenOrderWarning
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS, WIDTH, Attention
from tests.support.token_grids import (
    EXACT,
    GRID,
    SEEN,
    orders,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


SETTINGS = {**OPTIONS, "reorder": "tiles", "inner": "eager"}


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
    loaded: Any = sla_compile.load(Patches(), tmp_path / "gates")
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


def test_blocks_compiled_by_themselves_know_the_grid_of_each_size_that_was_prepared(tmp_path: Path) -> None:
    sizes = (GRID, (2, 5, 6), (4, 3, 6))
    model = sla_compile.prepare(Patches(), (video(sizes[0]),), config={**SETTINGS, **EXACT})
    settings = [gate.config for gate in sla_compile.gates(model).values()]
    for size in (*sizes[1:], sizes[0]):
        sla_compile.prepare(model, (video(size),))  # without settings: those that are there
    assert [gate.config for gate in sla_compile.gates(model).values()] == settings
    tall = (4, 6, 5)
    with pytest.warns(TokenOrderWarning, match=r"as a grid of 4 x 5 x 6, and knows them as 4 x 6 x 5 now \(2 gate"):
        sla_compile.prepare(model, (video(tall),))
    with pytest.warns(TokenOrderWarning, match="as a grid of 4 x 6 x 5, and knows them as 4 x 5 x 6 now"):
        sla_compile.prepare(model, (video(sizes[0]),))
    sla_compile.save(model, tmp_path / "gates")
    loaded: Any = sla_compile.load(Patches(), tmp_path / "gates")
    for block in loaded.blocks:
        block.compile(backend="sla", options={"inner": "eager"}, dynamic=False)
    for size in sizes:
        x = video(size)
        with torch.compiler.set_stance("force_eager"):
            dense = loaded(x)
        assert_close("topk=1", loaded(x), dense, 1e-5)
        assert [order["grid"] for order in orders(loaded)] == [list(size)] * 2


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


def test_a_symbolic_batch_keeps_the_grid() -> None:
    model = Patches()
    compiled = torch.compile(model, backend="sla", options={**SETTINGS, **EXACT})
    for batch in (2, 3, 5):
        x = video().repeat(batch, 1, 1, 1, 1)
        assert_close("topk=1", compiled(x), model(x), 1e-5)
        assert orders(model) == [SEEN, SEEN]
