"""Cases of ``tests/flows/test_many_gpus.py``: sequence, tensor and data parallelism on two ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sla_compile
from tests.support.closeness import assert_close
from tests.support.models import MARGINAL, Model, randomize_gates
from tests.support.ranks import WORLD, of_rank_0, whole

SMALL: dict[str, Any] = {"topk": 0.3, "bottomk": 0.2, "block_q": 16, "block_k": 16, "min_tokens": 32}
WITH_HEADS: dict[str, Any] = {**SMALL, "linear": "marginal", "gate": "per_head", "sparse_scale": True}
INNER: dict[str, Any] = {"inner": "aot_eager"}
EAGER: dict[str, Any] = {"inner": "eager"}
"""Where AOT autograd is not the point: what is compared with, and validation a second time."""
PLAIN: dict[str, Any] = {"return_dict": False}


def wan(**changes: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """A Wan of diffusers in float64 and its inputs: 96 tokens."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    sizes: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32}
    sizes |= {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16}
    model = WanTransformer3DModel(**{**sizes, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model, (torch.randn(1, 4, 6, 8, 8), torch.tensor([500]), torch.randn(1, 12, 16))


def outcome(compiled: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output, every gradient, and the parameters after one step of an optimizer, whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    output = compiled(*inputs, **PLAIN)[0]
    output.square().mean().backward()
    gradients = {f"gradient of {name}": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    state = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return {"output": output.detach(), **gradients, **state}


def summed(found: dict[str, Tensor]) -> None:
    """Sum gradients over the ranks, each of which has those of its own tokens."""
    for name, tensor in found.items():
        if name.startswith("gradient of"):
            dist.all_reduce(tensor)


@functools.cache
def of_one_process() -> tuple[dict[str, Tensor], str]:
    """What training without a second rank gives, and the call site of its gate."""
    model, inputs = wan()
    sla_compile.prepare(model, inputs, PLAIN, config=WITH_HEADS)
    with_gates(model)
    expected = outcome(torch.compile(model, backend="sla", options=EAGER), model, inputs)
    (made,) = sla_compile.gates(model).values()
    torch._dynamo.reset()
    return expected, made.call_site


def with_gates(model: nn.Module) -> None:
    """Gates with values, and of four heads that have a topk each, another for each."""
    torch.manual_seed(1)
    randomize_gates(model)
    for gate in sla_compile.gates(model).values():
        if gate.sparsity is not None and gate.sparsity.shape == (4, 2):
            gate.sparsity[:, 0] = torch.tensor([100_000, 300_000, 500_000, 700_000])


def enable_ulysses(model: Any) -> None:
    from diffusers import ContextParallelConfig

    with mock.patch("torch.accelerator.device_count", return_value=1):  # diffusers divides by it, on CPUs too
        mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("ring", "ulysses"))
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD, mesh=mesh))


def state_of(model: nn.Module) -> Any:
    return list(model.state_dict()), [len(module._forward_pre_hooks) for module in model.modules()]


def diffusers_ulysses(rank: int, folder: Path, *, prepared_first: bool) -> None:
    """Under diffusers' Ulysses as on one process, in validation and then in training."""
    expected, call_site = of_rank_0(of_one_process)
    model, inputs = wan()
    config = WITH_HEADS
    if prepared_first:
        sla_compile.prepare(model, inputs, PLAIN, config=config)
    enable_ulysses(model)
    if not prepared_first:
        before = state_of(model)
        assert any(site.rewritten for site in sla_compile.explain(model, inputs, PLAIN, config=config).sites)
        assert state_of(model) == before, "nothing is left behind"
        sla_compile.prepare(model, inputs, PLAIN, config=config)
    (path,) = sla_compile.gates(model)
    assert path == "blocks.0.attn1.sla"
    assert sla_compile.gates(model)[path].heads == 2, "of all ranks"
    with_gates(model)
    with torch.no_grad():  # what is not compiled stays dense; diffusers' hooks look at signatures once
        model(*inputs, **PLAIN)
    for block in model.blocks:  # diffusers' own hooks of the whole model break the graph, outside the blocks
        block.compile(backend="sla", options=INNER if prepared_first else EAGER, fullgraph=True)
    with torch.no_grad():
        assert_close("validation", model(*inputs, **PLAIN)[0], expected["output"], 1e-12)
    assert [site.path for site in sla_compile.report(model).sites if site.rewritten] == ["blocks.0.attn1"]
    assert sla_compile.gates(model)[path].call_site == call_site, "a file of many GPUs fits one"
    if not prepared_first:
        return
    found = outcome(model, model, inputs)
    assert [site.path for site in sla_compile.report(model).sites if site.rewritten] == ["blocks.0.attn1"]
    summed(found)
    for name in expected:
        if name == "output" or name.startswith("gradient"):
            assert_close(name, found[name], expected[name], 3e-7)  # Wan computes its modulation in float32


def small_model() -> Any:
    """Two attentions in float64, of four heads; the gates of an optimizer's choice."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    return Model()


def sharded(model: Any) -> Any:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


TOKENS = torch.randn(WORLD, 100, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def prepared(config: dict[str, Any] = MARGINAL) -> Any:
    model = sla_compile.prepare(small_model(), (TOKENS,), config=config)
    with_gates(model)
    return model


def files(rank: int, folder: Path) -> None:
    """Saved on two ranks and loaded on one, and the reverse; what cannot be is refused."""
    alone, model = prepared(), sharded(prepared())
    sla_compile.save(model, folder / "two.safetensors")
    assert (folder / "two.safetensors").exists(), "on every rank once save returns"
    loaded = sla_compile.load(small_model(), folder / "two.safetensors")
    for name, parameter in alone.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter), name
    with torch.no_grad():
        for parameter in sla_compile.gate_parameters(model):
            parameter.zero_()
    if rank == 0:
        sla_compile.save(alone, folder / "one.safetensors")
    dist.barrier()
    sla_compile.load(model, folder / "one.safetensors")
    for name, parameter in alone.named_parameters():
        assert torch.equal(whole(dict(model.named_parameters())[name]), parameter), name
    with pytest.raises(FileNotFoundError):  # on both ranks, not only on the one that writes
        sla_compile.save(model, folder / "none" / "gates.safetensors")
    late = sharded(small_model())
    with pytest.raises(ValueError, match="its owner is in fully_shard already; accepted: load first"):
        sla_compile.load(late, folder / "one.safetensors")
    assert sla_compile.gates(late) == {}
    flat = FullyShardedDataParallel(prepared(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"flattened over ranks; accepted: .*summon_full_params"):
        sla_compile.save(flat, folder / "flat.safetensors")
    assert not (folder / "flat.safetensors").exists()
    with FullyShardedDataParallel.summon_full_params(flat):
        sla_compile.save(flat, folder / f"flat{rank}.safetensors")
    for path, gate in sla_compile.gates(sla_compile.load(small_model(), folder / f"flat{rank}.safetensors")).items():
        assert torch.equal(gate.weight, sla_compile.gates(alone)[path].weight)


def fitted(kind: str, model: Any, batches: list[tuple[Tensor]]) -> dict[str, Tensor]:
    """The gates that ``kind`` gives."""
    if kind == "calibrate":
        sla_compile.calibrate(model, batches)
    elif kind == "allocate":
        sla_compile.allocate(model, batches, budget=0.2)
    else:
        sla_compile.distill(model, batches, steps=3, loss=kind, compile_options=INNER if kind == "output" else None)
    return {
        f"{path}.{name}": whole(tensor).detach()
        for path, gate in sla_compile.gates(model).items()
        for name, tensor in gate.state_dict().items()
    }


def chosen(model: Any, batches: list[tuple[Tensor]]) -> dict[str, dict[str, float]]:
    """The errors that choose_orders measures, by gate path and order."""
    report = sla_compile.choose_orders(model, batches, orders=("raster", "tiles:1"))
    return {site.path: dict(site.errors) for site in report.sites}


def fitting(rank: int, folder: Path) -> None:
    """Each rank with batches of its own: all get the gates that one process gets from all batches."""
    config = {**MARGINAL, "max_topk": 0.9}
    for kind in ("calibrate", "allocate", "attention", "output"):
        torch._dynamo.reset()
        rounds = 1 if kind == "calibrate" else 3
        mine = [(TOKENS[rank : rank + 1] * (1 + turn),) for turn in range(rounds)]
        joined = [(TOKENS * (1 + turn),) for turn in range(rounds)]
        expected = of_rank_0(fitted, kind, prepared(config), joined)
        before = {name: tensor for name, tensor in prepared(config).state_dict().items() if ".sla" in name}
        assert any(not torch.equal(expected[name], before[name]) for name in expected), kind
        wrapped: dict[str, Any] = {"ddp": nn.parallel.DistributedDataParallel(prepared(config))}
        if kind != "output":
            wrapped["fsdp2"] = sharded(prepared(config))
        for wrapper, model in wrapped.items():
            found = fitted(kind, model, mine)
            for name, tensor in found.items():
                others = [torch.empty_like(tensor) for _ in range(WORLD)]
                dist.all_gather(others, tensor.contiguous())
                assert torch.equal(others[0], others[1]), f"{kind}, {wrapper}: {name} differs between ranks"
                assert_close(f"{kind}, {wrapper}: {name}", tensor.double(), expected[name].double(), 1e-9)
    grid = {**MARGINAL, "grid": (4, 5, 5)}
    orders = [
        chosen(prepared(grid), [(TOKENS,)]),
        chosen(nn.parallel.DistributedDataParallel(prepared(grid)), [(TOKENS[rank : rank + 1],)]),
    ]
    for path, errors in orders[0].items():
        for order, error in errors.items():
            assert orders[1][path][order] == pytest.approx(error, rel=1e-9), f"{path}, {order}"
    with pytest.raises(
        ValueError, match=r"in fully_shard, which cannot be prepared again; accepted: choose_orders before"
    ):
        chosen(sharded(prepared(grid)), [(TOKENS[:1],)])
    with pytest.raises(ValueError, match=r"loss: got 'output' with a gate that is sharded, blocks\.0\.attention"):
        fitted("output", sharded(prepared(config)), [(TOKENS[:1],)])
    with pytest.raises(TypeError, match=r"group: got int; accepted: a torch\.distributed\.ProcessGroup, or None"):
        sla_compile.calibrate(prepared(), [(TOKENS[:1],)], group=0)


class ParallelAttention(nn.Module):
    """Heads as torchtitan has them: ``-1``, so that a rank has its own; or attention on DTensors."""

    def __init__(self, key_heads: int) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(32, 64), nn.Linear(64, 32)
        self.k, self.v = (nn.Linear(32, key_heads * 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(out.transpose(1, 2).flatten(2))


class ParallelModel(nn.Module):
    def __init__(self, key_heads: int = 4) -> None:
        super().__init__()
        self.attention = ParallelAttention(key_heads)

    def forward(self, x: Tensor, **_: Any) -> list[Tensor]:
        return [x + self.attention(x)]


def parallel_model(config: dict[str, Any], key_heads: int) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = sla_compile.prepare(ParallelModel(key_heads), (TOKENS,), config=config)
    with_gates(model)
    return model


def of_one_rank(config: dict[str, Any], key_heads: int) -> dict[str, Tensor]:
    alone = parallel_model(config, key_heads)
    return outcome(torch.compile(alone, backend="sla", options=EAGER), alone, (TOKENS,))


def tensor_parallel(rank: int, folder: Path) -> None:
    """Each rank with half of the heads: output, gradients and one step as on one process."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    # traced before it is rewritten, and on CPUs torch searches for its sharding for minutes
    register_sharding(cpu)(lambda *_, **__: [([Shard(1)] * 2, [Shard(1)] * 3 + [None] * 3)])
    virtual = {"linear": "taylor", "bottomk": 0.0, "max_topk": 0.9, "topk_by": "head"}
    for changes, key_heads in (({}, 4), ({"gate": "per_head", "sparse_scale": True}, 2), (virtual, 2)):
        torch._dynamo.reset()
        config = {**MARGINAL, **changes}
        expected = of_rank_0(of_one_rank, config, key_heads)
        for local in (True, False):
            torch._dynamo.reset()
            model = parallel_model(config, key_heads)
            column: Any = ColwiseParallel(use_local_output=local)
            plan = {f"attention.{name}": column for name in "qkv"} | {"attention.out": RowwiseParallel()}
            parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)
            found = outcome(torch.compile(model, backend="sla", options=INNER), model, (TOKENS,))
            (site,) = sla_compile.report(model).sites
            assert site.rewritten, (changes, local, str(site))
            assert found.keys() == expected.keys()
            for name in expected:
                if changes is virtual and name == "gradient of attention.k.bias":
                    # all keys are in one softmax, which does not change when they move together
                    assert max(found[name].norm(), expected[name].norm()) < 1e-15
                else:
                    assert_close(f"{changes}, {local}: {name}", found[name], expected[name], 1e-11)
            sla_compile.save(model, folder / f"{rank}.safetensors")
            (gate,) = sla_compile.gates(sla_compile.load(ParallelModel(), folder / f"{rank}.safetensors")).values()
            for saved, own in zip(gate.parameters(), sla_compile.gate_parameters(model), strict=True):
                assert torch.equal(saved, own)


def holds_a_group(rank: int, folder: Path) -> None:
    """A model that holds a process group and a mesh is prepared, on one rank alone too."""
    model = small_model()
    model.group, model.blocks[0].mesh = dist.group.WORLD, init_device_mesh("cpu", (WORLD,))
    if rank == 0:
        sla_compile.prepare(model, (TOKENS,), config=MARGINAL)
        assert len(sla_compile.gates(model)) == 2


def gate_in_fully_shard(rank: int, folder: Path) -> None:
    """A gate is never called, so that nothing would gather it: refused with the reason."""
    model = prepared()
    fully_shard(model.blocks[0].attention.sla)
    with pytest.raises(ValueError, match=r"attention\.sla: the gate itself is in fully_shard, .*; accepted: "):
        torch.compile(model, backend="sla", options=INNER)(TOKENS)
