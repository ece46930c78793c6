"""The benchmark on other people's weights, on a small flow model with random ones: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import other_weights
from benchmarks.other_weights import ARMS, Pair, attention_errors, fitted, flow_of, moved_back, pairs, study

WIDTH = 16
CONFIG = {"topk": 0.25, "block_q": 16, "block_k": 16, "min_tokens": 0, "grid": (8, 8)}


class Layer(nn.Module):
    """Attention of ``source`` to ``target``, added."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        q, k, v = self.q_proj(source), self.k_proj(target), self.v_proj(target)
        return source + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1)


class Transformer(nn.Module):
    """A layer of self-attention, one of attention to the other frame."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn_ffn = Layer(), Layer()

    def forward(self, feature0: Tensor, feature1: Tensor, attn_num_splits: int) -> tuple[Tensor, Tensor]:
        first, second = (x.flatten(2).mT for x in (feature0, feature1))
        x = torch.cat([first, second])
        x = self.self_attn(x, x)
        x = self.cross_attn_ffn(x, torch.cat(x.chunk(2)[::-1]))
        first, second = (part.mT.reshape(feature0.shape) for part in x.chunk(2))
        return first, second


class FlowModel(nn.Module):
    """As GMFlow is called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.transformer = Transformer()

    def forward(self, img0: Tensor, img1: Tensor, attn_splits_list: list[int]) -> Tensor:
        parts = self.transformer(self.embed(img0), self.embed(img1), attn_num_splits=attn_splits_list[0])
        return F.interpolate(torch.cat(parts, dim=1)[:, ::WIDTH], scale_factor=8.0, mode="bilinear")


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlowModel().eval().requires_grad_(False)


def frames(count: int) -> list[Pair]:
    made = torch.rand(count, 2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return [(pair[0], pair[1]) for pair in made]


def test_a_pair_is_the_middle_of_its_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 40, 56)
    monkeypatch.setattr(other_weights, "decode", lambda path: clip)
    ((first, second),) = pairs(["a", "b"], Path(), 1, 64)
    assert first.shape == second.shape == (1, 3, 64, 64)
    assert [round(float(255 * frame.mean())) for frame in (first, second)] == [8, 8 + other_weights.APART]


def test_a_frame_moved_back_by_its_motion_is_the_first_one() -> None:
    frame = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    flow = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 16, 16)
    moved = frame.roll((-2, 3), dims=(2, 3))  # 2 up, 3 to the right
    torch.testing.assert_close(moved_back(moved, flow)[..., 2:, :-3], frame[..., 2:, :-3])


def test_every_block_critical_is_the_dense_model(model: nn.Module) -> None:
    inputs = other_weights.transformer_inputs(model, frames(1))
    exact = fitted(model, ARMS[0], {**CONFIG, "topk": 1.0, "bottomk": 0.0}, inputs)
    assert max(attention_errors(exact, inputs).values()) < 1e-5


def test_a_table_has_every_arm(model: nn.Module) -> None:
    arms = [ARMS[0], ARMS[2]]
    (table,) = study(model, frames(2), frames(1), arms, [{key: CONFIG[key] for key in CONFIG if key != "grid"}])
    assert "64 tokens, 1 of 4 blocks critical, raster order" in str(table.title)
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["form"] == [arm.title for arm in arms]
    errors = [float(str(cell)) for cell in columns["cross"]]
    assert 0 < errors[1] <= errors[0] < 2  # the scale helps, calibrated
    assert flow_of(model, frames(1)[0]).shape == (1, 2, 64, 64)
