"""DTensor's tensor parallelism: self-attention is known as such; `test_many_gpus.py` trains it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sla_compile
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS
from tests.support.processes import launch

WIDTH, HEAD_DIM = 32, 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


def seeded(world: int) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    x, model = torch.randn(2, 96, WIDTH), Block()
    plan: dict[str, Any] = {f"attention.{name}": ColwiseParallel() for name in "qkv"} | {
        "attention.out": RowwiseParallel()
    }
    return parallelize_module(model, init_device_mesh("cpu", (world,)), plan) if world else model, x


def parallel_on(rank: int, world: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    try:
        model, x = seeded(world)
        options: dict[str, Any] = {**OPTIONS, "topk": 1.0, "bottomk": 0.0, "inner": "eager"}
        run: Any = torch.compile(model, backend="sla", options=options)
        output = run(x)
        output.square().mean().backward()
        (site,) = sla_compile.report(model).sites
        found = (site.rewritten, site.reason, site.value, site.accepted)
        if rank == 0:
            result = {"site": found, "output": output.detach(), "gates": len(sla_compile.gates(model))}
            torch.save(result, f"{folder}/0.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("world", [1, 2])
def test_projections_of_a_parallel_plan_are_of_one_tensor(world: int, tmp_path: Path) -> None:
    if world == 1:
        parallel_on(0, world, str(tmp_path))
    else:
        launch(parallel_on, world, str(tmp_path), ranks=world)
    result = torch.load(tmp_path / "0.pt")
    assert result["site"] == (True, "self-attention", "96 tokens", "")
    assert result["gates"] == 1
    model, x = seeded(0)
    assert_close("output", result["output"], model(x), 1e-6)
