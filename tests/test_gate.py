"""Gates as parts of a model: copied, pickled, moved, saved, frozen, taken away."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sla_compile
from sla_compile.gate import Gate
from sla_compile.gate_settings import GateSpec
from tests.support.closeness import assert_close
from tests.support.compiled import compiled, first_call, graphs
from tests.support.models import MARGINAL, OPTIONS, Model, assert_follows_definition, random_input, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")


def test_deepcopy() -> None:
    model, x = Model(), random_input()
    run = compiled(model)
    first_call(run, x)
    before = graphs()
    copied = copy.deepcopy(model)
    randomize_gates(copied)
    assert_follows_definition(compiled(copied), copied, x)
    assert_follows_definition(run, model, x)
    assert graphs() == before, "a deepcopy runs the code of its original"


def test_pickle() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    back = pickle.loads(pickle.dumps(model))
    assert_follows_definition(compiled(back), back, x)


def test_state_dict_and_dtype_moves() -> None:
    x = random_input()
    model = sla_compile.prepare(Model(), (x,), config=OPTIONS)
    run = compiled(model)
    run(x.requires_grad_())
    other = sla_compile.prepare(Model(), (x,), config=OPTIONS)
    randomize_gates(other)
    model.load_state_dict(other.state_dict())
    assert_follows_definition(run, model, x)
    with torch.no_grad():
        expected = run(x)
        model.to(torch.float32).to("cpu")
        assert {p.dtype for p in sla_compile.gate_parameters(model)} == {torch.float32}
        assert_close("after .to(float32)", run(x.float()), expected, 1e-4)
    model.to(torch.float64)
    assert_follows_definition(run, model, x)


def test_strict_load_of_a_dense_checkpoint() -> None:
    x = random_input()
    dense = Model()
    model = sla_compile.prepare(Model(), (x,), config=OPTIONS)
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model(x), dense(x))
    randomize_gates(model)
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.attention\.sla\.shift"):
        model.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.attention\.sla\.shift"):
        dense.load_state_dict(model.state_dict())


def test_frozen_base_with_trainable_gates() -> None:
    x = random_input()
    model = Model().requires_grad_(False)
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert set(map(id, trainable)) == set(map(id, sla_compile.gate_parameters(model)))
    assert_follows_definition(compiled(model), model, x)


def test_per_head_gates_and_overrides() -> None:
    model, x = Model(), random_input()
    config = {**MARGINAL, "gate": "per_head", "overrides": {"blocks.1.*": {"gate": "shared", "topk": 0.5}}}
    sla_compile.prepare(model, (x,), config=config)
    shapes = [tuple(gate.weight.shape) for gate in sla_compile.gates(model).values()]
    assert shapes == [(2, 16, 16), (16, 16)]
    randomize_gates(model)
    assert_follows_definition(torch.compile(model, backend="sla", options={"inner": "aot_eager"}), model, x)


def test_a_taken_name_is_an_error() -> None:
    model, x = Model(), random_input()
    model.blocks[1].attention.sla = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.sla.*Linear"):
        sla_compile.prepare(model, (x,), config=OPTIONS)
    assert not sla_compile.gates(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.sla.*Linear"):
        compiled(model)(x)


def test_detach_gives_the_model_back() -> None:
    model, x = Model(), random_input()
    keys = list(model.state_dict())
    run = compiled(model)
    first_call(run, x)
    assert sla_compile.detach(model) is model
    assert list(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_detach_takes_the_settings_along() -> None:
    model, x = Model(), random_input()
    dense = model(x)
    sla_compile.detach(sla_compile.prepare(model, (x,), config=OPTIONS))
    torch.testing.assert_close(torch.compile(model, backend="sla", options={"inner": "eager"})(x), dense)
    assert not sla_compile.gates(model), "fewer tokens than min_tokens"
    compiled(model, topk=0.7)(x)  # no gate that it could contradict
    assert {gate.config.topk for gate in sla_compile.gates(model).values()} == {0.7}


def test_a_gate_is_not_called() -> None:
    gate = Gate(GateSpec(heads=2, head_dim=16, config=sla_compile.SLAConfig(), path="a.sla"))
    with pytest.raises(TypeError, match=r"gate 'a\.sla' is not called"):
        gate(torch.zeros(1))
    assert "head_dim=16" in repr(gate)


def test_a_gate_that_was_taken_away_by_hand_is_not_read() -> None:
    model, x = Model(), random_input()
    dense = model(x)
    sla_compile.prepare(model, (x,), config=OPTIONS)
    model.blocks[0].attention.sla = None
    del model.blocks[1].attention.sla
    assert not sla_compile.gates(model)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), dense)
