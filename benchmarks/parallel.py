"""Ulysses sequence parallelism of a Wan2.1 on the GPUs of one host: forward and training step, dense and SLA.

    torchrun --nproc-per-node 2 benchmarks/parallel.py --json parallel.json
    torchrun --nproc-per-node 2 benchmarks/parallel.py --overlap --json overlapped.json
    torchrun --nproc-per-node 2 benchmarks/parallel.py --model 14B --layers 4 --height 720 --width 1280 --fsdp

Each arm is measured on one rank, the others waiting, and on all. The model is of plain PyTorch and random weights in
bf16, in Wan2.1's configuration; its blocks are compiled one by one and exchange tokens for heads by functional
collectives. ``--engines diffusers`` measures diffusers' own model and Ulysses instead. A training step is forward and
backward with activation checkpointing and the sum of the gradients over the ranks, without an optimizer; ``--fsdp``
has ``fully_shard`` hold the weights. A time is that of the slowest rank. Beside the times: how far the output is from
that of one rank, and whether the gates are bitwise equal on all ranks after ten steps of AdamW.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

import sla_compile

MODELS = {
    "1.3B": {"heads": 12, "head_dim": 128, "ffn": 8960, "layers": 30, "text": 512, "text_dim": 4096},
    "14B": {"heads": 40, "head_dim": 128, "ffn": 13824, "layers": 40, "text": 512, "text_dim": 4096},
    "tiny": {"heads": 2, "head_dim": 16, "ffn": 64, "layers": 1, "text": 8, "text_dim": 32},
}
WHAT = ("forward", "training step")
_EARLIER = "reorder_communication_preserving_peak_memory"
OVERLAPS = {"memory": [_EARLIER, "sink_waits_iterative", _EARLIER], "greedy": ["sink_waits", "raise_comms"]}
"""Passes of Inductor by which an exchange begins earlier and is waited for later; without them it waits at once."""


def heads_for_tokens(x: Tensor, group: Any) -> Tensor:
    """x (B, N/P, H, D) of this rank's tokens -> (B, H/P, N, D) of all tokens, this rank's heads."""
    if group is None:
        return x.transpose(1, 2)
    ranks = dist.get_world_size(group)
    parts = x.unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4).contiguous()  # (P, N/P, B, H/P, D)
    sent = collectives.all_to_all_single_autograd(parts, None, None, group)
    return sent.flatten(0, 1).permute(1, 2, 0, 3)


def tokens_for_heads(x: Tensor, group: Any) -> Tensor:
    """x (B, H/P, N, D) -> (B, N/P, H, D)."""
    if group is None:
        return x.transpose(1, 2)
    ranks = dist.get_world_size(group)
    parts = x.permute(2, 0, 1, 3).contiguous()  # (N, B, H/P, D), the tokens of one rank after those of another
    sent = collectives.all_to_all_single_autograd(parts, None, None, group).unflatten(0, (ranks, -1))
    return sent.permute(2, 1, 0, 3, 4).flatten(2, 3)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, N, H, D) turned by ``turn`` (2, N, D / 2), float32."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = turn[:, None, :, None].unbind(0)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, group: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)
        self.heads, self.group = heads, group

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        # In this order each may travel while the next is projected: with --overlap, Inductor waits that late.
        v = heads_for_tokens(self.v(x).unflatten(-1, (self.heads, -1)), self.group)
        k = rotated(self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1)), turn)
        k = heads_for_tokens(k, self.group)
        q = rotated(self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1)), turn)
        q = heads_for_tokens(q, self.group)
        return self.out(tokens_for_heads(F.scaled_dot_product_attention(q, k, v), self.group).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, text), (self.v, text))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, group: Any) -> None:
        super().__init__()
        self.attn1, self.attn2 = SelfAttention(width, heads, group), CrossAttention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, width))
        self.norm1, self.norm3 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(width)
        self.scale_shift = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: Tensor, text: Tensor, turn: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift.unbind(0)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1, turn)
        x = x + self.attn2(self.norm2(x), text)
        return x + gate2 * self.ffn(self.norm3(x) * (1 + scale2) + shift2)


class Wan(nn.Module):
    """The blocks of a Wan2.1 and what is around them; each rank gives and gets its own tokens."""

    def __init__(self, options: argparse.Namespace, group: Any) -> None:
        super().__init__()
        sizes = MODELS[options.model]
        width = sizes["heads"] * sizes["head_dim"]
        self.embed, self.text, self.head = (
            nn.Linear(64, width),
            nn.Linear(sizes["text_dim"], width),
            nn.Linear(width, 64),
        )
        layers = options.layers or sizes["layers"]
        self.blocks = nn.ModuleList(Block(width, sizes["heads"], sizes["ffn"], group) for _ in range(layers))

    def forward(self, x: Tensor, text: Tensor, turn: Tensor) -> Tensor:
        """x (B, N/P, 64), text (B, L, C), turn (2, N/P, D / 2) -> (B, N/P, 64)."""
        x, text = self.embed(x), self.text(text)
        for block in self.blocks:
            again = torch.is_grad_enabled()
            x = checkpoint(block, x, text, turn, use_reentrant=False) if again else block(x, text, turn)
        return self.head(x)


class Arm:
    """One model on this rank, alone or with the others."""

    def __init__(self, options: argparse.Namespace, engine: str, attention: str, alone: bool) -> None:
        self.options, self.engine, self.attention = options, engine, attention
        self.group = None if alone or dist.get_world_size() == 1 else dist.group.WORLD
        self.ranks = 1 if self.group is None else dist.get_world_size()
        self.sharded = options.fsdp and self.ranks > 1
        torch.manual_seed(0)
        self.model, self.inputs = self._plain() if engine == "plain" else self._diffusers()
        how: dict[str, Any] = {"backend": options.inner}
        if attention != "dense":
            block = int(attention.rpartition(" ")[2])
            config = {"topk": options.topk, "block_q": block, "block_k": block, "min_tokens": options.min_tokens}
            sla_compile.prepare(self.model, self.inputs, self._keywords(), config=config)
            how = {"backend": "sla", "options": {"inner": options.inner}}
        if options.overlap and options.inner == "inductor":
            passes = OVERLAPS[options.overlap]
            how["options"] = {
                **how.get("options", {}),
                "reorder_for_compute_comm_overlap": True,
                "reorder_for_compute_comm_overlap_passes": passes,
            }
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for layer in self.model.blocks:
                fully_shard(layer)
            fully_shard(self.model)
        for layer in self.model.blocks:
            layer.compile(**how)
        self.sums: list[Any] = []
        if self.group is not None and not self.sharded:
            for parameter in self.model.parameters():
                parameter.register_post_accumulate_grad_hook(self._sum)

    def _plain(self) -> tuple[Any, tuple[Tensor, ...]]:
        options, sizes = self.options, MODELS[self.options.model]
        with torch.device(options.device):
            model = Wan(options, self.group).to(options.dtype)
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
        from diffusers import ContextParallelConfig, WanTransformer3DModel

        options, sizes = self.options, MODELS[self.options.model]
        config = {"num_attention_heads": sizes["heads"], "attention_head_dim": sizes["head_dim"]}
        config |= {
            "ffn_dim": sizes["ffn"],
            "num_layers": options.layers or sizes["layers"],
            "text_dim": sizes["text_dim"],
        }
        with torch.device(options.device):
            model = WanTransformer3DModel(**config).to(options.dtype)
            latent = ((options.frames - 1) // 4 + 1, options.height // 8, options.width // 8)
            x, timestep = torch.randn(1, 16, *latent, dtype=options.dtype), torch.tensor([500])
            text = torch.randn(1, sizes["text"], sizes["text_dim"], dtype=options.dtype)
        model.enable_gradient_checkpointing()
        if self.group is not None:
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=self.ranks))
        return model, (x, timestep, text)

    def _keywords(self) -> dict[str, Any]:
        return {"return_dict": False} if self.engine == "diffusers" else {}

    def _sum(self, parameter: Tensor) -> None:
        self.sums.append(dist.all_reduce(parameter.grad, group=self.group, async_op=True))

    def call(self, what: str) -> Tensor:
        """One forward or training step; the output of this rank."""
        if what == "forward":
            with torch.no_grad():
                return self._output()
        output = self._output()
        # The mean over all tokens: of diffusers each rank has the whole output and, backward, its own tokens' part.
        share = 1 if self.engine == "diffusers" or self.sharded else self.ranks
        (output.float().square().mean() / share).backward()
        for pending in self.sums:
            pending.wait()
        self.sums.clear()
        return output.detach()

    def _output(self) -> Tensor:
        output = self.model(*self.inputs, **self._keywords())
        return output[0] if isinstance(output, tuple) else output

    def timed(self, what: str) -> dict[str, Any]:
        """Milliseconds on the slowest rank, and what the first call took in seconds."""
        started = time.perf_counter()
        self._step(what)
        found: dict[str, Any] = {"first_s": self._slowest(time.perf_counter() - started)}
        for _ in range(2):
            self._step(what)
        cuda = self.options.device == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.options.repeats):
            if self.group is not None:
                dist.barrier(self.group)
            started = time.perf_counter()
            self._step(what)
            times.append(1e3 * self._slowest(time.perf_counter() - started))
        found |= {"median_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}
        if cuda:
            found["peak_gib"] = self._slowest(torch.cuda.max_memory_allocated() / 2**30)
        return found

    def _step(self, what: str) -> None:
        self.call(what)
        self.model.zero_grad(set_to_none=True)
        if self.options.device == "cuda":
            torch.cuda.synchronize()

    def _slowest(self, number: float) -> float:
        tensor = torch.tensor(number, dtype=torch.float64, device=self.options.device)
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

    def gates_equal(self) -> bool | None:
        """Whether the gates are bitwise equal on all ranks after ten steps; None without gates of one's own."""
        parameters = list(sla_compile.gate_parameters(self.model))
        if self.group is None or not parameters or self.sharded:
            return None
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
        for _ in range(10):
            self.call("training step")
            optimizer.step()
            self.model.zero_grad(set_to_none=True)
        gates = torch.cat([parameter.detach().flatten() for parameter in parameters]).float()
        first = gates.clone()
        dist.broadcast(first, 0, group=self.group)
        return self._slowest(float(not torch.equal(gates, first))) == 0 and bool(gates.any())


def measure(options: argparse.Namespace, show: Callable[[str], None]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for engine in options.engines:
        for attention in options.attention:
            single: dict[str, float] = {}
            reference: Tensor | None = None
            for alone in (True, False) if dist.get_world_size() > 1 else (True,):
                found: list[dict[str, Any]] = []
                if not alone or dist.get_rank() == 0:
                    torch._dynamo.reset()
                    arm = Arm(options, engine, attention, alone)
                    row: dict[str, Any] = {"engine": engine, "attention": attention, "ranks": arm.ranks}
                    started = time.perf_counter()
                    output = arm.whole_output()
                    first_s = time.perf_counter() - started
                    if not alone and reference is not None:
                        row["difference"] = float((output - reference).norm() / reference.norm())
                    reference = output
                    if attention != "dense":
                        row["rewritten"] = sum(site.rewritten for site in sla_compile.report(arm.model).sites)
                    for what in WHAT[: 1 if options.no_training else 2]:
                        found.append({**row, "what": what, **arm.timed(what)})
                        if what == "forward":
                            found[-1]["first_s"] = first_s
                        single.setdefault(what, found[-1]["median_ms"])
                        found[-1]["times_faster"] = single[what] / found[-1]["median_ms"]
                        show(f"{engine}, {attention}, {arm.ranks} rank(s), {what}: {found[-1]['median_ms']:.1f} ms")
                    if not options.no_training and (equal := arm.gates_equal()) is not None:
                        found[-1]["gates_equal"] = equal
                    del arm
                    gc.collect()
                    if options.device == "cuda":
                        torch.cuda.empty_cache()
                dist.barrier()
                rows += found
    return rows


def table(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Table:
    layers = options.layers or MODELS[options.model]["layers"]
    weights = "fully_shard" if options.fsdp else "replicated"
    drawn = Table(title=f"Wan2.1-{options.model}, {layers} layers, {weights}; {device_name(options)}")
    columns = "engine|attention|what|ranks|ms (least to most)|x one rank|difference|gates equal|peak GiB|first, s"
    for column in columns.split("|"):
        drawn.add_column(column)
    for row in rows:
        equal = ("yes" if row["gates_equal"] else "NO") if "gates_equal" in row else ""
        drawn.add_row(
            *(row["engine"], row["attention"], row["what"], str(row["ranks"])),
            f"{row['median_ms']:.1f} ({row['least_ms']:.1f}-{row['most_ms']:.1f})",
            *(f"{row['times_faster']:.2f}", f"{row['difference']:.1e}" if "difference" in row else "", equal),
            *(f"{row['peak_gib']:.1f}" if "peak_gib" in row else "", f"{row['first_s']:.1f}"),
        )
    return drawn


def device_name(options: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if options.device == "cuda" else str(options.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.3B", choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--attention", nargs="+", default=["dense", "sla 128"], choices=("dense", "sla 64", "sla 128"))
    parser.add_argument("--engines", nargs="+", default=["plain"], choices=("plain", "diffusers"))
    parser.add_argument("--topk", type=float, default=0.05)
    parser.add_argument("--min-tokens", type=int, default=4096, help="SLAConfig.min_tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-training", action="store_true", help="forward only")
    parser.add_argument("--fsdp", action="store_true", help="weights held by fully_shard on several ranks")
    parser.add_argument(
        "--overlap",
        nargs="?",
        const="memory",
        choices=tuple(OVERLAPS),
        help="have Inductor put work between an exchange and the wait for it: within the peak memory of before, or all",
    )
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"), help="eager: to try this file")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", help="write every figure to this file")
    options = parser.parse_args()
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Long: ranks wait for the one that is measured alone.
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo", timeout=timedelta(minutes=40))
    first = dist.get_rank() == 0
    rows = measure(options, lambda line: print(line, flush=True) if first else None)
    if first:
        Console(width=150).print(table(options, rows))
        if options.json:
            used = {name: str(value) if name == "dtype" else value for name, value in vars(options).items()}
            found = {"torch": torch.__version__, "device": device_name(options), "options": used, "rows": rows}
            Path(options.json).write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
