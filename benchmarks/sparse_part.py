"""The sparse part alone beside other block-sparse kernels, and what each head dimension costs.

    python benchmarks/sparse_part.py [--json FILE] [--no-head-dims] [--no-popular]

Every arm of the first table gets the same random critical blocks, 5% of each row, and q, k, v in (B, N, H, D) memory.
Ours: the forward from ready lists; the backward whole, with the transposed lists. Rivals: FlexAttention (128x128),
and cuDNN-frontend's block-sparse attention where it is installed (nvidia-cudnn-frontend, nvidia-cutlass-dsl); neither
has a linear branch. All outputs and gradients are compared before anything is timed. The second table is our backward
where some keys are popular: critical blocks drawn with weights exp(sigma * normal), one weight a block. The third is
the whole op, blocks 128x128, at other head dimensions: ms, the time a floating-point operation against that of D = 128,
and cuDNN's dense kernel. Milliseconds by CUDA events, L2 flushed before each call: median (20th to 80th percentile).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult
from sla_compile.common.options import AttentionOptions
from sla_compile.inspection.timing import Times, time_in_turn
from sla_compile.kernels.hopper import support as hopper
from sla_compile.kernels.steps import BlockLists, KernelInputs, Steps
from sla_compile.kernels.triton import attention as triton_attention
from sla_compile.kernels.triton import steps as triton_steps

BATCH, HEADS, TOKENS, HEAD_DIM = 1, 12, 32768, 128
SHAPES = [
    *((128, 12, torch.bfloat16), (128, 12, torch.float16), (96, 16, torch.bfloat16), (80, 16, torch.bfloat16)),
    *((72, 16, torch.bfloat16), (64, 24, torch.bfloat16), (40, 24, torch.bfloat16)),
    *((192, 8, torch.bfloat16), (256, 6, torch.bfloat16)),
]
"""Head dimension, heads and type; the first is what the others are compared with."""

Call = Callable[[], Any]


def milliseconds(call: Call) -> Times:
    return time_in_turn({"": call}, torch.device("cuda"), seconds=0.1, turns=1)[""]


def activations(count: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """(B, H, N, D) in (B, N, H, D) memory."""
    shape = (BATCH, TOKENS, heads, head_dim)
    return [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(count)]


def random_blocks(block: int, sigma: float = 0.0) -> tuple[Tensor, Tensor]:
    """Ascending lists (B, H, T, count) int32 of critical blocks, drawn with weights exp(sigma * normal), and the block
    map of int8 that says the same."""
    blocks = TOKENS // block
    gumbel = -torch.empty(BATCH, HEADS, blocks, blocks, device="cuda").exponential_().log()
    drawn = (gumbel + sigma * torch.randn(BATCH, HEADS, 1, blocks, device="cuda")).topk(int(0.05 * blocks)).indices
    lists = drawn.sort(-1).values
    block_map = torch.full(gumbel.shape, -1, dtype=torch.int8, device="cuda").scatter_(-1, lists, 1)
    return lists.int().contiguous(), block_map


def options_of(head_dim: int, block: int, linear: str) -> AttentionOptions:
    """5% critical and 10% negligible blocks."""
    return AttentionOptions(
        scale=head_dim**-0.5,
        topk=0.05,
        bottomk=0.10,
        block_q=block,
        block_k=block,
        feature_map="softmax",
        linear=linear,
    )


def ours(inputs: list[Tensor], block: int, lists: Tensor, block_map: Tensor) -> tuple[Call, Call]:
    q, k, v, grad_out = inputs
    options = options_of(HEAD_DIM, block, "none")
    steps: Steps = triton_steps
    if hopper.usable(q, k, v, options=options, has_key_mask=False):
        from sla_compile.kernels.hopper import steps as hopper_steps

        steps = hopper_steps

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return steps.attention_forward(KernelInputs(q, k, v, None, None, None), BlockLists(lists, None), None, options)

    result = ForwardResult(*forward(), block_map)

    def backward() -> tuple[Tensor, ...]:
        return triton_attention.backward(grad_out, AttentionInputs(q, k, v, None, None), result, options)[:3]

    return lambda: forward()[0], backward


def flex(inputs: list[Tensor], block: int, lists: Tensor) -> tuple[Call, Call]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    blocks = TOKENS // block
    padded = torch.nn.functional.pad(lists, (0, blocks - lists.shape[-1]))
    none = torch.zeros(BATCH, HEADS, blocks, dtype=torch.int32, device="cuda")
    mask = BlockMask.from_kv_blocks(none, padded, none + lists.shape[-1], padded, BLOCK_SIZE=block)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    out = compiled(q, k, v, block_mask=mask)
    return lambda: compiled(q, k, v, block_mask=mask), lambda: torch.autograd.grad(
        out, (q, k, v), inputs[3], retain_graph=True
    )


def cudnn_frontend(inputs: list[Tensor], block: int, lists: Tensor) -> tuple[Call, Call]:
    from cudnn.block_sparse_attention import (  # type: ignore[import-not-found]
        block_sparse_attention_backward,
        block_sparse_attention_forward,
    )

    q, k, v, grad_out = (x.transpose(1, 2) for x in inputs)
    settings = {"sparse_block_size": block, "layout": "bshd"}

    def forward() -> Any:
        return block_sparse_attention_forward(q, k, v, lists, **settings)

    saved = forward()

    def backward() -> tuple[Tensor, ...]:
        found = block_sparse_attention_backward(
            grad_out, q, k, v, saved["o_tensor"], saved["lse_tensor"], lists, **settings
        )
        return tuple(found[name].transpose(1, 2) for name in ("dq_tensor", "dk_tensor", "dv_tensor"))

    return lambda: forward()["o_tensor"].transpose(1, 2), backward


def sparse_part(console: Console) -> dict[str, dict[str, Times]]:
    """Forward and backward of every arm on the same blocks."""
    rows: dict[str, dict[str, Times]] = {}
    table = Table(
        "", "forward, ms", "backward, ms", title=f"sparse part alone, N {TOKENS}; {torch.cuda.get_device_name()}"
    )
    for block in (128, 64):
        inputs = activations(4, HEADS, HEAD_DIM, torch.bfloat16)
        lists, block_map = random_blocks(block)
        arms: dict[str, Callable[[], tuple[Call, Call]]] = {
            f"ours {block}x{block}": partial(ours, inputs, block, lists, block_map)
        }
        if block == 128:
            arms["FlexAttention 128x128"] = partial(flex, inputs, block, lists)
        arms[f"cuDNN-frontend {block}x{block}"] = partial(cudnn_frontend, inputs, block, lists)
        expected: list[Tensor] | None = None
        for name, make in arms.items():
            try:
                forward, backward = make()
                found = [forward(), *backward()]
            except Exception as error:
                table.add_row(name, f"{type(error).__name__}: {error}"[:120])
                continue
            expected = expected or found
            errors = [
                ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, expected, strict=True)
            ]
            if max(errors) > 2e-2:
                sys.exit(f"{name}: differs from ours by {errors}, nothing timed")
            rows[name] = {"forward": milliseconds(forward), "backward": milliseconds(backward)}
            table.add_row(name, *map(str, rows[name].values()))
    console.print(table)
    return rows


def popular(console: Console) -> dict[str, dict[str, Any]]:
    """Our backward, and its dK and dV alone, where some blocks of keys are critical for many rows."""
    rows: dict[str, dict[str, Any]] = {}
    table = Table("", "most popular over mean", "backward, ms", "dK and dV, ms", title="popular keys")
    for block in (128, 64):
        inputs = activations(4, HEADS, HEAD_DIM, torch.bfloat16)
        for sigma in (0.0, 1.0, 2.0, 4.0, 100.0):
            lists, block_map = random_blocks(block, sigma)
            backward = ours(inputs, block, lists, block_map)[1]
            chosen = (block_map == 1).sum(-2)
            over_mean = (chosen.max() / chosen.float().mean()).item()
            name = f"{block}x{block}, sigma {sigma:g}"
            rows[name] = {"over_mean": over_mean, "backward": milliseconds(backward), "key": key_milliseconds(backward)}
            table.add_row(name, f"{over_mean:.1f}", str(rows[name]["backward"]), f"{rows[name]['key']:.3f}")
    console.print(table)
    return rows


def key_milliseconds(backward: Call, calls: int = 10) -> float:
    """The mean time of the kernel that makes dK and dV, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            backward()
        torch.cuda.synchronize()
    names = ("key_kernel", "attention_backward_key_kernel")
    (total,) = (event.device_time_total for event in profile.key_averages() if event.key in names)
    return float(total) / 1e3 / calls


def head_dims(console: Console) -> dict[str, dict[str, Any]]:
    """The whole op at other head dimensions, and cuDNN's dense kernel there."""
    rows: dict[str, dict[str, Any]] = {}
    table = Table("", "forward, ms", "an operation, of D 128", "x cuDNN", "backward, ms", "an operation", "x cuDNN")
    for head_dim, heads, dtype in SHAPES:
        q, k, v, grad_out = activations(4, heads, head_dim, dtype)
        weight = torch.randn(head_dim, head_dim, device="cuda", dtype=dtype) * 0.05
        bias = torch.randn(head_dim, device="cuda", dtype=dtype)
        call, options = AttentionInputs(q, k, v, weight, bias), options_of(head_dim, 128, "marginal")

        def forward() -> ForwardResult:
            return triton_attention.forward(call, options)  # noqa: B023

        saved = forward()

        def backward() -> Any:
            return triton_attention.backward(grad_out, call, saved, options)  # noqa: B023

        name = f"D {head_dim}, H {heads}, {str(dtype).removeprefix('torch.')}"
        rows[name] = {"size": heads * head_dim, "forward": milliseconds(forward), "backward": milliseconds(backward)}
        dense = dense_times(q, k, v, grad_out)
        base = next(iter(rows.values()))
        cells = [name]
        for direction, time in zip(("forward", "backward"), dense, strict=True):
            found = rows[name][direction]
            share = found.median / rows[name]["size"] / (base[direction].median / base["size"])
            rows[name][f"dense {direction}"] = time
            cells += [str(found), f"{share:.2f}", f"{time / found.median:.1f}" if time else "-"]
        table.add_row(*cells)
    console.print(table)
    return rows


def dense_times(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[float | None, float | None]:
    """cuDNN's dense attention, or None where it does not take the head dimension."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = sdpa(q, k, v)
            forward = milliseconds(lambda: sdpa(q, k, v))
            backward = milliseconds(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))
    except RuntimeError:
        return None, None
    return forward.median, backward.median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--no-popular", action="store_true", help="without the second table")
    parser.add_argument("--no-head-dims", action="store_true", help="without the third table")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.manual_seed(0)
    results: dict[str, Any] = {"sparse part": sparse_part(console)}
    if not options.no_popular:
        results["popular"] = popular(console)
    if not options.no_head_dims:
        results["head dims"] = head_dims(console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, default=dataclasses.asdict))


if __name__ == "__main__":
    main()
