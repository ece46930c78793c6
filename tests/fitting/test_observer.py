"""Which attention calls of a running model have a gate, and whose gate it is."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from sla_compile.fitting.observer import GatedCall, as_batches, gated_calls
from tests.support.calibration import DIM, Failed, batches, defined_error, made, recorded
from tests.support.closeness import relative_error
from tests.support.models import HEADS, OPTIONS, WIDTH, Attention, Model, TwoAttentions, random_input, randomize_gates

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
    sla_compile.prepare(model[0], (random_input(), True), config=OPTIONS)
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
    compiled: Any = torch.compile(model, backend="sla", options={**OPTIONS, "inner": "eager"})
    seen = iter([{"x": random_input()} for _ in range(5)])
    report = sla_compile.calibrate(compiled, seen, config=OPTIONS, max_batches=2, held_back=0)
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
    with pytest.raises(ValueError, match=r"no call of F\.scaled_dot_product_attention was found"):
        sla_compile.calibrate(nn.Linear(WIDTH, WIDTH).double(), batches(1))


class ByHand(Attention):
    """As its base, written out."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-2, -1) * DIM**-0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Padded(nn.Module):
    """Two attentions over all keys but the last ten, with a graph break between them."""

    def __init__(self, kind: type[Attention]) -> None:
        super().__init__()
        self.first, self.second = kind(), kind()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        torch._dynamo.graph_break()
        return x + self.second(x)


class MaskedCall(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        kept = torch.arange(x.shape[1]) < x.shape[1] - 10
        return self.out(F.scaled_dot_product_attention(q, k, v, kept[None, None, None]).transpose(1, 2).flatten(2))


class MaskedByHand(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        kept = torch.arange(x.shape[1]) < x.shape[1] - 10
        scores = (q @ k.transpose(-2, -1) * DIM**-0.5).masked_fill(~kept, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def twin(model: nn.Module, kind: type[Attention], written: type[Attention]) -> nn.Module:
    """``model`` with each attention of ``kind`` written otherwise, and the same weights."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if type(module) is kind:
            module.__class__ = written
    return other


@pytest.mark.parametrize("linear", ["marginal", "taylor"])
@pytest.mark.parametrize(
    ("model", "kind", "written"),
    [(Model(), Attention, ByHand), (Padded(MaskedCall), MaskedCall, MaskedByHand)],
    ids=["plain", "masked, with a graph break"],
)
def test_attention_written_by_hand_is_fitted_as_a_call_is(
    model: nn.Module, kind: type[Attention], written: type[Attention], linear: str
) -> None:
    data, options = batches(3), {"linear": linear, "max_topk": 0.9, "topk_by": "head"}
    found = []
    for each in (copy.deepcopy(model), twin(model, kind, written)):
        made(each, **options)
        calls = recorded(each, data)
        report = sla_compile.allocate(each, data, budget=0.4, ladder=(0.5, 1.0, 1.5))
        fitted = sla_compile.calibrate(each, data)
        found.append((calls, [site.topks for site in report.sites], [site.after for site in fitted.sites], each))
    (calls, topks, errors, first), (others, other_topks, other_errors, second) = found
    assert calls.keys() == others.keys()
    assert {gate.pattern for gate in sla_compile.gates(second).values()} == {"scaled_matmul_softmax_matmul"}
    for call, other in ((c, o) for path in calls for c, o in zip(calls[path], others[path], strict=True)):
        for name in ("query", "key", "value", "dense"):
            assert relative_error(getattr(other, name), getattr(call, name)) < 1e-12
        assert relative_error(other.output_with_sparsity(0.4, 0.0), call.output_with_sparsity(0.4, 0.0)) < 1e-12
    assert topks == other_topks
    assert errors == pytest.approx(other_errors, rel=1e-9)
    for one, two in zip(sla_compile.gate_parameters(first), sla_compile.gate_parameters(second), strict=True):
        assert (one - two).norm() <= 1e-9 * one.norm()
    forward = second.__dict__.get("forward")
    assert forward is None, "the model's own forward is back"


def test_what_is_distilled_is_what_runs_compiled() -> None:
    """Attention of nn.MultiheadAttention: gradients reach the gates, and the compiled model gives what was fitted."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out

    model, data = made(Module()), batches(2)
    report = sla_compile.distill(model, data, steps=12, lr=2e-2)
    assert report.losses[-1] < report.losses[0]
    assert all(gate.trained() for gate in sla_compile.gates(model).values())
    seen = {}

    def record(call: GatedCall) -> Tensor:
        seen[call.path] = call.output_with_gate(*call.gate.parameters())
        return seen[call.path]

    with torch.no_grad(), gated_calls(model, record):
        observed = model(*data[0])
    assert list(seen) == ["attention.sla"]
    compiled = torch.compile(model, backend="sla", options={"inner": "eager"})
    assert relative_error(observed, compiled(*data[0])) < 1e-12


class WithOneKept(Attention):
    """Called as often as it has gates: one attention by hand, one call that has a gate, one that is kept."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        first = (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v
        second = F.scaled_dot_product_attention(q, k, 2 * v)
        third = F.scaled_dot_product_attention(q, k, v, q.new_ones(x.shape[1], x.shape[1]).tril())
        return self.out((first + second + third).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("from_a_file", [False, True])
def test_an_owner_that_mixes_in_attention_written_by_hand(from_a_file: bool, tmp_path: Path) -> None:
    """The compiler counts both kinds, and so does this: each gate gets its own attention."""
    model = nn.Sequential(WithOneKept()).double()
    data = [(random_input(),)]
    sla_compile.prepare(model, data[0], config=OPTIONS)
    assert [gate.pattern for gate in sla_compile.gates(model).values()] == [
        "scaled_matmul_softmax_matmul",
        "scaled_dot_product_attention",
    ]
    if from_a_file:
        sla_compile.save(model, tmp_path / "gates.safetensors")
        model = nn.Sequential(WithOneKept()).double()
        sla_compile.load(model, tmp_path / "gates.safetensors")
    calls = recorded(model, data)
    assert {path: len(found) for path, found in calls.items()} == {"0.sla": 1, "0.sla_1": 1}
    by_hand, call = calls["0.sla"][0], calls["0.sla_1"][0]
    assert torch.equal(call.value, 2 * by_hand.value)
    assert relative_error(call.dense, 2 * by_hand.dense) < 1e-12  # a head has 16 numbers: 0.25 is the usual scale
    report = sla_compile.calibrate(model, data, held_back=0)
    assert [site.path for site in report.sites] == ["0.sla", "0.sla_1"]
    assert all(site.after < site.before for site in report.sites)
