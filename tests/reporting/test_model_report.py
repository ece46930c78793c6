"""``explain`` and ``report``: what they say, that they change nothing, and how they print at any width."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sla_compile
from tests.support.models import HEADS, MARGINAL, OPTIONS, Attention, Model, random_input, randomize_gates
from tests.support.reports import Stack, explain, flat, rendered

pytestmark = pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning")

EAGER: dict[str, Any] = {**OPTIONS, "inner": "eager"}


def test_totals_are_sums_over_the_sites() -> None:
    report = explain(Stack(3), random_input(100), random_input(30))
    totals = report.totals
    assert (totals.attentions, totals.rewritten, totals.kept, totals.not_compiled) == (6, 3, 3, 0)
    assert totals.flops_before == sum(site.flops_before or 0 for site in report.sites)
    assert totals.flops_after == sum(site.flops_after or 0 for site in report.sites) != totals.flops_before
    assert totals.gate_parameters == 3 * HEADS
    other = explain(Stack(1), random_input(100), random_input(30), linear="marginal")
    assert other.totals.gate_parameters == 16 * 16 + 16


def test_virtual_keys_have_no_feature_map_in_it() -> None:
    x = (random_input(100), random_input(30))
    taylor = " ".join(str(explain(Stack(1), *x, linear="taylor")).split())
    other = " ".join(str(explain(Stack(1), *x, linear="marginal")).split())
    assert "feature map softmax, linear marginal" in other
    assert "feature map" not in taylor
    assert "blocks 16x16, linear taylor" in taylor
    assert "shared" not in taylor


def test_explain_changes_nothing() -> None:
    model = Model().double()
    model.blocks[0].register_forward_pre_hook(lambda *_: None)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    modules, hooks = dict(model.named_modules()), len(model.blocks[0]._forward_pre_hooks)
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    x, random_state = random_input(), torch.get_rng_state()
    expected = model(x)
    first, second = explain(model, x), explain(model, x)
    assert first == second
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dict(model.named_modules()) == modules
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert len(model.blocks[0]._forward_pre_hooks) == hooks
    assert not model.blocks[1]._forward_pre_hooks
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(id(after[name]) == identity and torch.equal(after[name], p) for name, (identity, p) in before.items())
    assert torch.equal(model(x), expected)
    assert not sla_compile.gates(model)
    assert not sla_compile.report(model).sites


def test_explain_agrees_with_the_compile() -> None:
    model, x = Stack(2).double(), (random_input(), random_input(30))
    explained = explain(model, *x)
    torch.compile(model, backend="sla", options=EAGER)(*x)
    compiled = sla_compile.report(model)
    assert compiled.compiled
    assert not explained.compiled
    key = [(site.path, site.ordinal) for site in compiled.sites]
    assert sorted(key) == key
    for one, other in zip(sorted(explained.sites, key=lambda site: site.path), compiled.sites, strict=True):
        assert {**one.to_dict(), "diff": []} == {**other.to_dict(), "diff": []}
    assert explained.totals == compiled.totals


def test_untrained_gates_are_named_until_they_are_trained() -> None:
    class OwnAttention(Attention):
        """A class of its own: a model that shares compiled code with another is told what that code does."""

    model, x = Model(3).double(), random_input()
    for block in model.blocks:
        block.attention = OwnAttention().double()
    assert not explain(model, x).untrained_gates
    sla_compile.prepare(model, (x,), config=MARGINAL)
    report = sla_compile.report(model)
    assert report.untrained_gates == tuple(f"blocks.{i}.attention.sla" for i in range(3))
    assert "untrained gates" in str(report)
    assert "blocks.{0..2}.attention.sla" in flat(str(report))
    assert (report.totals.not_compiled, report.totals.kept) == (3, 0)
    assert "3 not compiled yet" in str(report)
    randomize_gates(model)
    torch.compile(model, backend="sla", options={"inner": "eager"})(x)
    report = sla_compile.report(model)
    assert (report.untrained_gates, report.totals.not_compiled, report.totals.rewritten) == ((), 0, 3)
    assert "untrained" not in str(report)


def test_the_status_is_that_of_this_very_model() -> None:
    def told(model: Any) -> tuple[str, list[bool]]:
        found = sla_compile.report(model)
        assert found.to_dict()["status"] == found.status
        return found.status, [site.ran_dense for site in found.sites]

    model, x = Model().double(), random_input()
    assert told(model) == ("not compiled", [])
    sla_compile.prepare(model, (x,), config=OPTIONS)
    model(x)
    assert told(model) == ("prepared, not compiled", [False, False])
    run: Any = torch.compile(model, backend="sla", options={"inner": "eager"})
    run(x)
    assert told(run) == ("compiled", [False, False])
    model(x)
    dense = sla_compile.report(run)
    assert told(run) == ("compiled, but the last call ran dense", [True, True])
    assert (dense.totals.rewritten, dense.totals.ran_dense) == (2, 2)  # what was compiled is still that
    assert "2 of 2 attentions are sparse-linear; 2 of them ran dense in the last call" in flat(str(dense))
    assert "the last call was not compiled, and ran dense" in flat(" ".join(rendered(dense, 80)))
    copied = copy.deepcopy(model)
    copied(x)
    assert told(copied) == ("prepared, not compiled", [False, False])
    run(x)
    assert told(run) == ("compiled", [False, False])
    sla_compile.calibrate(model, [(x,)])  # runs it dense, and that is no call of the user's
    assert told(run) == ("compiled", [False, False])
    sla_compile.export(model, (x,))
    assert told(run) == ("compiled", [False, False])
    with torch.compiler.set_stance("force_eager"):
        run(x)
    assert told(run)[0] == "compiled, but the last call ran dense"
    assert explain(model, x).status == "explained"


def test_the_status_of_blocks_compiled_by_themselves() -> None:
    model, x = Model().double(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    model.blocks[0].compile(backend="sla", options={"inner": "eager"})
    model(x)
    report = sla_compile.report(model)
    assert report.status == "compiled in part"
    assert [(site.rewritten, site.compiled) for site in report.sites] == [(True, True), (False, False)]
    with torch.compiler.set_stance("force_eager"):
        model(x)
    assert [site.ran_dense for site in sla_compile.report(model).sites] == [True, False]


class Lengths(Model):
    """Reads a number after a graph break: tokens that a mask leaves, or ones that only a run of a layer gives."""

    def __init__(self, *, of_layer: bool, error: type[Exception] = ValueError) -> None:
        super().__init__(2)
        self.of_layer, self.error = of_layer, error

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        x = self.blocks[0](x)
        last = torch.zeros(len(mask), dtype=torch.bool)
        last[-1] = True
        live = (x[..., 0].square() > 0) if self.of_layer else mask & ~last
        torch._dynamo.graph_break()
        length = int(live.sum())
        if length == 0:
            raise self.error("no token is left")
        return self.blocks[1](x[:, :length])


def test_numbers_of_masks_are_computed() -> None:
    """Python code after a graph break goes by them; no layer runs."""
    mask = torch.arange(100) < 80
    mask[-1] = True
    model = Lengths(of_layer=False)
    report = explain(model, random_input(100), mask)
    assert [(site.path, site.shape["tokens"]) for site in report.sites] == [
        ("blocks.0.attention", 100), ("blocks.1.attention", 80),
    ]  # fmt: skip
    assert all(site.rewritten for site in report.sites)
    assert int(mask.sum()) == 81


def test_a_value_that_only_a_run_gives_ends_the_report() -> None:
    report = explain(Lengths(of_layer=True), random_input(100), torch.ones(100, dtype=torch.bool))
    assert [site.path for site in report.sites] == ["blocks.0.attention"]
    found = report.graph_breaks[-1]
    assert "ValueError: no token is left" in found.reason
    assert "call it once and see sla_compile.report(model)" in found.reason
    assert (Path(found.file).name, found.function) == (Path(__file__).name, "forward")
    assert "the trace stopped here" in flat(str(report).replace("|", " "))


def test_prepare_refuses_what_it_cannot_see_whole() -> None:
    model = Lengths(of_layer=True).double()
    with pytest.raises(ValueError, match=r"Lengths: the trace stopped here, .*compile the model and call it once"):
        sla_compile.prepare(model, (random_input(100), torch.ones(100, dtype=torch.bool)), config=OPTIONS)
    assert not sla_compile.gates(model)


def test_a_call_that_is_wrong_raises_as_it_does() -> None:
    with pytest.raises(TypeError, match="mask"):
        explain(Lengths(of_layer=True), random_input(100))


def test_dictionary_is_json_and_complete() -> None:
    report = explain(Stack(2), random_input(), random_input(30))
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert set(data) == {
        "version", "model", "compiled", "status", "sites", "totals",
        "graph_breaks", "untrained_gates", "outside_graphs",
    }  # fmt: skip
    assert len(data["sites"]) == 4
    assert {"path", "rewritten", "reason", "value", "accepted", "flops_before", "diff"} <= set(data["sites"][0])
    assert data["totals"]["attentions"] == 4
    assert not any(site["diff"] for site in report.without_diffs().to_dict()["sites"])


def test_refusals_name_the_argument() -> None:
    with pytest.raises(TypeError, match=r"model: got int; accepted: a torch.nn.Module"):
        sla_compile.explain(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: got str"):
        sla_compile.report("x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="args: got Tensor; accepted: a tuple"):
        sla_compile.explain(Model(), random_input())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kwargs: got list"):
        sla_compile.explain(Model(), (), [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nearest known: 'topk'"):
        sla_compile.explain(Model(), (random_input(),), config={"topkk": 0.1})


def test_report_holds_on_to_no_module() -> None:
    report = explain(Model(1))
    assert copy.deepcopy(report) == report
    assert repr(report) == "<Report of Model: 1 of 1 attentions rewritten>"


def test_a_block_that_runs_the_code_of_another_is_told_with_the_settings_of_now() -> None:
    """It had code of its own for the settings before, and has none for these."""
    model, x = Model(3), random_input().float()
    sla_compile.prepare(model, (x,), config={**OPTIONS, "topk": 0.3, "inner": "eager"})
    for block in model.blocks:
        block.compile(backend="sla")
    model(x)
    sla_compile.prepare(model, (x,), config={**OPTIONS, "topk": 0.6, "inner": "eager"})
    with sla_compile.RunCounters(model) as counters:
        model(x.requires_grad_() + 0)  # now the first block is given what has a gradient, as the others are
    ran = [site["critical_share"] for site in counters.read().values()]
    told = [site.settings["topk"] for site in sla_compile.report(model).sites]
    assert told == [0.6] * 3
    assert ran == [pytest.approx(ran[0])] * 3
    assert ran[0] > 0.5
