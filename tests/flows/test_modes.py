"""Ways to compile: modes of torch.compile, graph breaks, several graphs of one module, with and without gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sla_compile
from tests.support.closeness import assert_close
from tests.support.models import (
    OPTIONS,
    Attention,
    Block,
    CheckpointedModel,
    Model,
    assert_follows_definition,
    defined,
    random_input,
    randomize_gates,
)

EAGER: dict[str, Any] = {"inner": "aot_eager"}
MODES = ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@pytest.fixture(autouse=True)
def float64_and_fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(torch.float32)


def prepared(model: nn.Module, x: Tensor, **changes: Any) -> Any:
    sla_compile.prepare(model, (x,), config={**OPTIONS, **changes})
    randomize_gates(model)
    torch._dynamo.reset()
    counters.clear()
    return model


def graphs() -> int:
    return int(counters["stats"].get("unique_graphs", 0))


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    torch.set_default_dtype(torch.float32)  # which autotuning has templates for
    x = random_input().float()
    model = prepared(nn.Sequential(Attention()), x)
    assert_follows_definition(torch.compile(model, backend="sla", mode=mode), model, x, 1e-5)
    assert graphs() == 1


def test_a_model_compiled_in_place() -> None:
    model, x = Model(), random_input()
    model.compile(backend="sla", options={**OPTIONS, **EAGER}, fullgraph=True)
    model(x.requires_grad_())
    assert list(sla_compile.gates(model)) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    randomize_gates(model)
    assert_follows_definition(model, model, x)


class BrokenBetween(Model):
    """A graph break between the blocks: two graphs, an attention in each."""

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i:
                torch._dynamo.graph_break()
            x = block(x)
        return x


class BrokenAround(Model):
    """Breaks on both sides of the owner of an attention."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        x = first.norm(x)
        torch._dynamo.graph_break()
        x = first.attention(x)
        torch._dynamo.graph_break()
        return second(x)


@pytest.mark.parametrize("with_prepare", [True, False])
@pytest.mark.parametrize("kind", [BrokenBetween, BrokenAround])
def test_graph_breaks_around_attention(kind: type[Model], with_prepare: bool) -> None:
    model, x = kind(), random_input()
    if with_prepare:
        prepared(model, x)
    run = torch.compile(model, backend="sla", options=EAGER if with_prepare else {**OPTIONS, **EAGER})
    run(x.requires_grad_())
    randomize_gates(model)
    assert len(sla_compile.gates(model)) == 2
    assert_close("output", run(x), definition(model, x), 1e-10)
    assert_gradients(run, model, x)
    assert all(site.rewritten for site in sla_compile.report(model).sites)


def definition(model: nn.Module, x: Tensor) -> Tensor:
    with defined(model):
        output: Tensor = model(x)
    return output


def assert_gradients(run: Any, model: nn.Module, x: Tensor) -> None:
    """Of every parameter, where the definition has one."""
    named = dict(model.named_parameters())
    wanted = torch.autograd.grad(definition(model, x).square().mean(), list(named.values()), allow_unused=True)
    got = torch.autograd.grad(run(x).square().mean(), list(named.values()), allow_unused=True)
    for name, actual, expected in zip(named, got, wanted, strict=True):
        assert (actual is None) == (expected is None), name
        if actual is not None and expected is not None:
            assert_close(f"gradient of {name}", actual, expected, 1e-10)


class BrokenInside(Attention):
    """A graph break between two attentions of one forward."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        torch._dynamo.graph_break()
        q, k, v = self.heads(x)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("with_prepare", [True, False])
def test_a_graph_break_between_two_attentions_of_one_forward(with_prepare: bool) -> None:
    """The second one has the second gate, in the second graph; also where another instance was compiled first."""
    x = random_input()
    for model in (nn.Sequential(BrokenInside()), nn.Sequential(BrokenInside(), BrokenInside())):
        if with_prepare:
            prepared(model, x)
        run = torch.compile(model, backend="sla", options=EAGER if with_prepare else {**OPTIONS, **EAGER})
        run(x)
        names = [name for i in range(len(model)) for name in (f"{i}.sla", f"{i}.sla_1")]
        assert list(sla_compile.gates(model)) == names
        assert [site.gate_path for site in sla_compile.report(model).sites if site.rewritten] == names
        randomize_gates(model)
        assert_close("output", run(x), definition(model, x), 1e-10)
        assert_gradients(run, model, x)


def test_several_graphs_of_one_module() -> None:
    """A graph for each length, over the same gates, in training mode and out of it."""
    x = random_input()
    model = prepared(Model(), x)
    run = torch.compile(model, backend="sla", options=EAGER, dynamic=False)
    for tokens in (100, 77, 130, 100):
        assert_follows_definition(run, model, random_input(tokens))
    model.eval()
    assert_follows_definition(run, model, x)
    assert graphs() == 3


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_with_and_without_gradients_by_turns(inner: str) -> None:
    x = random_input()
    model = prepared(nn.Sequential(Attention()), x)
    run = torch.compile(model, backend="sla", options={"inner": inner})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [gate.detach().clone() for gate in sla_compile.gate_parameters(model)]
    for _ in range(2):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                output = run(x)
                assert not output.requires_grad
                assert_close(mode.__name__, output, definition(model, x), 1e-10)
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_follows_definition(run, model, x)
    assert all(not torch.equal(a, b) for a, b in zip(before, sla_compile.gate_parameters(model), strict=True))


def test_autocast_on_and_off_by_turns() -> None:
    torch.set_default_dtype(torch.float32)
    x = random_input().float()
    model = prepared(Model(), x)
    run = torch.compile(model, backend="sla", options=EAGER)
    full = run(x)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = run(x)
        assert low.dtype != full.dtype or not torch.equal(low, full)
        assert_close("bfloat16", low, full, 3e-2)
        assert torch.equal(run(x), full)


def keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op is torch.ops.sla.forward.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Selective(Model):
    """Each block recomputed in backward, but for its attention."""

    def forward(self, x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, keep_attention)
        for block in self.blocks:
            if torch.compiler.is_compiling():
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            else:
                x = block(x)
        return x


@pytest.mark.parametrize(("kind", "runs"), [(Model, 1), (CheckpointedModel, 2), (Selective, 1)])
def test_recomputed_blocks_can_keep_their_attention(kind: type[Model], runs: int) -> None:
    """A policy of torch.utils.checkpoint that names sla::forward saves its output rather than run it again."""
    x = random_input()
    model = prepared(kind(), x)
    executed: list[int] = []

    def count(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        executed.append(sum(node.target is torch.ops.sla.forward.default for node in gm.graph.nodes))
        return gm.forward

    run = torch.compile(model, backend=partial(rewritten_then, compiler=count))
    assert_follows_definition(run, model, x)
    assert sum(executed) == 2 * runs


def rewritten_then(gm: torch.fx.GraphModule, inputs: Any, compiler: Any) -> Any:
    """The backend, with ``compiler`` for the forward and the backward graph."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    from sla_compile.compat import current_frame
    from sla_compile.compiler.rewriting import rewrite_graph
    from sla_compile.compiler.sites import Settings

    rewrite_graph(gm, Settings.of(None), current_frame())
    boxed = lambda graph, example: make_boxed_func(compiler(graph, example))  # noqa: E731
    return aot_autograd(fw_compiler=boxed, partition_fn=min_cut_rematerialization_partition)(gm, inputs)


def test_compile_repeated_blocks_trains() -> None:
    """diffusers' regional compile: one graph, and every block its own gate."""
    pytest.importorskip("diffusers")
    from diffusers import ModelMixin

    class Repeated(ModelMixin):  # type: ignore[misc]
        _repeated_blocks = ["Block"]  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    x = random_input()
    model = prepared(Repeated(), x)
    model.compile_repeated_blocks(backend="sla", options=EAGER, fullgraph=True)
    assert_follows_definition(model, model, x)
    assert graphs() == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("training", [False, True])
def test_cuda_graphs_are_used(mode: str, training: bool) -> None:
    torch.set_default_dtype(torch.float32)
    x = random_input(700).float().cuda()
    model = prepared(Model().float().cuda(), x, block_q=64, block_k=64)
    run = torch.compile(model, backend="sla", mode=mode)

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        if not training:
            with torch.no_grad():
                return run(x).clone()
        output = run(x)
        output.square().mean().backward()
        return output.detach().clone()

    for _ in range(4):  # warm up, record, replay
        output = step()
        model.zero_grad(set_to_none=True)
    assert counters["inductor"]["cudagraph_skips"] == 0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    launches = sum(event.count for event in profiled.key_averages() if event.key == "cudaGraphLaunch")
    assert launches == (2 if training else 1)
    assert_close("output", output, definition(model, x), 1e-3)
