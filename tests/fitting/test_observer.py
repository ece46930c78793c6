"""Which attention calls of a running model have a gate, and whose gate it is."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from sla_compile.fitting.observer import GatedCall, as_batches, gated_calls
from tests.support.calibration import DIM, Failed, batches, defined_error, made, recorded
from tests.support.closeness import relative_error
from tests.support.models import HEADS, MARGINAL, WIDTH, Attention, Model, TwoAttentions, random_input, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Inner(nn.Module):
    """Attention of a child, without a gate, inside an owner that has two."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.child = TwoAttentions()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        masked = F.scaled_dot_product_attention(q, k, v, q.new_ones(x.shape[1], x.shape[1]).tril())
        q = q + self.child(masked.transpose(1, 2).flatten(2)).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        return F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.3).transpose(1, 2).flatten(2)


def test_ordinals_are_those_of_the_compiled_graph() -> None:
    model = made(Inner(), exclude=("child",))
    assert list(sla_compile.gates(model)) == ["sla_1"]
    calls = recorded(model, batches(1))
    assert [(path, call.scale) for path, found in calls.items() for call in found] == [("sla_1", 0.3)]
    report = sla_compile.calibrate(model, batches(1))
    assert [site.path for site in report.sites] == ["sla_1"]


class Samples(nn.Module):
    """An attention that only some calls have; then one call for each sample, by a helper."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, aux: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        if aux:
            q = q + F.scaled_dot_product_attention(q, k, v)
        return torch.cat([self.attend(*(t[i : i + 1] for t in (q, k, v))) for i in range(len(x))])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)


def test_calls_of_one_call_site_have_one_gate_whatever_comes_before_them() -> None:
    model = made(nn.Sequential(Samples()))
    sla_compile.prepare(model[0], (random_input(), True), config=MARGINAL)
    assert list(sla_compile.gates(model)) == ["0.sla", "0.sla_1"]
    calls: list[tuple[str, float]] = []

    def record(call: GatedCall) -> Tensor:
        calls.append((call.path, call.scale))
        return call.dense

    for aux in (True, False):
        calls.clear()
        with torch.no_grad(), gated_calls(model, record):
            model[0](random_input(batch=3), aux)
        assert calls == [("0.sla_1", 0.25)] * aux + [("0.sla", 0.3)] * 3


def test_attention_too_short_for_its_settings_is_left_dense() -> None:
    model = made(min_tokens=80)
    assert recorded(model, batches(1, tokens=79)) == {}
    assert len(recorded(model, batches(1, tokens=80))) == 2


def test_prepares_takes_compiled_models_and_keyword_batches() -> None:
    model = Model().double()
    compiled: Any = torch.compile(model, backend="sla", options={**MARGINAL, "inner": "eager"})
    seen = iter([{"x": random_input()} for _ in range(5)])
    report = sla_compile.calibrate(compiled, seen, config=MARGINAL, max_batches=2, held_back=0)
    assert report.batches == 2
    assert len(list(seen)) == 3
    assert len(sla_compile.gates(model)) == 2
    assert all(gate.trained() for gate in sla_compile.gates(model).values())


def test_one_batch_alone_is_taken_as_one() -> None:
    """A tuple or a mapping by itself, as from a user with a single video; the same as a list of it."""
    x = random_input()
    for one in ((x,), {"x": x}):
        assert as_batches(one) == [one]
        assert as_batches(several := [one]) is several
    assert as_batches(()) == ()
    model = made(max_topk=1.0)
    report = sla_compile.calibrate(model, (x,))
    assert (report.batches, report.held_back, len(report.sites)) == (1, 0.25, 2)
    assert sla_compile.allocate(model, {"x": x}, budget=0.25, ladder=(1.0, 2.0)).batches == 1
    with pytest.raises(TypeError, match="batches: got a Tensor; accepted: an iterable of batches, or one batch"):
        sla_compile.calibrate(model, x)


def test_blocks_compiled_one_by_one_run_dense_meanwhile() -> None:
    model, data = made(), batches(2)
    randomize_gates(model)
    expected = {path: defined_error(calls) for path, calls in recorded(model, data).items()}
    for block in model.blocks:
        block.compile(backend="sla", options={"inner": "eager"})
    sparse = model(*data[0])
    report = sla_compile.calibrate(model, data)
    for site in report.sites:
        assert abs(site.before - expected[site.path]) < 1e-7
    assert relative_error(model(*data[0]), sparse) > 1e-3


def test_blocks_compiled_one_by_one_are_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = made(), batches(1)
    for block in model.blocks:
        block.compile(backend="sla", options={"inner": "eager"})
    model(*data[0])
    compiled: list[Any] = []

    def rewrite_nothing(*arguments: Any) -> list[Any]:
        compiled.append(arguments)
        return []

    monkeypatch.setattr("sla_compile.backend.rewrite_graph", rewrite_nothing)
    sla_compile.calibrate(model, data)
    assert not compiled


class Forgiving(Attention):
    """Goes on where a child fails."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(Failed):
            self.child(x)
        return super().forward(x)


def test_an_exception_that_the_model_catches_does_not_hide_the_owner() -> None:
    model = made(Forgiving())

    def fail(module: nn.Module, args: Any) -> None:
        raise Failed

    model.child.register_forward_pre_hook(fail)
    assert [site.path for site in sla_compile.calibrate(model, batches(1)).sites] == ["sla"]


def test_no_gated_attention_says_why() -> None:
    model = Model().double()
    reason = (
        r"Model: no attention with a gate.*blocks\.0\.attention: short sequence.*min_tokens=768, the default on cpu"
    )
    with pytest.raises(ValueError, match=reason):
        sla_compile.calibrate(model, batches(1))
    assert not sla_compile.gates(model)
    model = made(min_tokens=100)
    with pytest.raises(ValueError, match="short sequence, 50 tokens"):
        sla_compile.calibrate(model, batches(1, tokens=50))
    short = Model().double()
    with pytest.warns(UserWarning, match="no attention of Model will be rewritten"):
        sla_compile.prepare(short, (random_input(50),), config={**MARGINAL, "min_tokens": 60})
    assert sla_compile.calibrate(short, batches(1)).sites, "prepared by the settings that gave no gate at 50 tokens"
    with pytest.raises(ValueError, match="no attention was found"):
        sla_compile.calibrate(nn.Linear(WIDTH, WIDTH).double(), batches(1))
