"""A pattern that does nothing, or not what it says, is told by name with the nearest path."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import sla_compile
from sla_compile import UnmatchedPatternWarning
from tests.support.models import OPTIONS, Model, random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

EAGER: dict[str, Any] = {**OPTIONS, "inner": "eager"}

UNMATCHED: list[tuple[dict[str, Any], str]] = [
    (
        {"exclude": ["block.0.*"]},
        r"exclude pattern 'block\.0\.\*' matches no attention of Model; nearest: 'blocks\.0\.att",
    ),
    ({"exclude": ["blocks.0"]}, r"exclude pattern 'blocks\.0' matches no attention of Model; nearest: 'blocks\.0\.\*'"),
    (
        {"include": ["blocks.*", "x*"]},
        r"include pattern 'x\*' matches no attention of Model; nearest: 'blocks\.[01]\.att",
    ),
    (
        {"overrides": {"*.attn": {"topk": 0.1}}},
        r"overrides pattern '\*\.attn' matches no attention of Model; nearest: ",
    ),
]


@pytest.mark.parametrize(("config", "message"), UNMATCHED)
def test_of_a_whole_model_it_is_a_warning(config: Mapping[str, Any], message: str) -> None:
    model, x = Model(), random_input()
    with pytest.warns(UnmatchedPatternWarning, match=f"^{message}"):
        sla_compile.explain(model, (x,), config={**OPTIONS, **config})
    with pytest.warns(UnmatchedPatternWarning, match=f"^{message}") as told:
        torch.compile(model, backend="sla", options={**EAGER, **config})(x)
    (warning,) = (warning for warning in told if issubclass(warning.category, UnmatchedPatternWarning))
    assert warning.filename == __file__
    assert len(sla_compile.gates(model)) == 2
    other = Model()
    with pytest.warns(UnmatchedPatternWarning, match=f"^{message}"):
        sla_compile.prepare(other, (x,), config={**OPTIONS, **config})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"exclude": ["blocks.0.*"]}, r"exclude pattern 'blocks\.0\.\*' matches 'blocks\.0\.attention' in Model"),
    ({"include": ["blocks.*"]}, r"include pattern 'blocks\.\*' matches 'blocks\.0\.attention' in Model"),
    ({"exclude": ["*.attention"]}, r"exclude pattern '\*\.attention' matches 'blocks\.0\.attention' in Model"),
    ({"overrides": {"*.1.*": {"topk": 0.4}}}, r"overrides pattern '\*\.1\.\*' matches 'blocks\.1\.attention' in Model"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_of_blocks_compiled_one_by_one_it_is_an_error(config: Mapping[str, Any], message: str) -> None:
    model, x = Model(), random_input()
    for block in model.blocks:
        block.compile(backend="sla", options={**EAGER, **config})
    accepted = r", but a Block is compiled by itself, where .*accepted: prepare\(model, .*nearest: 'attention'"
    with pytest.raises(ValueError, match=f"^{message}{accepted}"):
        model(x)
    assert not sla_compile.gates(model)
    sla_compile.prepare(model, (x,), config={**OPTIONS, **config})
    model(x)
    rewritten = {site.path: site.rewritten for site in sla_compile.report(model).sites}
    selected = sla_compile.SLAConfig(**config)
    assert rewritten == {f"blocks.{i}.attention": selected.selects(f"blocks.{i}.attention") for i in range(2)}


def test_a_pattern_of_paths_in_the_block_holds() -> None:
    model, x = Model(), random_input()
    for block in model.blocks:
        block.compile(backend="sla", options={**EAGER, "include": ["att*"], "overrides": {"*tion": {"topk": 0.2}}})
    _quiet(model, x)
    assert [gate.config.topk for gate in sla_compile.gates(model).values()] == [0.2, 0.2]


class Broken(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


@pytest.mark.parametrize("config", [{"exclude": ["blocks.1.*"]}, {"overrides": {"blocks.0.*": {"topk": 0.4}}}])
@pytest.mark.parametrize("held", [False, True], ids=["alone", "in another module"])
def test_a_graph_that_is_a_part_of_the_model_says_nothing(config: Mapping[str, Any], held: bool) -> None:
    model, x = Broken(), random_input()
    outer = nn.ModuleDict({"model": model}) if held else None
    _quiet(torch.compile(model, backend="sla", options={**EAGER, **config}), x)
    assert len(sla_compile.gates(model)) == (1 if "exclude" in config else 2)
    assert outer is None or outer["model"] is model


def _quiet(run: Any, x: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnmatchedPatternWarning)
        run(x)
