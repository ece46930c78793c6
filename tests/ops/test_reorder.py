"""``sla::reorder``: the op, its lowering in Inductor, and an order in reports, files, fits and exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import sla_compile
from sla_compile.__main__ import main
from sla_compile.checkpoints.gate_format import read_gate_file
from sla_compile.common.token_orders import positions
from sla_compile.ops.reorder import arguments, reorder
from tests.support.capture import HEAD_DIM
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS, WIDTH, Attention, Block, CheckpointedModel, Model, randomize_gates
from tests.support.token_grids import (
    EXACT,
    GRID,
    SEEN,
    TILES,
    TOKENS,
    kernels_of,
    orders,
    placement,
    sdpa,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("shape", [(2, 3, 130, 5), (2, 130, 1)])
def test_the_op_gathers_forth_and_back_and_passes_torchs_own_check(shape: tuple[int, ...]) -> None:
    placed = placement(start=7)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = reorder(x, placed)
    assert torch.equal(y, x[..., list(positions(placed, 130)), :])
    assert torch.equal(reorder(y, placed, inverse=True), x)
    torch.library.opcheck(torch.ops.sla.reorder.default, (x, *arguments(placed)))
    cotangent = torch.randn(shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    assert torch.equal(gradient, reorder(cotangent, placed, inverse=True))
    with torch.inference_mode():
        assert torch.equal(reorder(x, placed), y)


def test_the_op_gathers_each_head_by_its_own_order() -> None:
    placed = placement("tiles,raster,tiles:1", start=7)
    x = torch.randn(2, 3, 130, 5, dtype=torch.float64, requires_grad=True)
    y = reorder(x, placed)
    for head, of_head in enumerate(placed.heads):
        assert torch.equal(y[:, head], x[:, head, list(positions(of_head, 130))])
    assert torch.equal(reorder(y, placed, inverse=True), x)
    torch.library.opcheck(torch.ops.sla.reorder.default, (x, *arguments(placed)))
    cotangent = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(y, x, cotangent)
    assert torch.equal(gradient, reorder(cotangent, placed, inverse=True))
    with pytest.raises(ValueError, match=r"3 orders, one for each head, and \(2, 130, 5\)"):
        reorder(x[:, 0], placed)


class Unprojected(Attention):
    """Queries and keys straight from a norm, the output straight into a function."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.cat([x.sin(), x.cos(), x + 1], dim=-1).unflatten(-1, (3, 2, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, (HEAD_DIM,)), F.rms_norm(k, (HEAD_DIM,))
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2).tanh())


@pytest.mark.parametrize("order", ["tiles", "tiles,tiles:1"])
def test_inductor_fuses_gathers_into_what_stands_next_to_them(order: str) -> None:
    kernels = kernels_of(nn.Sequential(Unprojected()), order)
    assert any("rsqrt" in name and "reorder" in name for name in kernels)
    assert any("tanh" in name and "reorder" in name for name in kernels)


class Modulated(Block):
    """Shift, scale and gate of all tokens, whose gradients are sums over tokens in the model's order."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(3, 1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        shift, scale, gate = self.modulation
        return x + gate * self.attention(self.norm(x) * scale + shift)


def table_loads(code: str) -> int:
    """Where Inductor's loops look a token up."""
    loads = 0
    for kernel in code.split("async_compile.cpp")[1:]:
        for table in re.findall(r"const int32_t\* (in_ptr\d+)", kernel):
            loads += len(re.findall(rf"= {table}\[", kernel))
    return loads


def test_a_backward_gathers_once_what_it_sums_over_tokens() -> None:
    """There are two such sums for every norm with shift and scale; inlined, each looks every token up again."""
    model, x = Model(1), torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    model.blocks[0] = Modulated()
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, **TILES, **EXACT})
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(lambda: compiled(x).square().sum().backward())
    parameters = {name: p for name, p in model.named_parameters() if ".sla." not in name}
    expected = torch.autograd.grad(model(x).square().sum(), [*parameters.values()])
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        assert parameter.grad is not None, name
        assert_close(name, parameter.grad, gradient, 1e-4)
    # before the projections and in the residual sum, each forth and back
    assert [table_loads(code) for code in codes] == [2, 2]


@pytest.mark.parametrize("kind", ["tiles", "tiles,hilbert"])
def test_activation_checkpointing_with_given_grid(kind: str) -> None:
    model, x = CheckpointedModel().double(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, **TILES, **EXACT, "reorder": kind})
    results = [(y := f(x), torch.autograd.grad(y.square().sum(), model.blocks[0].attention.qkv.weight)[0])
               for f in (compiled, Model.forward.__get__(model))]  # fmt: skip
    for name, actual, expected in zip(("output", "gradient"), *results, strict=True):
        assert_close(name, actual, expected, 1e-10)
    assert orders(model) == [{**SEEN, "kind": kind}] * 2


def test_the_report_says_which_order() -> None:
    model, x = Model(1), torch.randn(1, TOKENS, WIDTH)
    report = sla_compile.explain(model, (x,), config={**OPTIONS, **TILES})
    assert report.to_dict()["sites"][0]["order"] == SEEN
    assert "tiles of 4 x 5 x 6 tokens" in str(report).replace("\n", " ")
    (norm, *_), diff = [line for line in report.sites[0].diff if "sla::reorder" in line], report.sites[0].diff
    assert re.fullmatch(r"\+ \w+ = sla::reorder\(\w+, tiles, \[4, 5, 6\], 0, \[16, 16\], False\)", norm)
    assert diff[-1].startswith("+ ")
    assert diff[-1].endswith("True)")
    report = sla_compile.explain(model, (x,), config={**OPTIONS, "reorder": "hilbert"})
    assert "tokens in the model's order: no grid of tokens was seen" in str(report).replace("\n", " ")
    json.dumps(report.to_dict())
    assert sla_compile.explain(model, (x,), config=OPTIONS).sites[0].order == {"kind": "raster"}


def test_a_file_of_another_order_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(1, TOKENS, WIDTH)
    tiles = sla_compile.prepare(Model(), (x,), config={**OPTIONS, **TILES})
    sla_compile.save(tiles, tmp_path / "gates")
    assert read_gate_file(tmp_path / "gates").config.grid == GRID
    assert main(["show", str(tmp_path / "gates")]) == 0
    assert "tiles of 4 x 5 x 6 tokens" in " ".join(capsys.readouterr().out.split())
    plain = sla_compile.prepare(Model(), (x,), config=OPTIONS)
    with pytest.raises(ValueError, match="reorder is 'tiles' in the file, 'raster' in the model"):
        sla_compile.load(plain, tmp_path / "gates")
    with pytest.raises(ValueError, match="reorder='hilbert' here, 'tiles' in its gate"):
        torch.compile(tiles, backend="sla", options={"inner": "eager", "reorder": "hilbert"})(x)


def test_calibration_and_allocation_see_the_attention_in_its_order() -> None:
    """At topk=1 nothing is missed, and below it the sparse branch is that of the order."""
    model, x = Model(1).double(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    errors = {}
    for order in ("raster", "tiles"):
        prepared = sla_compile.prepare(sla_compile.detach(model), (x,), config={**OPTIONS, **TILES, "reorder": order})
        (site,) = sla_compile.calibrate(prepared, [(x,)]).sites
        errors[order] = site.sparse_only
        sla_compile.detach(model)
        exact = sla_compile.prepare(model, (x,), config={**OPTIONS, **TILES, **EXACT, "reorder": order})
        (site,) = sla_compile.calibrate(exact, [(x,)]).sites
        assert site.sparse_only < 1e-10
    assert errors["raster"] != errors["tiles"]


@pytest.mark.parametrize("kind", ["tiles", "tiles,hilbert"])
def test_exported_programs_keep_the_order(kind: str) -> None:
    model, x = Model(1).double(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    sla_compile.prepare(model, (x,), config={**OPTIONS, **TILES, "reorder": kind, "inner": "eager"})
    randomize_gates(model)
    program = sla_compile.export(model, (x,))
    # as in the compiled model: before the projections and behind that of the output, or q, k, v and the output
    gathers = sum(node.target is torch.ops.sla.reorder.default for node in program.graph.nodes)
    assert gathers == (2 if kind == "tiles" else 4)
    compiled = torch.compile(model, backend="sla", options={"inner": "eager"})
    assert_close("program", program.module()(x), compiled(x), 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["tiles", "tiles:2,raster"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_on_a_gpu_and_in_a_cuda_graph_it_is_dense_attention_at_topk_of_one(mode: str | None, kind: str) -> None:
    model, grid = Model(2).cuda(), (4, 12, 16)
    x = torch.randn(2, 768, WIDTH, device="cuda")
    exact = model.double()(x.double())
    model.float()
    options = {"min_tokens": 0, "reorder": kind, "grid": grid, **EXACT}
    compiled = torch.compile(sla_compile.prepare(model, (x,), config=options), backend="sla", mode=mode)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        output = compiled(x)
        gradient = torch.autograd.grad(output.square().sum(), model.blocks[0].attention.qkv.weight)[0].clone()
    assert_close("output", output, exact, 1e-3)
    wanted = torch.autograd.grad(model(x).square().sum(), model.blocks[0].attention.qkv.weight)[0]
    assert_close("gradient", gradient, wanted, 1e-2)
    assert orders(model) == [{"kind": kind, "grid": list(grid), "start": 0}] * 2
