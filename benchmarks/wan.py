"""Wan2.1-1.3B end to end on one GPU: a denoising forward and a training step, dense against ``backend="sla"``.

    python benchmarks/wan.py [--frames 81 --height 480 --width 832] [--layers 30] [--train] [--json results.json]

The true configuration of the model with random weights in bf16. Each arm runs in a process and an Inductor cache of
its own: a cached graph would silently keep the other arm's attention kernel. Times are medians of CUDA events.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

ARMS = {
    "inductor, torch's default": ("inductor", None),
    "inductor, cuDNN SDPA": ("inductor", SDPBackend.CUDNN_ATTENTION),
    "sla, blocks 64x64": ("sla", {"block_q": 64, "block_k": 64}),
    "sla, blocks 128x128": ("sla", {"block_q": 128, "block_k": 128}),
    "no self-attention (floor)": ("floor", None),
}


def wan(layers: int) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=12,
            attention_head_dim=128,
            ffn_dim=8960,
            num_layers=layers,
            text_dim=4096,
            freq_dim=256,
        )
    return model.to(torch.bfloat16)


def inputs(options: argparse.Namespace) -> dict[str, Any]:
    frames, height, width = (options.frames - 1) // 4 + 1, options.height // 8, options.width // 8
    return {
        "hidden_states": torch.randn(1, 16, frames, height, width, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.tensor([500], device="cuda"),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16),
        "return_dict": False,
    }


def median_ms(call: Callable[[], object], repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {"median_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}


def measure(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times of one arm, in this process."""
    backend, how = ARMS[arm]
    model, example = wan(options.layers), inputs(options)
    if backend == "floor":
        leave_self_attention_out()
    if options.train:
        model.enable_gradient_checkpointing()
    choice = sdpa_kernel(how) if isinstance(how, SDPBackend) else contextlib.nullcontext()
    compile_options = {"backend": "sla", "options": how} if backend == "sla" else {"backend": "inductor"}
    compiled = model
    if options.regional:
        model.compile_repeated_blocks(**compile_options)
    else:
        compiled = torch.compile(model, **compile_options)
    with choice:
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        call = training_step(compiled, model, example) if options.train else forward(compiled, example)
        call()
        torch.cuda.synchronize()
        result: dict[str, Any] = {"compile_s": time.perf_counter() - started}
        for _ in range(2):
            call()
        result |= median_ms(call, options.repeats)
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if backend == "sla":
        import sla_compile

        totals = sla_compile.report(model).to_dict()["totals"]
        result["rewritten"] = totals["rewritten"]
    return result


def leave_self_attention_out() -> None:
    """From here on, in this process, self-attention returns its values: what is left is the rest of the model."""
    original = F.scaled_dot_product_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> torch.Tensor:
        # Adding nothing of q and k keeps the work that makes them.
        return v + 0 * (q + k) if q.shape == k.shape else original(q, k, v, **arguments)

    F.scaled_dot_product_attention = attention


def forward(compiled: Callable[..., Any], example: dict[str, Any]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return compiled(**example)

    return call


def training_step(
    compiled: Callable[..., Any], model: torch.nn.Module, example: dict[str, Any]
) -> Callable[[], object]:
    model.train()

    def call() -> object:
        compiled(**example)[0].square().mean().backward()
        return model.zero_grad(set_to_none=True)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--train", action="store_true", help="forward and backward with activation checkpointing")
    parser.add_argument("--regional", action="store_true", help="compile one block for all (compile_repeated_blocks)")
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    results = {}
    for arm in options.arms:
        with tempfile.TemporaryDirectory() as cache:
            run = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", arm],
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
        lines = run.stdout.strip().splitlines()
        results[arm] = json.loads(lines[-1]) if run.returncode == 0 and lines else {"failed": run.returncode}
    show(results, options)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "arms": results}, file, indent=1
            )


def show(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    what = "training step, activation checkpointing" if options.train else "forward"
    table = Table(title=f"Wan2.1-1.3B, {options.layers} layers, bf16, {what}; {torch.cuda.get_device_name()}")
    for column in ("arm", "ms (least to most)", "speed-up", "compile s", "peak GiB", "rewritten"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    base = next((r["median_ms"] for r in results.values() if "median_ms" in r), None)
    for arm, r in results.items():
        if "median_ms" not in r or base is None:
            table.add_row(arm, f"failed: {r.get('failed')}")
            continue
        table.add_row(
            arm,
            f"{r['median_ms']:.1f} ({r['least_ms']:.1f}-{r['most_ms']:.1f})",
            f"{base / r['median_ms']:.2f}",
            f"{r['compile_s']:.1f}",
            f"{r['peak_gib']:.1f}",
            str(r.get("rewritten", "")),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
