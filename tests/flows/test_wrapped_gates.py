"""Gates inside wrappers: found, named, saved, loaded, reported, fitted and removed as in the plain model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import sla_compile
from sla_compile.gate import Gate, GateMarker
from tests.support.models import OPTIONS, Model, assert_follows_definition, numbers, random_input, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

EAGER: dict[str, Any] = {**OPTIONS, "inner": "aot_eager"}
PATHS = ["blocks.0.attention.sla", "blocks.1.attention.sla"]


def prepared() -> Model:
    model = Model()
    sla_compile.prepare(model, (random_input(),), config=OPTIONS)
    randomize_gates(model)
    return model


def left_behind(model: nn.Module) -> list[nn.Module]:
    """Modules of ``model`` that are a gate, hold one or have a hook for one."""
    return [
        module
        for module in model.modules()
        if isinstance(module, Gate) or any(isinstance(hook, GateMarker) for hook in module._forward_pre_hooks.values())
    ]


def assert_same(left: Path, right: Path) -> None:
    """The files name the same gates, with the same values and settings."""
    with safe_open(left, "pt") as one, safe_open(right, "pt") as other:
        assert one.metadata() == other.metadata()
    values = load_file(right)
    assert load_file(left).keys() == values.keys()
    assert all(torch.equal(tensor, values[name]) for name, tensor in load_file(left).items())


def with_trained_gates(model: Model) -> Any:
    """``model`` in peft, LoRA on its projections, its gates trained and saved as modules of their own."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["sla"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_gates_that_peft_trains_and_saves_are_those_of_the_plain_model(tmp_path: Path) -> None:
    plain = prepared()
    adapted, x = with_trained_gates(copy.deepcopy(plain)), random_input()
    found = sla_compile.gates(adapted)
    assert list(found) == PATHS
    assert all(parameter.requires_grad for parameter in sla_compile.gate_parameters(adapted))
    randomize_gates(adapted)
    compiled = torch.compile(adapted, backend="sla", options=EAGER)
    assert_follows_definition(compiled, adapted, x)
    report = sla_compile.report(adapted)
    assert [(site.gate_path, site.rewritten) for site in report.sites] == [(path, True) for path in PATHS]

    sla_compile.save(adapted, tmp_path / "gates")
    fresh = sla_compile.load(Model(), tmp_path / "gates")
    for path, gate in sla_compile.gates(fresh).items():
        assert torch.equal(numbers(gate), numbers(found[path]))
    other = with_trained_gates(plain)
    sla_compile.load(other, tmp_path / "gates")
    for path, gate in sla_compile.gates(other).items():
        assert torch.equal(numbers(gate), numbers(found[path]))


def test_a_later_prepare_changes_the_settings_of_every_copy_and_nests_nothing() -> None:
    adapted = with_trained_gates(prepared())
    values = {path: numbers(gate) for path, gate in sla_compile.gates(adapted).items()}
    sla_compile.prepare(adapted, (random_input(),), config={**OPTIONS, "topk": 0.5})
    assert list(sla_compile.gates(adapted)) == PATHS
    assert all(torch.equal(numbers(gate), values[path]) for path, gate in sla_compile.gates(adapted).items())
    copies = [module for module in adapted.modules() if isinstance(module, Gate)]
    assert len(copies) == 4
    assert {gate.config.topk for gate in copies} == {0.5}
    with adapted.disable_adapter():
        assert list(sla_compile.gates(adapted)) == PATHS


def test_calibrate_reaches_gates_in_peft() -> None:
    adapted = with_trained_gates(prepared())
    report = sla_compile.calibrate(adapted, [(random_input(),)])
    assert [site.path for site in report.sites] == PATHS
    assert not report.unreached


def test_detach_removes_gates_in_peft() -> None:
    adapted, x = with_trained_gates(prepared()), random_input()
    dense = adapted(x)
    sla_compile.detach(adapted)
    assert not left_behind(adapted)
    assert torch.equal(torch.compile(adapted, backend="eager", fullgraph=True)(x), dense)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_wrapper_in_wrapper(tmp_path: Path) -> None:
    """A checkpointed block, a compiled block, both in DistributedDataParallel, that compiled."""
    plain, x = prepared(), random_input()
    sla_compile.save(plain, tmp_path / "plain")
    model = copy.deepcopy(plain)
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(model.blocks[1], backend="sla", options=EAGER)
    wrapped: Any = torch.compile(nn.parallel.DistributedDataParallel(model), backend="sla", options=EAGER)
    assert sorted(sla_compile.gates(wrapped)) == PATHS
    assert_follows_definition(wrapped, model, x)
    report = sla_compile.report(wrapped)
    assert sorted((site.gate_path, site.rewritten) for site in report.sites) == [(path, True) for path in PATHS]
    sla_compile.save(wrapped, tmp_path / "wrapped")
    assert_same(tmp_path / "wrapped", tmp_path / "plain")
    randomize_gates(wrapped)
    sla_compile.load(wrapped, tmp_path / "plain")
    for path, gate in sla_compile.gates(plain).items():
        assert torch.equal(numbers(gate), numbers(sla_compile.gates(wrapped)[path]))
    sla_compile.detach(wrapped)
    assert not left_behind(wrapped)


def test_gates_of_a_file_go_into_a_model_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    sla_compile.save(prepared(), tmp_path / "gates")
    adapted = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    sla_compile.load(adapted, tmp_path / "gates")
    assert list(sla_compile.gates(adapted)) == PATHS
    sla_compile.save(adapted, tmp_path / "again")
    assert_same(tmp_path / "again", tmp_path / "gates")
