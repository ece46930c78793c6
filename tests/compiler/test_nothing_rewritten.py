"""A compile that makes no attention sparse says so where nobody asked for that."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import sla_compile
from tests.support.models import OPTIONS, BrokenAttention, Model, random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

EAGER: dict[str, Any] = {**OPTIONS, "inner": "eager"}
MESSAGE = "^no attention of Model is rewritten: blocks"


def test_short_sequences_and_patterns_are_told_once() -> None:
    model, x = Model(), random_input()
    run = torch.compile(model, backend="sla", options={"inner": "eager"})
    with pytest.warns(
        UserWarning, match=rf"{MESSAGE}\.0\.attention stays dense, short sequence \(100 tok.*1 more"
    ) as told:
        run(x)
    assert [warning.filename for warning in told if "no attention" in str(warning.message)] == [__file__]
    _quiet(run, random_input(tokens=50))
    with (
        pytest.warns(sla_compile.UnmatchedPatternWarning, match="^include pattern 'x' matches no attention of Model"),
        pytest.warns(UserWarning, match=rf"{MESSAGE}\.0\.attention stays dense, matched by no include pattern: 'x'"),
    ):
        torch.compile(Model(), backend="sla", options=dict[str, Any](EAGER, include=["x"]))(x)


def test_silent_where_it_is_as_asked_or_not_all() -> None:
    x = random_input()
    _quiet(torch.compile(Model(), backend="sla", options=dict[str, Any](EAGER, exclude=["blocks.*"])), x)
    with pytest.warns(UserWarning, match="prepare: no attention"):
        prepared = sla_compile.prepare(Model(), (x,))
    _quiet(torch.compile(prepared, backend="sla", options={"inner": "eager"}), x)
    blocks = Model()
    for block in blocks.blocks:  # another part may have longer sequences
        block.compile(backend="sla", options={"inner": "eager"})
    _quiet(blocks, x)
    with pytest.warns(sla_compile.DenseAttentionWarning):  # that says it
        _quiet(torch.compile(BrokenAttention(), backend="sla", options=EAGER), x)
    several = torch.compile(Model(), backend="sla", options=EAGER | {"min_tokens": 80}, dynamic=False)
    _quiet(several, x)
    _quiet(several, random_input(tokens=50))


def _quiet(run: Any, x: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no attention of")
        run(x)
