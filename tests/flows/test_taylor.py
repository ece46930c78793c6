"""``linear="taylor"``: virtual keys for marginal blocks, from settings to compiled graphs, files and exports."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sla_compile
from sla_compile.gate import Gate
from sla_compile.gate_attachment import attach_gate
from sla_compile.gate_settings import GateSpec
from sla_compile.passes.cost import sla_cost
from tests.support.closeness import assert_close, relative_error
from tests.support.models import (
    HEADS,
    OPTIONS,
    CalledTwice,
    CheckpointedModel,
    Model,
    TwoAttentions,
    assert_follows_definition,
    random_input,
    randomize_gates,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

TAYLOR = {name: value for name, value in OPTIONS.items() if name != "bottomk"} | {"linear": "taylor"}
PATHS = ["blocks.0.attention.sla", "blocks.1.attention.sla"]


def made(model: nn.Module | None = None, **options: Any) -> Any:
    """A model (two blocks by default) with gates for virtual keys."""
    return sla_compile.prepare(model or Model(), (random_input(),), config={**TAYLOR, **options})


def compiled(model: nn.Module, inner: str = "aot_eager") -> Any:
    return torch.compile(model, backend="sla", options={"inner": inner})


def shifts(model: nn.Module) -> dict[str, Any]:
    return {path: gate.shift for path, gate in sla_compile.gates(model).items()}


def test_a_gate_is_one_number_for_each_head() -> None:
    model = made()
    assert {path: list(dict(gate.named_parameters())) for path, gate in sla_compile.gates(model).items()} == {
        path: ["shift"] for path in PATHS
    }
    assert [tuple(shift.shape) for shift in shifts(model).values()] == [(HEADS,)] * 2
    assert not any(gate.trained() for gate in sla_compile.gates(model).values())
    assert {gate.config.bottomk for gate in sla_compile.gates(model).values()} == {0.0}
    assert "a number per head" in repr(model)


def test_all_blocks_critical_is_dense_attention_whatever_the_shift() -> None:
    model, x = made(topk=1.0), random_input()
    randomize_gates(model)
    assert_close("output", compiled(model)(x), model(x), 1e-12)


def test_nearer_to_dense_than_the_critical_blocks_alone() -> None:
    model, x = made(topk=0.3), random_input()
    plain = sla_compile.detach(copy.deepcopy(model))
    sparse = sla_compile.prepare(plain, (x,), config={**TAYLOR, "topk": 0.3, "linear": "none"})
    errors = [relative_error(compiled(one)(x), model(x)) for one in (model, sparse)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_output_and_gradients_follow_the_definition(inner: str) -> None:
    model, x = made(Model(blocks=1)), random_input()
    randomize_gates(model)
    assert_follows_definition(compiled(model, inner), model, x)


@pytest.mark.parametrize("kind", [TwoAttentions, CalledTwice, CheckpointedModel])
def test_other_owners(kind: type[nn.Module]) -> None:
    model, x = made(kind()), random_input()
    randomize_gates(model)
    assert_follows_definition(compiled(model), model, x)


def test_one_form_for_each_site_of_an_unprepared_model() -> None:
    model, x = Model(), random_input()
    options = {**OPTIONS, "linear": "marginal", "inner": "aot_eager", "overrides": {"blocks.1.*": {"linear": "taylor"}}}
    run = torch.compile(model, backend="sla", options=options)
    run(x.detach().requires_grad_())
    assert [gate.shift is not None for gate in sla_compile.gates(model).values()] == [False, True]
    randomize_gates(model)
    assert_follows_definition(run, model, x)


def test_symbolic_number_of_tokens() -> None:
    model = made()
    randomize_gates(model)
    run = torch.compile(model, backend="sla", options={"inner": "aot_eager"}, dynamic=True)
    for tokens in (100, 130, 81):
        assert_follows_definition(run, model, random_input(tokens))


def test_run_time_sparsity() -> None:
    model, x = made(max_topk=0.9), random_input()
    randomize_gates(model)
    run = compiled(model)
    for topk in (0.3, 0.8):
        sla_compile.set_sparsity(model, topk=topk)
        assert_follows_definition(run, model, x)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = made(), random_input()
    randomize_gates(model)
    sla_compile.save(model, tmp_path / "gates.safetensors")
    plain = Model()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".sla." not in name})
    sla_compile.load(plain, tmp_path / "gates.safetensors")
    for one, other in zip(shifts(model).values(), shifts(plain).values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(compiled(plain)(x), compiled(model)(x))


def test_a_file_of_the_papers_form_stays_one_without_a_word(tmp_path: Path) -> None:
    model, x = made(linear="marginal"), random_input()
    randomize_gates(model)
    sla_compile.save(model, tmp_path / "gates.safetensors")
    plain = Model()
    plain.load_state_dict(sla_compile.detach(copy.deepcopy(model)).state_dict())
    sla_compile.load(plain, tmp_path / "gates.safetensors")
    run = compiled(plain)
    assert_follows_definition(run, plain, x)
    assert torch.equal(run(x), compiled(model)(x))
    assert {gate.config.linear for gate in sla_compile.gates(plain).values()} == {"marginal"}


def test_the_default_and_its_gates_of_zero_are_no_cause_to_warn() -> None:
    options = {name: value for name, value in OPTIONS.items() if name != "bottomk"}
    for changes, warned in (({}, 0), ({"linear": "marginal"}, 1)):
        model, x = Model(blocks=1), random_input()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run: Any = torch.compile(model, backend="sla", options={**options, **changes, "inner": "eager"})
            run(x)
        assert sum(issubclass(one.category, sla_compile.UntrainedGatesWarning) for one in caught) == warned
        assert len(sla_compile.report(run).untrained_gates) == warned
        (gate,) = sla_compile.gates(model).values()
        assert gate.config.linear == changes.get("linear", "taylor")


def test_pickled_and_copied() -> None:
    model, x = made(), random_input()
    randomize_gates(model)
    wanted = compiled(model)(x)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(compiled(other)(x), wanted)


def test_a_gate_pickled_before_there_were_shifts_has_none() -> None:
    gate = next(iter(sla_compile.gates(made(linear="marginal")).values()))
    state = gate.__dict__ | {"_parameters": {n: p for n, p in gate._parameters.items() if n != "shift"}}
    old = Gate.__new__(Gate)
    old.__setstate__(state)
    assert old.shift is None


def test_exported() -> None:
    model, x = made(), random_input()
    randomize_gates(model)
    exported = sla_compile.export(model, (x,))
    assert_close("output", exported.module()(x), compiled(model)(x), 1e-12)


def test_explained() -> None:
    report = sla_compile.explain(Model(), (random_input(),), config=TAYLOR)
    assert [site.rewritten for site in report.sites] == [True, True]
    cost = sla_cost(TAYLOR["topk"], 16, 16, "taylor")
    assert {site.formula_after for site in report.sites} == {cost.formula}


def test_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sparse_scale=True with linear='taylor'"):
        sla_compile.SLAConfig(linear="taylor", sparse_scale=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.sla: has a gate for linear='taylor', but these set"):
        sla_compile.prepare(made(), (random_input(),), config={**OPTIONS, "linear": "marginal"})
    owner = nn.Module()
    spec = GateSpec(heads=2, head_dim=16, config=sla_compile.SLAConfig(linear="taylor"), path="a.sla")
    attach_gate(owner, spec, device="cpu", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"a\.sla: has a gate of 2 heads, but the attention has 3"):
        attach_gate(owner, replace(spec, heads=3), device="cpu", dtype=torch.float64)
    q = torch.randn(1, 2, 64, 16)
    with pytest.raises(ValueError, match="weight is given with linear='taylor', accepted there is shift alone"):
        sla_compile.sparse_linear_attention(q, q, q, torch.zeros(16, 16, dtype=q.dtype), linear="taylor")
    with pytest.raises(ValueError, match="shift is given with linear='marginal', accepted is linear='taylor'"):
        sla_compile.sparse_linear_attention(q, q, q, shift=torch.zeros(2), linear="marginal")
    with pytest.raises(ValueError, match=r"shift has shape \(3,\), accepted is \(2,\)"):
        sla_compile.sparse_linear_attention(q, q, q, shift=torch.zeros(3), linear="taylor")
