"""``distill``: trains the gates alone, lowers what it minimises, and gives everything else back as it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla_compile
from sla_compile.fitting.calibration import gather
from sla_compile.fitting.distillation import _AttentionLoss, _Float64Copies, _OutputLoss
from sla_compile.fitting.observer import GatedCall, gated_calls
from sla_compile.fitting.output_error import floating_tensors
from sla_compile.kernels import reference
from tests.support.calibration import wan
from tests.support.closeness import assert_close, relative_error
from tests.support.models import (
    MARGINAL,
    CalledTwice,
    Model,
    TwoAttentions,
    defined,
    prepared_model,
    random_input,
    randomize_gates,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EAGER: dict[str, Any] = {"inner": "eager"}


def batches(count: int = 3) -> list[tuple[Tensor]]:
    return [(random_input(),) for _ in range(count)]


def made(model: nn.Module | None = None, **options: Any) -> Any:
    """A float64 model (two blocks by default) with gates."""
    config = {**MARGINAL, "inner": "eager", **options}
    if model is None:
        return prepared_model(**config)
    return sla_compile.prepare(model.double(), (random_input(),), config=config)


@pytest.mark.parametrize("options", [{}, {"gate": "per_head"}, {"linear": "none"}], ids=["shared", "per head", "none"])
@pytest.mark.parametrize("kind", [Model, TwoAttentions, CalledTwice])
def test_attention_loss_and_its_gradient_are_those_of_the_definition(kind: type[nn.Module], options: Any) -> None:
    model, (batch,) = made(kind(), **options), batches(1)
    randomize_gates(model)
    calls: dict[str, list[GatedCall]] = {}

    def record(call: GatedCall) -> Tensor:
        calls.setdefault(call.path, []).append(call)
        return call.dense

    with torch.no_grad(), gated_calls(model, record):
        model(*batch)
    expected = torch.zeros((), dtype=torch.float64)
    for found in calls.values():
        distance = norm = torch.zeros((), dtype=torch.float64)
        for call in found:
            out = reference.sparse_linear_attention(
                call.query, call.key, call.value, call.gate.weight, call.gate.bias,
                scale=call.scale, **call.gate.config.kernel_options(),
            )  # fmt: skip
            distance, norm = distance + (out - call.dense).square().sum(), norm + call.dense.square().sum()
        expected = expected + distance / norm
    copies = _Float64Copies(model)
    loss, gradients = _AttentionLoss(model, copies)((batch, {}), 0)
    assert_close("loss", loss, expected.detach(), 1e-10)
    wanted: tuple[Tensor | None, ...] = torch.autograd.grad(expected, copies.parameters, allow_unused=True)
    for parameter, actual, gradient in zip(copies.parameters, gradients, wanted, strict=True):
        if gradient is None:
            assert not actual.any()
        else:
            assert_close(f"gradient {tuple(parameter.shape)}", actual, gradient, 1e-9)


def test_output_loss_and_its_gradient_are_those_of_the_definition() -> None:
    model, (batch,) = made(), batches(1)
    randomize_gates(model)
    dense = model(*batch).detach()
    copies = _Float64Copies(model)
    with defined(model):
        expected = (model(*batch) - dense).square().sum() / dense.square().sum()
        wanted = torch.autograd.grad(expected, copies.parameters)
    loss, gradients = _OutputLoss(model, copies, EAGER)((batch, {}), 0)
    assert_close("loss", loss, expected.detach(), 1e-9)
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert_close("gradient", actual, gradient, 1e-8)


@pytest.mark.parametrize("loss", ["attention", "output"])
def test_lowers_what_it_minimises_and_moves_the_gates_alone(loss: str) -> None:
    model, data = made(), batches()
    frozen = model.blocks[0].norm.weight.requires_grad_(False)
    model.blocks[1].norm.weight.grad = torch.ones_like(frozen)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    seen: list[tuple[int, float]] = []
    report = sla_compile.distill(model, data, steps=30, loss=loss, progress=lambda *step: seen.append(step))
    assert [step for step, _ in seen] == list(range(30))
    assert [value for _, value in seen] == list(report.losses)
    assert sum(report.losses[-3:]) < 0.8 * sum(report.losses[:3])
    for name, p in model.named_parameters():
        assert p.requires_grad == flags[name], name
        assert (p.grad is None) == (name != "blocks.1.norm.weight"), name
        assert torch.equal(p, values[name]) == (".sla." not in name), name
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert report.measured_batches == 3
    _, after = gather(model, [(batch, {}) for batch in data])
    for site in report.sites:
        statistics = after[site.path]
        assert math.isclose(site.after, statistics.error(statistics.gate.weight, statistics.gate.bias), rel_tol=1e-9)
        assert site.before == site.sparse_only
        if loss == "attention":
            assert site.after < 0.9 * site.before
    if loss == "attention":
        assert report.output_before is None
        assert report.output_after is None
        return
    assert report.output_before is not None
    assert report.output_after is not None
    assert report.output_after < 0.9 * report.output_before
    with torch.no_grad():
        dense = torch.stack([model(*batch) for batch in data])
        with defined(model):
            sparse = torch.stack([model(*batch) for batch in data])
    assert math.isclose(report.output_after, relative_error(sparse, dense), rel_tol=1e-6)


def test_attention_loss_comes_near_the_closed_form() -> None:
    """Both minimise the same loss, on one batch."""
    model, data = made(), batches(1)
    distilled = sla_compile.distill(model, data, steps=400, lr=0.05)
    calibrated = sla_compile.calibrate(model, data, ridge=0.0)
    for one, other in zip(distilled.sites, calibrated.sites, strict=True):
        assert other.after <= one.after + 1e-9
        assert one.after - other.after < 0.1 * (one.before - other.after)


@pytest.mark.parametrize("loss", ["attention", "output"])
def test_is_deterministic(loss: str) -> None:
    reports = []
    for _ in range(2):
        torch.manual_seed(1)
        torch._dynamo.reset()
        reports.append(sla_compile.distill(made(), batches(), steps=5, loss=loss))
    assert reports[0] == reports[1]


def test_only_gates_need_gradients_meanwhile() -> None:
    model = made()
    trainable: list[set[str]] = []

    def note(step: int, value: float) -> None:
        trainable.append({name for name, p in model.named_parameters() if p.requires_grad})

    for loss in ("attention", "output"):
        sla_compile.distill(model, batches(1), steps=1, loss=loss, progress=note)
    gates = {f"blocks.{i}.attention.sla.{name}" for i in range(2) for name in ("weight", "bias")}
    assert trainable == [gates, gates]


def test_warm_up_and_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            assert self.param_groups[0]["weight_decay"] == 0
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    sla_compile.distill(made(), batches(1), steps=40, lr=0.5)
    expected = [0.25 * min(1, (step + 1) / 4) * (1 + math.cos(math.pi * step / 40)) for step in range(40)]
    assert rates == pytest.approx(expected)


def test_low_precision_gates_move_by_small_steps() -> None:
    model = Model().bfloat16()
    data = [(x.bfloat16(),) for (x,) in batches()]
    report = sla_compile.distill(model, data, steps=40, lr=2e-3, config=MARGINAL)
    assert all(site.after < site.before for site in report.sites)
    assert all(gate.weight.dtype == torch.bfloat16 for gate in sla_compile.gates(model).values())


def spoiled(at: int, bad: float) -> Iterator[tuple[Tensor]]:
    for step in range(20):
        (x,) = batches(1)[0]
        yield (x * bad if step == at else x,)


@pytest.mark.parametrize("loss", ["attention", "output"])
def test_a_loss_that_is_not_finite_leaves_the_last_finite_gates(loss: str) -> None:
    model = made()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    kept: list[dict[str, Tensor]] = []

    def keep(step: int, value: float) -> None:
        kept.append({name: p.detach().clone() for name, p in model.named_parameters()})

    with pytest.raises(ValueError, match=r"step 6\b.*finite|finite.*step 6\b"):
        sla_compile.distill(model, spoiled(6, float("nan")), steps=10, loss=loss, progress=keep)
    assert len(kept) == 6
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all()
        # the loss at step 5 was the last finite one, measured with the gates that step 4 made
        assert torch.equal(p, kept[4][name]), name
        assert p.requires_grad == flags[name]
    assert not torch.equal(kept[4]["blocks.0.attention.sla.weight"], kept[5]["blocks.0.attention.sla.weight"])


def test_an_interruption_gives_everything_back() -> None:
    model = made()

    def interrupt(step: int, value: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sla_compile.distill(model, batches(), steps=10, progress=interrupt)
    assert all(p.requires_grad for p in model.parameters())
    assert all(gate.trained() for gate in sla_compile.gates(model).values())


def test_short_batches_are_cycled_and_short_iterators_refused() -> None:
    model, data = made(), batches(2)
    assert len(sla_compile.distill(model, data, steps=5).losses) == 5
    stream = iter(batches(8))
    report = sla_compile.distill(model, stream, steps=6)
    assert (len(report.losses), report.measured_batches) == (6, 4)
    assert len(list(stream)) == 2
    with pytest.raises(ValueError, match=r"batches: ended after 2 of 5 steps and cannot be iterated again"):
        sla_compile.distill(model, iter(data), steps=5)
    with pytest.raises(ValueError, match="batches: empty"):
        sla_compile.distill(model, [], steps=5)


def test_cycled_batches_come_in_order() -> None:
    model = made()
    losses = sla_compile.distill(model, batches(2), steps=4, lr=1e-12).losses
    assert losses[0] != losses[1]
    assert math.isclose(losses[0], losses[2], rel_tol=1e-6)
    assert math.isclose(losses[1], losses[3], rel_tol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"steps": 1.0}, "steps: got 1.0"),
        ({"lr": 0}, "lr: got 0"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"loss": "velocity"}, r"loss: got 'velocity'; accepted: one of \('attention', 'output'\)"),
        ({"compile_options": {}}, "compile_options.*only with loss='output'"),
        ({"loss": "output", "compile_options": {"topk": 0.9}}, "topk=0.9 here, 0.3 in its gate"),
        ({"config": {"topkk": 0.9}}, "topkk"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = made()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        sla_compile.distill(model, batches(), **{"steps": 2, **arguments})
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad


def test_what_is_not_reached_is_refused() -> None:
    model = Model().double()
    with pytest.raises(ValueError, match=r"no attention with a gate was reached.*short sequence, 100 tokens"):
        sla_compile.distill(model, batches(), steps=2)
    assert not sla_compile.gates(model)
    assert all(p.requires_grad for p in model.parameters())


@dataclass
class Result:
    video: Tensor
    steps: int


class Outputs(Model):
    def forward(self, x: Tensor, kind: str = "tuple") -> Any:
        y = super().forward(x)
        if kind == "nothing":
            return y.argmax(-1)
        if kind == "dataclass":
            return Result(y, 1)
        return {"mapping": {"sample": y, "mask": y > 0}, "tuple": (y, [x, None]), "tensor": y}[kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping", "dataclass"])
def test_outputs_of_any_form(kind: str) -> None:
    model, (batch,) = made(Outputs()), batches(1)
    report = sla_compile.distill(model, [{"x": batch[0], "kind": kind}], steps=8, loss="output")
    assert report.losses[-1] < report.losses[0]
    assert len(list(floating_tensors(model(batch[0], kind)))) == (2 if kind == "tuple" else 1)


def test_an_output_without_floating_tensors_is_refused() -> None:
    model, (batch,) = made(Outputs()), batches(1)
    with pytest.raises(ValueError, match="Outputs: its output has no floating-point tensors"):
        sla_compile.distill(model, [{"x": batch[0], "kind": "nothing"}], steps=1, loss="output")
    assert all(p.requires_grad for p in model.parameters())


def test_teacher_is_dense_although_blocks_are_compiled() -> None:
    model, data = made(), batches(1)
    randomize_gates(model)
    expected = sla_compile.distill(model, data, steps=1, lr=1e-12, loss="output").losses
    for block in model.blocks:
        block.compile(backend="sla", options=EAGER)
    model(*data[0])
    assert math.isclose(
        sla_compile.distill(model, data, steps=1, lr=1e-12, loss="output").losses[0], expected[0], rel_tol=1e-6
    )


def test_works_under_no_grad_and_says_nothing_about_untrained_gates() -> None:
    model, data = made(), batches(1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = sla_compile.distill(model, data, steps=3, loss="output")
    assert report.losses[-1] < report.losses[0]


def test_diffusers() -> None:
    model, batch, options = wan()
    report = sla_compile.distill(model, [batch], steps=6, loss="output", config={**options, "inner": "aot_eager"})
    assert len(report.sites) == 2
    assert report.losses[-1] < report.losses[0]
