"""``always_critical="text"``: the key tokens outside the grid, wherever they stand; dense where that is not known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sla_compile
from sla_compile.common.token_orders import block_ranges
from sla_compile.passes.decide import Keep, Rewrite
from tests.passes.test_token_grids import Patches, video
from tests.support.capture import HEAD_DIM, Capture, run
from tests.support.closeness import assert_close, relative_error
from tests.support.models import OPTIONS
from tests.support.token_grids import EXACT, GRID, TOKENS, by_hand, placement, qkv, sdpa

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TEXT: dict[str, Any] = {"always_critical": "text", "grid": GRID}


def decided(capture: Capture) -> Rewrite:
    (site,) = capture.sites
    assert isinstance(site.decision, Rewrite), site.decision
    return site.decision


@pytest.mark.parametrize(
    ("before", "behind", "start", "ranges"),
    [
        (0, 0, None, ()),
        (9, 0, -TOKENS, (0, 9)),
        (0, 21, 0, (120, 141)),
        (9, 21, 9, (0, 9, 129, 150)),
    ],
)
def test_the_tokens_before_and_behind_the_grid_are_critical(
    before: int, behind: int, start: int | None, ranges: tuple[int, ...]
) -> None:
    inputs = qkv(before + TOKENS + behind)
    cotangent = torch.randn_like(inputs[0])
    for exact in (EXACT, {}):
        capture, output = run(sdpa, *inputs, **TEXT, **exact, grid_start=start)
        assert decided(capture).always_critical == ranges
        wanted = sdpa(*inputs) if exact else by_hand(*inputs, None, None, always_critical=[*ranges])
        results = [(result, *torch.autograd.grad(result, inputs, cotangent)) for result in (output, wanted)]
        for name, actual, expected in zip(("output", "dq", "dk", "dv"), *results, strict=True):
            assert_close(name, actual, expected, 1e-11)
    if ranges:
        assert relative_error(output, by_hand(*inputs, None, None)) > 1e-3, "the text changes something"


def test_with_another_order_the_blocks_that_hold_text_are_critical() -> None:
    inputs = qkv(10 + TOKENS)
    capture, output = run(sdpa, *inputs, **TEXT, grid_start=10, reorder="tiles")
    placed = placement(start=10)
    ranges = block_ranges(placed, 10 + TOKENS, (0, 10), 16)
    assert decided(capture).always_critical == ranges
    assert_close("output", output, by_hand(*inputs, placed, placed, always_critical=[*ranges]), 1e-11)


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Text and video in (B, N, H, D); what follows a join keeps the place of the grid.
    "text first": lambda text, video: torch.cat([text, video], 1),
    "video first": lambda text, video: torch.cat([video, text], 1),
    "scaled after it": lambda text, video: torch.cat([text, video], 1) * 0.5 + 0.1,
    "in two steps": lambda text, video: torch.cat([torch.cat([text, video], 1), text[:, :3]], 1),
    "cut and joined again": lambda text, video: torch.cat([text, torch.cat([text, video], 1)[:, 16:]], 1),
}


@pytest.mark.parametrize("join", JOINS)
def test_the_place_of_a_given_grid_is_found_where_it_is_joined(join: str) -> None:
    parts = [torch.randn(2, tokens, 2, HEAD_DIM, dtype=torch.float64) for tokens in (16, TOKENS) for _ in range(3)]

    def call(*parts: Tensor) -> Tensor:
        q, k, v = (JOINS[join](*pair).transpose(1, 2) for pair in zip(parts[:3], parts[3:], strict=True))
        return sdpa(q, k, v)

    capture, output = run(call, *parts, **TEXT, **EXACT)
    text = {"video first": (120, 136), "in two steps": (0, 16, 136, 139)}.get(join, (0, 16))
    assert decided(capture).always_critical == text
    assert_close("topk=1", output, call(*parts), 1e-11)


UNKNOWN: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "two parts of that length": (lambda text, video: torch.cat([text, video, video], 1), "256 tokens are not a grid"),
    "a part in a part of that length": (
        lambda text, video: torch.cat([torch.cat([video, text], 1)[:, :130] * 1.0, video], 1),
        "250 tokens are not a grid",
    ),
    "shuffled": (
        lambda text, video: torch.cat([text, video], 1)[:, torch.arange(135, -1, -1)],
        "136 tokens are not a grid",
    ),
}


@pytest.mark.parametrize("why", UNKNOWN)
def test_a_grid_whose_place_is_not_sure_keeps_the_attention_dense_with_the_reason(why: str) -> None:
    join, value = UNKNOWN[why]
    text, video = torch.randn(1, 16, 2, HEAD_DIM), torch.randn(1, TOKENS, 2, HEAD_DIM)

    def call(text: Tensor, video: Tensor) -> Tensor:
        x = (join(text, video) * 2).transpose(1, 2)
        return sdpa(x, x, x)

    capture, output = run(call, text, video, **TEXT)
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert decision.reason == "which tokens are text is not known, for always_critical='text'"
    assert decision.value.startswith(value)
    assert decision.value.endswith("give its first token by grid_start")
    assert torch.equal(output, call(text, video))


def test_the_grid_of_a_patch_embedding_is_enough_and_gates_keep_it(tmp_path: Path) -> None:
    model, x = Patches(text=9, blocks=1), video()
    settings = {**OPTIONS, **EXACT, "always_critical": "text"}
    sla_compile.prepare(model, (x,), config=settings)
    sla_compile.save(model, tmp_path / "gates")
    loaded: Any = sla_compile.load(Patches(text=9, blocks=1), tmp_path / "gates")
    loaded.load_state_dict(model.state_dict())
    for one in (copy.deepcopy(model), loaded):
        torch._dynamo.reset()
        dense = one(x)
        for block in one.blocks:  # which by itself sees no grid
            block.compile(backend="sla", options={"inner": "eager"})
        assert_close("topk=1", one(x), dense, 1e-5)
        (site,) = sla_compile.report(one).sites
        assert site.critical_tokens == (0, 9)
    assert "text always critical (key tokens 0 to 9)" in " ".join(str(sla_compile.report(one)).split())


def test_calibration_takes_the_same_tokens() -> None:
    model, x = Patches(text=9, blocks=1), video()
    fitted = sla_compile.calibrate(model, [(x,)], config={**OPTIONS, "always_critical": "text"})
    assert [site.path for site in fitted.sites] == ["blocks.0.sla"]


def test_without_a_grid_the_report_says_what_is_missing() -> None:
    capture, _ = run(sdpa, *qkv(), always_critical="text")
    assert str(capture.sites[0].decision) == (
        "which tokens are text is not known, for always_critical='text': no grid of tokens was seen in the model; give "
        "one by grid=(T, H, W) (accepted: a grid among the keys (grid=, grid_start=), or ranges of tokens)"
    )
    short, _ = run(sdpa, *qkv(), always_critical="text", min_tokens=1000)
    assert str(short.sites[0].decision).startswith("short sequence: 120 tokens")
    (site,) = sla_compile.explain(
        Patches(text=9, blocks=1), (video(),), config={**OPTIONS, "always_critical": "text", "grid": (7, 7)}
    ).sites
    assert not site.rewritten
