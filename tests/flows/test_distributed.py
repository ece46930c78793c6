"""Two processes give the gradients of one: DistributedDataParallel and FSDP2, blocks compiled one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import FileStore, checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_module

import sla_compile
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS, Model, numbers, randomize_gates
from tests.support.processes import launch

WORLD = 2


def seeded_model() -> Model:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = Model()
    sla_compile.prepare(model, (torch.zeros(1, 100, 32),), config={**OPTIONS, "max_topk": 0.9})
    sla_compile.set_sparsity(model, topk=0.5)
    randomize_gates(model)
    return model


def batch() -> torch.Tensor:
    return torch.randn(WORLD, 100, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def compile_blocks(model: Model) -> None:
    for block in model.blocks:
        block.compile(backend="sla", options={"inner": "aot_eager"})


def data_parallel(model: Model) -> nn.Module:
    compile_blocks(model)
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: Model) -> Model:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def flattened(module: nn.Module) -> nn.Module:
    """In FSDP1."""
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


def fully_sharded(model: Model) -> nn.Module:
    compile_blocks(sharded(model))
    return model


def compiled_data_parallel(model: Model) -> Any:
    """Compiled as a whole, cut by torch's DDPOptimizer into buckets too small to hold an attention and its gate."""
    # A real model's blocks are larger than these bytes, which torch reads anew for each frame.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.003)
    return torch.compile(wrapped, backend="sla", options={"inner": "aot_eager"})


WRAPPERS: dict[str, Callable[[Model], Any]] = {
    "ddp": data_parallel,
    "ddp, compiled whole": compiled_data_parallel,
    "fsdp2": fully_sharded,
}


def work(rank: int, wrapper: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    store = FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    try:
        model = seeded_model()
        wrapped = WRAPPERS[wrapper](model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        wrapped(batch()[rank : rank + 1]).square().mean().backward()
        gradients = {name: _whole(p.grad) for name, p in model.named_parameters()}
        checkpoint.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
        optimizer.step()
        state = {name: _whole(p.detach()) for name, p in model.named_parameters()}
        kinds = [type(p).__name__ for p in sla_compile.gate_parameters(model)]
        rewritten = [site.rewritten for site in sla_compile.report(model).sites]
        graphs = torch._dynamo.utils.counters["aot_autograd"]["total"]
        if rank == 0:
            measured = {"kinds": kinds, "rewritten": rewritten, "graphs": graphs}
            torch.save({"gradients": gradients, "state": state, **measured}, f"{folder}/result.pt")
    finally:
        dist.destroy_process_group()


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_give_the_gradients_of_one(wrapper: str, tmp_path: Path) -> None:
    launch(work, wrapper, str(tmp_path), ranks=WORLD)
    result = torch.load(tmp_path / "result.pt")
    if wrapper == "fsdp2":
        assert set(result["kinds"]) == {"DTensor"}, "gates are sharded like any parameter"
    if wrapper == "ddp, compiled whole":
        assert result["graphs"] > 3, "cut into buckets"
    assert result["rewritten"] == [True, True]
    try:
        model = seeded_model()
        compile_blocks(model)
        model(batch()).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert_close(f"gradient of {name}", result["gradients"][name], parameter.grad, 1e-10)
            assert_close(name, result["state"][name], parameter.detach() - parameter.grad, 1e-10)
        # The sharded checkpoint goes into a model of one process.
        other = sla_compile.prepare(Model(), (torch.zeros(1, 100, 32),), config={**OPTIONS, "max_topk": 0.9})
        state = {"model": other.state_dict()}
        checkpoint.load(state, checkpoint_id=tmp_path / "checkpoint")
        other.load_state_dict(state["model"])
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone: what does not need a second one takes no time to start it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process", "fresh_dynamo", "float64")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp1", "fsdp2"])
def test_no_gate_is_made_behind_the_wrappers_back(wrapper: str) -> None:
    """Its gradients would not be averaged over the processes; without gradients it does no harm."""
    wrappers: dict[str, Callable[[Model], nn.Module]] = {
        "ddp": nn.parallel.DistributedDataParallel,
        "fsdp1": flattened,
        "fsdp2": sharded,
    }
    model = wrappers[wrapper](Model())
    wrapped: Any = torch.compile(model, backend="sla", options={**OPTIONS, "inner": "aot_eager"})
    with pytest.raises(ValueError, match=r"attention\.sla: the model is in .* already, .*call sla_compile\.prep"):
        wrapped(batch())
    with torch.no_grad():
        wrapped(batch())
    assert len(sla_compile.gates(wrapped)) == 2
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(Model())
        with pytest.raises(ValueError, match=r"^blocks\.0\.attention\.sla: the model is in Dist.* already, "):
            sla_compile.prepare(model, (batch(),), config=OPTIONS)
        assert sla_compile.gates(model) == {}
        with torch.no_grad():
            sla_compile.prepare(model, (batch(),), config=OPTIONS)
        assert [*sla_compile.gates(model)] == ["blocks.0.attention.sla", "blocks.1.attention.sla"]


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
@pytest.mark.parametrize("inner", [True, False])
def test_fits_refuse_fsdp1_before_anything_changes(inner: bool) -> None:
    model: Any = Model()
    if inner:
        model.blocks[1] = flattened(model.blocks[1])
    else:
        model = flattened(sla_compile.prepare(model, (torch.zeros(1, 100, 32),), config=OPTIONS))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [(torch.randn(1, 100, 32),)] * 2
    place = "blocks.1" if inner else "the model"
    named = rf"^{place}: got a FullyShardedDataParallel \(FSDP1\).*fully_shard"
    for fit in (
        partial(sla_compile.calibrate, model, batches),
        partial(sla_compile.allocate, model, batches),
        partial(sla_compile.distill, model, batches, steps=1),
        partial(sla_compile.allocate_by_time, model, {0.5: batches}),
        partial(sla_compile.prepare, model, batches[0]),
        partial(sla_compile.explain, model, batches[0]),
        partial(sla_compile.atlas, model, batches),
    ):
        with pytest.raises(ValueError, match=named):
            fit()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(sla_compile.gates(model)) == (0 if inner else 2)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("linear", "max_topk"), [("marginal", None), ("marginal", 0.5), ("taylor", None)])
def test_fits_refuse_gates_that_a_plan_distributes(linear: str, max_topk: float | None) -> None:
    batches = [(torch.randn(1, 100, 32),)] * 2
    model = sla_compile.prepare(Model(), batches[0], config={**OPTIONS, "linear": linear, "max_topk": max_topk})
    for gate in sla_compile.gates(model).values():
        distribute_module(gate, init_device_mesh("cpu", (1,)))
    named = r"^blocks\.0\.attention\.sla: got a gate of DTensors \(R\).*accepted: a gate outside of the parallel plan"
    with pytest.raises(ValueError, match=named):
        sla_compile.allocate(model, batches)
    if linear == "marginal" and max_topk is None:  # nothing runs the gate
        assert sla_compile.calibrate(model, batches).sites[0].factor is not None
    else:
        with pytest.raises(ValueError, match=named):
            sla_compile.calibrate(model, batches)


@pytest.mark.usefixtures("one_process", "fresh_dynamo", "float64")
def test_gates_in_a_wrapper_are_named_as_in_the_model(tmp_path: Path) -> None:
    model = seeded_model()
    wrapped: Any = torch.compile(
        nn.parallel.DistributedDataParallel(model), backend="sla", options={"inner": "aot_eager"}
    )
    wrapped(batch())
    assert sla_compile.gates(wrapped) == sla_compile.gates(model)
    assert [site.path for site in sla_compile.report(wrapped).sites] == ["blocks.0.attention", "blocks.1.attention"]
    sla_compile.save(wrapped, tmp_path / "gates.safetensors")
    alone = sla_compile.load(Model(), tmp_path / "gates.safetensors")
    with torch.no_grad():
        for parameter in sla_compile.gate_parameters(wrapped):
            parameter.zero_()
    sla_compile.load(wrapped, tmp_path / "gates.safetensors")
    for path, gate in sla_compile.gates(alone).items():
        assert torch.equal(numbers(gate), numbers(sla_compile.gates(model)[path]))
