"""``sla_compile.export``: exported programs hold the op, compute what the compiled model does, or are refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import sla_compile
from sla_compile.gate import detach_gate
from tests.support.closeness import assert_close
from tests.support.exported import run_saved
from tests.support.models import (
    HEADS,
    OPTIONS,
    WIDTH,
    Attention,
    CalledTwice,
    CheckpointedModel,
    Model,
    TwoAttentions,
    assert_follows_definition,
    defined,
    random_input,
    randomize_gates,
)
from tests.support.processes import FRESH

EAGER: dict[str, Any] = {"inner": "eager"}
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


@pytest.fixture(autouse=True)
def float64_and_fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(torch.float32)


class Inside(nn.Module):
    """An attention inside another module."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.attention(*args, **kwargs)
        return result


class WrittenOut(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = torch.softmax(q @ k.transpose(-2, -1) * 0.3, dim=-1)
        return self.out((scores @ v).transpose(1, 2).reshape(x.shape))


class Einsum(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = torch.einsum("bhid,bhjd->bhij", q / 4, k).softmax(-1, dtype=torch.float64).to(x.dtype)
        return self.out(torch.einsum("bhij,bhjd->bihd", scores, v).flatten(2))


class Masked(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.heads(x)
        mask = mask[:, None, None, :].expand(-1, -1, x.shape[1], -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class WithText(Attention):
    """A self-attention, and a cross-attention to as many tokens, which stays dense."""

    def forward(self, x: Tensor, *, text: Tensor) -> Tensor:  # type: ignore[override]
        x = super().forward(x)
        (q, _, _), (_, k, v) = self.heads(x), self.heads(text)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Samples(Attention):
    """Several calls of one line, and two of another; which is which, torch.export does not say."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q = torch.cat([F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(x))])
        y = self.attend(q, k, v) + self.attend(q, 2 * k, v)
        return self.out(y.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class UnderAutocast(Attention):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


def prepared(model: nn.Module, *args: Any, **changes: Any) -> Any:
    sla_compile.prepare(model, args, config={**OPTIONS, **changes})
    randomize_gates(model)
    return model


def count(program: ExportedProgram, target: Any) -> int:
    return sum(
        node.target is target
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
    )


def sparse(program: ExportedProgram) -> int:
    """How many attentions of ``program`` are; no marker may be left in it."""
    assert count(program, torch.ops.sla.gate.default) == 0
    return count(program, torch.ops.sla.forward.default)


@STRICT
@pytest.mark.parametrize(
    ("make", "attentions"), [(Model, 2), (TwoAttentions, 2), (CalledTwice, 2), (Attention, 1)], ids=lambda x: str(x)
)
def test_follows_the_definition(make: Callable[[], nn.Module], attentions: int, strict: bool) -> None:
    """Output and every gradient; under the model's own names."""
    x = random_input()
    model = prepared(make(), x)
    program = sla_compile.export(model, (x,), strict=strict)
    assert sparse(program) == attentions
    assert count(program, torch.ops.aten.scaled_dot_product_attention.default) == 0
    assert sorted(program.state_dict) == sorted(model.state_dict())
    assert_follows_definition(program.module(), model, x)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, dict[str, Any]]], dict[str, Any]]] = {
    "written out": (lambda: Inside(WrittenOut()), lambda: ((random_input(),), {}), {}),
    "einsum": (lambda: Inside(Einsum()), lambda: ((random_input(),), {}), {}),
    "key mask": (lambda: Inside(Masked()), lambda: ((random_input(), torch.arange(100).expand(2, 100) < 77), {}), {}),
    "cross-attention stays": (WithText, lambda: ((random_input(),), {"text": random_input()}), {}),
    "several calls of a line": (Samples, lambda: ((random_input(),), {}), {}),
    "sparsity at run time": (Model, lambda: ((random_input(),), {}), {"max_topk": 0.6}),
    "gate per head": (Model, lambda: ((random_input(),), {}), {"linear": "marginal", "gate": "per_head"}),
    "text is critical": (Model, lambda: ((random_input(),), {}), {"always_critical": ((0, 20),)}),
    "MultiheadAttention": (
        lambda: Inside(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)),
        lambda: ((x := random_input(), x, x), {"need_weights": False}),
        {},
    ),
}


@STRICT
@pytest.mark.parametrize("name", CASES)
def test_equals_the_compiled_model(name: str, strict: bool) -> None:
    make, inputs, config = CASES[name]
    model, (args, kwargs) = make(), inputs()
    sla_compile.prepare(model, args, kwargs, config={**OPTIONS, **config})
    randomize_gates(model)

    def output(run: Callable[..., Any]) -> Tensor:
        result = run(*args, **kwargs)
        return result[0] if isinstance(result, tuple) else result

    dense, expected = output(model), output(torch.compile(model, backend="sla", options=EAGER))
    program = sla_compile.export(model, args, kwargs, strict=strict)
    assert sparse(program) == (4 if name == "several calls of a line" else len(sla_compile.gates(model)))
    assert_close(name, output(program.module()), expected, 1e-12)
    assert (expected - dense).norm() > 1e-3 * dense.norm()


def test_recomputed_blocks() -> None:
    """Only where torch.export takes checkpoints, without Dynamo."""
    x = random_input()
    model = prepared(CheckpointedModel(), x)
    assert_follows_definition(sla_compile.export(model, (x,)).module(), model, x)


@STRICT
@pytest.mark.parametrize("how", ["whole", "blocks", "wrapped blocks"])
def test_a_model_that_is_compiled_too(how: str, strict: bool) -> None:
    x = random_input()
    model = prepared(Model(), x)
    run: Any = torch.compile(model, backend="sla", options=EAGER) if how == "whole" else model
    for i, block in enumerate(model.blocks if how != "whole" else ()):
        if how == "blocks":
            block.compile(backend="sla", options=EAGER)
        else:
            model.blocks[i] = torch.compile(block, backend="sla", options=EAGER)
    expected = run(x)
    program = sla_compile.export(run, (x,), strict=strict)
    assert sparse(program) == 2
    assert_close(how, program.module()(x), expected, 1e-12)


@STRICT
def test_dynamic_shapes(strict: bool) -> None:
    model = prepared(Model(), random_input())
    shapes = ({0: Dim("batch", max=8), 1: Dim("tokens", min=32, max=4096)},)
    program = sla_compile.export(model, (random_input(),), dynamic_shapes=shapes, strict=strict)
    assert sparse(program) == 2
    for tokens, batch in ((100, 2), (77, 3), (400, 2)):
        assert_follows_definition(program.module(), model, random_input(tokens, batch))


class Sized(Attention):
    """With the sizes read from the input, which are symbolic where they are dynamic."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(batch, tokens, -1))


@STRICT
def test_dynamic_sizes_that_the_model_reads(strict: bool) -> None:
    x = random_input()
    model = prepared(nn.Sequential(Sized()), x)
    program = sla_compile.export(model, (x,), dynamic_shapes=({1: Dim("tokens", min=32, max=4096)},), strict=strict)
    assert sparse(program) == 1
    run = torch.compile(model, backend="sla", options=EAGER)
    for tokens in (100, 77):
        x = random_input(tokens)
        assert_close("output", program.module()(x), run(x), 1e-12)


def test_dynamic_shapes_that_decide() -> None:
    """Below min_tokens the compiled model is dense; an exported program is one or the other."""
    model = prepared(Model(), random_input(), min_tokens=50)
    sla_compile.export(model, (random_input(),), dynamic_shapes=({1: Dim("tokens", min=50, max=4096)},))
    with pytest.raises(ValueError, match=r"blocks\.0\.attention: sparse only if s\d+ >= 50; accepted: dynamic_shapes"):
        sla_compile.export(model, (random_input(),), dynamic_shapes=({1: Dim("tokens", min=49, max=4096)},))


def test_torch_export_alone_is_the_dense_model() -> None:
    x = random_input()
    model = prepared(Model(), x)
    program = torch.export.export(model, (x,))
    assert sparse(program) == 0
    assert torch.equal(program.module()(x), model(x))
    assert torch.equal(torch.export.export(model, (x,), strict=True).module()(x), model(x))


def test_what_is_refused() -> None:
    x = random_input()
    with pytest.raises(ValueError, match=r"Model has no gates; accepted: a model that sla_compile\.prepare"):
        sla_compile.export(Model(), (x,))
    with pytest.raises(ValueError, match="attention: has a gate, but would stay dense: its gate is bound outside"):
        sla_compile.export(prepared(Inside(UnderAutocast()), x), (x,))
    model = prepared(Model(), x, min_tokens=90)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention: has a gate, but would stay dense: short sequence"):
        sla_compile.export(model, (random_input(64),))
    detach_gate(model.blocks[1].attention, 0)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention: has no gate; accepted: sla_compile\.prepare"):
        sla_compile.export(model, (x,))
    model = prepared(Model(), x)
    model.blocks[1].attention.forward = lambda x: x  # the gate is there, and what it was for is not
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.sla: its attention is not found"):
        sla_compile.export(model, (x,))


@pytest.mark.parametrize(("name", "strict"), [("WanTransformer3DModel", False), ("FluxTransformer2DModel", True)])
def test_diffusers(name: str, strict: bool) -> None:
    pytest.importorskip("diffusers")
    from tests.flows.test_diffusers import OPTIONS as options
    from tests.zoo.registry import build, call

    torch.set_default_dtype(torch.float32)
    model, inputs = build(name)
    sla_compile.prepare(model, (), inputs, config=options)
    randomize_gates(model)
    with torch.no_grad():
        expected = call(torch.compile(model, backend="sla", options=EAGER), inputs)
        program = sla_compile.export(model, (), inputs, strict=strict)
        assert sparse(program) == len(sla_compile.gates(model))
        assert_close(name, call(program.module(), inputs), expected, 1e-6)


def in_a_fresh_process(folder: Path, x: Tensor, expected: Tensor, name: str) -> None:
    torch.save((x, expected), folder / "tensors.pt")
    worker = FRESH.Process(target=run_saved, args=(str(folder), name))
    worker.start()
    worker.join(300)
    assert worker.exitcode == 0


def exported_attention(device: str = "cpu") -> tuple[ExportedProgram, Tensor, Tensor]:
    """A program, an input, and the output that the definition gives."""
    x = random_input().to(device, torch.float32)
    model = prepared(Attention().to(device, torch.float32), x)
    with torch.no_grad(), defined(model):
        expected = model(x)
    return sla_compile.export(model, (x,)), x, expected


def test_saved_and_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    program, x, expected = exported_attention()
    torch.export.save(program, tmp_path / "program.pt2")
    in_a_fresh_process(tmp_path, x, expected, "program.pt2")


def assert_packaged(program: ExportedProgram, x: Tensor, expected: Tensor, folder: Path) -> None:
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "package.pt2"))
        output = torch._inductor.aoti_load_package(package)(x)
    assert_close("AOTInductor", output, expected, 1e-5)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="AOTInductor needs a C++ compiler")
def test_aot_inductor(tmp_path: Path) -> None:
    """Its one package is compiled from the headers themselves: to prepare them takes longer."""
    program, x, expected = exported_attention()
    quick = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
    with torch._inductor.config.patch(quick):
        assert_packaged(program, x, expected, tmp_path)
    in_a_fresh_process(tmp_path, x, expected, "package.pt2")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_aot_inductor_on_a_gpu(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    plain, x = torch.nn.Linear(16, 16).cuda(), torch.randn(4, 16, device="cuda")
    with torch.no_grad():
        package = str(tmp_path / "plain.pt2")
        torch._inductor.aoti_compile_and_package(torch.export.export(plain, (x,)), package_path=package)
        load = f"import torch; torch._inductor.aoti_load_package({package!r})"
        if subprocess.run([sys.executable, "-c", load], capture_output=True, check=False).returncode:
            pytest.skip("a package of nothing but a torch.nn.Linear does not load here either")
    program, x, expected = exported_attention("cuda")
    assert_close("exported", program.module()(x), expected, 1e-3)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
        assert_close("AOTInductor", torch._inductor.aoti_load_package(package)(x), expected, 1e-3)
