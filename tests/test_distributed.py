"""Two processes give the gradients of one: DistributedDataParallel and FSDP2, blocks compiled one by one."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import sla_compile
from tests.helpers import assert_close
from tests.models import OPTIONS, Model, randomize_gates

WORLD = 2


def seeded_model() -> nn.Module:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = Model()
    sla_compile.prepare(model, (torch.zeros(1, 100, 32),), config=OPTIONS)
    randomize_gates(model)
    return model


def batch() -> torch.Tensor:
    return torch.randn(WORLD, 100, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def compile_blocks(model: nn.Module) -> None:
    for block in model.blocks:
        block.compile(backend="sla", options={"inner": "aot_eager"})


def data_parallel(model: nn.Module) -> nn.Module:
    compile_blocks(model)
    return nn.parallel.DistributedDataParallel(model)


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    compile_blocks(model)
    return model


WRAPPERS = {"ddp": data_parallel, "fsdp2": fully_sharded}


def work(rank: int, wrapper: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE=str(WORLD))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    try:
        model = seeded_model()
        wrapped = WRAPPERS[wrapper](model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        wrapped(batch()[rank : rank + 1]).square().mean().backward()
        gradients = {name: _whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        state = {name: _whole(p.detach()) for name, p in model.named_parameters()}
        sharded = [type(p).__name__ for p in sla_compile.gate_parameters(model)]
        if rank == 0:
            torch.save({"gradients": gradients, "state": state, "kinds": sharded}, f"{folder}/result.pt")
    finally:
        dist.destroy_process_group()


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_give_the_gradients_of_one(wrapper: str, tmp_path: Path) -> None:
    mp.spawn(work, args=(wrapper, str(tmp_path)), nprocs=WORLD)
    result = torch.load(tmp_path / "result.pt")
    if wrapper == "fsdp2":
        assert set(result["kinds"]) == {"DTensor"}, "gates are sharded like any parameter"
    try:
        model = seeded_model()
        compile_blocks(model)
        model(batch()).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert_close(f"gradient of {name}", result["gradients"][name], parameter.grad, 1e-10)
            assert_close(name, result["state"][name], parameter.detach() - parameter.grad, 1e-10)
    finally:
        torch.set_default_dtype(torch.float32)
