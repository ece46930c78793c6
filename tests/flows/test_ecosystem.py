"""What people train with, over a prepared and compiled model: each behaves as for any other model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import sla_compile
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS, Model, assert_follows_definition, defined, random_input, randomize_gates

EAGER: dict[str, Any] = {**OPTIONS, "inner": "aot_eager"}


@pytest.fixture(autouse=True)
def float64_and_fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(torch.float32)


def prepared(**changes: Any) -> tuple[nn.Module, torch.Tensor]:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config={**OPTIONS, **changes})
    randomize_gates(model)
    return model, x


def gate_values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in sla_compile.gate_parameters(model)]


class Checkpointed(Model):
    """Each block recomputed in backward, in either mode of torch's, once ``on``."""

    reentrant, on = False, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.on else block(x)
        return x


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_activation_checkpointing(whole: bool, reentrant: bool) -> None:
    model, x = Checkpointed(), random_input().requires_grad_()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    with defined(model):
        expected = model(x)
        wanted = torch.autograd.grad(expected.square().mean(), [x, *model.parameters()])
    model.on, model.reentrant = True, reentrant
    run = torch.compile(model, backend="sla", options=EAGER) if whole else model
    for block in () if whole else model.blocks:
        block.compile(backend="sla", options={"inner": "aot_eager"})
    actual = run(x)
    actual.square().mean().backward()  # autograd.grad does not go with reentrant checkpoints
    assert_close("output", actual, expected, 1e-10)
    for (name, parameter), gradient in zip([("input", x), *model.named_parameters()], wanted, strict=True):
        assert parameter.grad is not None, name
        assert_close(f"gradient of {name}", parameter.grad, gradient, 1e-10)


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
        foreach=kind == "foreach",
        fused=kind == "fused",
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
    scaler.unscale_(optimizer)
    with defined(model):
        wanted = torch.autograd.grad(model(x).square().mean(), list(sla_compile.gate_parameters(model)))
    for gate, gradient in zip(sla_compile.gate_parameters(model), wanted, strict=True):
        assert gate.grad is not None
        assert_close("gate's gradient", gate.grad, gradient, 0.05)  # bfloat16 against float32
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(a, b) for a, b in zip(before, gate_values(model), strict=True))


def test_grad_scaler_skips_a_step_that_overflows() -> None:
    model, x = prepared()
    model, x = model.float(), x.float()
    compiled = torch.compile(model, backend="sla", options=EAGER)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = gate_values(model)
    scaler.scale(compiled(x).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, gate_values(model), strict=True))
    assert scaler.get_scale() == 2.0**126


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


def test_peft_model(tmp_path: Path) -> None:
    """LoRA and gates trained together; the adapter saved by peft, the gates by us, both loaded into a dense model."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = prepared()
    dense = {name: value.clone() for name, value in model.state_dict().items() if ".sla." not in name}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv", "out"]))
    for parameter in sla_compile.gate_parameters(adapted):
        parameter.requires_grad_(True)
    compiled = torch.compile(adapted, backend="sla", options=EAGER)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_follows_definition(compiled, adapted.get_base_model(), x)
    adapted.save_pretrained(tmp_path / "adapter")
    sla_compile.save(adapted.get_base_model(), tmp_path / "gates.safetensors")

    fresh = Model()
    fresh.load_state_dict(dense)
    sla_compile.load(fresh, tmp_path / "gates.safetensors")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(torch.compile(again, backend="sla", options=EAGER)(x), compiled(x))


def test_prepare_after_lora() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = Model(), random_input()
    adapters = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(adapters, model)
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    assert list(sla_compile.gates(model)) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    assert_follows_definition(torch.compile(model, backend="sla", options=EAGER), model, x)


def accelerator_with(**options: Any) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(True)  # one per process otherwise
    return accelerate.Accelerator(cpu=True, **options)


def test_accelerate() -> None:
    model, x = prepared()
    before = gate_values(model)
    accelerator = accelerator_with(gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled, optimizer = accelerator.prepare(torch.compile(model, backend="sla", options=EAGER), optimizer)
    for _ in range(2):
        with accelerator.accumulate(compiled):
            accelerator.backward(compiled(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert all(not torch.equal(a, b) for a, b in zip(before, gate_values(model), strict=True))
    assert_follows_definition(compiled, model, x)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_accelerate_mixed_precision(compiled_first: bool, tmp_path: Path) -> None:
    """accelerate replaces ``forward`` by one under autocast; a run that it resumes goes on as if never stopped."""
    model, x = prepared()
    model, x = model.float(), x.float()
    accelerator = accelerator_with(mixed_precision="bf16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if compiled_first:
        compiled, optimizer = accelerator.prepare(torch.compile(model, backend="sla", options=EAGER), optimizer)
    else:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        compiled = torch.compile(wrapped, backend="sla", options=EAGER)

    def step() -> list[torch.Tensor]:
        accelerator.backward(compiled(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        return gate_values(model)

    before = step()
    assert all(site.rewritten for site in sla_compile.report(model).sites)
    accelerator.save_state(str(tmp_path))
    after = step()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(before, gate_values(model), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, step(), strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("compiled_first", [True, False])
def test_accelerate_with_a_model_compiled_in_place(compiled_first: bool, precision: str) -> None:
    """What the pages recommend: ``unwrap_model`` gives the model that computes sparse attention, whatever it strips."""
    model, x = prepared(linear="marginal")  # too far from dense to be taken for it
    model, x = model.float(), x.float()
    dense = model(x)
    accelerator = accelerator_with(mixed_precision=precision)
    if compiled_first:
        model.compile(backend="sla", options={"inner": "eager"})
    wrapped, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if not compiled_first:
        wrapped.compile(backend="sla", options={"inner": "eager"})
    accelerator.backward(wrapped(x).square().mean())
    assert all(parameter.grad is not None for parameter in sla_compile.gate_parameters(model))
    for stripped in ({}, {"keep_fp32_wrapper": False}, {"keep_torch_compile": False}):
        unwrapped = accelerator.unwrap_model(wrapped, **stripped)
        with pytest.raises(AssertionError, match="relative error"):
            assert_close("dense", unwrapped(x), dense, 0.1)


def test_accelerate_takes_no_backend_that_it_does_not_know() -> None:
    """Once this fails, ``docs/trainers-and-pipelines.md`` has a simpler way."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    with pytest.raises(ValueError, match="'SLA' is not a valid DynamoBackend"):
        accelerate.utils.TorchDynamoPlugin(backend="sla")


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
