"""``calibrate`` and ``allocate`` of gates for virtual keys: shifts from measured errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sla_compile
from sla_compile.fitting.observer import GatedCall, gated_calls
from sla_compile.fitting.shift_search import SHIFTS
from tests.support.models import OPTIONS, Model, prepared_model, random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

TAYLOR = {name: value for name, value in OPTIONS.items() if name != "bottomk"} | {"linear": "taylor"}


def made(**options: Any) -> Any:
    return prepared_model(**{**TAYLOR, **options})


def errors_at(model: nn.Module, batches: list[tuple[torch.Tensor]], shift: float) -> dict[str, torch.Tensor]:
    """By path, the squared error of each head with one shift for all, on the dense model's inputs."""
    found: dict[str, torch.Tensor] = {}

    def observe(call: GatedCall) -> torch.Tensor:
        out = call.output_with_gate(torch.full((call.gate.heads,), shift))
        found[call.path] = found.get(call.path, 0) + (out - call.dense).square().sum((0, 2, 3))
        return call.dense

    with torch.no_grad(), gated_calls(model, observe):
        for batch in batches:
            model(*batch)
    return found


def test_each_head_gets_its_best_shift() -> None:
    model, batches = made(topk=0.1), [(random_input(),) for _ in range(3)]
    with torch.no_grad():
        for parameter in sla_compile.gate_parameters(model):
            parameter.fill_(1.3)  # no rung of the ladder, and a bad one
    report = sla_compile.calibrate(model, batches, held_back=0.0)
    table = {shift: errors_at(model, batches, shift) for shift in SHIFTS}
    for site in report.sites:
        best = torch.stack([table[shift][site.path] for shift in SHIFTS]).argmin(dim=0)
        wanted = torch.tensor(SHIFTS)[best]
        shift = sla_compile.gates(model)[site.path].shift
        assert shift is not None
        assert torch.equal(shift.detach(), wanted)
        assert site.after < site.before


def test_no_worse_on_what_is_held_back() -> None:
    model = made(topk=0.1)
    report = sla_compile.calibrate(model, [(random_input(),) for _ in range(4)])
    assert report.output_before is not None
    assert report.output_after is not None
    assert report.output_after <= report.output_before
    assert "output error" in str(report)


def test_a_single_batch_and_layer_after_layer() -> None:
    model = made(topk=0.1)
    assert all(site.after <= site.before for site in sla_compile.calibrate(model, [(random_input(),)]).sites)
    again = sla_compile.calibrate(model, [(random_input(),) for _ in range(4)], sequential=True)
    assert all(site.after <= site.before for site in again.sites)


def test_allocated() -> None:
    model = made(max_topk=0.9)
    report = sla_compile.allocate(model, [(random_input(),)], budget=0.3)
    assert report.critical <= report.critical_uniform
    assert report.output <= report.output_uniform


@pytest.mark.parametrize("linear", ["taylor", "marginal"])
def test_allocated_to_heads(linear: str) -> None:
    model, batches = made(topk=0.2, max_topk=0.9, topk_by="head", linear=linear), [(random_input(),)]
    with torch.no_grad():  # one head of each attention all but uniform, so that it wants fewer blocks
        for block in model.blocks:
            block.attention.qkv.weight[:16] *= 0.05
            block.attention.qkv.weight[16:32] *= 6
    report = sla_compile.allocate(model, batches, budget=0.4, objective="attention")
    assert report.critical <= report.critical_uniform * (1 + 1e-9)
    sparsities = [gate.sparsity for gate in sla_compile.gates(model).values()]
    for site, sparsity in zip(report.sites, sparsities, strict=True):
        assert site.topks is not None
        assert sparsity is not None
        assert torch.equal(sparsity[:, 0], torch.tensor([round(topk * 1e6) for topk in site.topks]))
        assert site.topk == pytest.approx(sum(site.topks) / len(site.topks))
    assert any(site.topks[0] < site.topks[1] for site in report.sites if site.topks is not None)
    assert sum(site.after**2 for site in report.sites) < sum(site.uniform**2 for site in report.sites)
    wanted = errors_as_they_are(model, batches)
    compiled = torch.compile(model, backend="sla", options={"inner": "eager"})
    compiled(*batches[0])
    for site in report.sites:
        assert site.after == pytest.approx(wanted[site.path], rel=1e-6)
    again = sla_compile.allocate(model, batches, budget=0.4, objective="attention")
    for site, before in zip(again.sites, report.sites, strict=True):
        assert site.topks_before == before.topks  # what each head had, and not their mean alone
        assert site.before == pytest.approx(before.after, rel=1e-6)
    sla_compile.set_sparsity(model, topk=0.3)
    assert all(bool((sparsity[:, 0] == 300_000).all()) for sparsity in sparsities if sparsity is not None)


def errors_as_they_are(model: nn.Module, batches: list[tuple[torch.Tensor]]) -> dict[str, float]:
    """By path, the relative error of each attention with its gate and buffer as they are."""
    found: dict[str, float] = {}

    def observe(call: GatedCall) -> torch.Tensor:
        out = call.output_with_gate(*call.gate.parameters())
        found[call.path] = ((out - call.dense).norm() / call.dense.norm()).item()
        return call.dense

    with torch.no_grad(), gated_calls(model, observe):
        for batch in batches:
            model(*batch)
    return found


def test_topks_of_heads_are_saved(tmp_path: Path) -> None:
    model = made(max_topk=0.9, topk_by="head")
    sparsity = next(iter(sla_compile.gates(model).values())).sparsity
    assert sparsity is not None
    sparsity[0, 0] = 123_456
    sla_compile.save(model, tmp_path / "gates.safetensors")
    other = sla_compile.load(sla_compile.detach(Model()), tmp_path / "gates.safetensors")
    loaded = next(iter(sla_compile.gates(other).values())).sparsity
    assert loaded is not None
    assert torch.equal(loaded, sparsity)
    with pytest.raises(ValueError, match="topk_by='head' without max_topk"):
        sla_compile.SLAConfig(topk_by="head")


def test_distill_refuses_them_by_name() -> None:
    model = made()
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.sla: got a gate for linear='taylor'"):
        sla_compile.distill(model, [(random_input(),)], steps=1)
