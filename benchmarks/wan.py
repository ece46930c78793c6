"""Wan2.1 end to end on one GPU: a denoising forward and a training step, dense against ``backend="sla"``.

    python benchmarks/wan.py --regional --json wan.json                             # 1.3B, about four minutes
    python benchmarks/wan.py --regional --model 14B --layers 4 --json wan14.json    # as many layers as fit

The true configuration with random weights in bf16; a training step is forward and backward with activation
checkpointing, no optimizer. Every arm has a process of its own for the whole run, with empty caches of its own (a
cached graph would silently keep another arm's attention kernel), so each one is imported and built once, all at once.
Then, each arm alone while the others wait:

1. its first forward, caches empty: the compile time, from ``torch.compile`` on, with torch and diffusers imported;
2. its forward, after two calls to warm up;

and, once all arms have compiled a training step (some at a time, so those compile times are of a busy machine):

3. its training step, after one call to warm up.

Peak memory is of the timed calls. Attention's share is what the arm takes above the arm with no self-attention. Each
figure is printed, and the JSON written, as soon as it is there. ``--repeats 0`` measures compile times only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed


FLOOR = "no self-attention (floor)"
ARMS: dict[str, SDPBackend | dict[str, Any] | None] = {
    "inductor, flash SDPA": SDPBackend.FLASH_ATTENTION,
    "inductor, cuDNN SDPA": SDPBackend.CUDNN_ATTENTION,
    "inductor, torch's default": None,
    "sla, blocks 64x64": {"block_q": 64, "block_k": 64},
    "sla, blocks 128x128": {"block_q": 128, "block_k": 128},
    "sla, blocks 64x64, tiles": {"block_q": 64, "block_k": 64, "reorder": "tiles"},
    "sla, blocks 128x128, tiles": {"block_q": 128, "block_k": 128, "reorder": "tiles"},
    FLOOR: None,
}
"""What computes the dense attention, or the settings of SLA."""
USUAL_ARMS = [
    *("inductor, flash SDPA", "inductor, cuDNN SDPA"),
    *("sla, blocks 64x64", "sla, blocks 128x128", "sla, blocks 128x128, tiles"),
    FLOOR,
]
BASES = ("inductor, flash SDPA", "inductor, cuDNN SDPA")

MODELS = {
    "1.3B": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "14B": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 1},
}
"""Configurations of Wan2.1's text-to-video models, and one to try this file with."""


class Arm:
    """A model compiled in this process, and its two calls."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.how = name, options, ARMS[name]
        if name == FLOOR:
            leave_self_attention_out()
        self.model = wan(options)
        self.example = example(options)
        self.compiled: Callable[..., Any] | None = None

    def first(self, what: str) -> dict[str, Any]:
        """Seconds of the first call, which compiles."""
        if what == "training step":
            self.model.train()
            self.model.enable_gradient_checkpointing()
        started = time.perf_counter()
        if self.compiled is None:
            self.compiled = self._compile()
        self._call(what)
        result = {"first_s": time.perf_counter() - started}
        if self.options.device == "cuda":
            torch.cuda.empty_cache()  # the other arms are on this GPU too
        if isinstance(self.how, dict):
            import sla_compile

            result |= {"rewritten": sla_compile.report(self.model).to_dict()["totals"]["rewritten"]}
        return result

    def timed(self, what: str) -> dict[str, float]:
        """Milliseconds of the calls after a warm-up, and their peak memory."""
        for _ in range(2 if what == "forward" else 1):
            self._call(what)
        cuda = self.options.device == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.options.repeats):
            started = time.perf_counter()
            self._call(what)
            times.append(1e3 * (time.perf_counter() - started))
        result = {"median_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}
        if cuda:
            result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.empty_cache()
        return result

    def _compile(self) -> Callable[..., Any]:
        how: dict[str, Any] = {"backend": self.options.inner}
        if isinstance(self.how, dict):
            settings = {**self.how, "inner": self.options.inner, "min_tokens": self.options.min_tokens}
            if "reorder" in self.how:
                frames, height, width = latent(self.options)
                settings["grid"] = (frames, height // 2, width // 2)  # of patches
            how = {"backend": "sla", "options": settings}
        if not self.options.regional:
            return torch.compile(self.model, **how)
        self.model.compile_repeated_blocks(**how)
        return self.model

    def _call(self, what: str) -> None:
        """One forward or training step, to its end on the device."""
        assert self.compiled is not None
        chosen = sdpa_kernel(self.how) if isinstance(self.how, SDPBackend) else contextlib.nullcontext()
        with chosen:
            if what == "forward":
                with torch.no_grad():
                    self.compiled(**self.example)
            else:
                self.compiled(**self.example)[0].square().mean().backward()
                self.model.zero_grad(set_to_none=True)
        if self.options.device == "cuda":
            torch.cuda.synchronize()


def wan(options: argparse.Namespace) -> Any:
    from diffusers import WanTransformer3DModel

    config = MODELS[options.model] | ({"num_layers": options.layers} if options.layers else {})
    torch.manual_seed(0)
    with torch.device(options.device):
        model = WanTransformer3DModel(patch_size=(1, 2, 2), text_dim=4096, freq_dim=256, **config)
    return model.to(torch.bfloat16).eval()


def latent(options: argparse.Namespace) -> tuple[int, int, int]:
    """Frames, height and width of the latent video."""
    return (options.frames - 1) // 4 + 1, options.height // 8, options.width // 8


def example(options: argparse.Namespace) -> dict[str, Any]:
    of = {"device": options.device, "dtype": torch.bfloat16}
    return {
        "hidden_states": torch.randn(1, 16, *latent(options), **of),
        "timestep": torch.tensor([500], device=options.device),
        "encoder_hidden_states": torch.randn(1, 512, 4096, **of),
        "return_dict": False,
    }


def leave_self_attention_out() -> None:
    """From here on, in this process, self-attention returns its values: what is left is the rest of the model."""
    original = F.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any) -> torch.Tensor:
        if query.shape != key.shape:
            return original(query, key, value, **arguments)
        return value + 0 * (query + key)  # adding nothing of them keeps the work that makes them

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]


def serve(name: str, options: argparse.Namespace, caches: str, asked: Connection) -> None:
    """One arm's process: answer ``(method, what)`` until the other end is closed."""
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ[variable] = str(Path(caches, variable))
    arm: Arm | None = None
    with contextlib.suppress(EOFError):
        while True:
            method, what = asked.recv()
            try:
                if arm is None:
                    arm = Arm(name, options)
                asked.send({} if method == "build" else getattr(arm, method)(what))
            except Exception as error:  # the other arms go on
                traceback.print_exc()
                asked.send({"failed": type(error).__name__})


class Run:
    """The arms' processes, and every figure so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.perf_counter()
        self.results: dict[str, dict[str, dict[str, Any]]] = {arm: {} for arm in options.arms}
        self.ends: dict[str, Connection] = {}

    @contextlib.contextmanager
    def processes(self) -> Iterator[None]:
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as caches:
            running = []
            for number, arm in enumerate(self.options.arms):
                self.ends[arm], theirs = context.Pipe()
                folder = str(Path(caches, str(number)))
                running.append(context.Process(target=serve, args=(arm, self.options, folder, theirs)))
                running[-1].start()
                theirs.close()
            try:
                yield
            finally:
                for end in self.ends.values():
                    end.close()
                for process in running:
                    process.join()

    def ask(self, arm: str, method: str, what: str) -> None:
        """Have the arm do it, and keep, print and write what it found; an arm that failed is not asked again."""
        if any("failed" in found for found in self.results[arm].values()):
            return
        try:
            self.ends[arm].send((method, what))
            answer = self.ends[arm].recv()
        except (EOFError, OSError):
            answer = {"failed": "its process ended"}
        if not answer:
            return
        self.results[arm][what] = self.results[arm].get(what, {}) | answer
        found = ", ".join(
            f"{key} {round(value, 2) if type(value) is float else value}" for key, value in answer.items()
        )
        print(f"[{time.perf_counter() - self.started:4.0f} s] {arm}, {what}: {found}", flush=True)
        if self.options.json:
            self.write()

    def measure(self) -> None:
        arms = self.options.arms
        with self.processes():
            with ThreadPoolExecutor(len(arms)) as pool:
                list(pool.map(lambda arm: self.ask(arm, "build", "forward"), arms))
            for arm in arms:
                self.ask(arm, "first", "forward")
                if self.options.repeats:
                    self.ask(arm, "timed", "forward")
            if self.options.no_training:
                return
            with ThreadPoolExecutor(self.options.at_once) as pool:
                list(pool.map(lambda arm: self.ask(arm, "first", "training step"), arms))
            if self.options.repeats:
                for arm in arms:
                    self.ask(arm, "timed", "training step")

    def write(self) -> None:
        options = {key: value for key, value in vars(self.options).items() if key != "json"}
        found: dict[str, Any] = {"torch": torch.__version__, "device": device_name(self.options), "options": options}
        found["compile_ahead"] = os.environ.get("SLA_COMPILE_AHEAD", "1") != "0"
        Path(self.options.json).write_text(json.dumps(found | {"arms": self.results}, indent=1))

    def show(self, what: str) -> None:
        layers = self.options.layers or MODELS[self.options.model]["num_layers"]
        table = Table(title=f"Wan2.1-{self.options.model}, {layers} layers, bf16, {what}; {device_name(self.options)}")
        columns = "arm|ms (least to most)|x flash|x cuDNN|attention|first call, s|peak GiB|rewritten"
        for column in columns.split("|"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for arm, found in self.results.items():
            table.add_row(arm, *self.cells(found.get(what, {}), what))
        Console(width=140).print(table)

    def cells(self, found: dict[str, Any], what: str) -> list[str]:
        if "failed" in found:
            return [f"failed: {found['failed']}"]
        cells = [""] * 4
        if "median_ms" in found:
            ms = found["median_ms"]
            others = [self.results.get(arm, {}).get(what, {}).get("median_ms") for arm in (*BASES, FLOOR)]
            cells = [f"{ms:.1f} ({found['least_ms']:.1f}-{found['most_ms']:.1f})"]
            cells += ["" if base is None else f"{base / ms:.2f}" for base in others[:2]]
            cells.append("" if others[2] is None else f"{1 - others[2] / ms:.0%}")
        peak = f"{found['peak_gib']:.1f}" if "peak_gib" in found else ""
        return [*cells, f"{found['first_s']:.1f}" if "first_s" in found else "", peak, str(found.get("rewritten", ""))]


def device_name(options: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if options.device == "cuda" else str(options.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.3B", choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--regional", action="store_true", help="compile one block for all (compile_repeated_blocks)")
    parser.add_argument("--no-training", action="store_true", help="forward only")
    parser.add_argument("--at-once", type=int, default=4, help="training steps that compile (and run) at the same time")
    parser.add_argument("--min-tokens", type=int, default=4096, help="SLAConfig.min_tokens")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"), help="eager: to try this file")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--arms", nargs="+", default=USUAL_ARMS, choices=list(ARMS))
    run = Run(parser.parse_args())
    run.measure()
    for what in ("forward",) if run.options.no_training else ("forward", "training step"):
        run.show(what)


if __name__ == "__main__":
    main()
