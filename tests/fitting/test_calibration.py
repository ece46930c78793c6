"""``calibrate``: the closed form is the least-squares gate, its report is true, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla_compile
from sla_compile.fitting.observer import GatedCall, gated_calls
from tests.support.calibration import (
    DIM,
    Failed,
    assert_same_state,
    batches,
    defined_error,
    direct_solution,
    made,
    recorded,
    state,
    wan,
)
from tests.support.closeness import assert_close, relative_error
from tests.support.models import HEADS, MARGINAL, CalledTwice, Model, TwoAttentions, random_input, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "per_head"},
        {"linear": "all"},
        {"linear": "none"},
        {"feature_map": "relu"},
        {"topk": 1.0, "bottomk": 0},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
@pytest.mark.parametrize("sequential", [False, True])
def test_report_states_the_errors_of_the_definition(options: dict[str, Any], sequential: bool) -> None:
    model, data = made(**options), batches(2)
    randomize_gates(model)
    zero, before = {}, {}
    for path, calls in recorded(model, data).items():
        gate = calls[0].gate
        zero[path] = defined_error(calls, torch.zeros_like(gate.weight), torch.zeros_like(gate.bias))
        before[path] = defined_error(calls)
    report = sla_compile.calibrate(model, data, sequential=sequential)
    assert [site.path for site in report.sites] == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    # Only the first layer's inputs are the same in both variants.
    checked = report.sites[:1] if sequential else report.sites
    for site in checked:
        after = defined_error(recorded(model, data)[site.path])
        for name, actual, expected in (
            ("sparse only", site.sparse_only, zero[site.path]),
            ("before", site.before, before[site.path]),
            ("after", site.after, after),
        ):
            assert abs(actual - expected) < 1e-6 + 1e-8 * expected, f"{site.path} {name}: {actual}, {expected}"
    for site in report.sites:
        # The penalty counts against the fit, and the bound is its value at a gate of zero.
        assert site.after <= site.sparse_only + 1e-7
        assert site.after <= site.before
        assert site.calls == 2
    assert report.sequential is sequential
    assert report.batches == 2


def test_sequential_fits_a_layer_to_what_the_calibrated_ones_give_it() -> None:
    model, data = made(), batches(2)
    report = sla_compile.calibrate(model, data, sequential=True, ridge=0.0, held_back=0)
    calls: list[GatedCall] = []

    def gated(call: GatedCall) -> Tensor:
        calls.extend([call] if call.path == "blocks.1.attention.sla" else [])
        return call.output_with_gate(call.gate.weight, call.gate.bias)

    with torch.no_grad(), gated_calls(model, gated):
        for args in data:
            model(*args)
    weight, bias = direct_solution(calls, 0.0)
    assert_close("weight", calls[0].gate.weight, weight, 1e-8)
    assert_close("bias", calls[0].gate.bias, bias, 1e-8)
    assert abs(report.sites[1].after - defined_error(calls)) < 1e-7
    one_pass = made()
    one_pass.load_state_dict(model.state_dict())
    sla_compile.calibrate(one_pass, data, ridge=0.0, held_back=0)
    other = sla_compile.gates(one_pass)["blocks.1.attention.sla"].weight
    assert relative_error(other, calls[0].gate.weight) > 1e-4


def test_what_is_calibrated_is_what_the_compiled_model_computes() -> None:
    model, data = made(Model(blocks=1)), batches(2)
    (path,) = sla_compile.gates(model)
    report = sla_compile.calibrate(model, data, held_back=0)
    caught = []
    attention = model.get_submodule("blocks.0.attention")
    handle = attention.out.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(*data[0])
        model(*data[1])
        compiled = torch.compile(model, backend="sla", options={"inner": "eager"})
        compiled(*data[0])
        compiled(*data[1])
    handle.remove()
    error = relative_error(torch.stack(caught[2:]), torch.stack(caught[:2]))
    assert abs(error - report.sites[0].after) < 1e-7
    assert 0 < report.sites[0].after < 0.9 * report.sites[0].sparse_only, path


def test_two_attentions_of_one_owner_have_a_gate_each() -> None:
    model, data = made(TwoAttentions()), batches()
    calls = recorded(model, data)
    assert list(calls) == ["sla", "sla_1"]
    assert [call.scale for call in (calls["sla"][0], calls["sla_1"][0])] == [DIM**-0.5, 0.4]
    expected = {path: direct_solution(found, 0.0) for path, found in calls.items()}
    report = sla_compile.calibrate(model, data, ridge=0.0, held_back=0)
    for path, (weight, _) in expected.items():
        assert_close(path, sla_compile.gates(model)[path].weight, weight, 1e-8)
    assert [site.calls for site in report.sites] == [3, 3]


def test_an_owner_called_twice_fits_its_gate_to_both_calls() -> None:
    model, data = made(CalledTwice()), batches()
    calls = recorded(model, data)["attention.sla"]
    assert len(calls) == 6
    weight, _ = direct_solution(calls, 0.0)
    report = sla_compile.calibrate(model, data, ridge=0.0, held_back=0)
    assert report.sites[0].calls == 6
    assert_close("weight", sla_compile.gates(model)["attention.sla"].weight, weight, 1e-8)


def test_mixed_settings_per_site() -> None:
    overrides = {"blocks.0.*": {"linear": "none"}, "blocks.1.*": {"gate": "per_head", "feature_map": "elu"}}
    model, data = made(overrides=overrides), batches()
    report = sla_compile.calibrate(model, data, held_back=0)
    first, second = sla_compile.gates(model).values()
    assert not first.weight.any()
    calls = recorded(model, data)[report.sites[0].path]
    missed = torch.cat([(call.dense - call.branches()[0]).transpose(1, 2).reshape(-1, DIM) for call in calls])
    assert_close("bias", first.bias, missed.mean(0), 1e-10)
    assert second.weight.shape == (HEADS, DIM, DIM)
    assert report.sites[1].after < report.sites[1].sparse_only


def test_without_marginal_blocks_the_weight_stays_zero() -> None:
    model = made(topk=0.5, bottomk=0.5)
    report = sla_compile.calibrate(model, batches(tokens=96))  # six blocks: three critical, three negligible
    for gate in sla_compile.gates(model).values():
        assert not gate.weight.any()
        assert gate.bias.any()
    assert all(site.after < site.sparse_only for site in report.sites)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_of_lower_precision(dtype: torch.dtype) -> None:
    model, data = made(), batches()
    sla_compile.calibrate(model, data)
    exact = {path: gate.weight.detach().clone() for path, gate in sla_compile.gates(model).items()}
    low = sla_compile.prepare(Model().to(dtype), (random_input().to(dtype),), config=MARGINAL)
    low.load_state_dict({name: value for name, value in model.state_dict().items() if ".sla." not in name})
    report = sla_compile.calibrate(low, [(x.to(dtype),) for (x,) in data])
    for path, gate in sla_compile.gates(low).items():
        assert gate.weight.dtype == dtype
        # loose: the inputs of the fit are rounded too, and its small directions amplify that
        assert_close(path, gate.weight, exact[path], {torch.float32: 1e-3}.get(dtype, 0.5))
    for site in report.sites:
        assert site.after < site.sparse_only


def test_autocast() -> None:
    model = Model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = sla_compile.calibrate(model, [(x.float(),) for (x,) in batches(1)], config=MARGINAL, held_back=0)
    assert all(site.after < site.sparse_only for site in report.sites)
    assert all(gate.weight.dtype == torch.float32 for gate in sla_compile.gates(model).values())


@pytest.mark.parametrize("held_back", [0, 0.25])
def test_a_gate_that_the_fit_would_not_improve_stays(held_back: float) -> None:
    model, data = made(), batches(1)
    best = sla_compile.calibrate(model, data, ridge=0.0, held_back=0)
    gates = {path: gate.weight.detach().clone() for path, gate in sla_compile.gates(model).items()}
    again = sla_compile.calibrate(model, data, ridge=1.0, held_back=held_back)
    for path, weight in gates.items():
        assert torch.equal(sla_compile.gates(model)[path].weight, weight)
    # the sums of two parts are rounded otherwise than those of the whole
    assert [site.after for site in again.sites] == pytest.approx([site.after for site in best.sites], rel=1e-9)


def failing(count: int) -> Iterator[tuple[Tensor]]:
    yield from batches(count)
    raise Failed


@pytest.mark.parametrize("config", [None, {**MARGINAL, "topk": 0.5}], ids=["as it was", "other settings"])
@pytest.mark.parametrize("sequential", [False, True])
def test_an_exception_leaves_a_prepared_model_as_it_was(config: Any, sequential: bool) -> None:
    model = made()
    randomize_gates(model)
    before = state(model)
    with pytest.raises(Failed):
        sla_compile.calibrate(model, failing(2), config=config, sequential=sequential)
    assert_same_state(state(model), before)
    calls = []

    def fail(module: nn.Module, args: Any) -> None:
        calls.append(module)
        if len(calls) == 3:
            raise Failed

    handle = model.blocks[1].norm.register_forward_pre_hook(fail)
    with pytest.raises(Failed):
        sla_compile.calibrate(model, batches(4), sequential=sequential)
    handle.remove()
    assert len(calls) == 3
    assert_same_state(state(model), before)


def test_an_exception_leaves_an_unprepared_model_as_it_was() -> None:
    model = Model().double()
    before = state(model)
    with pytest.raises(Failed):
        sla_compile.calibrate(model, failing(1), config=MARGINAL)
    assert_same_state(state(model), before)
    assert not sla_compile.gates(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_the_site(bad: float) -> None:
    model, data = made(), batches()
    before = state(model)
    handle = model.blocks[1].norm.register_forward_hook(lambda m, args, out: out * bad)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.sla: attention.*not finite"):
        sla_compile.calibrate(model, data)
    handle.remove()
    assert_same_state(state(model), before)


def test_what_is_refused() -> None:
    model = made()
    with pytest.raises(ValueError, match="batches: empty"):
        sla_compile.calibrate(model, [])
    with pytest.raises(TypeError, match="item 0 is a Tensor; accepted: a tuple"):
        sla_compile.calibrate(model, [random_input()])
    with pytest.raises(TypeError, match="item 1 is a int"):
        sla_compile.calibrate(model, [(random_input(),), 3])
    with pytest.raises(ValueError, match=r"ridge: got -1"):
        sla_compile.calibrate(model, batches(1), ridge=-1)
    with pytest.raises(ValueError, match=r"held_back: got 1; accepted: a share of at least 0 and below 1"):
        sla_compile.calibrate(model, batches(1), held_back=1)
    with pytest.raises(ValueError, match="max_batches: got 0"):
        sla_compile.calibrate(model, batches(1), max_batches=0)
    with pytest.raises(TypeError, match=r"accepted: a torch\.nn\.Module"):
        sla_compile.calibrate(lambda x: x, batches(1))  # type: ignore[arg-type]


def test_diffusers() -> None:
    model, batch, options = wan()
    report = sla_compile.calibrate(model, [batch], config=options)
    gates = sla_compile.gates(model)
    assert [site.path for site in report.sites] == list(gates) == ["blocks.0.attn1.sla", "blocks.1.attn1.sla"]
    for site in report.sites:
        assert site.after < site.sparse_only
        assert gates[site.path].trained()
