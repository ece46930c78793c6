"""The CUDA kernels by themselves: both directions beside SDPA, Gluon beside Triton, and where the time goes.

    python benchmarks/kernels.py [--tokens 32760] [--blocks 128x128 64x64] [OPTION]  # one of these, or none:
    --run-time, --forms, --key-mask 0.1, --causal, --grouped 4

The launchers are called without the library op around them, so no autograd or checks are timed; everything else is:
classification, block states, attention, gate, every gradient. Milliseconds by CUDA events after a warm-up, the L2
cache flushed before each call: median, and the 20th and 80th percentile. tests/kernels/triton/test_gpu.py checks that
they are right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench_cudagraph

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult
from sla_compile.common.options import AttentionOptions
from sla_compile.inspection.timing import Times, time_in_turn
from sla_compile.kernels.hopper import support as hopper
from sla_compile.kernels.triton import attention as triton_attention

BATCH, HEADS, HEAD_DIM = 1, 12, 128


def milliseconds(call: Callable[[], Any]) -> str:
    return str(time_in_turn({"": call}, torch.device("cuda"), seconds=0.06, turns=1)[""])


@contextmanager
def without_gluon() -> Iterator[None]:
    usable = hopper.usable
    hopper.usable = lambda *tensors, **settings: False
    try:
        yield
    finally:
        hopper.usable = usable


def tensors(tokens: int) -> list[torch.Tensor]:
    """q, k, v and grad_out in (B, N, H, D) memory, a weight and a bias."""
    shape = (BATCH, tokens, HEADS, HEAD_DIM)
    activations = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]
    weight = torch.randn(HEAD_DIM, HEAD_DIM, device="cuda", dtype=torch.bfloat16) * 0.05
    bias = torch.randn(HEAD_DIM, device="cuda", dtype=torch.bfloat16) * 0.1
    return [*activations, weight, bias]


def options_of(block_q: int, block_k: int, topk: float = 0.05, linear: str = "marginal") -> AttentionOptions:
    return AttentionOptions(
        scale=HEAD_DIM**-0.5,
        topk=topk,
        bottomk=0.0 if linear == "taylor" else 0.10,
        block_q=block_q,
        block_k=block_k,
        feature_map="softmax",
        linear=linear,
    )


def ours(
    inputs: list[torch.Tensor], block_q: int, block_k: int, topk: float = 0.05, now: torch.Tensor | None = None
) -> tuple[str, str]:
    """``now``: topk and bottomk at run time, in millionths; ``topk`` is the most that it may be, then."""
    q, k, v, grad_out, weight, bias = inputs
    call, options = AttentionInputs(q, k, v, weight, bias, sparsity=now), options_of(block_q, block_k, topk)

    def forward() -> ForwardResult:
        return triton_attention.forward(call, options)

    saved = forward()
    return milliseconds(forward), milliseconds(lambda: triton_attention.backward(grad_out, call, saved, options))


def dense(
    inputs: list[torch.Tensor], backend: SDPBackend, mask: torch.Tensor | None = None, is_causal: bool = False
) -> tuple[str, str]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])

    def call() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)

    with sdpa_kernel(backend):
        out = call()
        forward = milliseconds(call)
        return forward, milliseconds(lambda: torch.autograd.grad(out, (q, k, v), inputs[3], retain_graph=True))


def at_run_time(inputs: list[torch.Tensor], blocks: list[tuple[int, int]], console: Console) -> None:
    """What it costs that topk is read when the attention runs, in a graph that allows for more."""
    now = torch.tensor([50_000, 100_000], device="cuda")
    table = Table("topk", "forward, ms", "backward, ms", title="compiled, and as set_sparsity sets it")
    for block_q, block_k in blocks:
        for label, topk, sparsity in (
            ("5%, compiled", 0.05, None),
            ("5% of at most 5%", 0.05, now),
            ("5% of at most 30%", 0.30, now),
            ("30%, compiled", 0.30, None),
        ):
            table.add_row(f"{block_q}x{block_k}: {label}", *ours(inputs, block_q, block_k, topk, sparsity))
    console.print(table)


def forms(inputs: list[torch.Tensor], blocks: list[tuple[int, int]], console: Console) -> None:
    """What stands for blocks that are not critical, in CUDA graphs, so that no launch waits for the host."""
    q, k, v, grad_out, weight, bias = inputs
    shift = torch.zeros(HEADS, device="cuda")
    even = torch.tensor([[50_000, 0]] * HEADS, device="cuda")
    calls = {
        "none": (AttentionInputs(q, k, v, None, None), 0.05),
        "marginal": (AttentionInputs(q, k, v, weight, bias), 0.05),
        "taylor": (AttentionInputs(q, k, v, None, None, shift=shift), 0.05),
        "taylor, 5% for each head of at most 25%": (AttentionInputs(q, k, v, None, None, None, even, shift), 0.25),
    }
    table = Table("linear", "forward, ms", "backward, ms", title=f"{torch.cuda.get_device_name()}, in CUDA graphs")

    for block_q, block_k in blocks:
        for name, (call, topk) in calls.items():
            options = options_of(block_q, block_k, topk, name.partition(",")[0])
            saved = triton_attention.forward(call, options)
            forward = graphed(lambda: triton_attention.forward(call, options))  # noqa: B023
            backward = graphed(lambda: triton_attention.backward(grad_out, call, saved, options))  # noqa: B023
            table.add_row(f"{block_q}x{block_k}: {name}", forward, backward)
    console.print(table)


def graphed(call: Callable[[], Any]) -> str:
    """Milliseconds in a CUDA graph, so that no launch waits for the host."""
    return str(Times.of(do_bench_cudagraph(call, rep=60, return_mode="all")))


def key_mask(inputs: list[torch.Tensor], blocks: list[tuple[int, int]], share: float, console: Console) -> None:
    """What a mask costs that takes the last ``share`` of the keys; ours in CUDA graphs."""
    q, k, v, grad_out, weight, bias = inputs
    keys = k.shape[2]
    mask = (torch.arange(keys, device="cuda") < keys * (1 - share))[None]
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}: the last {share:.0%} of the keys masked"
    table = Table("", "forward, ms", "backward, ms", title=title)

    def timed(given: torch.Tensor | None, block_q: int, block_k: int) -> tuple[str, str]:
        call, options = AttentionInputs(q, k, v, weight, bias, given), options_of(block_q, block_k)
        saved = triton_attention.forward(call, options)
        forward = graphed(lambda: triton_attention.forward(call, options))
        return forward, graphed(lambda: triton_attention.backward(grad_out, call, saved, options))

    for block_q, block_k in blocks:
        table.add_row(f"SLA {block_q}x{block_k}", *timed(mask, block_q, block_k))
        table.add_row(f"SLA {block_q}x{block_k}, no mask", *timed(None, block_q, block_k))
        with without_gluon():
            table.add_row(f"SLA {block_q}x{block_k}, Triton alone", *timed(mask, block_q, block_k))
    table.add_row("cuDNN SDPA", *dense(inputs, SDPBackend.CUDNN_ATTENTION, mask[:, None, None]))
    table.add_row("cuDNN SDPA, no mask", *dense(inputs, SDPBackend.CUDNN_ATTENTION))
    console.print(table)


def causal(inputs: list[torch.Tensor], blocks: list[tuple[int, int]], console: Console) -> None:
    """Causal attention beside one with about as many critical blocks; ours in CUDA graphs."""
    q, k, v, grad_out, weight, bias = inputs
    table = Table("", "forward, ms", "backward, ms", title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}")

    def timed(options: AttentionOptions) -> tuple[float, str, str]:
        """The share of blocks that is critical, forward and backward."""
        call = AttentionInputs(q, k, v, weight, bias)
        saved = triton_attention.forward(call, options)
        share = (saved.block_map == 1).float().mean().item()
        forward = graphed(lambda: triton_attention.forward(call, options))
        return share, forward, graphed(lambda: triton_attention.backward(grad_out, call, saved, options))

    for block_q, block_k in blocks:
        options = replace(options_of(block_q, block_k), causal=True)
        share, *times = timed(options)
        table.add_row(f"SLA {block_q}x{block_k}, {share:.2%} critical", *times)
        with without_gluon():
            table.add_row(f"SLA {block_q}x{block_k}, Triton alone", *timed(options)[1:])
        count = -(-q.shape[2] // block_k)
        share, *times = timed(options_of(block_q, block_k, round(round(share * count) / count + 1e-4, 4)))
        table.add_row(f"SLA {block_q}x{block_k}, not causal, {share:.2%} critical", *times)
    table.add_row("cuDNN SDPA, causal", *dense(inputs, SDPBackend.CUDNN_ATTENTION, is_causal=True))
    console.print(table)


def grouped(inputs: list[torch.Tensor], blocks: list[tuple[int, int]], group: int, console: Console) -> None:
    """So many query heads to a key head, beside as many key heads, and beside keys that are repeated in memory; in CUDA
    graphs."""
    q, k, v, grad_out, weight, bias = inputs
    few = [x[:, ::group].transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    table = Table("", "forward, ms", "backward, ms", title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}")

    def timed(keys: list[torch.Tensor], options: AttentionOptions, repeats: int = 1) -> tuple[str, str]:
        def call() -> AttentionInputs:
            key, value = keys if repeats == 1 else [x.repeat_interleave(repeats, 1) for x in keys]
            return AttentionInputs(q, key, value, weight, bias)

        def backward() -> list[torch.Tensor]:
            found = triton_attention.backward(grad_out, repeated, saved, options)
            return [x.unflatten(1, (-1, repeats)).sum(2) for x in found[1:3]] if repeats > 1 else list(found)

        repeated = call()
        saved = triton_attention.forward(repeated, options)
        return graphed(lambda: triton_attention.forward(call(), options)), graphed(backward)

    for block_q, block_k in blocks:
        name, options = f"SLA {block_q}x{block_k}", options_of(block_q, block_k)
        table.add_row(f"{name}, {HEADS} key heads", *timed([k, v], options))
        table.add_row(f"{name}, {HEADS // group} key heads", *timed(few, options))
        table.add_row(f"{name}, {HEADS // group} key heads, repeated in memory", *timed(few, options, group))
    console.print(table)


def stages(inputs: list[torch.Tensor], block_q: int, block_k: int, console: Console) -> None:
    """Time of each kernel of one call in each direction, by the profiler."""
    q, k, v, grad_out, weight, bias = inputs
    call, options = AttentionInputs(q, k, v, weight, bias), options_of(block_q, block_k)
    calls = 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            saved = triton_attention.forward(call, options)
            triton_attention.backward(grad_out, call, saved, options)
        torch.cuda.synchronize()
    table = Table("kernel", "ms a call of both", title=f"blocks {block_q}x{block_k}")
    rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)
    for row in rows:
        table.add_row(row.key[:80], f"{row.device_time_total / calls / 1000:.3f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument("--blocks", nargs="+", default=["128x128", "128x64", "64x64"])
    parser.add_argument("--stages", action="store_true", help="also the time of each kernel")
    parser.add_argument("--run-time", action="store_true", help="what run-time sparsity costs, and nothing else")
    parser.add_argument(
        "--key-mask", type=float, metavar="SHARE", help="with a mask of the last keys, and nothing else"
    )
    parser.add_argument("--causal", action="store_true", help="causal attention, and nothing else")
    parser.add_argument("--grouped", type=int, metavar="HEADS", help="query heads to a key head, and nothing else")
    parser.add_argument("--forms", action="store_true", help="the forms of the rest, and nothing else")
    options = parser.parse_args()
    console = Console()
    inputs = tensors(options.tokens)
    table = Table("", "forward, ms", "backward, ms", title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    blocks = [(int(size_q), int(size_k)) for size_q, size_k in (name.split("x") for name in options.blocks)]
    if options.run_time:
        at_run_time(inputs, blocks, console)
        return
    if options.causal:
        causal(inputs, blocks, console)
        return
    if options.grouped is not None:
        grouped(inputs, blocks, options.grouped, console)
        return
    if options.key_mask is not None:
        key_mask(inputs, blocks, options.key_mask, console)
        return
    if options.forms:
        forms(inputs, blocks, console)
        return
    for block_q, block_k in blocks:
        table.add_row(f"SLA {block_q}x{block_k}", *ours(inputs, block_q, block_k))
        with without_gluon():
            table.add_row(f"SLA {block_q}x{block_k}, Triton alone", *ours(inputs, block_q, block_k))
    table.add_row("cuDNN SDPA", *dense(inputs, SDPBackend.CUDNN_ATTENTION))
    table.add_row("flash SDPA", *dense(inputs, SDPBackend.FLASH_ATTENTION))
    console.print(table)
    if options.stages:
        for block_q, block_k in blocks:
            stages(inputs, block_q, block_k, console)


if __name__ == "__main__":
    main()
