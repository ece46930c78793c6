"""Gates that a compile injects: into its own module and its siblings, and into nobody else's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sla_compile
from tests.support.models import OPTIONS, Attention, Model, random_input, randomize_gates

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "float64"),
    pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning"),
]

EAGER: dict[str, Any] = {**OPTIONS, "inner": "eager"}
OWN: dict[str, Any] = {**EAGER, "topk": 0.5, "bottomk": 0.0, "max_topk": 0.75, "exclude": ("blocks.1.*",)}


def compile_blocks(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="sla", options=options)
    return model


def settings_of(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """By gate, its settings and what its buffer holds."""
    found = sla_compile.gates(model)
    return {
        path: (gate.config, None if gate.sparsity is None else gate.sparsity.tolist()) for path, gate in found.items()
    }


@pytest.mark.parametrize("how", ["prepared", "loaded", "copied"])
@pytest.mark.parametrize("used", [False, True])
def test_another_model_with_gates_keeps_its_settings(how: str, used: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    first, x = Model(), random_input()
    sla_compile.prepare(first, (x,), config=OWN)
    randomize_gates(first)
    if how == "loaded":
        sla_compile.save(first, tmp_path / "gates.safetensors")
        state = {name: value for name, value in first.state_dict().items() if ".sla." not in name}
        first = Model()
        first.load_state_dict(state)
        sla_compile.load(first, tmp_path / "gates.safetensors")
    elif how == "copied":
        first = copy.deepcopy(first)
    options = {"inner": "eager", "min_tokens": 0}  # equal ones, so that the blocks of both share code
    before = settings_of(first)
    compile_blocks(first, options)
    expected = first(x) if used else None
    compile_blocks(Model(), options)(x)
    assert settings_of(first) == before
    assert list(before) == ["blocks.0.attention.sla"]
    if expected is not None:
        torch.testing.assert_close(first(x), expected, rtol=0, atol=0)


def test_two_sizes_of_one_class_live_in_one_process() -> None:
    class OfWidth(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.qkv = nn.Linear(width, 3 * width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    small, large = OfWidth(32), OfWidth(64)
    for module in (small, large):
        module.compile(backend="sla", options={**EAGER, "linear": "marginal"})
    small(torch.randn(1, 64, 32))
    assert not sla_compile.gates(large)
    large(torch.randn(1, 64, 64))
    assert [tuple(gate.weight.shape) for gate in sla_compile.gates(large).values()] == [(32, 32)]
    assert [tuple(gate.weight.shape) for gate in sla_compile.gates(small).values()] == [(16, 16)]


def test_prepared_blocks_that_call_attention_themselves_share_one_compile() -> None:
    """More of them than Dynamo's recompile limit: the first compile lets each show its gate, as the first does."""
    from torch._dynamo.utils import counters

    model = nn.Sequential(*(Attention() for _ in range(10)))
    x = random_input(64)
    sla_compile.prepare(model, (x,), config=EAGER)
    randomize_gates(model)
    for module in model:
        module.compile(backend="sla", options={"inner": "eager"})
    before = counters["stats"]["unique_graphs"]
    model(x)
    assert counters["stats"]["unique_graphs"] - before <= 2
    assert all(site.rewritten for site in sla_compile.report(model).sites)


def test_blocks_of_one_model_are_injected_together() -> None:
    model = compile_blocks(Model(), EAGER)
    model.blocks[0](random_input())  # type: ignore[index, operator]
    assert list(sla_compile.gates(model)) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]


@pytest.mark.parametrize("blockwise", [False, True])
def test_the_gates_of_a_failed_compile_are_taken_away(blockwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As are the hooks; and the next compile makes gates again."""
    import torch._dynamo

    def fails(*arguments: Any) -> None:
        raise RuntimeError("no such kernel")

    x, model = random_input(), Model()
    before = [dict(module._forward_pre_hooks) for module in model.modules()]
    options = {**EAGER, "inner": "aot_eager"}
    compiled: Any = (
        compile_blocks(model, options) if blockwise else torch.compile(model, backend="sla", options=options)
    )
    with monkeypatch.context() as patched:
        patched.setattr(torch._dynamo, "lookup_backend", lambda name: fails)
        with pytest.raises(Exception, match="no such kernel"):
            compiled(x)
    assert not sla_compile.gates(model)
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == before
    compiled(x)
    assert list(sla_compile.gates(model)) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    assert all(site.rewritten for site in sla_compile.report(model).sites)
    with monkeypatch.context() as patched:  # a gate that serves stays, though a compile for other sizes fails
        patched.setattr(torch._dynamo, "lookup_backend", lambda name: fails)
        with pytest.raises(Exception, match="no such kernel"):
            compiled(random_input(120))
    assert len(sla_compile.gates(model)) == 2
