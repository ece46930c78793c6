"""``calibrate`` does no harm: gates that hurt on what is held back, or the model's output, are shrunk or left."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from examples.study.video_dit import VideoDiT, VideoDiTConfig
from sla_compile.fitting.calibration import CalibrationReport
from sla_compile.fitting.held_back import split_batches
from sla_compile.fitting.observer import Arguments
from sla_compile.fitting.output_error import OutputError
from sla_compile.reporting.terminal import plain_text
from tests.support.calibration import batches, made
from tests.support.closeness import relative_error
from tests.support.models import Model, random_input, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

VIDEO = (3, 3, 20, 20)  # channels, frames, height, width: 300 tokens
SMALL_BLOCKS = {"topk": 0.25, "block_q": 16, "block_k": 16, "min_tokens": 64}
Batch = tuple[Tensor, ...]


def video_dit() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig())
    for name, parameter in model.named_parameters():
        if name.endswith("modulation.bias"):  # fresh from its constructor, each block is the identity
            nn.init.normal_(parameter, std=0.5)
    return model


def videos(count: int, seed: int) -> list[Batch]:
    """Noisy smooth still videos, each at a noise level of its own."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        time = torch.rand(1, generator=generator)
        still = F.interpolate(torch.randn(1, 3, 3, 3, generator=generator), VIDEO[2:], mode="bilinear")[:, :, None]
        found.append(((1 - time) * still + time * torch.randn(1, *VIDEO, generator=generator), time))
    return found


def output_error(model: nn.Module, data: list[Batch]) -> float:
    error = OutputError(model, [(batch, {}) for batch in data])
    return math.sqrt(error.of(lambda call: call.output_with_gate(*call.gate.parameters())))


def split(count: int, share: float) -> list[float]:
    def stream() -> Any:
        yield from (((i,), {}) for i in range(count))

    found: list[tuple[Arguments, float]] = list(split_batches(stream(), share))
    assert [args for (args, _), _ in found] == [(i,) for i in range(count)]
    return [held for _, held in found]


def test_what_is_held_back() -> None:
    assert split(9, 0.25) == [0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert split(3, 0.25) == [0, 0, 1]
    assert split(5, 0.5) == [0, 1, 0, 1, 0]
    assert split(1, 0.25) == [0.25]
    assert split(2, 0.0) == [0, 0]


@pytest.mark.parametrize(("gate", "count"), [("shared", 1), ("per_head", 1), ("per_head", 4)])
def test_videos_not_seen_are_no_worse(gate: str, count: int) -> None:
    """Least squares alone took 0.068 to 0.084, to 0.347, and 0.068 to 0.082."""
    model, data, unseen = video_dit(), videos(count, seed=0), videos(4, seed=9)
    sla_compile.prepare(model, data[0], config={**SMALL_BLOCKS, "gate": gate})
    before = output_error(model, unseen)
    report = sla_compile.calibrate(model, data)
    after = output_error(model, unseen)
    print(before, after, [site.factor for site in report.sites])
    assert after <= before
    assert report.output_before is not None
    assert report.output_after is not None
    assert report.output_after <= report.output_before
