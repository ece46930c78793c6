"""The tables that calibrate, distill and allocate return."""

from __future__ import annotations

import dataclasses
import json

import pytest
from torch import Tensor

import sla_compile
from sla_compile.reporting.terminal import plain_text
from tests.support.allocation import BUDGET, prepared, uneven
from tests.support.allocation import batches as videos
from tests.support.calibration import batches, made
from tests.support.models import HEADS, Model, random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")


class Branching(Model):
    def forward(self, x: Tensor, last: bool = True) -> Tensor:
        x = self.blocks[0](x)
        return self.blocks[1](x) if last else x


def test_report_of_calibrate_renders_and_lists_gates_that_were_not_reached() -> None:
    model = made(Branching())
    report = sla_compile.calibrate(model, [(random_input(), False)], held_back=0)
    assert report.unreached == ("blocks.1.attention.sla",)
    assert not sla_compile.gates(model)["blocks.1.attention.sla"].trained()
    data = json.loads(report.to_json())
    assert data["sites"][0]["path"] == "blocks.0.attention.sla"
    assert data["mean"]["after"] == report.sites[0].after
    assert data["unreached"] == ["blocks.1.attention.sla"]
    assert 0 < data["sites"][0]["closed"] < 1
    for width in (40, 120):
        text = plain_text(report, width)
        assert all(len(line) <= width for line in text.splitlines())
        for part in ("blocks.0.attention.sla", f"{report.sites[0].after:.4f}", f"{100 * report.sites[0].closed:.1f}%"):
            assert part in text
        assert "not reached" in text
    assert str(report) == plain_text(report, 100)
    assert "CalibrationReport of Branching" in repr(report)


def test_report_of_distill_renders() -> None:
    report = sla_compile.distill(made(inner="eager"), batches(1), steps=2, loss="output")
    data = json.loads(report.to_json())
    assert data["losses"] == list(report.losses)
    assert data["output_after"] == report.output_after
    assert data["sites"][1]["after"] == report.sites[1].after
    for width in (40, 120):
        text = plain_text(report, width)
        assert all(len(line) <= width for line in text.splitlines())
        assert "blocks.1.attention.sla" in text
        assert f"{report.sites[1].after:.4f}" in text
    assert f"{report.output_after:.4f}" in str(report)
    assert "DistillationReport of Model" in repr(report)


def test_report_of_allocate_renders() -> None:
    model = prepared(uneven())
    report = sla_compile.allocate(model, videos(), budget=BUDGET)
    data = json.loads(report.to_json())
    assert data["mean"]["after"] == report.mean("after")
    assert data["sites"][1]["topk"] == report.sites[1].topk
    assert len(data["sites"]) == HEADS * 2
    assert "blocks.1.attention.sla" in str(report)
    for width in (60, 120):
        text = plain_text(dataclasses.replace(report, unreached=("blocks.9.sla",)).__rich__(), width)
        assert all(len(line) <= width for line in text.splitlines())
        assert "not reached, left as they were: blocks.9.sla" in text
        assert f"-> {100 * report.sites[1].topk:.3g}%" in text
    assert "AllocationReport of Model" in repr(report)
    assert f"output error {report.output_uniform:.4f} spread evenly, {report.output:.4f} as allocated" in report.title


def test_report_of_choose_orders_renders() -> None:
    model = prepared(uneven(), grid=(4, 8, 10))
    report = sla_compile.choose_orders(model, videos(), orders=("raster", "tiles:1", "tiles:4"))
    data = json.loads(report.to_json())
    assert data["sites"][1]["errors"] == report.sites[1].errors
    for width in (60, 120):
        text = plain_text(report.__rich__(), width)
        assert all(len(line) <= width for line in text.splitlines())
        assert all(f"{error:.4f}" in text for site in report.sites for error in site.errors.values())
    assert "OrderReport of Model" in repr(report)
    nearer = dataclasses.replace(report, output=report.output_before / 2)
    assert f"output error {report.output_before:.4f} -> {nearer.output:.4f}" in nearer.title
