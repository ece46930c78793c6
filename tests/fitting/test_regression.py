"""The least squares behind ``calibrate``: the closed form, on calls of a model and on random numbers."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sla_compile
from sla_compile.fitting.calibration import gather
from sla_compile.fitting.observer import GatedCall
from sla_compile.fitting.regression import SiteStatistics
from sla_compile.gate import Gate
from sla_compile.gate_settings import GateSpec
from tests.support.calibration import (
    DIM,
    batches,
    direct_solution,
    made,
    recorded,
)
from tests.support.closeness import assert_close
from tests.support.models import random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("gate", ["shared", "per_head"])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_closed_form_is_the_least_squares_solution(gate: str, ridge: float) -> None:
    model, data = made(gate=gate), batches()
    expected = {path: direct_solution(calls, ridge) for path, calls in recorded(model, data).items()}
    sla_compile.calibrate(model, data, ridge=ridge, held_back=0)
    assert len(expected) == 2
    for path, (weight, bias) in expected.items():
        assert_close(f"{path} weight", sla_compile.gates(model)[path].weight, weight, 1e-8)
        assert_close(f"{path} bias", sla_compile.gates(model)[path].bias, bias, 1e-8)


def test_closed_form_on_random_numbers() -> None:
    """Branches far from those of an attention, on tokens that do not fill the last chunk."""
    config = sla_compile.SLAConfig(linear="marginal", gate="per_head")
    gate = Gate(GateSpec(heads=3, head_dim=16, config=config), dtype=torch.float64)
    linear, sparse, dense = torch.randn(3, 2, 3, 2100, 16, dtype=torch.float64)

    class Given(GatedCall):
        def branches(self) -> tuple[Tensor, Tensor | None]:
            return sparse, linear

    statistics = SiteStatistics(gate, linear.device)
    statistics.add(Given("site", gate, dense, dense, dense, key_mask=None, decision=cast(Any, None), dense=dense))
    weight, bias = statistics.solve(0.0)
    for head in range(3):
        x = F.pad(linear[:, head].reshape(-1, 16), (0, 1), value=1.0)
        solution = torch.linalg.lstsq(x, (dense - sparse)[:, head].reshape(-1, 16)).solution
        assert_close("weight", weight[head], solution[:16].mT, 1e-8)
        assert_close("bias", bias[head], solution[16], 1e-8)


def test_statistics_do_not_grow_with_tokens_or_batches() -> None:
    model = made()
    _, small = gather(model, iter([((random_input(64),), {})]))
    _, large = gather(model, iter([((random_input(640),), {})] * 3))
    for path, statistics in small.items():
        sizes = [t.numel() for t in vars(statistics).values() if isinstance(t, Tensor)]
        assert sizes == [t.numel() for t in vars(large[path]).values() if isinstance(t, Tensor)]
        assert max(sizes) == (DIM + 1) ** 2
