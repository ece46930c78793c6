"""``explain`` and ``report``: what they say, that they change nothing, and how they print at any width."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.cells import cell_len
from rich.console import Console
from torch import Tensor, nn

import sla_compile
from sla_compile.passes.cost import sla_cost
from sla_compile.reporting.model_report import Report
from sla_compile.reporting.path_patterns import path_patterns
from sla_compile.reporting.terminal import GatesView, ReportView, group_sites, plain_text, quantity
from tests.support.models import (
    HEADS,
    OPTIONS,
    WIDTH,
    Attention,
    BrokenAttention,
    CalledTwice,
    CheckpointedModel,
    Doubled,
    Model,
    TwoAttentions,
    random_input,
    randomize_gates,
)

pytestmark = pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning")

WIDTHS = (20, 27, 40, 60, 87, 88, 100, 133, 250)
EAGER: dict[str, Any] = {**OPTIONS, "inner": "eager"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Cross(nn.Module):
    """Self-attention, then attention to a text of another length, as video DiTs have."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(), CrossAttention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        return x + self.attn2(x, text)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k = (self.project(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in (x, y))
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Cross() for _ in range(blocks))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


class BrokenBlocks(Model):
    """A break after each block: every block is a frame of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def explain(model: nn.Module, *args: Any, **changes: Any) -> Report:
    return sla_compile.explain(model.double(), args or (random_input(),), config={**OPTIONS, **changes})


def rendered(view: Any, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def assert_fits(view: Any) -> None:
    for width in WIDTHS:
        lines = rendered(view, width)
        assert lines
        wide = [line for line in lines if cell_len(line) > width]
        assert not wide, f"wider than {width}: {wide[0]!r}"


def flat(text: str) -> str:
    return " ".join(text.split())


def test_each_site_says_what_would_become_of_it() -> None:
    report = explain(Cross(), random_input(100), random_input(30))
    attn1, attn2 = report.sites
    assert (attn1.path, attn1.owner, attn1.rewritten, attn1.reason) == (
        "attn1", "CrossAttention", True, "self-attention",
    )  # fmt: skip
    assert attn1.shape == {
        "batch": 2, "heads": HEADS, "tokens": 100, "head_dim": 16, "dtype": "float64", "device": "cpu",
    }  # fmt: skip
    assert (attn1.gate_path, attn1.gate_parameters) == ("attn1.sla", 16 * 16 + 16)
    assert attn1.settings["topk"] == OPTIONS["topk"]
    assert attn1.flops_before == 4 * 2 * HEADS * 100 * 100 * 16
    assert (attn2.path, attn2.rewritten, attn2.reason) == ("attn2", False, "cross-attention")
    assert attn2.value == "100 queries, 30 keys"
    assert attn2.accepted
    assert attn2.flops_before == attn2.flops_after == 4 * 2 * HEADS * 100 * 30 * 16
    assert (attn2.gate_path, attn2.gate_parameters, attn2.settings) == ("", 0, {})


def test_totals_are_sums_over_the_sites() -> None:
    report = explain(Stack(3), random_input(100), random_input(30))
    totals = report.totals
    assert (totals.attentions, totals.rewritten, totals.kept, totals.not_compiled) == (6, 3, 3, 0)
    assert totals.flops_before == sum(site.flops_before or 0 for site in report.sites)
    assert totals.flops_after == sum(site.flops_after or 0 for site in report.sites) != totals.flops_before
    assert totals.gate_parameters == 3 * (16 * 16 + 16)


def test_flops_after_are_those_of_the_settings_of_the_site() -> None:
    after = explain(Model(1)).sites[0]
    cost = sla_cost(OPTIONS["topk"], 16, 16, "marginal")
    # 100 tokens are 7 blocks of 16, of which floor(0.3 * 7) = 2 are critical.
    sparse = 4 * (7 * 16) * (2 * 16) * 16
    others = 4 * 7 * 7 * 16 + 6 * 100 * 16**2 + 2 * 7 * 7 * 16**2 + 2 * 100 * 16
    assert after.flops_after == 2 * HEADS * (sparse + others)
    assert after.expression_after == str(cost.flops)
    assert (after.formula_after, after.where) == (cost.formula, cost.where)


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


def test_a_prepared_model_is_explained_with_its_own_settings() -> None:
    model = Model().double()
    sla_compile.prepare(model, (random_input(),), config={**OPTIONS, "overrides": {"blocks.1.*": {"topk": 0.5}}})
    sites = sla_compile.explain(model, (random_input(),)).sites
    assert [site.settings["topk"] for site in sites] == [0.3, 0.5]
    assert len(sla_compile.gates(model)) == 2


def test_untrained_gates_are_named_until_they_are_trained() -> None:
    class OwnAttention(Attention):
        """A class of its own: a model that shares compiled code with another is told what that code does."""

    model, x = Model(3).double(), random_input()
    for block in model.blocks:
        block.attention = OwnAttention().double()
    assert not explain(model, x).untrained_gates
    sla_compile.prepare(model, (x,), config=OPTIONS)
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


def test_a_module_called_twice_counts_both_calls_and_one_gate() -> None:
    model, x = CalledTwice().double(), random_input()
    explained = explain(model, x)
    torch.compile(model, backend="sla", options=EAGER)(x)
    for report in (explained, sla_compile.report(model)):
        assert [site.path for site in report.sites] == ["attention", "attention"]
        assert report.totals.gate_parameters == 16 * 16 + 16
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


def test_graph_breaks_of_a_compiled_model() -> None:
    model = Doubled(BrokenAttention()).double()
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


def test_diff_shows_the_site_before_and_after() -> None:
    diff = explain(Model()).sites[1].diff
    minus = [line for line in diff if line.startswith("- ")]
    plus = [line for line in diff if line.startswith("+ ")]
    context = [line for line in diff if line.startswith("  ")]
    assert len(minus) + len(plus) + len(context) == len(diff) <= 12
    assert any("scaled_dot_product_attention(" in line for line in minus)
    assert any("sla::forward(" in line for line in plus)
    assert "blocks.1.attention.sla.weight" in "".join(plus)
    assert "blocks.1.attention.sla.bias" in "".join(plus)
    assert not any("gate(" in line or "_parameters_" in line for line in diff)
    assert not any("sla" in line for line in minus + context)


def test_diff_inside_activation_checkpointing() -> None:
    diff = explain(CheckpointedModel()).sites[1].diff
    assert "blocks.1.attention.sla.weight" in "".join(diff)
    assert not any("gate(" in line for line in diff)


def test_a_view_that_became_a_reshape_is_shown_as_it_was() -> None:
    class Views(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).view(2, 100, -1)

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.views = Views()

        def forward(self, q: Tensor) -> Tensor:
            return self.views(q)

    diff = explain(Owner(), torch.randn(2, 100, HEADS, 16).transpose(1, 2)).sites[0].diff
    assert any(line.startswith("- ") and ".view(" in line for line in diff)
    assert any(line.startswith("+ ") and ".reshape(" in line for line in diff)


def test_kept_sites_have_no_diff() -> None:
    assert not explain(Model(), min_tokens=1000).sites[0].diff


def test_dictionary_is_json_and_complete() -> None:
    report = explain(Stack(2), random_input(), random_input(30))
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert set(data) == {
        "version", "model", "compiled", "sites", "totals", "graph_breaks", "untrained_gates",
    }  # fmt: skip
    assert len(data["sites"]) == 4
    assert {"path", "rewritten", "reason", "value", "accepted", "flops_before", "diff"} <= set(data["sites"][0])
    assert data["totals"]["attentions"] == 4
    assert not any(site["diff"] for site in report.without_diffs().to_dict()["sites"])


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
    report = explain(Stack(3), random_input(100), random_input(30))
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


@pytest.mark.parametrize(
    ("paths", "patterns"),
    [
        (["blocks.0.a", "blocks.1.a", "blocks.2.a"], ["blocks.{0..2}.a"]),
        ([f"blocks.{i}.a" for i in range(12)], ["blocks.{0..11}.a"]),
        (["b.0", "b.1", "b.2", "b.5", "b.7"], ["b.{0..2,5,7}"]),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0", "s.1.b.1"], ["s.{0,1}.b.{0,1}"]),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0"], ["s.0.b.{0,1}", "s.1.b.0"]),
        (["only"], ["only"]),
        ([""], [""]),
    ],
)
def test_path_patterns(paths: list[str], patterns: list[str]) -> None:
    assert path_patterns(paths) == patterns


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
        "bias_norm": 1.5, "config": sla_compile.SLAConfig(gate="per_head").to_dict(),
    }  # fmt: skip
    assert_fits(GatesView("file.safetensors", [gate] * 3))


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
