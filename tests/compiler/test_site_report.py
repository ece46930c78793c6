"""What a report says of one site, and of one graph break."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sla_compile
from sla_compile.passes.cost import sla_cost
from sla_compile.reporting.terminal import ReportView, group_sites, plain_text
from tests.support.models import (
    HEADS,
    OPTIONS,
    BrokenAttention,
    CalledTwice,
    Doubled,
    Model,
    TwoAttentions,
    random_input,
)
from tests.support.reports import BrokenBlocks, Cross, assert_fits, explain, flat

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning"),
]


EAGER: dict[str, Any] = {**OPTIONS, "inner": "eager"}


def test_each_site_says_what_would_become_of_it() -> None:
    report = explain(Cross(), random_input(100), random_input(30))
    attn1, attn2 = report.sites
    assert (attn1.path, attn1.owner, attn1.rewritten, attn1.reason) == (
        "attn1", "CrossAttention", True, "self-attention",
    )  # fmt: skip
    assert attn1.shape == {
        "batch": 2, "heads": HEADS, "tokens": 100, "head_dim": 16, "dtype": "float64", "device": "cpu",
    }  # fmt: skip
    assert (attn1.gate_path, attn1.gate_parameters) == ("attn1.sla", HEADS)
    assert attn1.settings["topk"] == OPTIONS["topk"]
    assert attn1.flops_before == 4 * 2 * HEADS * 100 * 100 * 16
    assert (attn2.path, attn2.rewritten, attn2.reason) == ("attn2", False, "cross-attention")
    assert attn2.value == "100 queries, 30 keys"
    assert attn2.accepted
    assert attn2.flops_before == attn2.flops_after == 4 * 2 * HEADS * 100 * 30 * 16
    assert (attn2.gate_path, attn2.gate_parameters, attn2.settings) == ("", 0, {})


def test_flops_after_are_those_of_the_settings_of_the_site() -> None:
    after = explain(Model(1), linear="marginal").sites[0]
    cost = sla_cost(OPTIONS["topk"], 16, 16, "marginal")
    # 100 tokens are 7 blocks of 16, of which floor(0.3 * 7) = 2 are critical.
    sparse = 4 * (7 * 16) * (2 * 16) * 16
    others = 4 * 7 * 7 * 16 + 6 * 100 * 16**2 + 2 * 7 * 7 * 16**2 + 2 * 100 * 16
    assert after.flops_after == 2 * HEADS * (sparse + others)
    assert after.expression_after == str(cost.flops)
    assert (after.formula_after, after.where) == (cost.formula, cost.where)


def test_a_prepared_model_is_explained_with_its_own_settings() -> None:
    model = Model().double()
    sla_compile.prepare(model, (random_input(),), config={**OPTIONS, "overrides": {"blocks.1.*": {"topk": 0.5}}})
    sites = sla_compile.explain(model, (random_input(),)).sites
    assert [site.settings["topk"] for site in sites] == [0.3, 0.5]
    assert len(sla_compile.gates(model)) == 2


def test_a_module_called_twice_counts_both_calls_and_one_gate() -> None:
    model, x = CalledTwice().double(), random_input()
    explained = explain(model, x)
    torch.compile(model, backend="sla", options=EAGER)(x)
    for report in (explained, sla_compile.report(model)):
        assert [site.path for site in report.sites] == ["attention", "attention"]
        assert report.totals.gate_parameters == HEADS
        assert len(group_sites(report.sites)) == 1


def test_two_attentions_of_one_module_have_their_own_rows() -> None:
    report = explain(Doubled(TwoAttentions()))
    assert [(site.ordinal, site.gate_path) for site in report.sites] == [(0, "attention.sla"), (1, "attention.sla_1")]
    assert "attention 2 in it" in plain_text(ReportView(report), 250)
    assert "scale=0.4" in "".join(report.sites[1].diff)


@pytest.mark.parametrize("tokens", [100, 16])
def test_blocks_cut_apart_by_breaks_are_all_there_under_their_full_paths(tokens: int) -> None:
    report = explain(BrokenBlocks(3), random_input(tokens), min_tokens=50)
    assert [site.path for site in report.sites] == [f"blocks.{i}.attention" for i in range(3)]
    assert {site.rewritten for site in report.sites} == {tokens > 50}
    report = explain(BrokenBlocks(3), exclude=["blocks.1.*"])
    assert [site.rewritten for site in report.sites] == [True, False, True]


def test_graph_breaks_say_where() -> None:
    report = explain(Doubled(BrokenAttention()))
    assert len(report.graph_breaks) == 1
    found = report.graph_breaks[0]
    assert found.file.endswith("models.py")
    assert "graph_break" in found.reason
    assert found.line > 0
    assert f"models.py:{found.line}" in str(report).replace("\n", "").replace("|", "").replace(" ", "")
    assert not explain(Model()).graph_breaks


def test_a_forward_that_dynamo_gives_up_is_told() -> None:
    breaks = explain(BrokenBlocks(2)).graph_breaks
    assert any("BrokenBlocks.forward is not compiled" in found.reason for found in breaks)


def test_graph_breaks_of_a_compiled_model() -> None:
    model = Doubled(BrokenAttention()).double()
    with pytest.warns(sla_compile.DenseAttentionWarning):
        torch.compile(model, backend="sla", options=EAGER)(random_input())
    assert len(sla_compile.report(model).graph_breaks) == 1
    assert not sla_compile.report(Model()).graph_breaks


def test_symbolic_sizes_stay_symbolic_beside_the_traced_ones() -> None:
    model = Model().double()
    torch.compile(model, backend="sla", dynamic=True, options={**EAGER, "min_tokens": 64})(random_input(100))
    report = sla_compile.report(model)
    site = report.sites[0]
    assert isinstance(site.shape["tokens"], str)
    assert site.traced["tokens"] == 100
    assert site.shape["tokens"] in site.condition
    assert site.flops_before == 4 * 2 * HEADS * 100 * 100 * 16
    assert f"{site.shape['tokens']} = 100" in flat(str(report))
    assert_fits(report)
