"""``prepare``: it makes gates and changes nothing else, and what it sets takes effect."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sla_compile
from tests.support.closeness import assert_close
from tests.support.compiled import compiled
from tests.support.models import MARGINAL, OPTIONS, Model, assert_follows_definition, random_input, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")


@pytest.mark.parametrize(
    ("model", "config", "why"),
    [
        (
            Model,
            {"include": ("nothing.*",)},
            r"blocks\.0\.attention stays dense, matched by no include pattern: 'noth.*1 more",
        ),
        (
            Model,
            {"min_tokens": 101},
            r"blocks\.0\.attention stays dense, short sequence \(100 tokens; accepted: at least",
        ),
        (lambda: nn.Linear(32, 32), {}, "none was found in its forward"),
    ],
    ids=["no pattern", "short", "no attention"],
)
def test_prepare_says_that_nothing_will_be_rewritten(
    model: Callable[[], nn.Module], config: dict[str, Any], why: str
) -> None:
    unmatched = pytest.warns(sla_compile.UnmatchedPatternWarning, match="^include pattern 'nothing")
    with (
        unmatched if "include" in config else contextlib.nullcontext(),
        pytest.warns(UserWarning, match=f"^prepare: no attention of [A-Z][a-z]* will be rewritten: {why}"),
    ):
        prepared = sla_compile.prepare(model(), (torch.zeros(1, 100, 32),), config={**OPTIONS, **config})
    assert sla_compile.gates(prepared) == {}


def test_prepare_changes_nothing_but_gates() -> None:
    model, x = Model(), random_input()
    model.blocks[0].attention.qkv.weight.requires_grad_(False)
    model.train()
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    random_state, dense = torch.get_rng_state(), model(x)
    assert sla_compile.prepare(model, (x,), config=OPTIONS) is model
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model(x), dense)
    after = dict(model.named_parameters())
    for name, (parameter, value, trainable) in before.items():
        assert after.pop(name) is parameter
        assert torch.equal(parameter, value)
        assert parameter.requires_grad is trainable
    assert sorted(after) == [f"blocks.{i}.attention.sla.shift" for i in range(2)]
    assert not any(bool(p.any()) for p in after.values())
    assert all(p.requires_grad for p in after.values())


def test_prepare_twice_is_once() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = {name: (value, value.clone()) for name, value in model.state_dict().items()}
    sla_compile.prepare(model, (x,), config=OPTIONS)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    again = model.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[name], copied) for name, (_, copied) in state.items())


def test_prepare_again_with_other_settings_takes_effect() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    run = torch.compile(model, backend="sla", options={"inner": "aot_eager"})
    assert_follows_definition(run, model, x)
    sla_compile.prepare(model, (x,), config={**OPTIONS, "topk": 0.6})
    assert next(iter(sla_compile.gates(model).values())).config.topk == 0.6
    assert_follows_definition(run, model, x)


def test_prepare_without_settings_keeps_those_of_the_model_and_refuses_parts_that_differ() -> None:
    model, x = torch.nn.Sequential(Model(1), Model(2)), random_input()
    sla_compile.prepare(model[0], (x,), config=OPTIONS)
    of_one = {"overrides": {"blocks.1.*": {"topk": 0.7}}}
    sla_compile.prepare(model[1], (x,), config={**OPTIONS, **of_one})
    topks = [gate.config.topk for gate in sla_compile.gates(model).values()]
    assert topks == [OPTIONS["topk"], OPTIONS["topk"], 0.7]
    sla_compile.prepare(model[1], (x,))
    with pytest.raises(ValueError, match=r"1\.blocks\.1\.attention\.sla was prepared in another model.*0\.7 in"):
        sla_compile.prepare(model, (x,))
    assert [gate.config.topk for gate in sla_compile.gates(model).values()] == topks
    sla_compile.prepare(model, (x,), config=OPTIONS)
    assert {gate.config.topk for gate in sla_compile.gates(model).values()} == {OPTIONS["topk"]}


def test_prepare_after_a_dense_compile_takes_effect() -> None:
    model, x = Model(), random_input()
    run = torch.compile(model, backend="sla", options={"inner": "eager"})  # too few tokens: dense
    assert torch.equal(run(x), model(x))
    assert not sla_compile.gates(model)
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    assert_follows_definition(run, model, x)


def test_prepare_keeps_python_state_of_the_model() -> None:
    class Caching(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = x.mean()
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    model = Caching()
    sla_compile.prepare(model, (random_input(),), config=OPTIONS)
    assert not hasattr(model, "cache")
    assert not hasattr(model, "calls")
    assert len(sla_compile.gates(model)) == 2


def test_settings_that_would_drop_a_trained_gate_are_refused() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=MARGINAL)
    without_first = {**MARGINAL, "exclude": ["blocks.0.*"]}
    sla_compile.prepare(model, (x,), config=without_first)
    assert list(sla_compile.gates(model)) == ["blocks.1.attention.sla"]
    sla_compile.prepare(model, (x,), config=MARGINAL)
    randomize_gates(model)
    kept = list(sla_compile.gates(model))
    with pytest.raises(ValueError, match=r"leave out attention whose gate is trained: blocks\.0\.attention\.sla"):
        sla_compile.prepare(model, (x,), config=without_first)
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.sla: has a gate of shape \(16, 16\)"):
        sla_compile.prepare(model, (x,), config={**MARGINAL, "gate": "per_head"})
    with pytest.raises(ValueError, match=r"these settings have linear='taylor', .*; keep linear='marginal', or remove"):
        sla_compile.prepare(model, (x,), config=OPTIONS)
    assert list(sla_compile.gates(model)) == kept


def test_min_tokens_of_the_compile_hold_where_prepare_made_no_gate() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,))
    assert not sla_compile.gates(model)
    compiled(model)(x)
    assert len(sla_compile.gates(model)) == 2


def test_a_topk_of_one_alone_is_accepted_where_prepare_made_no_gate() -> None:
    model, x = Model(), random_input()
    with pytest.warns(UserWarning, match="short sequence"):
        sla_compile.prepare(model, (x,))
    run = torch.compile(model, backend="sla", options=dict[str, Any](topk=1.0, min_tokens=0, inner="eager"))
    assert_close("output", run(x), model(x), 1e-10)
    assert len(sla_compile.gates(model)) == 2


@pytest.mark.parametrize("how", ["force_eager", "eager_on_recompile", "disable", "environment", "suppressed"])
def test_a_trace_although_compiling_is_turned_off(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling():
                raise AssertionError("executed")
            return super().forward(x)

    model, x = Counting(), random_input()
    with contextlib.ExitStack() as off:
        if how in ("force_eager", "eager_on_recompile"):
            off.enter_context(torch.compiler.set_stance(how))
        elif how == "environment":
            monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
        else:  # TORCH_COMPILE_DISABLE=1 sets the first
            off.enter_context(torch._dynamo.config.patch("disable" if how == "disable" else "suppress_errors", True))
        assert sla_compile.explain(model, (x,), config=OPTIONS).totals.rewritten == 2
        sla_compile.prepare(model, (x,), config=OPTIONS)
        assert how != "environment" or os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert len(sla_compile.gates(model)) == 2


def test_no_trace_where_dynamo_compiles_nothing() -> None:
    model, x = Model(), random_input()
    with FlopCounterMode(display=False), pytest.raises(ValueError, match=r"^Model: cannot be traced under FlopCounter"):
        sla_compile.prepare(model, (x,), config=OPTIONS)
    with pytest.raises(ValueError, match=r"^Model: cannot be traced under torch\.func\.grad, where Dynamo compiles"):
        torch.func.grad(lambda x: sla_compile.explain(model, (x,), config=OPTIONS))(x)
