"""topk and bottomk at run time: read from the gates' buffers by the compiled graph, set with no recompilation."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sla_compile
from sla_compile.fitting.observer import gated_calls
from tests.support.closeness import assert_close
from tests.support.models import (
    OPTIONS,
    CheckpointedModel,
    Model,
    TwoAttentions,
    assert_follows_definition,
    defined,
    prepared_model,
    random_input,
    randomize_gates,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

AT_RUN_TIME = {**OPTIONS, "max_topk": 0.9}
EAGER: dict[str, Any] = {"inner": "eager"}
JOINT: dict[str, Any] = {"inner": "aot_eager"}
"""For tests of which graphs forward and backward are: shapes that vary, recomputed blocks, training."""


def graphs() -> int:
    return int(counters["stats"].get("unique_graphs", 0))


def prepared(model: nn.Module | None = None, **settings: Any) -> Any:
    config = {**AT_RUN_TIME, **settings}
    if model is None:
        model = prepared_model(**config)
    else:
        sla_compile.prepare(model, (random_input(),), config=config)
    randomize_gates(model)
    return model


def shares(model: nn.Module) -> list[tuple[float, float]]:
    return [gate.shares() for gate in sla_compile.gates(model).values()]


def refused(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_takes_effect_without_recompiling(inner: str) -> None:
    model, x = prepared(), random_input()
    run = torch.compile(model, backend="sla", options={"inner": inner})
    assert_follows_definition(run, model, x)
    outputs = [run(x)]
    compiled = graphs()
    for topk, bottomk in ((0.9, 0.1), (0.6, 0.3), (0.05, 0.0)):
        sla_compile.set_sparsity(model, topk=topk, bottomk=bottomk)
        assert shares(model) == [(topk, bottomk)] * 2
        assert_follows_definition(run, model, x)
        outputs.append(run(x))
    assert graphs() == compiled
    assert all((a - b).norm() > 1e-3 * a.norm() for a, b in pairwise(outputs))


def test_equals_what_is_compiled_with_constants() -> None:
    model, x = prepared(), random_input()
    sla_compile.set_sparsity(model, topk=0.6)
    constant = Model()
    constant.load_state_dict(model.state_dict(), strict=False)
    sla_compile.prepare(constant, (x,), config={**OPTIONS, "topk": 0.6})
    constant.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("sparsity")})
    runs = [torch.compile(m, backend="sla", options=JOINT)(x) for m in (model, constant)]
    assert torch.equal(runs[0], runs[1])


def test_dynamic_shapes() -> None:
    model, before = prepared(), graphs()
    run = torch.compile(model, backend="sla", options=JOINT, dynamic=True)
    for tokens in (100, 144, 77):
        for topk in (0.7, 0.2):
            sla_compile.set_sparsity(model, topk=topk, bottomk=0.1)
            assert_follows_definition(run, model, random_input(tokens))
    assert graphs() == before + 1


def test_blocks_of_different_sparsity_share_one_graph() -> None:
    model, x = prepared(Model(blocks=4)), random_input()
    for block in model.blocks:
        block.compile(backend="sla", options=JOINT)
    for i, topk in enumerate((0.9, 0.5, 0.2, 0.7)):
        sla_compile.set_sparsity(model, topk=topk, bottomk=0.1, sites=f"blocks.{i}.*")
    before = graphs()
    assert_follows_definition(model, model, x)
    assert graphs() == before + 1
    assert [site.settings["topk"] for site in sla_compile.report(model).sites] == [0.9, 0.5, 0.2, 0.7]


def test_first_call_of_an_unprepared_model() -> None:
    model, x = Model(), random_input()
    run: Any = torch.compile(model, backend="sla", options={**AT_RUN_TIME, **EAGER})
    run(x.detach().requires_grad_())
    randomize_gates(model)
    sla_compile.set_sparsity(run, topk=0.7)
    assert_follows_definition(run, model, x)
    assert graphs() == 1


def test_activation_checkpointing() -> None:
    model, x = prepared(CheckpointedModel()), random_input()
    run = torch.compile(model, backend="sla", options=JOINT)
    for topk in (0.3, 0.8):
        sla_compile.set_sparsity(model, topk=topk)
        assert_follows_definition(run, model, x)


def test_bottomk_gets_what_topk_leaves() -> None:
    model, x = prepared(bottomk=0.5), random_input()
    run = torch.compile(model, backend="sla", options=EAGER)
    sla_compile.set_sparsity(model, topk=0.9)
    with defined(model):
        expected = model(x)
    assert_close("output", run(x), expected, 1e-10)


def test_sites_by_pattern() -> None:
    model = prepared(Model(blocks=3))
    sla_compile.set_sparsity(model, topk=0.8, sites="blocks.1.*")
    assert shares(model) == [(0.3, 0.2), (0.8, 0.2), (0.3, 0.2)]
    sla_compile.set_sparsity(model, bottomk=0.1, sites=["blocks.0.attention", "blocks.2.attention.sla"])
    assert shares(model) == [(0.3, 0.1), (0.8, 0.2), (0.3, 0.1)]
    two = prepared(TwoAttentions())
    sla_compile.set_sparsity(two, topk=0.5, sites="sla_1")
    assert shares(two) == [(0.3, 0.2), (0.5, 0.2)]
    run = torch.compile(two, backend="sla", options=EAGER)
    assert_follows_definition(run, two, random_input())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got neither topk nor bottomk"),
        ({"topk": 0.95}, "blocks.0.attention.sla: got topk=0.95; accepted: topk up to max_topk=0.9"),
        ({"topk": 0.0}, "topk: got 0.0 (float); accepted: a number above 0 and up to 1"),
        ({"topk": 1e-9}, "topk: got 1e-09; accepted: at least a millionth"),
        ({"topk": True}, "topk: got True (bool)"),
        ({"bottomk": -0.1}, "bottomk: got -0.1 (float); accepted: a number from 0 to 1"),
        ({"bottomk": float("nan")}, "bottomk: got nan"),
        ({"topk": 0.8, "bottomk": 0.3}, "got topk=0.8, bottomk=0.3; accepted: topk + bottomk up to 1"),
        ({"topk": 0.5, "sites": "blocks.9.*"}, "no gate at 'blocks.9.*'; accepted: patterns of module paths such as"),
        ({"topk": 0.5, "sites": ["blocks.0.*", "nowhere"]}, "no gate at 'nowhere'"),
    ],
)
def test_what_is_refused_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    model = prepared()
    with refused(message):
        sla_compile.set_sparsity(model, **arguments)
    assert shares(model) == [(0.3, 0.2)] * 2


def test_models_without_max_topk_are_refused() -> None:
    with refused("Model has no SLA gates"):
        sla_compile.set_sparsity(Model(), topk=0.1)
    mixed = prepared(overrides={"blocks.1.*": {"max_topk": None}})
    with refused("blocks.1.attention.sla: its topk and bottomk are constants of the compiled graph", "max_topk"):
        sla_compile.set_sparsity(mixed, topk=0.1)
    assert shares(mixed) == [(0.3, 0.2)] * 2
    sla_compile.set_sparsity(mixed, topk=0.1, sites="blocks.0.*")
    assert shares(mixed) == [(0.1, 0.2), (0.3, 0.2)]
    assert_follows_definition(torch.compile(mixed, backend="sla", options=EAGER), mixed, random_input())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topk": 0.3, "max_topk": 0.2}, "SLAConfig: got topk=0.3; accepted: topk up to max_topk=0.2"),
        ({"max_topk": 1.5}, "SLAConfig.max_topk: got 1.5 (float); accepted: None, or a number from topk up to 1"),
        ({"max_topk": 0.2, "overrides": {"a": {"topk": 0.3}}}, "SLAConfig.overrides['a']: got topk=0.3"),
        ({"topk": 0.3, "overrides": {"a": {"max_topk": 0.2}}}, "SLAConfig.overrides['a']: got topk=0.3"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with refused(message):
        sla_compile.SLAConfig(**fields)


def test_buffers_keep_their_type_and_travel_with_the_model(tmp_path: Path) -> None:
    model = prepared()
    sla_compile.set_sparsity(model, topk=0.123456, bottomk=0.654321, sites="blocks.1.*")
    expected = [(0.3, 0.2), (0.123456, 0.654321)]
    for moved in (copy.deepcopy(model), copy.deepcopy(model).half(), copy.deepcopy(model).bfloat16()):
        assert shares(moved) == expected
        assert all(gate.sparsity is not None for gate in sla_compile.gates(moved).values())
        assert {buffer.dtype for name, buffer in moved.named_buffers() if name.endswith("sparsity")} == {torch.int64}
    assert not any(name.endswith("sparsity") for name, _ in model.named_parameters())

    other = prepared()
    other.load_state_dict(model.state_dict())
    assert shares(other) == expected
    sla_compile.save(model, tmp_path / "gates.safetensors")
    for loaded in (Model(), prepared()):
        sla_compile.load(loaded, tmp_path / "gates.safetensors")
        assert shares(loaded) == expected
        assert_close("shift", loaded.blocks[1].attention.sla.shift, model.blocks[1].attention.sla.shift, 1e-12)
    with refused("max_topk is 0.9 in the file, None in the model"):
        sla_compile.load(prepared(max_topk=None), tmp_path / "gates.safetensors")


@pytest.mark.parametrize("use_buffers", [False, True])
def test_average_of_the_model(use_buffers: bool) -> None:
    model, x = prepared(), random_input()
    sla_compile.set_sparsity(model, topk=0.6)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    average.update_parameters(model)
    assert shares(average) == [(0.6, 0.2)] * 2
    run = torch.compile(average.module, backend="sla", options=EAGER)
    assert_follows_definition(run, average.module, x)


def test_prepare_again() -> None:
    model, x = prepared(), random_input()
    sla_compile.set_sparsity(model, topk=0.6)
    sla_compile.prepare(model, (x,), config=AT_RUN_TIME)
    sla_compile.prepare(model, (x,))
    assert shares(model) == [(0.6, 0.2)] * 2, "the same settings, or none: as it is"
    sla_compile.prepare(model, (x,), config={**AT_RUN_TIME, "topk": 0.5})
    assert shares(model) == [(0.5, 0.2)] * 2
    run = torch.compile(model, backend="sla", options=EAGER)
    assert_follows_definition(run, model, x)
    sla_compile.prepare(model, (x,), config=OPTIONS)
    assert not any(name.endswith("sparsity") for name in model.state_dict())
    assert_follows_definition(run, model, x)
    sla_compile.prepare(model, (x,), config=AT_RUN_TIME)
    sla_compile.set_sparsity(model, topk=0.8)
    assert_follows_definition(run, model, x)


def test_options_that_contradict_the_gate() -> None:
    model, x = prepared(), random_input()
    with refused("topk=0.5 here, 0.3 in its gate"):
        torch.compile(model, backend="sla", options=EAGER | {"topk": 0.5})(x)
    with refused("max_topk=0.8 here, 0.9 in its gate"):
        torch.compile(model, backend="sla", options=EAGER | {"max_topk": 0.8})(x)


def test_eager_calls_see_it_too() -> None:
    """calibrate and distill measure what the compiled model computes."""
    model, x = prepared(Model(blocks=1)), random_input()
    run = torch.compile(model, backend="sla", options=EAGER)
    for topk in (0.2, 0.7):
        sla_compile.set_sparsity(model, topk=topk)
        with gated_calls(model, lambda call: call.output_with_gate(*call.gate.parameters())):
            eager = model(x)
        assert_close("output", eager, run(x), 1e-12)


def test_report_shows_what_is_set_now() -> None:
    model, x = prepared(), random_input()
    run = torch.compile(model, backend="sla", options=EAGER)
    assert {site.settings["topk"] for site in sla_compile.report(model).sites} == {0.3}, "not compiled yet"
    run(x)
    before = sla_compile.report(model)
    sla_compile.set_sparsity(model, topk=0.9, bottomk=0.1)
    after = sla_compile.report(model)
    assert [(s.settings["topk"], s.settings["bottomk"]) for s in after.sites] == [(0.9, 0.1)] * 2
    expected = Model()
    sla_compile.prepare(expected, (x,), config={**OPTIONS, "topk": 0.9, "bottomk": 0.1})
    torch.compile(expected, backend="sla", options=EAGER)(x)
    constant = sla_compile.report(expected)
    assert after.totals.flops_after == constant.totals.flops_after > before.totals.flops_after
    assert after.sites[0].where == constant.sites[0].where
    assert "topk=0.9 of at most 0.9" in repr(model)


def test_prepared_on_meta() -> None:
    """As large models are built for FSDP: without values, then memory, then a checkpoint."""
    trained, x = prepared(), random_input()
    with torch.device("meta"):
        model = Model()
    sla_compile.prepare(model, (x.to("meta"),), config=AT_RUN_TIME)
    assert {gate.device.type for gate in sla_compile.gates(model).values()} == {"meta"}
    model.to_empty(device="cpu")
    for gate in sla_compile.gates(model).values():
        gate.reset_parameters()
    assert shares(model) == [(0.3, 0.2)] * 2
    assert not any(gate.trained() for gate in sla_compile.gates(model).values())
    sla_compile.set_sparsity(trained, topk=0.7)
    model.load_state_dict(trained.state_dict())
    assert shares(model) == [(0.7, 0.2)] * 2
    assert_follows_definition(torch.compile(model, backend="sla", options=EAGER), model, x)


def test_anneal() -> None:
    values = list(sla_compile.anneal(1.0, 0.05, 5))
    assert len(values) == 5
    assert (values[0], values[-1]) == (1.0, 0.05)
    ratios = [b / a for a, b in pairwise(values)]
    assert max(ratios) - min(ratios) < 1e-12
    assert list(sla_compile.anneal(0.05, 1.0, 3))[-1] == 1.0, "never above the stop"
    for wrong in ((0.0, 0.5, 3), (0.5, 1.5, 3), (1.0, 0.05, 1)):
        with refused("anneal: got"):
            sla_compile.anneal(*wrong)


def test_training_with_a_schedule() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config={**OPTIONS, "max_topk": 1.0})
    run = torch.compile(model, backend="sla", options=JOINT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dense = model(x).detach()
    sizes = []
    for topk in sla_compile.anneal(1.0, 0.1, 4):
        sla_compile.set_sparsity(model, topk=topk)
        output = run(x)
        sizes.append((output - dense).norm().item())
        (output - dense).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sizes[0] < 1e-10 < sizes[-1], "the first step is the dense model"
    assert graphs() == 2
