"""Gates in every way a model is compiled: right against the definition in float64, forward and every gradient."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import sla_compile
from sla_compile.gate import Gate
from sla_compile.gate_settings import GateSpec
from tests.support.closeness import assert_close
from tests.support.models import (
    OPTIONS,
    Attention,
    BrokenAttention,
    BrokenAttentionWithProjection,
    CalledTwice,
    CheckpointedModel,
    Doubled,
    Model,
    TwoAttentions,
    assert_follows_definition,
    random_input,
    randomize_gates,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

EAGER: dict[str, Any] = {**OPTIONS, "inner": "aot_eager"}


def graphs() -> int:
    return int(counters["stats"].get("unique_graphs", 0))


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sla", options={**EAGER, **options})


def first_call(model: Any, x: torch.Tensor) -> None:
    """A call with a gradient, as later ones have it, then gates that are not zero."""
    model(x.detach().requires_grad_())
    randomize_gates(model)


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


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_the_compiled_module_owns_the_attention(how: str) -> None:
    owners = [Attention() for _ in range(3)]
    x = random_input()
    for owner in owners:
        run = compiled(owner) if how == "torch.compile" else owner
        if how == "module.compile":
            owner.compile(backend="sla", options=EAGER)
        first_call(run, x)
        assert list(sla_compile.gates(owner)) == ["sla"]
        assert_follows_definition(run, owner, x)


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
    models = [sla_compile.prepare(Model(), (x,), config=OPTIONS) for _ in range(10)]  # above recompile_limit
    before = graphs()
    for model in models:
        randomize_gates(model)
        assert_follows_definition(compiled(model), model, x)
    assert graphs() == before + 1


def test_many_unprepared_models_of_one_class() -> None:
    x = random_input()
    for _ in range(12):  # more than recompile_limit: the ninth must not be dense
        model = Model(1)
        run = compiled(model)
        first_call(run, x)
        assert len(sla_compile.gates(model)) == 1
    assert_follows_definition(run, model, x)


def test_deepcopy() -> None:
    model, x = Model(), random_input()
    run = compiled(model)
    first_call(run, x)
    before = graphs()
    copied = copy.deepcopy(model)
    randomize_gates(copied)
    assert_follows_definition(compiled(copied), copied, x)
    assert_follows_definition(run, model, x)
    assert graphs() == before, "a deepcopy runs the code of its original"


def test_pickle() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    back = pickle.loads(pickle.dumps(model))
    assert_follows_definition(compiled(back), back, x)


def test_state_dict_and_dtype_moves() -> None:
    x = random_input()
    model = sla_compile.prepare(Model(), (x,), config=OPTIONS)
    run = compiled(model)
    run(x.requires_grad_())
    other = sla_compile.prepare(Model(), (x,), config=OPTIONS)
    randomize_gates(other)
    model.load_state_dict(other.state_dict())
    assert_follows_definition(run, model, x)
    with torch.no_grad():
        expected = run(x)
        model.to(torch.float32).to("cpu")
        assert {p.dtype for p in sla_compile.gate_parameters(model)} == {torch.float32}
        assert_close("after .to(float32)", run(x.float()), expected, 1e-4)
    model.to(torch.float64)
    assert_follows_definition(run, model, x)


def test_strict_load_of_a_dense_checkpoint() -> None:
    x = random_input()
    dense = Model()
    model = sla_compile.prepare(Model(), (x,), config=OPTIONS)
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model(x), dense(x))
    randomize_gates(model)
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.attention\.sla\.weight"):
        model.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.attention\.sla\.weight"):
        dense.load_state_dict(model.state_dict())


def test_a_module_called_twice_has_one_gate() -> None:
    model, x = CalledTwice(), random_input()
    run = compiled(model)
    first_call(run, x)
    assert list(sla_compile.gates(model)) == ["attention.sla"]
    assert_follows_definition(run, model, x)


@pytest.mark.parametrize("root", [False, True])
def test_two_attentions_in_one_module_have_two_gates(root: bool) -> None:
    owner, x = TwoAttentions(), random_input()
    model = owner if root else nn.Sequential(owner)
    run = compiled(model)
    first_call(run, x)
    assert [path.rpartition(".")[2] for path in sla_compile.gates(model)] == ["sla", "sla_1"]
    assert_follows_definition(run, model, x)


def test_function_over_a_model() -> None:
    model, x = Model(), random_input()

    def function(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x)

    run = torch.compile(function, backend="sla", options=EAGER)
    run(model, x.requires_grad_())
    assert list(sla_compile.gates(model)) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    randomize_gates(model)
    assert_follows_definition(lambda x: run(model, x), model, x)


def test_closure_over_a_model() -> None:
    model, x = Model(), random_input()
    run = torch.compile(lambda x: model(x), backend="sla", options=EAGER)
    run(x.requires_grad_())
    randomize_gates(model)
    assert len(sla_compile.gates(model)) == 2
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


def test_a_checkpoint_inside_the_owner_keeps_its_attention_dense() -> None:
    """The gate is bound where the owner starts, outside the region that holds the attention."""

    class PartlyCheckpointed(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.heads(x)
            y = checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False)
            return self.out(y.transpose(1, 2).flatten(2))

    model, x = Doubled(PartlyCheckpointed()), random_input()
    assert torch.equal(compiled(model)(x), model(x))
    (site,) = sla_compile.report(model).sites
    assert not site.rewritten
    assert site.reason == "its gate is bound outside the region that holds the attention"


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


def test_frozen_base_with_trainable_gates() -> None:
    x = random_input()
    model = Model().requires_grad_(False)
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert set(map(id, trainable)) == set(map(id, sla_compile.gate_parameters(model)))
    assert_follows_definition(compiled(model), model, x)


def test_graph_break_before_the_attention() -> None:
    model, x = Doubled(BrokenAttentionWithProjection()), random_input()
    run = compiled(model)
    first_call(run, x)
    assert list(sla_compile.gates(model)) == ["attention.sla"]
    assert_follows_definition(run, model, x)


def test_graph_break_that_cuts_the_attention_off_keeps_it_dense() -> None:
    model, x = Doubled(BrokenAttention()), random_input()
    dense = model(x)
    assert torch.equal(compiled(model)(x), dense)
    assert not sla_compile.gates(model)
    (site,) = sla_compile.report(model).sites
    assert (site.path, site.rewritten) == ("attention", False)
    assert site.reason == "graph break between the owner's start and its attention"


def test_a_gate_whose_marker_does_not_turn_up_is_taken_back() -> None:
    class Bare(nn.Module):  # the compiled module itself, with no child to mark its gate from
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.unflatten(-1, (2, 16)).transpose(1, 2)
            return F.scaled_dot_product_attention(x, x, x)

    model, x = Bare(), random_input()
    assert torch.equal(compiled(model)(x), model(x))
    assert not sla_compile.gates(model)
    assert not model._forward_pre_hooks
    (site,) = sla_compile.report(model).sites
    assert site.reason == "the traced graph does not reach its gate"


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


@pytest.mark.parametrize(
    ("model", "config", "why"),
    [
        (
            Model,
            {"include": ("nothing.*",)},
            r"blocks\.0\.attention stays dense, matched by no include pattern: 'noth.*1 more",
        ),
        (
            Model,
            {"min_tokens": 101},
            r"blocks\.0\.attention stays dense, short sequence \(100 tokens; accepted: at least",
        ),
        (lambda: nn.Linear(32, 32), {}, "none was found in its forward"),
    ],
    ids=["no pattern", "short", "no attention"],
)
def test_prepare_says_that_nothing_will_be_rewritten(
    model: Callable[[], nn.Module], config: dict[str, Any], why: str
) -> None:
    with pytest.warns(UserWarning, match=f"^prepare: no attention of [A-Z][a-z]* will be rewritten: {why}"):
        prepared = sla_compile.prepare(model(), (torch.zeros(1, 100, 32),), config={**OPTIONS, **config})
    assert sla_compile.gates(prepared) == {}


def test_prepare_changes_nothing_but_gates() -> None:
    model, x = Model(), random_input()
    model.blocks[0].attention.qkv.weight.requires_grad_(False)
    model.train()
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    random_state, dense = torch.get_rng_state(), model(x)
    assert sla_compile.prepare(model, (x,), config=OPTIONS) is model
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model(x), dense)
    after = dict(model.named_parameters())
    for name, (parameter, value, trainable) in before.items():
        assert after.pop(name) is parameter
        assert torch.equal(parameter, value)
        assert parameter.requires_grad is trainable
    assert sorted(after) == sorted(f"blocks.{i}.attention.sla.{name}" for i in range(2) for name in ("weight", "bias"))
    assert not any(bool(p.any()) for p in after.values())
    assert all(p.requires_grad for p in after.values())


def test_prepare_twice_is_once() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = {name: (value, value.clone()) for name, value in model.state_dict().items()}
    sla_compile.prepare(model, (x,), config=OPTIONS)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    again = model.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[name], copied) for name, (_, copied) in state.items())


def test_prepare_again_with_other_settings_takes_effect() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    run = torch.compile(model, backend="sla", options={"inner": "aot_eager"})
    assert_follows_definition(run, model, x)
    sla_compile.prepare(model, (x,), config={**OPTIONS, "topk": 0.6})
    assert next(iter(sla_compile.gates(model).values())).config.topk == 0.6
    assert_follows_definition(run, model, x)


def test_prepare_after_a_dense_compile_takes_effect() -> None:
    model, x = Model(), random_input()
    run = torch.compile(model, backend="sla", options={"inner": "aot_eager"})  # too few tokens: dense
    assert torch.equal(run(x), model(x))
    assert not sla_compile.gates(model)
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    assert_follows_definition(run, model, x)


def test_prepare_keeps_python_state_of_the_model() -> None:
    class Caching(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = x.mean()
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    model = Caching()
    sla_compile.prepare(model, (random_input(),), config=OPTIONS)
    assert not hasattr(model, "cache")
    assert not hasattr(model, "calls")
    assert len(sla_compile.gates(model)) == 2


def test_settings_that_would_drop_a_trained_gate_are_refused() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    without_first = {**OPTIONS, "exclude": ["blocks.0.*"]}
    sla_compile.prepare(model, (x,), config=without_first)
    assert list(sla_compile.gates(model)) == ["blocks.1.attention.sla"]
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    kept = list(sla_compile.gates(model))
    with pytest.raises(ValueError, match=r"leave out attention whose gate is trained: blocks\.0\.attention\.sla"):
        sla_compile.prepare(model, (x,), config=without_first)
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.sla: has a gate of shape \(16, 16\)"):
        sla_compile.prepare(model, (x,), config={**OPTIONS, "gate": "per_head"})
    assert list(sla_compile.gates(model)) == kept


def test_per_head_gates_and_overrides() -> None:
    model, x = Model(), random_input()
    config = {**OPTIONS, "gate": "per_head", "overrides": {"blocks.1.*": {"gate": "shared", "topk": 0.5}}}
    sla_compile.prepare(model, (x,), config=config)
    shapes = [tuple(gate.weight.shape) for gate in sla_compile.gates(model).values()]
    assert shapes == [(2, 16, 16), (16, 16)]
    randomize_gates(model)
    assert_follows_definition(torch.compile(model, backend="sla", options={"inner": "aot_eager"}), model, x)


def test_excluded_sites_of_a_prepared_model_stay_dense() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config={**OPTIONS, "exclude": ["blocks.0.*"]})
    randomize_gates(model)
    run = torch.compile(model, backend="sla", options={"inner": "aot_eager"})
    assert_follows_definition(run, model, x)
    assert list(sla_compile.gates(model)) == ["blocks.1.attention.sla"]


def test_options_that_contradict_a_gate_are_refused() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    run = torch.compile(model, backend="sla", options=dict[str, Any](topk=0.5))
    with pytest.raises(ValueError, match=r"blocks\.0\.attention.*topk=0\.5 here, 0\.3 in its gate"):
        run(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"topkk": 0.1}, "nearest known: 'topk'"), ({"topk": float("nan")}, "topk"), ({"topk": 0.95}, "up to 1")],
)
def test_refused_options_leave_no_trace(options: dict[str, Any], message: str) -> None:
    model, x = Model(), random_input()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        torch.compile(model, backend="sla", options=options)(x)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_taken_name_is_an_error() -> None:
    model, x = Model(), random_input()
    model.blocks[1].attention.sla = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.sla.*Linear"):
        sla_compile.prepare(model, (x,), config=OPTIONS)
    assert not sla_compile.gates(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.sla.*Linear"):
        compiled(model)(x)


def test_detach_gives_the_model_back() -> None:
    model, x = Model(), random_input()
    keys = list(model.state_dict())
    run = compiled(model)
    first_call(run, x)
    assert sla_compile.detach(model) is model
    assert list(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_detach_takes_the_settings_along() -> None:
    model, x = Model(), random_input()
    dense = model(x)
    sla_compile.detach(sla_compile.prepare(model, (x,), config=OPTIONS))
    torch.testing.assert_close(torch.compile(model, backend="sla", options={"inner": "eager"})(x), dense)
    assert not sla_compile.gates(model), "fewer tokens than min_tokens"
    compiled(model, topk=0.7)(x)  # no gate that it could contradict
    assert {gate.config.topk for gate in sla_compile.gates(model).values()} == {0.7}


def test_min_tokens_of_the_compile_hold_where_prepare_made_no_gate() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,))
    assert not sla_compile.gates(model)
    compiled(model)(x)
    assert len(sla_compile.gates(model)) == 2


def test_a_gate_of_another_attention_is_refused() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    sla_compile.gates(model)["blocks.1.attention.sla"].weight = nn.Parameter(torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.sla: has a gate of shape \(5, 5\), but"):
        compiled(model)(x)


def test_a_module_at_two_places_has_one_gate() -> None:
    model, x = Model(3), random_input()
    model.blocks[2] = model.blocks[0]
    run = compiled(model)
    first_call(run, x)
    assert list(sla_compile.gates(model)) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    assert_follows_definition(run, model, x)


@pytest.mark.parametrize("dynamic", [None, False])
def test_a_long_sequence_after_short_ones(dynamic: bool | None) -> None:
    """The gates are made while Dynamo compiles code whose dense entries, made before, must not serve any more."""
    model = Model()
    run = torch.compile(model, backend="sla", options={**EAGER, "min_tokens": 100}, dynamic=dynamic)
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
    run = torch.compile(model, backend="sla", options=EAGER, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error", RecompileLimitWarning)
        for tokens in (100, 120):
            run(random_input(tokens))
        with pytest.raises(RecompileLimitWarning, match=r"reached torch\._dynamo\.config\.recompile_limit"):
            run(random_input(140))


def test_fullgraph() -> None:
    model, x = Model(), random_input()
    run = torch.compile(model, backend="sla", options=EAGER, fullgraph=True)
    first_call(run, x)
    assert_follows_definition(run, model, x)


def test_untrained_gates_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sla_compile.compiler.memory._warned", set())
    with pytest.warns(sla_compile.UntrainedGatesWarning, match="2 attention.* gates that are still zero"):
        compiled(Model())(random_input())
    with warnings.catch_warnings():
        warnings.simplefilter("error", sla_compile.UntrainedGatesWarning)
        compiled(Model())(random_input())


def test_a_gate_is_not_called() -> None:
    gate = Gate(GateSpec(heads=2, head_dim=16, config=sla_compile.SLAConfig(), path="a.sla"))
    with pytest.raises(TypeError, match=r"gate 'a\.sla' is not called"):
        gate(torch.zeros(1))
    assert "head_dim=16" in repr(gate)
