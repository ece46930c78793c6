"""``RunCounters``: what it counts is what ran, at the site where it ran."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sla_compile
from sla_compile.kernels import reference
from sla_compile.ops import run_watchers
from tests.support.calibration import made, recorded
from tests.support.models import OPTIONS, Attention, CalledTwice, Model, random_input, randomize_gates


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


def compiled(model: nn.Module, inner: str = "eager") -> Any:
    randomize_gates(model)
    return torch.compile(model, backend="sla", options={"inner": inner})


def test_counts_are_those_of_the_block_maps() -> None:
    model = made(topk=0.3, bottomk=0.6, overrides={"blocks.1.*": {"topk": 0.9, "bottomk": 0.1}})
    x = random_input()
    run = compiled(model)
    with sla_compile.RunCounters(run) as counters:
        run(x)
        run(x)
    run(x)  # after the end
    found = counters.read()
    assert list(found) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    for path, (call,) in recorded(model, [(x,)]).items():
        options = call.options()
        names = ("scale", "topk", "bottomk", "block_q", "block_k")
        block_map = reference.classify(call.query, call.key, **{name: options[name] for name in names})
        assert found[path]["calls"] == 2
        assert found[path]["critical_share"] == pytest.approx((block_map == 1).double().mean().item())
        rows = (block_map != 0).all(-1).double().mean().item()
        assert found[path]["rows_without_marginal"] == pytest.approx(rows)
        assert found[path]["non_finite"] == 0
    assert counters.scalars("x")["x/blocks.0.attention.sla/calls"] == 2
    counters.reset()
    assert counters.read()["blocks.0.attention.sla"]["calls"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"linear": "none"},
        {"linear": "taylor", "bottomk": 0.0},
        {"linear": "marginal", "max_topk": 0.5, "sparse_scale": True},
        {"linear": "marginal", "gate": "per_head"},
    ],
)
def test_sites_of_every_form_of_gate(changes: dict[str, Any]) -> None:
    run = compiled(made(**changes))
    with sla_compile.RunCounters(run) as counters:
        run(random_input())
    assert {path: counts["calls"] for path, counts in counters.read().items()} == {
        "blocks.0.attention.sla": 1,
        "blocks.1.attention.sla": 1,
    }


def test_a_copy_that_shares_the_code_is_another_model() -> None:
    model = made(Attention())
    other = copy.deepcopy(model)
    run, run_other = compiled(model), compiled(other)
    with sla_compile.RunCounters(run) as counters:
        run(random_input())
        run_other(random_input())
    found = counters.read()
    assert found["sla"]["calls"] == 1
    assert found["other"]["calls"] == 1


def test_what_is_not_finite_is_counted() -> None:
    run, x = compiled(made(CalledTwice())), random_input()
    x[0, 3] = float("nan")
    with sla_compile.RunCounters(run) as counters:
        run(x)
    counts = counters.read()["attention.sla"]
    assert counts["calls"] == 2
    assert counts["non_finite"] > 0


def test_a_model_that_runs_dense_has_no_calls() -> None:
    model = made()
    with sla_compile.RunCounters(model) as counters:
        model(random_input())  # not compiled
    assert [counts["calls"] for counts in counters.read().values()] == [0, 0]


def test_training_through_inductor() -> None:
    run = compiled(made(Model(1)), inner="inductor")
    with sla_compile.RunCounters(run) as counters:
        run(random_input()).sum().backward()
    assert {path: counts["calls"] for path, counts in counters.read().items()} == {"blocks.0.attention.sla": 1}


def test_nothing_stays_behind() -> None:
    run = compiled(made())
    with pytest.raises(RuntimeError, match="mine"), sla_compile.RunCounters(run):
        raise RuntimeError("mine")
    assert run_watchers._watchers == []


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="Model has no gates; accepted"):
        sla_compile.RunCounters(Model())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device() -> None:
    model = sla_compile.prepare(Model().cuda(), (torch.randn(1, 100, 32, device="cuda"),), config=OPTIONS)
    run, x = compiled(model), torch.randn(1, 100, 32, device="cuda")
    run(x)
    with sla_compile.RunCounters(run) as counters:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert counters.read()["blocks.0.attention.sla"]["calls"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_counts_what_it_replays() -> None:
    x = torch.randn(1, 100, 32, device="cuda")
    run = compiled(sla_compile.prepare(Model().cuda(), (x,), config=OPTIONS))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        run(x)
        with sla_compile.RunCounters(run) as counters:
            with torch.cuda.graph(graph):
                run(x)
            for _ in range(3):
                graph.replay()
            assert counters.read()["blocks.0.attention.sla"]["calls"] == 3
            counters.reset()
            graph.replay()
            assert counters.read()["blocks.0.attention.sla"]["calls"] == 1
        del counters
        graph.replay()  # what it writes to is still there
        torch.cuda.synchronize()
