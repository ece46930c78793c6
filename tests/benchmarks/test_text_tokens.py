"""The benchmark of text that is always critical: as many critical blocks either way, on a small untrained model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sla_compile
from benchmarks.text_tokens import Batch, CaptionedDiT, Case, captioned, compared, looked_at
from examples.study.video_dit import VideoDiTConfig
from examples.study.videos import Data
from sla_compile.fitting.observer import GatedCall, gated_calls


@pytest.fixture
def case() -> Case:
    """64 tokens of a video behind 32 of its caption, in blocks of 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CaptionedDiT(VideoDiTConfig(patch=(1, 4, 4), heads=2, head_dim=16, layers=1))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # blocks begin as the identity otherwise
    data = Data((4, 16, 16), 2, torch.device("cpu"))
    batches: list[Batch] = [captioned(data, seed) for seed in range(2)]
    model.requires_grad_(False)
    return Case("a caption", model, (4, 4, 4), 32, 16, batches[:1], batches[1:], (4,))


@pytest.mark.parametrize("total", [3, 5])
@pytest.mark.parametrize("forced", [False, True])
def test_a_row_has_as_many_critical_blocks_either_way(case: Case, forced: bool, total: int) -> None:
    maps = []

    def look(call: GatedCall) -> Tensor:
        options: Any = call.options()
        maps.append(torch.ops.sla.forward.default(call.query, call.key, call.value, None, None, **options)[3])
        return call.dense

    args = case.held[0][0]
    sla_compile.prepare(case.model, args, config=case.settings(total, forced, linear="none"))
    with gated_calls(case.model, look):
        case.model(*args)
    assert len(maps) == 1
    assert (maps[0] == 1).sum(dim=-1).unique().tolist() == [total]
    if forced:
        assert (maps[0][..., :2] == 1).all()


def test_a_caption_is_used(case: Case) -> None:
    (video, time, numbers), _ = case.held[0]
    assert not torch.allclose(case.model(video, time, numbers), case.model(video, time, 1 - numbers))


def test_a_table_has_each_form_with_and_without(case: Case) -> None:
    said: list[str] = []
    table = compared(case, {"`none`": {"linear": "none"}}, said.append)
    cells = [list(column.cells) for column in table.columns]
    assert cells[:3] == [["`none`"] * 2, ["4"] * 2, ["chosen", "all"]]
    assert all(0 < float(str(cell)) < 1 for cell in cells[3])
    with torch.no_grad():
        mass, *shares = looked_at(case, 6)
    assert 0 < mass[0] < 1
    assert shares == [1.0, 1.0]  # where all six blocks are critical
