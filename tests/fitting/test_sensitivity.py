"""What allocate measures: errors of attentions and of the output, at each topk of the ladder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla_compile
from sla_compile.fitting.observer import GatedCall
from sla_compile.fitting.sensitivity import SiteSensitivity
from tests.support.allocation import BUDGET, batches, errors, prepared, topks, uneven

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")


EAGER: dict[str, Any] = {"inner": "eager"}


def output_error(model: nn.Module, data: list[tuple[Tensor]]) -> float:
    """Of the compiled model against the dense one."""
    run = torch.compile(model, backend="sla", options={**EAGER})
    with torch.no_grad():
        dense = torch.cat([model(*batch) for batch in data])
        return ((torch.cat([run(*batch) for batch in data]) - dense).norm() / dense.norm()).item()


@pytest.mark.parametrize("at_run_time", [False, True], ids=["constants", "run time"])
def test_what_reaches_the_output_counts(at_run_time: bool) -> None:
    """The layer with the largest error of its own hardly reaches the output, so its blocks go to others."""
    model = uneven()
    with torch.no_grad():
        model.blocks[1].attention.out.weight.mul_(0.02)
    prepared(model, **({"max_topk": 1.0} if at_run_time else {}))
    data = batches()
    even = output_error(model, data)
    report = sla_compile.allocate(model, data, budget=BUDGET)
    assert report.output_uniform == pytest.approx(even, rel=1e-6)
    assert report.output == pytest.approx(output_error(model, data), rel=1e-6)
    assert report.output < 0.9 * even
    assert report.critical <= report.critical_uniform
    effects = {site.path: site.effect for site in report.sites}
    assert min(effects, key=effects.__getitem__) == "blocks.1.attention.sla"  # type: ignore[arg-type]
    given = topks(model)
    assert given["blocks.1.attention.sla"] < BUDGET < given["blocks.3.attention.sla"]
    attention = sla_compile.allocate(prepared(model, max_topk=1.0), data, budget=BUDGET, objective="attention")
    assert report.output < attention.output
    assert attention.sites[1].effect is None


def test_an_output_that_no_attention_reaches() -> None:
    model = uneven(2)
    for block in model.blocks:
        nn.init.zeros_(block.attention.out.weight)
    report = sla_compile.allocate(prepared(model), batches(), budget=BUDGET)
    assert report.output == report.output_uniform == 0
    assert [site.effect for site in report.sites] == [None, None]


def test_gates_count_in_the_error() -> None:
    """A gate that makes up for a layer's missing blocks leaves them to others."""
    model, data = prepared(uneven(2)), batches()
    before = sla_compile.allocate(model, data, budget=BUDGET, objective="attention")
    sla_compile.calibrate(model, data, held_back=0)
    after = sla_compile.allocate(model, data, budget=BUDGET, objective="attention")
    assert after.mean("uniform") < 0.9 * before.mean("uniform")
    given = topks(model)
    expected = errors(model, data, given)
    assert [site.after for site in after.sites] == pytest.approx(list(expected.values()), rel=1e-9)


def test_numbers_do_not_grow_with_tokens_or_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    original = SiteSensitivity.add

    def spy(self: Any, call: GatedCall) -> None:
        original(self, call)
        kept.append(sum(v.numel() for v in vars(self).values() if isinstance(v, Tensor)) + len(self.critical))

    monkeypatch.setattr(SiteSensitivity, "add", spy)
    sla_compile.allocate(prepared(uneven(1)), batches(3), budget=BUDGET)
    assert len(set(kept)) == 1
    assert kept[0] < 40
