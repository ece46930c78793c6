"""A gate that a compiled call does not use is told, and stands in the report; where it can be used, it is."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from sla_compile.reporting.terminal import ReportView, plain_text
from tests.support.closeness import assert_close
from tests.support.models import HEADS, MARGINAL, OPTIONS, WIDTH, Model, random_input, randomize_gates

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "float64"),
    pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning"),
]

EAGER: dict[str, Any] = {"inner": "eager"}


class SelfAttention(nn.Module):
    """An owner with four layers, whose attention a function computes."""

    def __init__(self, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(attend(self, x))


def attend(layers: Any, x: Tensor) -> Tensor:
    q, k, v = layers.to_q(x), layers.to_k(x), layers.to_v(x)
    q, k, v = q.unflatten(-1, (HEADS, -1)), k.unflatten(-1, (HEADS, -1)), v.unflatten(-1, (HEADS, -1))
    if layers.norm_q is not None:
        q = layers.norm_q(q)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


class OwnerBlock(SelfAttention):
    """A block that calls the attention itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Processor:
    """As diffusers has them: a plain object that the owner hands itself to."""

    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        return attn.to_out(attend(attn, x))


class Processed(SelfAttention):
    def __init__(self, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__(linear)
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


def call(model: nn.Module, x: Tensor) -> Any:
    return model(x)


class BreakingLinear(nn.Linear):
    """As under a hook that Dynamo cannot trace: layerwise casting, offload of leaves."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class InBlock(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def model_of(make: Callable[[], nn.Module], blocks: int = 2) -> Model:
    model = Model(0)
    model.blocks = nn.ModuleList(make() for _ in range(blocks))
    return model


def prepared(model: Model) -> Model:
    sla_compile.prepare(model, (random_input(),), config=OPTIONS)
    randomize_gates(model)
    return model


def by_blocks(model: Model, options: dict[str, Any] = EAGER) -> Model:
    for block in model.blocks:
        block.compile(backend="sla", options=options)
    return model


def whole(model: nn.Module, options: dict[str, Any] = EAGER) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="sla", options=options)


def breaking(model: Model) -> Model:
    """Replace each linear layer by one at which Dynamo breaks the graph."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                wrapped = BreakingLinear(WIDTH, WIDTH)
                wrapped.load_state_dict(child.state_dict())
                setattr(module, name, wrapped)
    return model


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", sla_compile.DenseAttentionWarning)
        yield


def told_of(run: Callable[[Tensor], Tensor]) -> list[str]:
    """What a call of ``run`` tells of attention that runs dense."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        run(random_input())
    return [str(w.message) for w in given if issubclass(w.category, sla_compile.DenseAttentionWarning)]


def decisions(model: nn.Module) -> list[tuple[str, bool, bool, str]]:
    return [(s.path, s.rewritten, s.compiled, s.reason) for s in sla_compile.report(model).sites if s.current]


def assert_sparse(model: Model, run: Callable[[Tensor], Tensor], reference: Model) -> None:
    """``run`` computes without a word what ``reference``, of the same weights and gates, does compiled as a whole."""
    x = random_input()
    with silent():
        out = run(x)
    assert_close("output", out, whole(reference)(x), 1e-12)
    assert [(path, rewritten) for path, rewritten, _, _ in decisions(model)] == [
        (path.removesuffix(".sla"), True) for path in sla_compile.gates(model)
    ]


def test_children_wrapped_after_a_compile_mark_again() -> None:
    peft = pytest.importorskip("peft")
    model = by_blocks(prepared(model_of(OwnerBlock)))
    plain = copy.deepcopy(model)
    assert_sparse(model, model, plain)
    config = peft.LoraConfig(target_modules=["to_q", "to_v"])
    peft.inject_adapter_in_model(config, model)
    sla_compile.gates(model)["blocks.0.sla"].requires_grad_(True)
    assert_sparse(model, model, plain)  # a new adapter adds nothing
    model(random_input()).sum().backward()
    assert all(p.grad is not None for p in sla_compile.gates(model)["blocks.0.sla"].parameters())
    with silent():
        sla_compile.prepare(model, (random_input(),), config=OPTIONS)
    assert len(sla_compile.gates(model)) == 2
    sla_compile.detach(model)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        module.__dict__["_compiled_call_impl"] = None
    torch.compile(model, backend="eager", fullgraph=True)(random_input())


def test_children_replaced_after_a_compile_mark_again() -> None:
    model = by_blocks(prepared(model_of(OwnerBlock)))
    plain = copy.deepcopy(model)
    assert_sparse(model, model, plain)

    class Quantised(nn.Linear):
        pass

    for block in model.blocks:
        for name in ("to_q", "to_k", "to_v", "to_out"):
            layer = Quantised(WIDTH, WIDTH)
            layer.load_state_dict(getattr(block, name).state_dict())
            setattr(block, name, layer)
    assert_sparse(model, model, plain)


@pytest.mark.parametrize("how", ["method", "partial", "accelerate"])
def test_a_forward_put_on_the_instance(how: str) -> None:
    model = prepared(model_of(OwnerBlock))
    plain = copy.deepcopy(model)
    for block in model.blocks:
        if how == "accelerate":
            hooks = pytest.importorskip("accelerate.hooks")
            hooks.add_hook_to_module(block, hooks.ModelHook())
        elif how == "method":
            block.forward = types.MethodType(lambda self, x: x + self.to_out(attend(self, x)), block)
        else:
            block.forward = functools.partial(lambda self, x: x + self.to_out(attend(self, x)), block)
    assert_sparse(by_blocks(model), model, plain)


@pytest.mark.parametrize("ready", [True, False])
def test_a_compiled_forward_is_seen_by_prepare(ready: bool) -> None:
    model = model_of(lambda: InBlock(SelfAttention()))
    if ready:
        prepared(model)
    plain = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend="sla", options=EAGER)  # type: ignore[method-assign]
    before = list(sla_compile.gates(model).values())
    assert sla_compile.explain(model, (random_input(),), config=OPTIONS).totals.rewritten == 2
    prepared(model)
    assert not ready or [*map(id, before)] == [*map(id, sla_compile.gates(model).values())]
    prepared(plain).load_state_dict(model.state_dict())
    assert_sparse(model, model, plain)


@pytest.mark.parametrize("ready", [True, False])
def test_a_processor_after_a_graph_break_is_bound(ready: bool) -> None:
    """Where a child of the owner is called between the break and the attention: a norm that has no hook."""
    model = model_of(lambda: InBlock(Processed()))
    for block in model.blocks:
        block.attention.norm_q = nn.LayerNorm(WIDTH // HEADS)
    plain = copy.deepcopy(model)
    if ready:
        prepared(model)
    run = whole(breaking(model), EAGER if ready else {**OPTIONS, **EAGER})
    run(random_input())
    randomize_gates(model)
    prepared(plain)
    for gate, other in zip(sla_compile.gates(plain).values(), sla_compile.gates(model).values(), strict=True):
        gate.load_state_dict(other.state_dict())
    assert_sparse(model, run, plain)


@pytest.mark.parametrize("compile_it", [whole, by_blocks])
def test_a_processor_that_cannot_be_bound_is_told(compile_it: Callable[[Model], Any]) -> None:
    model = prepared(model_of(lambda: InBlock(Processed())))
    run = compile_it(breaking(model))
    told = told_of(run)
    assert [text.partition(":")[0] for text in told] == ["blocks.0.attention", "blocks.1.attention"]
    assert all("its attention runs dense, its gate 'sla' is not used: graph break" in text for text in told)
    assert not told_of(run)  # once
    assert [entry[:3] for entry in decisions(model)] == [
        ("blocks.0.attention", False, True),
        ("blocks.1.attention", False, True),
    ]


def test_attention_in_no_graph_is_told() -> None:
    model = prepared(model_of(lambda: InBlock(SelfAttention())))
    for block in model.blocks:
        block.attention.forward = torch.compiler.disable(block.attention.forward)
    run = whole(model)
    told = told_of(run)
    assert len(told) == 2
    assert "blocks.1.attention: its attention runs dense, its gate 'sla' is not used: no graph of this call" in told[1]
    assert [entry[1] for entry in decisions(model)] == [False, False]
    report = sla_compile.report(model)
    assert report.status == "compiled, but the last call ran dense"
    assert report.sites[0].value == "outside every graph"


def test_another_attention_function_is_told() -> None:
    """As ``set_attention_backend`` after ``prepare``: the op that is called now is none that is known."""

    known = F.scaled_dot_product_attention

    @torch.library.custom_op("sla_test::other_attention", mutates_args=())
    def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return known(q, k, v)

    @other.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)

    model = prepared(model_of(lambda: InBlock(SelfAttention())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", other)
        told = told_of(whole(model))
    assert [text.partition(":")[0] for text in told] == ["blocks.0.attention", "blocks.1.attention"]
    assert "no attention that is known" in told[0]
    assert [entry[1] for entry in decisions(model)] == [False, False]


def test_a_skipped_attention_is_no_alarm() -> None:
    """As caches of attention outputs do: the owner returns what it had, or is not called."""

    class Cached(SelfAttention):
        cached: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.cached is None else self.cached + 0

    model = prepared(model_of(lambda: InBlock(Cached())))
    run = whole(model)
    with silent():
        out = run(random_input())
        for block in model.blocks:
            block.attention.cached = torch.zeros_like(out)
        run(random_input())


def test_a_report_is_about_its_own_model() -> None:
    model = prepared(model_of(lambda: InBlock(SelfAttention())))
    average, other = copy.deepcopy(model), prepared(model_of(lambda: InBlock(SelfAttention())))
    run = whole(model)
    assert [entry[2] for entry in decisions(model)] == [False, False]
    run(random_input())
    assert [entry[1:3] for entry in decisions(model)] == [(True, True)] * 2
    for untouched in (average, other):
        assert [entry[1:3] for entry in decisions(untouched)] == [(False, False)] * 2
    whole(other)(random_input())  # by the code that was compiled for the first
    assert [entry[1:3] for entry in decisions(other)] == [(True, True)] * 2
    average(random_input())
    assert [entry[1:3] for entry in decisions(average)] == [(False, False)] * 2


def test_a_regional_compile_reports_every_block_whole() -> None:
    class WithCross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.text = SelfAttention(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x)
            q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            k = self.text(torch.ones(2, 7, WIDTH)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            return x + F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)

    model = by_blocks(prepared(model_of(WithCross, 3)))
    model(random_input())
    report = sla_compile.report(model)
    assert [site.path for site in report.sites if not site.rewritten] == [f"blocks.{i}" for i in range(3)]
    assert [site.path for site in report.sites if site.rewritten] == [f"blocks.{i}.attention" for i in range(3)]
    whole_report = sla_compile.explain(model, (random_input(),), config=OPTIONS)
    assert report.totals.flops_before == whole_report.totals.flops_before
    assert report.totals.flops_after == whole_report.totals.flops_after


def test_a_report_shows_both_of_two_sizes() -> None:
    model = model_of(lambda: InBlock(SelfAttention()))
    sla_compile.prepare(model, (random_input(),), config={**OPTIONS, "min_tokens": 64})
    run = whole(model)
    with silent():
        run(random_input(100))
        run(random_input(32))
    report = sla_compile.report(model)
    rows = [(site.path, site.rewritten, site.current) for site in report.sites]
    assert rows[:2] == [("blocks.0.attention", False, True), ("blocks.0.attention", True, False)]
    assert report.totals.attentions == 2
    assert "compiled before, for calls of these sizes" in plain_text(ReportView(report), width=250)


def test_a_report_after_hooks_that_break_the_graph() -> None:
    """The whole graph was rewritten; under the hooks every owner starts a frame, and its code is another."""
    model = prepared(model_of(lambda: InBlock(Processed())))
    run = whole(model)
    run(random_input())
    assert all(rewritten for _, rewritten, _, _ in decisions(model))
    breaking(model)
    assert len(told_of(run)) == 2
    assert not any(rewritten for _, rewritten, _, _ in decisions(model))


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("kind", ["method", "function over a model", "function of layers", "hook"])
def test_roots_of_other_kinds(kind: str, ready: bool) -> None:
    model: Any = SelfAttention() if kind == "function of layers" else InBlock(SelfAttention())
    options = EAGER if ready else {**OPTIONS, **EAGER}
    if ready:
        sla_compile.prepare(model, (random_input(),), config=OPTIONS)
    target: Any = model
    if kind == "method":
        model.forward = types.MethodType(lambda self, x: x + self.attention(x), model)
    elif kind == "hook":
        model.attention.register_forward_hook(lambda module, args, output: output * 1)
    elif kind == "function over a model":
        target = functools.partial(torch.compile(call, backend="sla", options=options), model)
    else:
        target = functools.partial(torch.compile(attend, backend="sla", options=options), model)
    run = target if isinstance(target, functools.partial) else whole(target, options)
    with silent():
        run(random_input()).sum().backward()
    ((path, rewritten, _, _),) = decisions(model)
    assert (path, rewritten) == ("" if kind == "function of layers" else "attention", True)
    assert all(parameter.grad is not None for parameter in sla_compile.gate_parameters(model))


def test_the_second_model_of_a_process_is_told_of_zero_gates() -> None:
    for compile_it in (whole, by_blocks):
        for _ in range(2):
            model = model_of(lambda: InBlock(SelfAttention()))
            sla_compile.prepare(model, (random_input(),), config=MARGINAL)
            run = compile_it(model)
            with pytest.warns(sla_compile.UntrainedGatesWarning, match=r"first: 'blocks\.0\.attention'") as told:
                run(random_input())
            assert len(told) == 1
            with warnings.catch_warnings():
                warnings.simplefilter("error", sla_compile.UntrainedGatesWarning)
                run(random_input())


def test_a_model_for_another_backend_is_no_alarm() -> None:
    model = prepared(model_of(OwnerBlock))
    with silent():
        torch.compile(model, backend="eager")(random_input())
        model(random_input())
    assert [entry[1:3] for entry in decisions(model)] == [(False, False)] * 2


def test_hooks_go_with_the_gates() -> None:
    model = prepared(model_of(lambda: InBlock(SelfAttention())))
    assert model._forward_hooks
    sla_compile.detach(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
