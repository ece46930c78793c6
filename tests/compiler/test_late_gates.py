"""Gates that the first call makes after the optimizer was made are told of once, and only there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sla_compile
from sla_compile import LateGatesWarning
from tests.support.models import OPTIONS, Model, random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

EAGER: dict[str, Any] = {**OPTIONS, "inner": "eager"}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def whole(model: Any) -> None:
    model.compile(backend="sla", options=EAGER)


def blocks(model: Any) -> None:
    for block in model.blocks:
        block.compile(backend="sla", options=EAGER)


@pytest.mark.parametrize("compile_model", [whole, blocks])
def test_gates_made_after_the_optimizer(compile_model: Callable[[Any], None]) -> None:
    model, x = Model(), random_input()
    compile_model(model)
    optimizer = optimizer_of(model)
    with pytest.warns(LateGatesWarning, match=r"(blocks\.0\.)?attention\.sla: this gate.* call .*prepare") as told:
        model(x)
    (warning,) = (warning for warning in told if warning.category is LateGatesWarning)
    assert warning.filename.endswith("test_late_gates.py" if compile_model is whole else "support/models.py")
    assert len(sla_compile.gates(model)) == 2
    assert len(optimizer.param_groups) == 1
    _quiet(model, x[:, :50])


def test_silent_where_they_are_in_the_optimizer_or_none_is_trained(tmp_path: Path) -> None:
    x = random_input()
    prepared = sla_compile.prepare(Model(), (x,), config=OPTIONS)
    sla_compile.save(prepared, tmp_path / "gates.safetensors")
    loaded = sla_compile.load(Model(), tmp_path / "gates.safetensors")
    for model in (prepared, loaded):
        optimizer = optimizer_of(model)
        whole(model)
        _quiet(model, x)
        assert {id(p) for p in sla_compile.gate_parameters(model)} <= {
            id(p) for p in optimizer.param_groups[0]["params"]
        }
    first_call_first = Model()
    whole(first_call_first)
    _quiet(first_call_first, x)
    kept = [optimizer_of(first_call_first)]
    other = Model()
    whole(other)
    _quiet(other, x)  # the optimizer is of another model
    for context in (torch.no_grad, torch.inference_mode):
        sampled = Model()
        kept.append(optimizer_of(sampled))
        whole(sampled)
        with context():
            _quiet(sampled, x)


def _quiet(run: nn.Module, x: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LateGatesWarning)
        run(x)
