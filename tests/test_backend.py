"""Every way a model is compiled: right against the definition in float64, forward and every gradient."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch

import sla_compile
from sla_compile import backend as backend_module
from tests.support.closeness import assert_close
from tests.support.compiled import EAGER, compiled, first_call, graphs
from tests.support.models import (
    OPTIONS,
    CheckpointedModel,
    Model,
    assert_follows_definition,
    random_input,
    randomize_gates,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_whole_model(inner: str) -> None:
    model, x = Model(), random_input()
    dense = model(x)
    run = torch.compile(model, backend="sla", options={**OPTIONS, "inner": inner})
    run(x.requires_grad_())
    assert list(sla_compile.gates(model)) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    randomize_gates(model)
    assert_follows_definition(run, model, x)
    assert graphs() == 1
    assert torch.equal(model(x), dense), "a prepared model that is not compiled is the dense model"


def test_first_call_is_already_sparse() -> None:
    model, x = Model(), random_input()
    dense = model(x)
    first = compiled(model)(x)
    second = compiled(model)(x)
    assert torch.equal(first, second)
    assert (first - dense).norm() > 1e-3 * dense.norm()


def test_regional_compile_unprepared() -> None:
    model, x = Model(blocks=12), random_input()
    for block in model.blocks:
        block.compile(backend="sla", options=EAGER)
    first_call(model, x)
    assert len(sla_compile.gates(model)) == 12
    assert_follows_definition(model, model, x)
    assert graphs() == 1, "one graph serves all twelve blocks"


def test_regional_compile_of_wrapped_blocks() -> None:
    model, x = Model(blocks=12), random_input()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="sla", options=EAGER)
    first_call(model, x)
    assert len(sla_compile.gates(model)) == 12
    assert "blocks.11.attention.sla" in sla_compile.gates(model)
    assert_follows_definition(model, model, x)
    assert graphs() == 1


def test_regional_compile_prepared() -> None:
    model, x = Model(blocks=12), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    for block in model.blocks:
        block.compile(backend="sla", options={"inner": "aot_eager"})
    before = graphs()
    assert_follows_definition(model, model, x)
    assert graphs() == before + 1


def test_regional_compile_leaves_a_dense_sibling_alone() -> None:
    model, teacher, x = Model(), Model(), random_input()
    for block, dense_block in zip(model.blocks, teacher.blocks, strict=True):
        block.compile(backend="sla", options=EAGER)
        dense_block.compile(backend="aot_eager")
    dense = teacher(x)
    first_call(model, x)
    assert len(sla_compile.gates(model)) == 2
    assert not sla_compile.gates(teacher)
    assert torch.equal(teacher(x), dense)


def test_two_models_of_one_class() -> None:
    x = random_input()
    models = [Model(), Model()]
    runs = [compiled(model) for model in models]
    for run in runs:
        first_call(run, x)
    for run, model in zip(runs, models, strict=True):
        assert_follows_definition(run, model, x)
    gates = [set(map(id, sla_compile.gate_parameters(model))) for model in models]
    assert not gates[0] & gates[1]


def test_prepared_models_of_one_class_share_their_code() -> None:
    x = random_input()
    models = [sla_compile.prepare(Model(1), (x,), config=OPTIONS) for _ in range(10)]  # above recompile_limit
    before = graphs()
    for model in models:
        randomize_gates(model)
        assert_follows_definition(compiled(model), model, x)
    assert graphs() == before + 1


def test_many_unprepared_models_of_one_class() -> None:
    x = random_input()
    for _ in range(10):  # more than recompile_limit: the ninth must not be dense
        model = Model(1)
        run = compiled(model, inner="eager")
        first_call(run, x)
        assert len(sla_compile.gates(model)) == 1
    assert_follows_definition(run, model, x)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_first_call_without_gradients_then_trained(mode: type) -> None:
    model, x = Model(), random_input()
    run = compiled(model)
    with mode():
        run(x)
    assert len(sla_compile.gates(model)) == 2
    assert not any(p.is_inference() for p in sla_compile.gate_parameters(model))
    randomize_gates(model)
    assert_follows_definition(run, model, x)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_activation_checkpointing(inner: str) -> None:
    model, x = CheckpointedModel(), random_input()
    run = compiled(model, inner=inner)
    first_call(run, x)
    assert len(sla_compile.gates(model)) == 2
    assert_follows_definition(run, model, x)


def test_autocast() -> None:
    torch.set_default_dtype(torch.float32)
    model, x = Model(), random_input().float()
    run = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(x)
    assert {p.dtype for p in sla_compile.gate_parameters(model)} == {torch.float32}
    randomize_gates(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(x)
        low.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert_close("bf16 autocast", low, run(x), 3e-2)


def test_dynamic_shapes() -> None:
    model, x = Model(), random_input(100)
    run = torch.compile(model, backend="sla", options=EAGER, dynamic=True)
    first_call(run, x)
    for tokens in (100, 130, 77, 64):
        assert_follows_definition(run, model, random_input(tokens))
    assert graphs() == 1


def test_dynamic_shapes_guard_the_decision() -> None:
    model, short = Model(), random_input(30)
    run = torch.compile(model, backend="sla", options={**EAGER, "min_tokens": 50}, dynamic=True)
    first_call(run, random_input(100))
    assert torch.equal(run(short), model(short)), "below min_tokens it is dense"
    assert_follows_definition(run, model, random_input(50))
    assert graphs() == 2  # one sparse, one dense


def test_other_backends_see_the_dense_model() -> None:
    x = random_input()
    model = sla_compile.prepare(Model(), (x,), config=OPTIONS)
    randomize_gates(model)
    dense = model(x)
    for backend in ("aot_eager", "inductor"):
        assert_close(backend, torch.compile(model, backend=backend)(x), dense, 1e-12)


def test_models_are_released() -> None:
    model, x = Model(), random_input()
    run = compiled(model)
    first_call(run, x)
    sla_compile.prepare(model, (x,), config=OPTIONS)
    seen = [weakref.ref(model), weakref.ref(model.blocks[0].attention.sla)]
    del model, run
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_options_that_contradict_a_gate_are_refused() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    run = torch.compile(model, backend="sla", options=dict[str, Any](topk=0.5))
    with pytest.raises(ValueError, match=r"blocks\.0\.attention.*topk=0\.5 here, 0\.3 in its gate"):
        run(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topkk": 0.1}, "nearest known: 'topk'"),
        ({"topk": float("nan")}, "topk"),
        ({"topk": 0.95, "bottomk": 0.1}, "up to 1"),
    ],
)
def test_refused_options_leave_no_trace(options: dict[str, Any], message: str) -> None:
    model, x = Model(), random_input()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        torch.compile(model, backend="sla", options=options)(x)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{"topkk": 0.1}, {"topk": 0.5}])
def test_a_refused_option_is_told_where_errors_are_suppressed(options: dict[str, Any]) -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    with torch._dynamo.config.patch(suppress_errors=True):
        run = torch.compile(model.blocks[0].attention, backend="sla", options=options)
        with (
            pytest.warns(sla_compile.DenseAttentionWarning, match="blocks.0.attention: its attention runs dense"),
            pytest.warns(UserWarning, match=f"suppress_errors lets this run .* dense: .*{next(iter(options))}") as told,
        ):
            assert torch.equal(run(x), model.blocks[0].attention(x))
    assert any(warning.filename == __file__ for warning in told)


@pytest.mark.parametrize("dynamic", [None, False])
def test_a_long_sequence_after_short_ones(dynamic: bool | None) -> None:
    """The gates are made while Dynamo compiles code whose dense entries, made before, must not serve any more."""
    model = Model()
    run = torch.compile(model, backend="sla", options={**EAGER, "inner": "eager", "min_tokens": 100}, dynamic=dynamic)
    for x in (random_input(40), random_input(60)):
        torch.testing.assert_close(run(x), model(x))
    x = random_input(200)
    first_call(run, x)
    assert_follows_definition(run, model, x)
    short = random_input(50)
    torch.testing.assert_close(run(short), model(short))


def test_a_recompile_limit_is_no_silent_end() -> None:
    from sla_compile import RecompileLimitWarning

    model = Model()
    run = torch.compile(model, backend="sla", options={**EAGER, "inner": "eager"}, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error", RecompileLimitWarning)
        for tokens in (100, 120):
            run(random_input(tokens))
        with pytest.raises(RecompileLimitWarning, match=r"reached torch\._dynamo\.config\.recompile_limit"):
            run(random_input(140))


def test_each_block_may_have_a_topk_of_its_own() -> None:
    """As many as Dynamo would not compile for one function, block by block."""
    model, x = Model(blocks=4), random_input()
    overrides = {f"blocks.{i}.*": {"topk": 0.2 + 0.2 * i} for i in range(4)}
    sla_compile.prepare(model, (x,), config={**OPTIONS, "bottomk": 0.0, "overrides": overrides})
    randomize_gates(model)
    for block in model.blocks:
        block.compile(backend="sla", options={"inner": "eager"}, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error", sla_compile.RecompileLimitWarning)
        assert_follows_definition(model, model, x)
        assert [site.rewritten for site in sla_compile.report(model).sites] == [True] * 4
        model.blocks[3](random_input(110))
        with pytest.raises(sla_compile.RecompileLimitWarning):
            model.blocks[3](random_input(120))


def test_a_recompile_limit_of_another_backend_is_not_ours() -> None:
    run = torch.compile(Model(), backend="sla", options={**EAGER, "inner": "eager"}, dynamic=False)
    other = torch.compile(Model(), backend="eager", dynamic=False)
    run(random_input())
    with torch._dynamo.config.patch(recompile_limit=3), warnings.catch_warnings():
        warnings.simplefilter("error", sla_compile.RecompileLimitWarning)
        for tokens in (100, 110, 120, 130):
            other(random_input(tokens))


def test_fullgraph() -> None:
    model, x = Model(), random_input()
    run = torch.compile(model, backend="sla", options=EAGER, fullgraph=True)
    first_call(run, x)
    assert_follows_definition(run, model, x)


@pytest.mark.parametrize("given", [{}, {"triton.mix_order_reduction": True}], ids=["default", "given"])
def test_inductor_gets_the_options_under_which_it_is_right(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the user's in their place."""
    from torch._inductor import compile_fx

    seen: list[Any] = []

    def as_it_is(gm: torch.fx.GraphModule, inputs: Any, *, config_patches: Any, **_: Any) -> Any:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", as_it_is)
    monkeypatch.setattr(backend_module, "sound_options", lambda: {"triton.mix_order_reduction": False})
    options: dict[str, Any] = {"min_tokens": 0, **given}
    torch.compile(Model(), backend="sla", options=options)(torch.randn(2, 64, 32))
    assert seen
    assert all(patches == {"triton.mix_order_reduction": bool(given)} for patches in seen)


def test_untrained_gates_warn_once_a_model() -> None:
    for _ in range(2):
        run = compiled(Model(), linear="marginal")
        with pytest.warns(sla_compile.UntrainedGatesWarning, match="2 attention.* gates that are still zero"):
            run(random_input())
        with warnings.catch_warnings():
            warnings.simplefilter("error", sla_compile.UntrainedGatesWarning)
            run(random_input(80))
