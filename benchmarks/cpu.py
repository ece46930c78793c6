"""Dense attention (SDPA) against Sparse-Linear Attention on the CPU: times, speed-up, peak memory, crossover.

    python benchmarks/cpu.py                                  # B1 H4 N16384 D64, topk 5%
    python benchmarks/cpu.py --tokens 4096 --dim 128 --topk 0.1
    python benchmarks/cpu.py --crossover                      # from which N on the op wins, D 64 and 128
    python benchmarks/cpu.py --crossover --linear taylor      # the same with virtual keys

No figure is printed unless the op first matches the definition. The arms are timed in turn in one process;
memory is the peak resident set of a process of its own for each arm.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

from sla_compile.common.limits import LINEAR_BRANCHES, TAYLOR
from sla_compile.inspection.self_test import errors_by_definition
from sla_compile.inspection.timing import time_in_turn
from sla_compile.ops.attention import sparse_linear_attention

ARMS = ("dense", "sla")
PASSES = ("forward", "forward+backward")
CPU = torch.device("cpu")


def make_inputs(arguments: argparse.Namespace, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """q, k, v (1, H, N, D), views of (1, N, H, D) as models pass them; weight (D, D) and bias (D), or shift (H)."""
    torch.manual_seed(0)
    shape = (1, tokens, arguments.heads, arguments.dim)
    q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2) for _ in range(3))
    inputs = {"q": q, "k": k, "v": v}
    if arguments.linear == TAYLOR:
        inputs["shift"] = torch.randn(arguments.heads, dtype=dtype)
    else:
        inputs["weight"] = torch.randn(arguments.dim, arguments.dim, dtype=dtype)
        inputs["bias"] = torch.randn(arguments.dim, dtype=dtype)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of the op that is timed; with virtual keys no block is skipped, as by their default."""
    bottomk = 0.0 if arguments.linear == TAYLOR else arguments.bottomk
    return {"topk": arguments.topk, "bottomk": bottomk, "linear": arguments.linear}


def make_arm(name: str, what: str, arguments: argparse.Namespace, tokens: int) -> Callable[[], None]:
    """A call that runs one arm once."""
    inputs = make_inputs(arguments, tokens)
    q, k, v = (inputs[name] for name in "qkv")
    leaves = list(inputs.values())
    grad_out = torch.randn_like(q) if what == "forward+backward" else None

    def forward() -> Tensor:
        if name == "dense":
            return F.scaled_dot_product_attention(q, k, v)
        return sparse_linear_attention(**inputs, **options(arguments))

    def run() -> None:
        if what == "forward":
            with torch.no_grad():
                forward()
        else:
            torch.autograd.grad(forward(), leaves if name == "sla" else leaves[:3], grad_out)

    return run


def verify(arguments: argparse.Namespace) -> float:
    """Largest relative error of output and gradients against the definition, in float64; stops over 1e-10."""
    sizes = {"tokens": 1000, "heads": arguments.heads, "dim": arguments.dim}
    settings: dict[str, Any] = {"block_q": 64, "block_k": 64, **options(arguments)}
    worst = max(errors_by_definition(CPU, torch.float64, **sizes, **settings).values())
    if not worst < 1e-10:
        sys.exit(f"the op is wrong: relative error {worst:.1e} against the definition; nothing was timed")
    return worst


def clock_of(arguments: argparse.Namespace) -> Callable[[], float]:
    """What the times are read off."""
    return time.process_time if arguments.processor_time else time.perf_counter


def peak_mebibytes() -> float:
    """Peak resident set of this process; unlike getrusage's, it does not start from the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux alone")


def print_memory(name: str, what: str, arguments: argparse.Namespace) -> None:
    """In a process of its own: peak after a small run of both arms, which loads the libraries, and at the end."""
    for arm in ARMS:
        make_arm(arm, what, arguments, 256)()
    before = peak_mebibytes()
    make_arm(name, what, arguments, arguments.tokens)()
    print(before, peak_mebibytes())


def measure_memory(name: str, what: str) -> tuple[float, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", f"{name}:{what}"]
    before, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(before), float(peak)


def compare(arguments: argparse.Namespace, console: Console) -> None:
    shape = f"B1 H{arguments.heads} N{arguments.tokens} D{arguments.dim}"
    shares = ", ".join(f"{name} {value}" for name, value in options(arguments).items())
    table = Table(title=f"{shape} float32, {shares}")
    for heading in (
        "pass",
        "dense ms",
        "sla ms",
        "speed-up",
        "dense MiB",
        "sla MiB",
        "dense work MiB",
        "sla work MiB",
    ):
        table.add_column(heading, justify="left" if heading == "pass" else "right")
    for what in PASSES:
        memory = [measure_memory(name, what) for name in ARMS]
        calls = {name: make_arm(name, what, arguments, arguments.tokens) for name in ARMS}
        times = time_in_turn(calls, CPU, seconds=arguments.seconds, clock=clock_of(arguments))
        table.add_row(
            what,
            *map(str, times.values()),
            f"{times['dense'].median / times['sla'].median:.2f}x",
            *(f"{peak:.0f}" for _, peak in memory),
            *(f"{peak - before:.0f}" for before, peak in memory),
        )
    console.print(table)
    console.print(
        "ms: median (20th to 80th percentile). MiB: peak resident set; work: of it, what the libraries did not take."
    )


def crossover(arguments: argparse.Namespace, console: Console) -> None:
    table = Table(
        title=f"speed-up over dense, B1 H{arguments.heads} float32, topk {arguments.topk}, {arguments.linear}"
    )
    for heading in ("N", *(f"D{dim} {what}" for dim in (64, 128) for what in PASSES)):
        table.add_column(heading, justify="right")
    for tokens in arguments.lengths or (128, 256, 384, 512, 768, 1024, 1536, 2048, 4096):
        cells = []
        for dim in (64, 128):
            sized = argparse.Namespace(**vars(arguments) | {"dim": dim})
            for what in PASSES:
                calls = {name: make_arm(name, what, sized, tokens) for name in ARMS}
                times = time_in_turn(calls, CPU, seconds=arguments.seconds / 10, clock=clock_of(arguments))
                dense, sla = (times[name].median for name in ARMS)
                cells.append(f"{dense / sla:.2f}x ({dense:.2f} / {sla:.2f} ms)")
        table.add_row(str(tokens), *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--topk", type=float, default=0.05)
    parser.add_argument("--bottomk", type=float, default=0.10)
    parser.add_argument("--linear", default="marginal", choices=LINEAR_BRANCHES)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each arm; a tenth with --crossover")
    parser.add_argument("--crossover", action="store_true", help="sweep N instead of timing one size")
    parser.add_argument("--processor-time", action="store_true", help="of the process, on a shared machine: one thread")
    parser.add_argument("--lengths", type=int, nargs="+", help="the N of --crossover")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.processor_time:
        torch.set_num_threads(1)
    if arguments.memory_of:
        name, what = arguments.memory_of.split(":")
        print_memory(name, what, arguments)
        return
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    console.print(f"verified against the definition: relative error {verify(arguments):.1e} in float64")
    (crossover if arguments.crossover else compare)(arguments, console)


if __name__ == "__main__":
    main()
