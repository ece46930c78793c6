"""One model of `parallel` on this rank, alone or with the others: built, compiled, called and timed."""

from __future__ import annotations

import argparse
import copy
import logging
import math
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sla_compile
from benchmarks.ulysses_wan import MODELS, Wan, keep_exchanged
from sla_compile.inspection.timing import Times

WHAT = ("forward", "training step")
_EARLIER = "reorder_communication_preserving_peak_memory"
OVERLAPS = {"memory": [_EARLIER, "sink_waits_iterative", _EARLIER], "greedy": ["sink_waits", "raise_comms"]}
"""Passes of Inductor by which an exchange begins earlier and is waited for later; without them it waits at once."""
ADDED = (*OVERLAPS, "keep", "graph")
"""What may be added to an arm's name."""


class Arm:
    """``name``: "alone" or "all", and some of `ADDED`, after a + each; ``gradients``: the group that averages those."""

    def __init__(self, options: argparse.Namespace, engine: str, attention: str, name: str, gradients: Any) -> None:
        base, *added = name.split("+")
        self.options, self.engine, self.added = options, engine, set(added)
        self.group = None if base == "alone" or dist.get_world_size() == 1 else dist.group.WORLD
        self.ranks = 1 if self.group is None else dist.get_world_size()
        self.gradients = gradients
        self.calls: dict[str, Callable[[], Any]] = {}
        self.pending: list[Any] = []
        self.sharded = options.fsdp and self.ranks > 1
        self.device = torch.device(options.device)
        torch.manual_seed(0)
        self.model, self.inputs = self._plain() if engine == "plain" else self._diffusers()
        how: dict[str, Any] = {"backend": options.inner}
        if attention != "dense":
            block = int(attention.rpartition(" ")[2])
            config = {"topk": options.topk, "block_q": block, "block_k": block, "min_tokens": options.min_tokens}
            config |= {"linear": options.linear}
            sla_compile.prepare(self.model, self.inputs, self._keywords(), config=config)
            how = {"backend": "sla", "options": {"inner": options.inner}}
        self._add_layers()
        if engine == "diffusers" and self.group is not None:
            from diffusers import ContextParallelConfig

            # diffusers divides by the number of devices, on CPUs too
            with mock.patch("torch.accelerator.device_count", return_value=torch.accelerator.device_count() or 1):
                self.model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=self.ranks))
        self.reduced = self._reduced()
        self._compile(how)

    def _plain(self) -> tuple[Any, tuple[Tensor, ...]]:
        options, sizes = self.options, MODELS[self.options.model]
        kept = {"context_fn": keep_exchanged} if "keep" in self.added else {}
        with torch.device(options.device):
            model = Wan({**sizes, "layers": 1}, self.group, kept).to(options.dtype)
            tokens = ((options.frames - 1) // 4 + 1) * (options.height // 16) * (options.width // 16)
            x = torch.randn(1, tokens, 64, dtype=options.dtype)
            text = torch.randn(1, sizes["text"], sizes["text_dim"], dtype=options.dtype)
            half = sizes["head_dim"] // 2
            angles = torch.arange(tokens)[:, None] * 1e4 ** (-torch.arange(half) / half)
        turn = torch.stack([angles.cos(), angles.sin()])
        if tokens % self.ranks:
            raise SystemExit(f"{tokens} tokens; accepted: a multiple of {self.ranks} ranks")
        rank = dist.get_rank() if self.ranks > 1 else 0
        return model, (x.chunk(self.ranks, 1)[rank], text, turn.chunk(self.ranks, 1)[rank])

    def _diffusers(self) -> tuple[Any, tuple[Tensor, ...]]:
        from diffusers import WanTransformer3DModel

        if not hasattr(logging.Logger, "warning_once"):  # transformers adds it, and diffusers counts on that
            logging.Logger.warning_once = logging.Logger.warning  # type: ignore[attr-defined]
        options, sizes = self.options, MODELS[self.options.model]
        config = {"num_attention_heads": sizes["heads"], "attention_head_dim": sizes["head_dim"]}
        config |= {"ffn_dim": sizes["ffn"], "num_layers": 1, "text_dim": sizes["text_dim"]}
        with torch.device(options.device):
            model = WanTransformer3DModel(**config).to(options.dtype)
            latent = ((options.frames - 1) // 4 + 1, options.height // 8, options.width // 8)
            x, timestep = torch.randn(1, 16, *latent, dtype=options.dtype), torch.tensor([500])
            text = torch.randn(1, sizes["text"], sizes["text_dim"], dtype=options.dtype)
        model.enable_gradient_checkpointing()
        return model, (x, timestep, text)

    def _keywords(self) -> dict[str, Any]:
        return {"return_dict": False} if self.engine == "diffusers" else {}

    def _add_layers(self) -> None:
        """Copies of the first block with weights of their own: `prepare` of one block takes less time than of all."""
        torch.manual_seed(1)
        shared: dict[int, Any] = {id(self.group): self.group}
        for _ in range(self.options.layers - 1):
            block = copy.deepcopy(self.model.blocks[0], dict(shared))
            for module in block.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            self.model.blocks.append(block)

    def _reduced(self) -> Any:
        """What a training step calls: the model in what averages its gradients."""
        if self.sharded:
            mesh = DeviceMesh.from_group(self.gradients, self.device.type)
            for layer in self.model.blocks:
                fully_shard(layer, mesh=mesh)
            return fully_shard(self.model, mesh=mesh)
        if self.group is None:
            return self.model
        if "graph" in self.added:
            for parameter in self.model.parameters():
                parameter.register_post_accumulate_grad_hook(self._average)
            return self.model
        # Before the first call: blocks are compiled afterwards, and DDP does not see into them.
        return DistributedDataParallel(self.model, process_group=self.gradients, gradient_as_bucket_view=True)

    def _average(self, parameter: Tensor) -> None:
        """Begin to average one gradient: a captured call of many costs no launch, and DDP is not captured."""
        self.pending.append(dist.all_reduce(parameter.grad, dist.ReduceOp.AVG, self.gradients, async_op=True))

    def _compile(self, how: dict[str, Any]) -> None:
        overlap = self.added & set(OVERLAPS)
        if overlap and self.options.inner == "inductor":
            how["options"] = {
                **how.get("options", {}),
                "reorder_for_compute_comm_overlap": True,
                "reorder_for_compute_comm_overlap_passes": OVERLAPS[overlap.pop()],
            }
        for layer in self.model.blocks:
            layer.compile(**how)

    def call(self, what: str) -> Tensor:
        """One forward or training step; the output of this rank."""
        if what == "forward":
            with torch.no_grad():
                return self._output(self.model)
        output = self._output(self.reduced)
        # Of diffusers each rank has the whole output and, backward, its own tokens' part: a sum, and not an average.
        share = self.ranks if self.engine == "diffusers" else 1
        (output.float().square().mean() * share).backward()
        for work in self.pending:
            work.wait()
        self.pending.clear()
        return output.detach()

    def _output(self, model: Any) -> Tensor:
        output = model(*self.inputs, **self._keywords())
        return output[0] if isinstance(output, tuple) else output

    def ready(self, what: str) -> Callable[[], Any]:
        """A call of one forward or step; compiled already, and captured where the arm is of CUDA graphs."""
        if what not in self.calls:

            def step() -> None:
                self.call(what)
                self.model.zero_grad(set_to_none=True)

            step()
            self.calls[what] = self._graph(what) if "graph" in self.added else step
        return self.calls[what]

    def _graph(self, what: str) -> Callable[[], Any]:
        """One forward or step as a CUDA graph; the gradients stay where the graph writes them."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # that of the capture, where autograd then expects its gradients
            for _ in range(3):
                self.call(what)
                self.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()  # a replay allocates nothing, so that the capture's peak is its
        graph = torch.cuda.CUDAGraph()
        # Thread-local: the thread that watches over NCCL may ask for events meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.call(what)
        return graph.replay

    def timed(self, what: str) -> dict[str, Any]:
        """Milliseconds on the slowest rank, those until its host had launched all, and the first call's seconds."""
        started = time.perf_counter()
        call = self.ready(what)
        self._synchronize()
        found: dict[str, Any] = {"first_s": self._slowest(time.perf_counter() - started)}
        if self.device.type == "cuda" and "graph" not in self.added:
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        launched: list[float] = []
        while len(times) <= self._repeats(times):  # the first is not counted
            if self.group is not None:
                dist.barrier(self.group)
            started = time.perf_counter()
            call()
            launched.append(1e3 * (time.perf_counter() - started))
            self._synchronize()
            times.append(1e3 * self._slowest(time.perf_counter() - started))
        taken = Times.of(times[1:])
        found |= {"median_ms": taken.median, "low_ms": taken.low, "high_ms": taken.high, "runs": len(times) - 1}
        found["host_ms"] = self._slowest(Times.of(launched[1:]).median)
        if self.device.type == "cuda":
            found["peak_gib"] = self._slowest(torch.cuda.max_memory_allocated() / 2**30)
        return found

    def _repeats(self, times: list[float]) -> int:
        """How many runs count: two seconds of them, but three at least where so many are wanted."""
        wanted: int = self.options.repeats
        return min(wanted, max(3, math.ceil(2000 / times[0]))) if times else wanted

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _slowest(self, number: float) -> float:
        tensor = torch.tensor(number, dtype=torch.float64, device=self.device)
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return float(tensor)

    def whole_output(self) -> Tensor:
        """The output of all tokens, on the CPU."""
        output = self.call("forward").contiguous()
        if self.group is None or self.engine == "diffusers":
            return output.float().cpu()
        parts = [torch.empty_like(output) for _ in range(self.ranks)]
        dist.all_gather(parts, output, group=self.group)
        return torch.cat(parts, 1).float().cpu()

    def whole_gradient(self) -> Tensor:
        """The gradient of the first queries' projection, by all tokens, on the CPU."""
        attention = self.model.blocks[0].attn1
        weight = (attention.q if self.engine == "plain" else attention.to_q).weight
        if "graph" in self.added:
            self.ready("training step")()
        else:
            self.call("training step")
        gradient = weight.grad.full_tensor() if self.sharded else weight.grad
        found: Tensor = gradient.float().cpu()
        self.model.zero_grad(set_to_none=True)
        return found

    def gates_equal(self) -> bool | None:
        """Whether the gates are bitwise equal on all ranks after ten steps; None without gates of one's own."""
        parameters = list(sla_compile.gate_parameters(self.model))
        if self.group is None or not parameters or self.sharded:
            return None
        self.model.zero_grad(set_to_none=True)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
        for _ in range(10):
            self.call("training step")
            optimizer.step()
            self.model.zero_grad(set_to_none=True)
        gates = torch.cat([parameter.detach().flatten() for parameter in parameters]).float()
        first = gates.clone()
        dist.broadcast(first, 0, group=self.group)
        return self._slowest(float(not torch.equal(gates, first))) == 0 and bool(gates.any())
