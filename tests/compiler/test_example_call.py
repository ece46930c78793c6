"""``call=`` of ``prepare`` and ``explain``: the example is what a program calls the model with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla_compile
from sla_compile.gate import Hook
from tests.support.models import OPTIONS, Model, assert_follows_definition, random_input, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")


class Counting(Model):
    """Counts its forwards in Python, and says what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls.append(tuple(x.shape))
        return super().forward(x * scale)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_first_call_in_a_program_is_the_example(mode: Any) -> None:
    model, state = Counting(), torch.get_rng_state()

    def program() -> None:
        with mode():
            for _ in range(3):
                model(random_input(), scale=2.0)

    found = sla_compile.explain(model, call=program, config=OPTIONS)
    assert [site.shape["tokens"] for site in found.sites] == [100, 100]
    assert sla_compile.prepare(model, call=program, config=OPTIONS) is model
    assert model.calls == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(isinstance(hook, Hook) for hook in model._forward_pre_hooks.values())
    assert all(p.requires_grad and not p.is_inference() for p in sla_compile.gate_parameters(model))
    randomize_gates(model)
    assert_follows_definition(torch.compile(model, backend="sla", options={"inner": "eager"}), model, random_input())


def test_a_program_may_call_the_compiled_model_and_catch_errors() -> None:
    model, x = Counting(), random_input()
    compiled: Any = torch.compile(model, backend="sla", options={"inner": "eager"})

    def program() -> None:
        try:
            compiled(x)
        except Exception:
            pytest.fail("a program must not be able to catch what ends it")

    sla_compile.prepare(compiled, call=program, config=OPTIONS)
    assert len(sla_compile.gates(model)) == 2
    assert model.calls == []


def test_weights_that_are_offloaded_stay_where_they_are() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, x = Model(), random_input()
    model, _ = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    moved: list[Any] = []
    hook = model._hf_hook

    def pre_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(module)
        return args, kwargs

    hook.pre_forward = pre_forward
    sla_compile.prepare(model, call=lambda: model(x), config=OPTIONS)
    assert not any(module is model for module in moved)
    assert len(sla_compile.gates(model)) == 2


def test_errors() -> None:
    model, x = Model(), random_input()
    with pytest.raises(ValueError, match=r"^call: returned without a call of this Model; accepted: a function that"):
        sla_compile.prepare(model, call=lambda: None)
    with pytest.raises(ValueError, match=r"^call: got it beside args or kwargs; accepted: one of them"):
        sla_compile.prepare(model, (x,), call=lambda: model(x))
    with pytest.raises(TypeError, match=r"^call: got Tensor; accepted: a function without arguments"):
        sla_compile.explain(model, call=x)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        sla_compile.prepare(model, call=lambda: 1 / 0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pipeline_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.set_default_dtype(torch.float32)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1, sample_size=16
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    ran: list[nn.Module] = []
    for module in transformer.modules():
        module.register_forward_hook(lambda module, *_: ran.append(module))
    sla_compile.prepare(transformer, call=lambda: pipe([1], num_inference_steps=2), config=OPTIONS)
    assert not any(module is part for module in ran for part in transformer.modules())
    assert len(sla_compile.gates(transformer)) == 1
    assert all(parameter.requires_grad for parameter in sla_compile.gate_parameters(transformer))
    transformer.compile(backend="sla", options={"inner": "eager"})
    with torch.inference_mode():
        pipe([1], num_inference_steps=1, output_type="np")
    assert sla_compile.report(transformer).totals.rewritten == 1
