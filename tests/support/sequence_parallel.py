"""Cases of ``tests/flows/test_many_gpus.py``: tokens exchanged for heads by hand, and what is no such exchange."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.experimental import context_parallel, register_sharding

import sla_compile
from benchmarks.ulysses_wan import heads_for_tokens, tokens_for_heads
from sla_compile.user_warnings import DenseAttentionWarning
from tests.support.closeness import assert_close
from tests.support.many_gpus import EAGER, INNER, PLAIN, SMALL, WITH_HEADS, outcome, summed, wan, with_gates
from tests.support.models import MARGINAL
from tests.support.ranks import WORLD, of_rank_0

VIRTUAL: dict[str, Any] = {"linear": "taylor", "bottomk": 0.0, "max_topk": 0.9, "topk_by": "head"}
TOKENS = torch.randn(2, 128, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Attention(nn.Module):
    """Self-attention; with ``parts``, tokens are exchanged for so many heads on each rank; with ``mesh``, DTensors."""

    def __init__(self, heads: int, parts: tuple[int, ...]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 16 * heads) for _ in range(3))
        self.out = nn.Linear(16 * heads, 32)
        self.parts = parts
        self.mesh: Any = None

    def exchanged(self, x: Tensor) -> Tensor:
        if self.mesh is not None:
            whole = DTensor.from_local(x.transpose(1, 2), self.mesh, [Replicate()])
            return whole.redistribute(self.mesh, [Shard(1)])
        if not self.parts:
            return x.transpose(1, 2)
        if len({*self.parts}) == 1:
            return heads_for_tokens(x, dist.group.WORLD)
        own, sent = self.parts[dist.get_rank()], x.permute(2, 1, 0, 3).contiguous()  # (H, N/P, B, D)
        group: Any = dist.group.WORLD
        received = collectives.all_to_all_single_autograd(sent, [own] * WORLD, list(self.parts), group)
        return received.unflatten(0, (WORLD, own)).permute(3, 1, 0, 2, 4).flatten(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.exchanged(layer(x).unflatten(-1, (-1, 16))) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        if self.mesh is not None or len({*self.parts}) > 1:
            return y
        return self.out((tokens_for_heads(y, dist.group.WORLD) if self.parts else y.transpose(1, 2)).flatten(2))


class Model(nn.Module):
    def __init__(self, heads: int = 4, parts: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        self.attention = Attention(heads, parts)

    def forward(self, x: Tensor, **_: Any) -> list[Tensor]:
        return [self.attention(x)]


def prepared(config: dict[str, Any], **form: Any) -> Any:
    model = sla_compile.prepare(Model(**form), (TOKENS,), config=config)
    with_gates(model)
    return model


def of_one_rank(config: dict[str, Any]) -> dict[str, Tensor]:
    alone = prepared(config)
    return outcome(torch.compile(alone, backend="sla", options=EAGER), alone, (TOKENS,))


def by_hand(rank: int, folder: Path) -> None:
    """Each rank with half of the tokens, then with half of the heads and what of the gate is theirs."""
    config = {**MARGINAL, **VIRTUAL}
    expected = of_rank_0(of_one_rank, config)
    model = prepared(config)
    model.attention.parts = (2, 2)
    found = outcome(torch.compile(model, backend="sla", options=INNER), model, (TOKENS.chunk(WORLD, 1)[rank],))
    (site,) = sla_compile.report(model).sites
    assert site.rewritten, str(site)
    assert_close("output", found["output"], expected["output"].chunk(WORLD, 1)[rank], 1e-12)
    summed(found)
    for name in expected:
        if name.startswith("gradient") and name != "gradient of attention.k.bias":  # all keys are in one softmax
            assert_close(name, found[name] / WORLD, expected[name], 1e-11)  # a loss is the mean of a rank's tokens


def on_cpus(outputs: list[Any], inputs: list[Any]) -> None:
    """The placements of torch's dense attention on CPUs, for which it would search for minutes."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    register_sharding(cpu)(lambda *_, **__: [(outputs, [*inputs, None, None, None])])


def unequal_heads(rank: int, folder: Path) -> None:
    """Numbers of each head's own on heads that the ranks do not divide: refused with the heads, nothing changed."""
    forms = ({"gate": "per_head"}, True), ({"sparse_scale": True}, False), (VIRTUAL, True)
    for config, ahead in forms:
        torch._dynamo.reset()
        settings = {**MARGINAL, **config}
        model: Any = Model(3)
        if ahead:
            sla_compile.prepare(model, (TOKENS,), config=settings)
        model.attention.parts = (2, 1)
        before = list(model.state_dict())
        run = torch.compile(model, backend="sla", options=EAGER if ahead else {**settings, **EAGER})
        with pytest.raises(ValueError, match=r"^attention\.sla: got heads in parts of 2, 1 on 2 ranks, .*accepted: "):
            run(TOKENS.chunk(WORLD, 1)[rank])
        assert list(model.state_dict()) == before
    shared = prepared(MARGINAL, heads=3)
    shared.attention.parts = (2, 1)
    with torch.no_grad():
        torch.compile(shared, backend="sla", options=EAGER)(TOKENS.chunk(WORLD, 1)[rank])
    assert sla_compile.report(shared).sites[0].rewritten, "what all heads share needs no equal parts"
    torch._dynamo.reset()
    on_cpus([Shard(1)] * 2, [Shard(1)] * 3)
    of_dtensors: Any = sla_compile.prepare(Model(3), (TOKENS,), config={**MARGINAL, "gate": "per_head"})
    of_dtensors.attention.mesh = init_device_mesh("cpu", (WORLD,))
    with pytest.raises(ValueError, match=r"^attention\.sla: got 3 heads on 2 ranks, .*accepted: heads in equal parts"):
        torch.compile(of_dtensors, backend="sla", options=EAGER)(TOKENS)
    torch._dynamo.reset()
    spread = prepared(MARGINAL)
    distribute_module(spread.attention.sla, init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(
        ValueError, match=r"^attention\.sla: got a gate of DTensors \(R\) for an attention of local tensors"
    ):
        torch.compile(spread, backend="sla", options=EAGER)(TOKENS)


def enable(model: Any, **degrees: Any) -> None:
    from diffusers import ContextParallelConfig

    with mock.patch("torch.accelerator.device_count", return_value=1):  # diffusers divides by it, on CPUs too
        ring = degrees.get("ring_degree", 1)
        mesh = init_device_mesh("cpu", (ring, WORLD // ring), mesh_dim_names=("ring", "ulysses"))
        model.enable_parallelism(config=ContextParallelConfig(mesh=mesh, **degrees))


def refused_engines(rank: int, folder: Path) -> None:
    """diffusers' other forms, and heads that its Ulysses cannot divide: an error of each rank, before an exchange."""
    ring = r"ring attention of diffusers \(ring_degree=2\)"
    model, inputs = wan()
    sla_compile.prepare(model, inputs, PLAIN, config=WITH_HEADS)
    enable(model, ring_degree=WORLD)
    for block in model.blocks:
        block.compile(backend="sla", options=EAGER)
    accepted = r"accepted: ContextParallelConfig\(ulysses_degree=P"
    with pytest.raises(ValueError, match=rf"^blocks\.0\.attn1: {ring} .*{accepted}"):
        model(*inputs, **PLAIN)
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"ulysses_degree": WORLD, "ulysses_anything": True}, 2, "ulysses_anything of diffusers"),
        ({"ulysses_degree": WORLD}, 3, "Ulysses of diffusers with 3 heads on 2 ranks"),
    ]
    for degrees, heads, seen in cases:
        torch._dynamo.reset()
        late, inputs = wan(num_attention_heads=heads)
        enable(late, **degrees)
        with pytest.raises(ValueError, match=rf"^blocks\.0\.attn1: {seen} .*accepted: .* P divides the {heads} heads"):
            sla_compile.prepare(late, inputs, PLAIN, config=WITH_HEADS)
        assert sla_compile.gates(late) == {}
    excluded, inputs = wan()
    enable(excluded, ring_degree=WORLD)
    with pytest.raises(ValueError, match="Native attention does not support return_lse"):  # diffusers' word, on a CPU
        sla_compile.prepare(excluded, inputs, PLAIN, config={**SMALL, "exclude": ["*attn1"]})


def torch_context_parallel(rank: int, folder: Path) -> None:
    """``context_parallel`` of torch: its own dense result, told by a warning and in the report."""
    # torch has the ring for CUDA's kernels alone; here each rank gathers keys and values, which is as exact
    on_cpus([Shard(2)] * 2, [Shard(2), Replicate(), Replicate()])
    model, whole = prepared(MARGINAL), TOKENS[:1].clone()
    dense = model(whole)[0].chunk(WORLD, 1)[rank]
    run = torch.compile(model, backend="sla", options=INNER)
    mesh = init_device_mesh("cpu", (WORLD,))
    own = whole.chunk(WORLD, 1)[rank].clone()
    spread = context_parallel(mesh, buffers=[own.repeat(1, WORLD, 1)], buffer_seq_dims=[1])  # needs a buffer
    told = pytest.warns(DenseAttentionWarning, match=r"^attention: .*context parallelism: the query is of .*Ulysses")
    with spread, torch.no_grad(), told:
        output = run(own)[0]
    assert_close("output", output, dense, 1e-12)
    (site,) = sla_compile.report(model).sites
    assert (site.rewritten, site.reason) == (False, "context parallelism")
