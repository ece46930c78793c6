"""What people train with, over a prepared and compiled model: each behaves as for any other model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sla_compile
from tests.helpers import assert_close
from tests.models import OPTIONS, Model, assert_follows_definition, defined, random_input, randomize_gates

EAGER = {**OPTIONS, "inner": "aot_eager"}


@pytest.fixture(autouse=True)
def float64_and_fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(torch.float32)


def prepared() -> tuple[nn.Module, torch.Tensor]:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    return model, x


def gate_values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in sla_compile.gate_parameters(model)]


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_optimizers(kind: str) -> None:
    model, x = prepared()
    before = gate_values(model)
    compiled = torch.compile(model, backend="sla", options=EAGER)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if ".sla." not in n], "lr": 1e-3},
            {"params": list(sla_compile.gate_parameters(model)), "lr": 1e-2, "weight_decay": 0.0},
        ],
        **{kind: True},
    )
    target = torch.randn_like(x)
    losses = []
    for _ in range(5):
        loss = (compiled(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, gate_values(model), strict=True))
    assert_follows_definition(compiled, model, x)


def test_gradient_accumulation() -> None:
    model, x = prepared()
    compiled = torch.compile(model, backend="sla", options=EAGER)
    for part in x.split(1):
        (compiled(part).square().mean() / len(x)).backward()
    accumulated = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with defined(model):
        wanted = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), wanted, strict=True):
        assert_close(name, accumulated[name], gradient, 1e-10)


def test_grad_scaler() -> None:
    model, x = prepared()
    model, x = model.float(), x.float()
    compiled = torch.compile(model, backend="sla", options=EAGER)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = gate_values(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compiled(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(a, b) for a, b in zip(before, gate_values(model), strict=True))
    assert all(value.isfinite().all() for value in gate_values(model))


def test_exponential_moving_average() -> None:
    model, x = prepared()
    compiled = torch.compile(model, backend="sla", options=EAGER)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    first = gate_values(model)
    average.update_parameters(model)
    randomize_gates(model)
    average.update_parameters(model)
    for a, b, mean in zip(first, gate_values(model), gate_values(average), strict=True):
        assert_close("averaged gate", mean, (a + b) / 2, 1e-12)
    assert_follows_definition(torch.compile(average.module, backend="sla", options=EAGER), average.module, x)
    assert_follows_definition(compiled, model, x)


def test_lora_on_the_same_attention_modules() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = prepared()
    adapters = peft.LoraConfig(r=4, target_modules=["qkv", "out"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(adapters, model)
    assert not any(p.requires_grad for p in sla_compile.gate_parameters(model)), "peft froze all but its own"
    for parameter in sla_compile.gate_parameters(model):
        parameter.requires_grad_(True)
    trainable = {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"default", "sla"}
    assert_follows_definition(torch.compile(model, backend="sla", options=EAGER), model, x)


def test_prepare_after_lora() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = Model(), random_input()
    adapters = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(adapters, model)
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    assert list(sla_compile.gates(model)) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    assert_follows_definition(torch.compile(model, backend="sla", options=EAGER), model, x)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, x = prepared()
    before = gate_values(model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled, optimizer = accelerator.prepare(torch.compile(model, backend="sla", options=EAGER), optimizer)
    for _ in range(2):
        with accelerator.accumulate(compiled):
            accelerator.backward(compiled(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert all(not torch.equal(a, b) for a, b in zip(before, gate_values(model), strict=True))
    assert_follows_definition(compiled, model, x)


def test_distributed_checkpoint(tmp_path: Path) -> None:
    model, x = prepared()
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
    other, _ = prepared()
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state["model"])
    assert all(torch.equal(a, b) for a, b in zip(gate_values(model), gate_values(other), strict=True))
    run = [torch.compile(m, backend="sla", options=EAGER)(x) for m in (model, other)]
    assert torch.equal(run[0], run[1])


def test_apply_leaves_gates_alone() -> None:
    """Initialisation by class, as ``model.apply`` is used, does not know gates."""
    model, _ = prepared()
    before = gate_values(model)

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)

    model.apply(initialise)
    assert all(torch.equal(a, b) for a, b in zip(before, gate_values(model), strict=True))
