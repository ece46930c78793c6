"""A gate belongs to one call site of its owner, whatever else the owner calls, how often, and in which order."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sla_compile
from sla_compile.gate import gate_name
from sla_compile.gate_attachment import attach_gate
from sla_compile.gate_settings import GateSpec
from sla_compile.reporting.terminal import ReportView, group_sites, plain_text
from tests.support.closeness import assert_close
from tests.support.compiled import graphs
from tests.support.models import MARGINAL, WIDTH, Attention, TwoAttentions, random_input

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "float64"),
    pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning"),
]

EAGER: dict[str, Any] = {"inner": "eager"}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Split(Attention):
    """One call for each sample, cut to its length."""

    def forward(self, x: Tensor, lens: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        q, k, v = self.heads(x)
        cut = [(slice(i, i + 1), slice(n), x.shape[1] - n) for i, n in enumerate(lens)]
        y = torch.cat(
            [F.pad(F.scaled_dot_product_attention(q[i, :, n], k[i, :, n], v[i, :, n]), (0, 0, 0, p)) for i, n, p in cut]
        )
        return self.out(y.transpose(1, 2).flatten(2))


class SplitThenJoint(Split):
    """A loop, then another attention."""

    def forward(self, x: Tensor, lens: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        x = super().forward(x, lens)
        q, k, v = self.heads(x)
        return attend(q, k, v).transpose(1, 2).flatten(2)


class Optional(Attention):
    """An attention, by a helper, that only some calls have; and one that all have. Without its gates, zero."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken

    def forward(self, x: Tensor, aux: bool) -> Tensor:  # type: ignore[override]
        q, k, v = self.heads(x)
        v = 0 * v
        y = v
        if aux:
            y = 10 * attend(q, k, v)
        if self.broken:
            torch._dynamo.graph_break()
        z = self.out(x).sum() * 0 + F.scaled_dot_product_attention(q, k, v)
        return (y + z).transpose(1, 2).flatten(2)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, aux: bool) -> Tensor:
        return checkpoint(self.inner, x, aux, use_reentrant=False)


class Within(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor, arguments: Any) -> Tensor:
        for module in self.inner:
            x = module(x, arguments)
        return x


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sla", options={**EAGER, **options})


def names(model: nn.Module) -> list[str]:
    return list(sla_compile.gates(model))


def fill(model: nn.Module, **biases: float) -> None:
    """Set the bias of each gate by its attribute name; weights at random."""
    with torch.no_grad():
        for path, gate in sla_compile.gates(model).items():
            gate.weight.normal_(std=0.5)
            gate.bias.fill_(biases[path.rpartition(".")[2]]) if biases else gate.bias.normal_()


@pytest.mark.parametrize("root", [True, False])
def test_calls_for_the_samples_of_a_batch_share_a_gate(root: bool) -> None:
    torch.manual_seed(0)
    owner, x = Split(), random_input(batch=2)
    model = owner if root else Within(owner)
    sla_compile.prepare(model, (x, (100, 60)), config=MARGINAL)
    assert [path.rpartition(".")[2] for path in names(model)] == ["sla"]
    parameters = {id(p) for p in model.parameters()}
    fill(model)
    run = compiled(model)
    two = run(x, (100, 60))
    assert_close("the other order", run(x.flip(0), (60, 100)), two.flip(0), 1e-12)
    four = run(torch.cat([x.flip(0), x]), (60, 100, 100, 60))
    assert_close("a larger batch", four, torch.cat([two.flip(0), two]), 1e-12)
    assert {id(p) for p in model.parameters()} == parameters
    four.sum().backward()
    assert all(bool(p.grad.any()) for p in sla_compile.gate_parameters(model) if p.grad is not None)
    assert {(site.ordinal, site.gate_path) for site in sla_compile.report(model).sites} == {(0, names(model)[0])}


def test_the_report_of_a_loop_is_one_row_with_its_calls() -> None:
    report = sla_compile.explain(Split(), (random_input(), (100, 100)), config=MARGINAL)
    (row,) = group_sites(report.sites)
    assert (row.count, row.modules, row.first.call_site.partition("+")[0]) == (2, 1, "forward")
    assert "the model itself (2 calls)" in plain_text(ReportView(report), 200)


@pytest.mark.parametrize(
    ("how", "first"),
    [
        ("plain", False),
        ("root", False),
        ("prepared", False),
        ("graph break", False),
        ("checkpoint", True),
        ("copied", False),
    ],
)
def test_an_optional_attention_moves_no_gate(how: str, first: bool) -> None:
    owner = Optional(broken=how == "graph break")
    model: nn.Module = {"root": owner, "checkpoint": Within(Checkpointed(owner))}.get(how, Within(owner))
    x = random_input()
    if how == "prepared":
        sla_compile.prepare(model, (x, first), config=MARGINAL)
        sla_compile.prepare(model, (x, True), config=MARGINAL)
    run = compiled(model, **({} if how == "prepared" else MARGINAL))
    run(x, first)
    if how == "copied":
        model = copy.deepcopy(model)
        run = compiled(model, **MARGINAL)
    run(x, not first)
    found = sla_compile.gates(owner if how != "copied" else model)
    assert sorted(path.rpartition(".")[2] for path in found) == ["sla", "sla_1"]
    fill(model, **({"sla": 1.0, "sla_1": 100.0} if first else {"sla": 100.0, "sla_1": 1.0}))
    for aux in (True, False, True):
        torch.testing.assert_close(run(x, aux), torch.full_like(x, 110.0 if aux else 100.0))


def test_code_of_one_block_does_not_serve_another_whose_gates_are_in_another_order() -> None:
    x = random_input()
    blocks = [Optional(), Optional()]
    for block, aux in zip(blocks, (True, False), strict=True):
        sla_compile.prepare(block, (x, aux), config=MARGINAL)
        sla_compile.prepare(block, (x, True), config=MARGINAL)
        main, optional = ("sla_1", "sla") if aux else ("sla", "sla_1")
        fill(block, **{main: 100.0, optional: 1.0})
        block.compile(backend="sla", options=EAGER)
    for block in (*blocks, *blocks):
        torch.testing.assert_close(block(x, True), torch.full_like(x, 110.0))


def test_equal_blocks_still_share_one_graph() -> None:
    model = nn.Sequential(*(TwoAttentions() for _ in range(10)))
    x = random_input(64)
    for block in model:
        block.compile(backend="sla", options={**MARGINAL, **EAGER})
    before = graphs()
    model(x)
    assert graphs() - before <= 2
    assert len({(gate.ordinal, gate.call_site) for gate in sla_compile.gates(model).values()}) == 2


class TwoForms(nn.Module):
    """One line for heads of two sizes, which no gate can serve both."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for heads in (2, 1):
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            x = attend(q, k, v).transpose(1, 2).flatten(2)
        return x


def test_of_calls_that_no_one_gate_can_serve_the_others_stay_dense() -> None:
    model = nn.Sequential(TwoForms())
    with pytest.warns(sla_compile.DenseAttentionWarning, match="its call site has a gate of another form"):
        compiled(model, **MARGINAL)(random_input())
    assert [tuple(gate.weight.shape) for gate in sla_compile.gates(model).values()] == [(16, 16)]
    kept = [site for site in sla_compile.report(model).sites if not site.rewritten]
    assert [(site.reason, site.value) for site in kept] == [
        ("its call site has a gate of another form", "1 heads of 32")
    ]


# Gates from before there were call sites: one for each call, and no file says where it is.


def with_old_gates(model: nn.Module, numbers: int) -> nn.Module:
    """``model``, an owner, with gates of before for its first calls, with random values."""
    config = sla_compile.SLAConfig(**MARGINAL)
    for ordinal in range(numbers):
        spec = GateSpec(heads=2, head_dim=16, config=config, path=gate_name(ordinal), ordinal=ordinal)
        attach_gate(model, spec, device="cpu", dtype=torch.float64)
    fill(model)
    return model


def biases(model: nn.Module) -> dict[str, float]:
    return {path: float(gate.bias.sum()) for path, gate in sla_compile.gates(model).items()}


def into(model: nn.Module, old: nn.Module, how: str, folder: Path) -> nn.Module:
    """``model`` with the gates of ``old``, which come by a file or with a copy."""
    if how == "copied":
        return copy.deepcopy(old)
    sla_compile.save(old, folder / "gates.safetensors")
    with safe_open(folder / "gates.safetensors", framework="pt") as opened:
        assert "call_site" not in opened.metadata()["sites"]
    if how == "prepared":
        sla_compile.prepare(model, (random_input(), (100, 60)), config=MARGINAL)
    return sla_compile.load(model, folder / "gates.safetensors")


@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning")
@pytest.mark.parametrize("how", ["copied", "loaded"])
def test_old_gates_bind_by_count_once_and_without_a_word(how: str, tmp_path: Path) -> None:
    x = random_input()
    old = with_old_gates(Optional(), 2)
    before = biases(old)
    model = into(Optional(), old, how, tmp_path)
    run = compiled(model)
    run(x, True)
    assert biases(model) == before
    sites = [gate.call_site for gate in sla_compile.gates(model).values()]
    assert [site.partition(":")[0] for site in sites] == ["forward+5", "forward+8"]
    fill(model, sla=1.0, sla_1=100.0)
    torch.testing.assert_close(run(x, False), torch.full_like(x, 100.0))
    sla_compile.save(model, tmp_path / "new.safetensors")
    again = sla_compile.load(Optional(), tmp_path / "new.safetensors")
    torch.testing.assert_close(compiled(again)(x, False), torch.full_like(x, 100.0))


def test_old_gates_after_a_graph_break(tmp_path: Path) -> None:
    old = with_old_gates(Optional(broken=True), 2)
    fill(old, sla=1.0, sla_1=100.0)
    model = into(Optional(broken=True), old, "loaded", tmp_path)
    x = random_input()
    torch.testing.assert_close(compiled(model)(x, True), torch.full_like(x, 110.0))


@pytest.mark.parametrize("how", ["copied", "loaded", "prepared"])
def test_of_one_old_gate_for_each_sample_the_first_is_used(how: str, tmp_path: Path) -> None:
    x = random_input()
    old = with_old_gates(Split(), 3)
    first = biases(old)["sla"]
    if how == "prepared":
        with pytest.warns(UserWarning, match="has one for all; sla is used, not sla_1, sla_2"):
            model = into(Split(), old, how, tmp_path)
    else:
        model = into(Split(), old, how, tmp_path)
        with pytest.warns(UserWarning, match=r"module: the calls at forward\+\S+ have one gate now.*, sla_1 taken out"):
            compiled(model)(x, (100, 60))
    if how == "loaded":
        with pytest.warns(UserWarning, match="sla_2 taken out"):
            compiled(model)(random_input(batch=3), (100, 60, 70))
    assert biases(model)["sla"] == first
    assert "sla_1" not in biases(model)


def test_prepare_drops_the_others_too() -> None:
    model = with_old_gates(SplitThenJoint(), 3)
    before = biases(model)
    with pytest.warns(UserWarning, match="sla_1 taken out"):
        sla_compile.prepare(model, (random_input(), (100, 60)), config=MARGINAL)
    assert biases(model) == {"sla": before["sla"], "sla_2": before["sla_2"]}
    assert [gate.call_site.count(">") for gate in sla_compile.gates(model).values()] == [1, 1]


def test_old_gates_of_siblings_bind_together() -> None:
    model = nn.Sequential(*(with_old_gates(TwoAttentions(), 2) for _ in range(10)))
    x = random_input(64)
    for block in model:
        block.compile(backend="sla", options=EAGER)
    before = graphs()
    model(x)
    assert graphs() - before <= 3
    assert len({(gate.ordinal, gate.call_site) for gate in sla_compile.gates(model).values()}) == 2
    assert all(site.rewritten for site in sla_compile.report(model).sites)


# Files say where the gates belong; the source may have changed since.


def edited(path: Path, *sites: str) -> None:
    """Let the file say these call sites."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    entries = json.loads(metadata["sites"])
    for entry, site in zip(entries, sites, strict=True):
        entry["call_site"] = site
    save_file(load_file(path), path, {**metadata, "sites": json.dumps(entries)})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of an ``Optional`` with the biases 1 and 100."""
    model = Optional()
    sla_compile.prepare(model, (random_input(), True), config=MARGINAL)
    fill(model, sla=1.0, sla_1=100.0)
    sla_compile.save(model, tmp_path / "gates.safetensors")
    return tmp_path / "gates.safetensors"


def where(file: Path) -> tuple[str, str]:
    with safe_open(file, framework="pt") as opened:
        aux, main = (entry["call_site"] for entry in json.loads(opened.metadata()["sites"]))
    return aux, main


@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning")
@pytest.mark.parametrize("prepared", [True, False])
def test_a_file_knows_which_attention_a_gate_belongs_to(file: Path, prepared: bool) -> None:
    x, model = random_input(), Optional()
    if prepared:
        sla_compile.prepare(model, (x, False), config=MARGINAL)
        sla_compile.prepare(model, (x, True), config=MARGINAL)  # the other order
    sla_compile.load(model, file)
    run = compiled(model)
    for aux in (False, True):
        torch.testing.assert_close(run(x, aux), torch.full_like(x, 110.0 if aux else 100.0))
    names_now = [(path, float(gate.bias[0])) for path, gate in sla_compile.gates(model).items()]
    assert names_now == ([("sla", 100.0), ("sla_1", 1.0)] if prepared else [("sla", 1.0), ("sla_1", 100.0)])


@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning")
@pytest.mark.parametrize("prepared", [True, False])
def test_an_edit_that_moves_lines_loses_no_gate(file: Path, prepared: bool) -> None:
    edited(file, "forward+15:12 > attend+1:11", "forward+18:39")
    x, model = random_input(), Optional()
    if prepared:
        sla_compile.prepare(model, (x, True), config=MARGINAL)
    sla_compile.load(model, file)
    run = compiled(model)
    for aux in (True, False):
        torch.testing.assert_close(run(x, aux), torch.full_like(x, 110.0 if aux else 100.0))


@pytest.mark.parametrize("prepared", [True, False])
def test_what_cannot_be_told_apart_is_said(file: Path, prepared: bool) -> None:
    """One call site is in the source, and another attention is at none that is in the file."""
    aux, _ = where(file)
    edited(file, aux, "forward+18:39")
    x, model = random_input(), Optional()
    if prepared:
        sla_compile.prepare(model, (x, True), config=MARGINAL)
        with pytest.warns(UserWarning, match=r"sla_1.*\(was forward\+18:39\)"):
            sla_compile.load(model, file)
    else:
        sla_compile.load(model, file)
        with pytest.warns(UserWarning, match=r"forward\+8:\d+ \(was forward\+18:39\)"):
            compiled(model)(x, True)
    torch.testing.assert_close(compiled(model)(x, False), torch.full_like(x, 100.0))
