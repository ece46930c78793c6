"""What the order of a video's tokens does to Sparse-Linear Attention: how much of the exact attention it catches.

    python benchmarks/token_order.py CHECKPOINT [CHECKPOINT ...] [--videos 1] [--json order.json]
    python benchmarks/token_order.py --pooled CHECKPOINT                              # six videos or more

A checkpoint is the ``pretrained-<seed>.pt`` that examples/finetune.py or benchmarks/quality.py leaves in its folder,
beside its settings.json: a dense video transformer, trained on moving shapes. Its attention is looked at on held-out
videos at several times of the flow. For each order, block and topk:

- mass: the share of the dense attention's weight that lies in the critical blocks, the mean over queries;
- error: ||sparse branch - dense output|| / ||dense output||, the sparse branch alone, as an untrained SLA is.

Both are means over layers, times, videos and checkpoints; mass is also told by layer. With --pooled the error is
that of ``calibrate``: squares are summed over videos before the ratio is taken, at times that come close to pure noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

import sla_compile
from benchmarks.dense_checkpoint import load
from examples.study.videos import Data
from sla_compile.common.token_orders import ORDERS, Placement
from sla_compile.fitting.calibration import gather
from sla_compile.fitting.observer import GatedCall, gated_calls
from sla_compile.ops.reorder import reorder

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
TOPKS = (0.05, 0.10, 0.20)
BLOCKS = (16, 64, 128)

Key = tuple[str, int, float]
"""Order, block, topk."""


Looked = dict[Key, dict[str, float]]
"""Mass and error."""


def look(call: GatedCall, grid: tuple[int, ...], orders: tuple[str, ...]) -> Looked:
    """Mass and error of one attention, of one video, for every order, block and topk."""
    q, k, v, scale = call.query, call.key, call.value, call.scale
    weights = (q @ k.mT * scale).softmax(dim=-1)
    dense = weights @ v
    found: Looked = {}
    for kind in orders:
        for block in BLOCKS:
            placement = Placement(kind, grid, 0, (block, block))
            inside = reorder(weights, placement)  # the queries, and then the keys
            inside = reorder(inside.mT, placement).mT.unflatten(-1, (-1, block)).sum(dim=-1)
            q_in, k_in, v_in = (reorder(x, placement) for x in (q, k, v))
            for topk in TOPKS:
                out, _, _, block_map, *_ = torch.ops.sla.forward.default(
                    q_in, k_in, v_in, None, None, None, None, scale, topk, 0.0, block, block, "softmax", "none"
                )
                critical = (block_map == 1).repeat_interleave(block, dim=2)
                missed = reorder(out, placement, inverse=True) - dense
                found[kind, block, topk] = {
                    "mass": float((inside * critical).sum(dim=-1).mean()),
                    "error": float(missed.norm() / dense.norm()),
                }
    return found


@torch.no_grad()
def measure(checkpoints: list[Path], videos: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each checkpoint, video, time, layer, order, block and topk."""
    rows = []
    calls: list[GatedCall] = []

    def keep(call: GatedCall) -> Tensor:
        calls.append(call)
        return call.dense

    for number, checkpoint in enumerate(checkpoints):
        model, settings = load(checkpoint, device)
        clean = list(Data(settings.size, 1, device).videos(videos, seed=10 + number))
        sla_compile.prepare(
            model, (clean[0], torch.zeros(1, device=device)), config={"linear": "marginal", "min_tokens": 0}
        )
        generator = torch.Generator().manual_seed(number)
        for video in clean:
            for time in TIMES:
                noise = torch.randn(video.shape, generator=generator).to(device)
                calls.clear()
                with gated_calls(model, keep):
                    model((1 - time) * video + time * noise, torch.full((1,), time, device=device))
                for layer, call in enumerate(calls):
                    for (kind, size, topk), numbers in look(call, settings.grid, ORDERS).items():
                        where = {"checkpoint": checkpoint.name, "time": time, "layer": layer}
                        rows.append({**where, "order": kind, "block": size, "topk": topk, **numbers})
    return rows


@torch.no_grad()
def pooled(checkpoint: Path, videos: int, device: torch.device, console: Console) -> None:
    """Print the error of the sparse branch over ``videos`` held-out ones, for every order, block and smaller topk."""
    model, settings = load(checkpoint, device)
    held_out = Data(settings.size, 1, device).held_out(videos)
    batches: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [((noisy, time), {}) for noisy, time, _ in held_out]
    console.print("times " + ", ".join(f"{float(time):.2f}" for _, time, _ in held_out))
    for topk in TOPKS[:2]:
        for block in BLOCKS[1:]:
            for kind in ORDERS:
                config = {"topk": topk, "block_q": block, "block_k": block, "min_tokens": 0, "reorder": kind}
                config |= {"linear": "marginal"}  # errors are those of its sparse branch
                sla_compile.prepare(sla_compile.detach(model), batches[0][0], config=config)
                _, sites = gather(model, batches)
                errors = [site.sparse_only_error() for site in sites.values()]
                layers, mean_error = ", ".join(f"{error:.3f}" for error in errors), sum(errors) / len(errors)
                console.print(f"topk {topk:.0%} block {block} {kind}: {mean_error:.3f} (layers: {layers})")


def mean(rows: list[dict[str, Any]], what: str, **where: Any) -> float:
    values = [row[what] for row in rows if all(row[name] == value for name, value in where.items())]
    return sum(values) / len(values)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    layers = sorted({row["layer"] for row in rows})
    for block in BLOCKS:
        table = Table(title=f"blocks of {block}")
        for name in ("order", "topk", "mass", *(f"layer {layer}" for layer in layers), "error"):
            table.add_column(name, justify="left" if name == "order" else "right")
        for topk in TOPKS:
            for kind in ORDERS:
                where = {"order": kind, "block": block, "topk": topk}
                by_layer = [f"{mean(rows, 'mass', layer=layer, **where):.3f}" for layer in layers]
                numbers = (f"{mean(rows, 'mass', **where):.3f}", *by_layer, f"{mean(rows, 'error', **where):.3f}")
                table.add_row(kind, f"{topk:.0%}", *numbers, end_section=kind == ORDERS[-1])
        console.print(table)
    wins: defaultdict[str, int] = defaultdict(int)
    cases = {(r["checkpoint"], r["time"], r["layer"], r["block"], r["topk"]) for r in rows}
    for checkpoint, time, layer, block, topk in cases:
        where = {"checkpoint": checkpoint, "time": time, "layer": layer, "block": block, "topk": topk}
        wins[max(ORDERS, key=lambda kind: mean(rows, "mass", order=kind, **where))] += 1
    console.print(f"most mass, of {len(cases)} cases: {', '.join(f'{kind} {wins[kind]}' for kind in ORDERS)}")


def main(given: Sequence[str] | None = None) -> None:
    """Look at every checkpoint, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--videos", type=int, default=1, help="held-out videos for each checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    parser.add_argument("--pooled", action="store_true", help="the error as calibrate reports it, alone")
    options = parser.parse_args(given)
    if options.pooled:
        for checkpoint in options.checkpoints:
            pooled(checkpoint, max(options.videos, 6), torch.device(options.device), Console(width=120))
        return
    rows = measure(options.checkpoints, options.videos, torch.device(options.device))
    show(rows, Console(width=120))
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
