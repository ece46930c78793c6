"""Where a dry run takes no second trace, it finds what the second trace would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla_compile
from sla_compile.compat import Frame
from tests.support import models
from tests.support.models import OPTIONS, WIDTH, random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")


class Around(nn.Module):
    """Calls what is inside in some way."""

    def __init__(self, inside: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inside = inside
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inside, x)


class CalledInItsOwnWay(models.Attention):
    """Its call runs no hooks."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


def twice(inside: nn.Module, x: Tensor) -> Tensor:
    return inside(inside(x))


def by_forward(inside: nn.Module, x: Tensor) -> Tensor:
    return inside.forward(x)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "blocks": (models.Model, {}, 1),
    "a scale by head and a limit": (models.Model, {"linear": "marginal", "sparse_scale": True, "max_topk": 0.5}, 1),
    "a weight and a bias": (models.Model, {"linear": "marginal"}, 1),
    "one of two": (models.Model, {"exclude": ("blocks.0.*",)}, 1),
    "two attentions of one owner": (lambda: models.Doubled(models.TwoAttentions()), {}, 1),
    "called twice": (models.CalledTwice, {}, 1),
    "a module called twice": (lambda: Around(models.Attention(), twice), {}, 1),
    "the owner is the model": (models.Attention, {}, 2),
    "within a checkpoint": (models.CheckpointedModel, {}, 2),
    "its forward is called": (lambda: Around(models.Attention(), by_forward), {}, 2),
    "its call runs no hooks": (lambda: Around(CalledInItsOwnWay(), lambda inside, x: inside(x)), {}, 2),
    "a graph break": (lambda: models.Doubled(models.BrokenAttentionWithProjection()), {}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_with_a_second_trace(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, config, traces = CASES[case]
    model, x = make(), random_input()
    assert x.shape[-1] == WIDTH
    restarts: list[str] = []
    restart = Frame.restart

    def noted(frame: Frame, reason: str) -> None:
        restarts.append(reason)
        restart(frame, reason)

    monkeypatch.setattr(Frame, "restart", noted)

    def found() -> tuple[Any, dict[str, Any]]:
        report = sla_compile.explain(model, (x,), config={**OPTIONS, **config})
        prepared = sla_compile.prepare(make(), (x,), config={**OPTIONS, **config})
        gates = {path: (gate.settings, gate.form()) for path, gate in sla_compile.gates(prepared).items()}
        return (report.sites, report.graph_breaks), gates

    once = found()
    if traces:
        assert len(restarts) == 2 * (traces - 1)
    restarts.clear()
    torch._dynamo.reset()
    monkeypatch.setattr("sla_compile.compiler.rewriting.mark_in_graph", lambda *_: False)
    assert found() == once
    assert len(restarts) >= 2 or not once[1]
