"""Ulysses sequence parallelism of a Wan2.1 on the GPUs of one host: forward and training step, dense and SLA.

    torchrun --nproc-per-node 2 benchmarks/parallel.py --json parallel.json
    torchrun --nproc-per-node 2 benchmarks/parallel.py --arms alone all all+memory all+memory+keep --profile traces
    torchrun --nproc-per-node 2 benchmarks/parallel.py --model 14B --layers 12 --height 720 --width 1280 --fsdp

``--arms``: ``alone``, one rank while the others wait, or ``all``, and what is added to it:

- ``memory``, ``greedy``: passes of Inductor put work between an exchange and the wait for it, within the peak memory of
  before, or all they can;
- ``keep``: what was exchanged is kept for the backward, and not exchanged again by activation checkpointing;
- ``graph``: forward and training step each are one CUDA graph, with nothing left to launch for the host.

The model is of plain PyTorch and random weights in bf16, in Wan2.1's configuration (`ulysses_wan`); its blocks are
compiled one by one. ``--engines diffusers`` measures diffusers' own model and Ulysses instead. A training step is
forward and backward with activation checkpointing and the average of the gradients over the ranks, without an
optimizer: by DistributedDataParallel, or with ``--fsdp`` by ``fully_shard``, which holds the weights. A time is that of
the slowest rank. Beside the times: how far output and a gradient are from those of one rank, and whether the gates are
bitwise equal on all ranks after ten steps of AdamW. ``--profile`` adds what the kernels of rank 0 add up to.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

import sla_compile
from benchmarks.gpu_timeline import profile, timeline
from benchmarks.parallel_arm import ADDED, OVERLAPS, WHAT, Arm
from benchmarks.ulysses_wan import MODELS
from sla_compile.common.limits import LINEAR_BRANCHES

STARTED = time.perf_counter()
Row = dict[str, Any]


class Run:
    """All arms in turn; what was found is written after each, so that whoever ends it early loses nothing."""

    def __init__(self, options: argparse.Namespace, gradients: Any) -> None:
        self.options, self.gradients, self.first = options, gradients, dist.get_rank() == 0
        self.rows: list[Row] = []
        self.references: dict[tuple[str, str], dict[str, Any]] = {}
        self.quickest = 0.0

    def measure(self) -> None:
        for engine in self.options.engines:
            for attention in self.options.attention:
                for arm in self.options.arms:
                    if arm.startswith("alone") or dist.get_world_size() > 1:
                        if not self._time_left():
                            self.show(f"{engine}, {attention}, {arm}: left out, --seconds {self.options.seconds:g}")
                            continue
                        started = time.perf_counter()
                        if self.first or not arm.startswith("alone"):
                            self._arm(engine, attention, arm)
                        dist.barrier()
                        took = time.perf_counter() - started
                        self.quickest = min(self.quickest or took, took)
                        self.write()

    def _time_left(self) -> bool:
        """Whether there is time for another arm; the same on every rank."""
        left = [time.perf_counter() - STARTED + self.quickest < self.options.seconds]
        dist.broadcast_object_list(left, src=0)
        return left[0]

    def _arm(self, engine: str, attention: str, name: str) -> None:
        row: Row = {"engine": engine, "attention": attention, "arm": name}
        try:
            torch._dynamo.reset()
            self._measured(Arm(self.options, engine, attention, name, self.gradients), row)
        except Exception as error:  # out of memory, above all: the other arms may fit
            traceback.clear_frames(error.__traceback__)
            self.rows.append({**row, "failed": f"{type(error).__name__}: {error}"})
            self.show(f"{engine}, {attention}, {name}: {''.join(traceback.format_exception(error))}")
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()

    def _measured(self, arm: Arm, row: Row) -> None:
        reference = self.references.setdefault((row["engine"], row["attention"]), {})
        row["ranks"] = arm.ranks
        started = time.perf_counter()
        output = arm.whole_output()
        first_s = time.perf_counter() - started
        if row["attention"] != "dense":
            row["rewritten"] = sum(site.rewritten for site in sla_compile.report(arm.model).sites)
        for what in WHAT[: 1 if self.options.no_training else 2]:
            found = {**row, "what": what, **arm.timed(what)}
            if what == "forward":
                found["first_s"] = first_s
            value = output if what == "forward" else arm.whole_gradient()
            if (expected := reference.setdefault(what, value)) is not value:
                found["difference"] = float((value - expected).norm() / expected.norm())
            found["times_faster"] = reference.setdefault(f"{what}, ms", found["median_ms"]) / found["median_ms"]
            self.rows.append(found)
            self.show(line(found))
            if self.options.profile:
                self._profiled(arm, found)
        if not self.options.no_training and not reference.get("gates") and (equal := arm.gates_equal()) is not None:
            self.rows[-1]["gates_equal"] = reference["gates"] = equal

    def _profiled(self, arm: Arm, found: Row) -> None:
        call = arm.ready(found["what"])
        if not self.first:
            call()
            return
        names = (found["engine"], found["attention"], found["arm"], found["what"])
        path = Path(self.options.profile) / ("_".join(names).replace(" ", "-").replace("+", "-") + ".json.gz")
        profile(call, path)
        if (seen := timeline(path)) is not None:
            found["timeline"] = asdict(seen)

    def show(self, text: str) -> None:
        if self.first:
            print(f"{time.perf_counter() - STARTED:.0f} s: {text}", flush=True)

    def write(self) -> None:
        if self.first and self.options.json:
            used = {name: str(value) if name == "dtype" else value for name, value in vars(self.options).items()}
            found = {"torch": torch.__version__, "device": device_name(self.options), "options": used}
            Path(self.options.json).write_text(json.dumps({**found, "rows": self.rows}, indent=1))


def line(row: Row) -> str:
    named = f"{row['engine']}, {row['attention']}, {row['arm']} ({row['ranks']} rank(s)), {row['what']}"
    differs = f", difference {row['difference']:.1e}" if "difference" in row else ""
    peak = f", peak {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
    times = f"{row['median_ms']:.1f} ms, {row['times_faster']:.2f} x, host {row['host_ms']:.1f} ms"
    return f"{named}: {times}{differs}{peak}, first {row['first_s']:.0f} s"


def table(options: argparse.Namespace, rows: list[Row]) -> Table:
    weights = "fully_shard" if options.fsdp else "replicated"
    drawn = Table(title=f"Wan2.1-{options.model}, {options.layers} layers, {weights}; {device_name(options)}")
    columns = "engine|attention|what|arm|ms (20% to 80%)|host ms|x alone|difference|gates equal|peak GiB|first, s"
    for column in columns.split("|"):
        drawn.add_column(column)
    for row in rows:
        if "failed" in row:
            drawn.add_row(row["engine"], row["attention"], "failed", row["arm"], row["failed"][:80])
            continue
        equal = ("yes" if row["gates_equal"] else "NO") if "gates_equal" in row else ""
        drawn.add_row(
            *(row["engine"], row["attention"], row["what"], row["arm"]),
            f"{row['median_ms']:.1f} ({row['low_ms']:.1f} to {row['high_ms']:.1f})",
            *(f"{row['host_ms']:.1f}", f"{row['times_faster']:.2f}"),
            *(f"{row['difference']:.1e}" if "difference" in row else "", equal),
            *(f"{row['peak_gib']:.1f}" if "peak_gib" in row else "", f"{row['first_s']:.1f}"),
        )
    return drawn


def timelines(rows: list[Row]) -> Table:
    """What the kernels of rank 0 add up to, of the rows that were profiled."""
    drawn = Table(title="one call on rank 0, profiled, ms")
    columns = "engine|attention|what|arm|span|compute|NCCL|NCCL exposed|idle|exchanges|of each"
    for column in columns.split("|"):
        drawn.add_column(column)
    for row in rows:
        if seen := row.get("timeline"):
            each = f"{seen['exchange'] / seen['exchanges']:.3f}" if seen["exchanges"] else ""
            times = (f"{seen[name]:.2f}" for name in ("span", "compute", "nccl", "exposed", "idle"))
            names = (row["engine"], row["attention"], row["what"], row["arm"])
            drawn.add_row(*names, *times, str(seen["exchanges"]), each)
    return drawn


def device_name(options: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if options.device == "cuda" else str(options.device)


def arm_name(text: str) -> str:
    """``text`` if it is an arm; else an argparse error that says what is one."""
    base, *added = text.split("+")
    if base not in ("alone", "all") or set(added) - set(ADDED) or len({*added} & set(OVERLAPS)) > 1:
        accepted = "alone or all, and after a + each: memory or greedy, keep, graph"
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: {accepted}")
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.3B", choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--attention", nargs="+", default=["dense", "sla 128"], choices=("dense", "sla 64", "sla 128"))
    parser.add_argument("--engines", nargs="+", default=["plain"], choices=("plain", "diffusers"))
    parser.add_argument("--arms", nargs="+", type=arm_name, default=["alone", "all", "all+memory"], help="see above")
    parser.add_argument("--topk", type=float, default=0.05)
    parser.add_argument("--linear", default="marginal", choices=LINEAR_BRANCHES, help="SLAConfig.linear")
    parser.add_argument("--min-tokens", type=int, default=4096, help="SLAConfig.min_tokens")
    parser.add_argument("--repeats", type=int, default=7, help="at most; fewer where a call is long, but three")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no arm that would end later")
    parser.add_argument("--no-training", action="store_true", help="forward only")
    parser.add_argument("--fsdp", action="store_true", help="weights held by fully_shard on several ranks")
    parser.add_argument("--profile", metavar="DIR", help="trace a forward and a step of each arm, and add them up")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"), help="eager: to try this file")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", help="write every figure to this file, after each arm")
    options = parser.parse_args()
    added = {word for arm in options.arms for word in arm.split("+")}
    if "graph" in added and (options.fsdp or options.device == "cpu"):
        parser.error("--arms with graph; accepted: on GPUs, without --fsdp")
    if "keep" in added and "diffusers" in options.engines:
        parser.error("--arms with keep; accepted: --engines plain, whose checkpointing is ours")
    options.layers = options.layers or MODELS[options.model]["layers"]
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return options


def main() -> None:
    options = arguments()
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")  # an exchange is not kept waiting by a long product
    own = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else None
    # Long: ranks wait for the one that is measured alone.
    dist.init_process_group("nccl" if own else "gloo", timeout=timedelta(minutes=40), device_id=own)
    # Of their own, so that exchanges do not queue behind gradients and weights.
    run = Run(options, dist.new_group())
    run.measure()
    if run.first:
        console = Console(width=170)
        console.print(table(options, run.rows))
        if any("timeline" in row for row in run.rows):
            console.print(timelines(run.rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
