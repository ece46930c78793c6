"""How reports print: at any width, with every fact, equal sites grouped."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from torch import nn

import sla_compile
from sla_compile.reporting.terminal import GatesView, ReportView, group_sites, plain_text, quantity
from tests.support.models import WIDTH, Model, random_input
from tests.support.reports import BrokenBlocks, Stack, assert_fits, explain, flat

pytestmark = pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning")


REPORTS = {
    "mixed": lambda: explain(Stack(3), random_input(), random_input(30)),
    "kept": lambda: explain(Model(), min_tokens=1000),
    "none": lambda: explain(nn.Linear(WIDTH, WIDTH)),
    "breaks": lambda: explain(BrokenBlocks(2)),
    "never compiled": lambda: sla_compile.report(nn.Linear(2, 2)),
    "overrides": lambda: explain(Model(3), overrides={"blocks.1.*": {"topk": 0.6, "linear": "none"}}),
}


@pytest.mark.parametrize("name", REPORTS)
def test_renders_at_any_width(name: str) -> None:
    report = REPORTS[name]()
    assert_fits(report)
    text = str(report)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    words = {
        "mixed": "3 of 6 attentions would be sparse-linear",
        "kept": "0 of 2 attentions",
        "none": "no call of scaled_dot_product_attention",
        "breaks": "graph breaks",
        "never compiled": "no attention compiled",
        "overrides": "topk 60%",
    }
    assert words[name] in flat(text)


def test_text_has_every_fact_of_a_site_in_table_and_list() -> None:
    report = explain(Stack(3), random_input(100), random_input(30), linear="marginal")
    facts = ["blocks.{0..2}.attn1", "blocks.{0..2}.attn2", "3 sites", "cross-attention", "100 queries, 30 keys"]
    facts += ["self-attention", "272", "4*B*H*N^2*d", "4*B*H*N*L*d", "Tk = ceil(N/bk)", "C = max(1, floor(0.3*Tk))"]
    for width in (60, 250):
        text = flat(plain_text(ReportView(report), width).replace("|", " "))
        assert all(fact in text for fact in facts), [fact for fact in facts if fact not in text]


def test_paths_are_never_read_as_markup() -> None:
    model = nn.Sequential()
    model.add_module("[red]x[/red]", Model(1))
    report = explain(model)
    assert "[red]x[/red]" in plain_text(ReportView(report), 200)


def test_diff_is_coloured() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard", no_color=False)
    console.print(explain(Model(1)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "\x1b[31m" in text
    assert "\x1b[32m" in text


def test_sites_that_differ_are_not_grouped() -> None:
    report = explain(Model(4), overrides={"blocks.2.*": {"topk": 0.6}})
    assert [(row.pattern, row.count) for row in group_sites(report.sites)] == [
        ("blocks.{0,1,3}.attention", 3),
        ("blocks.2.attention", 1),
    ]
    excluded = explain(Model(4), exclude=["blocks.[12].*"])
    assert [row.pattern for row in group_sites(excluded.sites)] == [
        "blocks.{0,3}.attention",
        "blocks.{1,2}.attention",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (1234567, "1.23 M"), (6.594e12, "6.59 T"), (999.9e9, "1.00 T"),
     (465.6e9, "466 G"), (45.6e6, "45.6 M"), (2e15, "2.00 P")],
)  # fmt: skip
def test_quantities(number: float, text: str) -> None:
    assert quantity(number) == text


def test_gates_view_fits() -> None:
    gate = {
        "path": "blocks.0.attention.sla", "heads": 2, "shape": [16, 16], "dtype": "float32", "weight_norm": 0.0,
        "bias_norm": 1.5, "config": sla_compile.SLAConfig(linear="marginal", gate="per_head").to_dict(),
    }  # fmt: skip
    assert_fits(GatesView("file.safetensors", [gate] * 3))
