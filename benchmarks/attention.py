"""Attention on one CUDA device: Sparse-Linear Attention beside cuDNN, flash and FlexAttention.

    python benchmarks/attention.py [--json FILE] [--figure FILE] [--tokens 32760] [--quick]

First a correctness gate against the definition in float64; no time is printed where it fails. All arms are
timed in turn in one process, by CUDA events, with the L2 cache flushed before each run: median, and the 20th
and 80th percentile. Inputs are (B, N, H, D) memory seen as (B, H, N, D), as video models pass them. Ours
counts everything: classification, block states, attention, gate. FlexAttention is the sparse part only, over
as many random blocks. The sweep over tokens is done twice: eager, where a short call waits for the host, and
replayed from a CUDA graph, where it does not. The roof is the sparse part's products at the rate of a large matrix
product, measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

import sla_compile
from sla_compile.inspection.self_test import errors_by_definition
from sla_compile.inspection.timing import Times, peak_bytes, time_in_turn
from sla_compile.ops.attention import sparse_linear_attention

BATCH, HEADS, HEAD_DIM = 1, 12, 128
TOPK, BOTTOMK = 0.05, 0.10
SWEEP = (1024, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536, 131072)
EAGER = 16384
"""Tokens from which the host is ahead of the device in any case."""
FLEX_FROM = 8192
CUDA = torch.device("cuda")
DENSE, FLEX = ("cuDNN SDPA", "flash SDPA"), "FlexAttention 128x128, sparse part only"
SLA_BLOCKS = ((64, 64), (128, 64), (128, 128))
SWEPT_BLOCKS = ((64, 64), (128, 128))

Call = Callable[[], Any]
Sweep = dict[int, dict[str, dict[str, Times]]]


def make_inputs(tokens: int) -> dict[str, Tensor]:
    """q, k, v, weight, bias that ask for gradients, and grad_out."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    tensors = {
        name: normal(BATCH, tokens, HEADS, HEAD_DIM).bfloat16().transpose(1, 2) for name in ("q", "k", "v", "grad_out")
    }
    tensors["weight"] = normal(HEAD_DIM, HEAD_DIM) / HEAD_DIM**0.5
    tensors["bias"] = normal(HEAD_DIM)
    for name in ("q", "k", "v", "weight", "bias"):
        tensors[name].requires_grad_()
    return tensors


def gate_on_correctness(tokens: int = 2008) -> dict[str, float]:
    """Relative errors of out and every gradient against the definition; exit where one is over its budget."""
    sizes: dict[str, Any] = {"tokens": tokens, "heads": HEADS, "dim": HEAD_DIM}
    options: dict[str, Any] = {"topk": TOPK, "bottomk": BOTTOMK, "block_q": 64, "block_k": 64}
    errors = errors_by_definition(CUDA, torch.bfloat16, **sizes, **options)
    failed = {name: e for name, e in errors.items() if not e < (1e-2 if name == "out" else 2e-2)}
    if failed:
        sys.exit(f"correctness gate failed, nothing timed: {failed}")
    return errors


def in_cuda_graph(call: Call) -> Call:
    """The same work replayed from a CUDA graph: what it costs where the host does not hold the device up."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def random_block_mask(tokens: int, block: int = 128) -> BlockMask:
    """As many random blocks a row as topk asks for, all of them whole."""
    blocks = tokens // block
    count = max(1, int(TOPK * blocks))
    indices = torch.rand(BATCH, HEADS, blocks, blocks, device="cuda").argsort(-1).int()
    none = torch.zeros(BATCH, HEADS, blocks, dtype=torch.int32, device="cuda")
    return BlockMask.from_kv_blocks(none, indices, none + count, indices, BLOCK_SIZE=block)


def arms(tokens: int, *, flex: bool, blocks: Sequence[tuple[int, int]] = SLA_BLOCKS) -> dict[str, tuple[Call, Call]]:
    """Forward and backward of each arm."""
    tensors = make_inputs(tokens)
    q, k, v = (tensors[name] for name in "qkv")
    grad_out, gates = tensors["grad_out"], (tensors["weight"], tensors["bias"])

    def pair(forward: Callable[[], Tensor], wanted: tuple[Tensor, ...], grad: Tensor) -> tuple[Call, Call]:
        out = forward()
        return forward, lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)

    def dense(backend: SDPBackend) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return forward

    found = {
        "cuDNN SDPA": pair(dense(SDPBackend.CUDNN_ATTENTION), (q, k, v), grad_out),
        "flash SDPA": pair(dense(SDPBackend.FLASH_ATTENTION), (q, k, v), grad_out),
    }
    for block_q, block_k in blocks:

        def sparse(block_q: int = block_q, block_k: int = block_k) -> Tensor:
            blocks: dict[str, Any] = {"block_q": block_q, "block_k": block_k}
            return sparse_linear_attention(q, k, v, *gates, topk=TOPK, bottomk=BOTTOMK, linear="marginal", **blocks)

        found[f"SLA {block_q}x{block_k}"] = pair(sparse, (q, k, v, *gates), grad_out)
    if flex:
        whole = tokens // 128 * 128
        mask = random_block_mask(whole)
        # FlexAttention's blocks are whole: a few tokens fewer
        part = [x[:, :, :whole].detach().requires_grad_() for x in (q, k, v)]
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        found[FLEX] = pair(lambda: compiled(*part, block_mask=mask), tuple(part), grad_out[:, :, :whole])
    return found


def breakdown(calls: dict[str, Call], repeats: int = 5) -> dict[str, dict[str, float]]:
    """Milliseconds of each GPU kernel of one call, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    stages: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        call()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
        kernels = [e for e in record.key_averages() if e.self_device_time_total > 0]
        stages[name] = {
            e.key[:64]: round(e.self_device_time_total / repeats / 1e3, 4)
            for e in sorted(kernels, key=lambda e: -e.self_device_time_total)
        }
    return stages


def peak_share(tokens: int, block_q: int, block_k: int) -> float:
    """Most memory above the inputs in a forward and its backward, all results included, as a share of q, k, v, out."""
    tensors = make_inputs(tokens)
    leaves = [tensors[name] for name in ("q", "k", "v", "weight", "bias")]
    activations = 4 * tensors["q"].numel() * tensors["q"].element_size()

    def call() -> None:
        blocks: dict[str, Any] = {"block_q": block_q, "block_k": block_k}
        out = sparse_linear_attention(*leaves, topk=TOPK, bottomk=BOTTOMK, linear="marginal", **blocks)
        torch.autograd.grad(out, leaves, tensors["grad_out"])

    call()
    return (peak_bytes(call, [CUDA]) or 0) / activations


def matrix_rate() -> float:
    """Floating-point operations a second of an 8192^3 bfloat16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    time = time_in_turn({"matmul": lambda: a @ b}, CUDA, seconds=0.1)["matmul"]
    return 2 * 8192**3 / (time.median / 1e3)


def roof(tokens: int, rate: float, direction: str) -> float:
    """Milliseconds of the sparse part's matrix products alone: two of the forward, five of the backward."""
    products = 2 if direction == "forward" else 5
    return 1e3 * products * 2 * BATCH * HEADS * HEAD_DIM * TOPK * tokens**2 / rate


def crossover(rows: Sweep, arm: str) -> dict[str, int | None]:
    """Per direction, the fewest tokens from which ``arm`` stays faster than the fastest dense kernel."""
    first: dict[str, int | None] = {}
    for direction in ("forward", "forward+backward"):
        first[direction] = None
        for tokens in sorted(rows, reverse=True):
            total = {
                name: sum(t.median for d, t in times.items() if d in direction) for name, times in rows[tokens].items()
            }
            if total[arm] >= min(total[name] for name in DENSE):
                break
            first[direction] = tokens
    return first


def measure(
    tokens: int,
    seconds: float,
    *,
    flex: bool = False,
    graphs: bool = False,
    blocks: Sequence[tuple[int, int]] = SLA_BLOCKS,
) -> dict[str, dict[str, Times]]:
    """Times of every arm: name -> direction -> times."""
    found = arms(tokens, flex=flex, blocks=blocks)
    times: dict[str, dict[str, Times]] = {name: {} for name in found}
    for index, direction in enumerate(("forward", "backward")):
        calls = {name: pair[index] for name, pair in found.items()}
        if graphs:
            calls = {name: in_cuda_graph(call) for name, call in calls.items()}
        for name, found_times in time_in_turn(calls, CUDA, seconds=seconds).items():
            times[name][direction] = found_times
    return times


def print_arms(console: Console, tokens: int, times: dict[str, dict[str, Times]]) -> None:
    title = f"B{BATCH} H{HEADS} N{tokens} D{HEAD_DIM} bf16, topk {TOPK}, bottomk {BOTTOMK}; median (20th to 80th) ms"
    table = Table("arm", "forward", "x cuDNN", "x flash", "backward", "x cuDNN", "x flash", title=title)
    for name, row in times.items():
        cells = [name]
        for direction in ("forward", "backward"):
            t = row[direction]
            cells += [
                str(t),
                *(f"{times[name][direction].median / t.median:.1f}" for name in DENSE),
            ]
        table.add_row(*cells)
    console.print(table)


def print_sweep(console: Console, title: str, rows: Sweep) -> None:
    names = max((list(row) for row in rows.values()), key=len)
    table = Table("tokens", *names, title=f"{title}: forward / backward, median ms")
    for tokens, row in rows.items():
        table.add_row(
            str(tokens),
            *(f"{row[n]['forward'].median:.3f} / {row[n]['backward'].median:.3f}" if n in row else "" for n in names),
        )
    console.print(table)


def print_stages(console: Console, stages: dict[str, dict[str, float]]) -> None:
    for direction, kernels in stages.items():
        table = Table("GPU kernel", "ms", title=f"SLA 64x64, {direction}")
        for name, value in kernels.items():
            if value >= 0.001:
                table.add_row(name, f"{value:.3f}")
        console.print(table)


def draw(path: Path, rows: Sweep, rate: float) -> None:
    """Forward and backward time against tokens, both axes logarithmic, and the roof at ``rate``."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        for name in max((list(row) for row in rows.values()), key=len):
            points = {tokens: row[name][direction].median for tokens, row in rows.items() if name in row}
            axis.loglog(list(points), list(points.values()), "o-", markersize=4, label=name)
        axis.loglog(list(rows), [roof(n, rate, direction) for n in rows], "k:", label="roof of the sparse part")
        axis.set(title=direction, xlabel="tokens")
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[1].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--figure", type=Path, help="draw time against tokens here (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="no sweep over tokens, no FlexAttention")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/attention.py needs a CUDA device")
    console = Console(width=None if sys.stdout.isatty() else 120)
    machine = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}, sla-compile {sla_compile.__version__}"
    )
    console.print(machine)
    errors = gate_on_correctness()
    console.print("correct: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))

    # a stream of its own, because a backward can be captured only on the stream of its forward
    with torch.cuda.stream(torch.cuda.Stream()):
        times = measure(options.tokens, 0.5, flex=not options.quick)
        print_arms(console, options.tokens, times)
        peaks = {f"{q}x{k}": peak_share(options.tokens, q, k) for q, k in SLA_BLOCKS}
        console.print("peak of forward + backward above inputs, of q, k, v and out together:", peaks)
        forward, backward = arms(options.tokens, flex=False, blocks=((64, 64),))["SLA 64x64"]
        stages = breakdown({"forward": forward, "backward": backward})
        sweeps = {} if options.quick else {"CUDA graph": sweep(graphs=True), "eager": sweep(graphs=False)}
    first = {
        f"{title}, {arm}": crossover(rows, arm)
        for title, rows in sweeps.items()
        for arm in (f"SLA {q}x{k}" for q, k in SWEPT_BLOCKS)
    }
    print_stages(console, stages)
    for title, rows in sweeps.items():
        print_sweep(console, title, rows)
    console.print("faster than the fastest dense kernel from (tokens):", first)
    rate = matrix_rate()
    console.print(f"8192^3 matrix product: {rate / 1e12:.0f} TFLOP/s")
    if options.figure and sweeps:
        draw(options.figure, sweeps["CUDA graph"], rate)
    if options.json:
        record = {
            "machine": machine,
            "errors": errors,
            "matrix_rate": rate,
            "peaks": peaks,
            "times": plain({options.tokens: times}),
            "sweeps": {title: plain(rows) for title, rows in sweeps.items()},
            "stages": stages,
            "crossover": first,
        }
        options.json.write_text(json.dumps(record, indent=1))


def sweep(*, graphs: bool) -> Sweep:
    rows: Sweep = {}
    for tokens in SWEEP:
        if graphs or tokens <= EAGER:
            flex = graphs and tokens >= FLEX_FROM
            rows[tokens] = measure(tokens, 0.1, graphs=graphs, flex=flex, blocks=SWEPT_BLOCKS)
            torch.cuda.empty_cache()
    return rows


def plain(rows: Sweep) -> dict[str, Any]:
    """For JSON: tokens -> arm -> direction -> median, low, high."""
    return {
        str(tokens): {arm: {d: vars(t) for d, t in row.items()} for arm, row in table.items()}
        for tokens, table in rows.items()
    }


if __name__ == "__main__":
    main()
