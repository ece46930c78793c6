"""Models come and go in one process: what was traced or compiled for them is let go of with them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sla_compile
from tests.support.models import OPTIONS, Attention, Doubled

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

INPUT = torch.randn(1, 48, 32)

REPEATS = 8
OF_TORCH = 60
"""Objects that a compile may leave: torch keeps its timings, and the lines of generated code. Guards are 500."""


def prepare_one() -> None:
    sla_compile.prepare(Doubled(Attention()), (INPUT,), config=OPTIONS)


def explain_one() -> None:
    sla_compile.explain(Doubled(Attention()), (INPUT,), config=OPTIONS)


def compile_one_that_is_not_prepared() -> None:
    torch.compile(Doubled(Attention()), backend="sla", options={**OPTIONS, "inner": "eager"})(INPUT)


def objects() -> int:
    for _ in range(3):  # what a collection frees may have finalizers that leave more
        gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize("run", [prepare_one, explain_one, compile_one_that_is_not_prepared])
def test_models_leave_no_guards_behind(run: Callable[[], None]) -> None:
    live = torch.compile(Doubled(Attention()), backend="eager")
    live(INPUT)
    for _ in range(2):
        run()
    before = objects()
    for _ in range(REPEATS):
        run()
    assert (objects() - before) / REPEATS < OF_TORCH


def test_what_is_compiled_serves_on_after_a_dry_run() -> None:
    compiled = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(gm)
        return gm.forward

    model = torch.compile(Doubled(Attention()), backend=backend)
    model(INPUT)
    prepare_one()
    explain_one()
    model(INPUT)
    assert len(compiled) == 1
