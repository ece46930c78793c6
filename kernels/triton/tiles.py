"""What the host decides for the kernels: tile sizes, warps and stages from one small table, and operands' memory.

Nothing is tuned at a user's first call: other launches come from a file (``launches.py``) that ``tuning.py`` fills.
Kernels read rows in vectors of 16 bytes: a tensor whose memory does not allow that is copied once. (Reading element by
element, each with its mask, is slow, and Triton 3.6's assembler then gave one wgmma operand a wrong address.)
"""

from __future__ import annotations

from functools import cache

import torch

from sla_compile.common.limits import (
    BLOCK_SIZES,
    DTYPES,
    FEATURE_MAPS,
    LINEAR_BRANCHES,
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
)
from sla_compile.common.options import BackwardOptions

from .launches import KERNELS, Launch, check_environment, on_hopper, replaced

__all__ = [
    "FULL_PRECISION",
    "KERNELS",
    "Launch",
    "ceil_div",
    "check_supported",
    "clamped",
    "gate_matrix",
    "head_stride",
    "launch_for",
    "padded_dim",
    "power_of_two",
    "row_of",
    "row_pitch",
    "shipped_launch",
    "stacked",
    "vector_readable",
    "vector_strides",
    "virtual_launch",
]

FULL_PRECISION = "ieee" if torch.version.hip is not None else "tf32x3"
"""How ``tl.dot`` multiplies float32 where 24 bits are wanted: on NVIDIA's matrix units in three products, whose error
is that of float32 (1.5e-7 of block scores, 2.1e-7 by "ieee") in a third of the time."""


def ceil_div(size: int, part: int) -> int:
    """Parts in ``size``, the last one maybe short. ``triton.cdiv``, made for kernels too, takes 4 us on the host."""
    return -(-size // part)


def stacked(x: torch.Tensor, heads: int, axis: int = 1) -> torch.Tensor:
    """x (..., H, T, ...), H at ``axis``, as (..., heads, T * H / heads, ...): what belongs to the query heads of a key
    head lies one after the other, so this is a view."""
    group = x.shape[axis] // max(1, heads)
    return x if group == 1 else x.unflatten(axis, (heads, group)).flatten(axis + 1, axis + 2)


def power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``, at least 1."""
    return 1 << max(0, size - 1).bit_length()


def padded_dim(head_dim: int) -> int:
    """Head dimension in registers: the next power of two, at least the 16 that a matrix unit needs."""
    return max(16, power_of_two(head_dim))


def row_pitch(head_dim: int) -> int:
    """Elements from one row of a (D, D) matrix to the next: the head dimension up to a multiple of 8."""
    return -(-head_dim // 8) * 8


def vector_readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` (B, H, N, D) itself if its rows are dense whole 16-byte vectors, else a copy padded with zeros."""
    batch, heads, tokens, head_dim = x.shape
    strides = (stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1)
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    if head_dim % 8 == 0 and x.stride(3) == 1 and aligned:
        return x
    padded = x.new_zeros(batch, tokens, heads, row_pitch(head_dim))
    return padded[..., :head_dim].transpose(1, 2).copy_(x)


def vector_strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of a `vector_readable` (B, H, N, D) over batch, head and token, in vectors of 8 elements."""
    return tuple(stride // 8 for stride in x.stride()[:3])


def gate_matrix(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gate's weight (D, D) or (H, D, D) in ``dtype``, each row padded with zeros to ``row_pitch``."""
    head_dim = weight.shape[-1]
    if head_dim % 8 == 0 and weight.is_contiguous():
        weight = weight.to(dtype)
        return weight if weight.data_ptr() % 16 == 0 else weight.clone()
    padded = weight.new_zeros((*weight.shape[:-1], row_pitch(head_dim)), dtype=dtype)
    return padded[..., :head_dim].copy_(weight)


def head_stride(gate: torch.Tensor | None, shared_dims: int) -> int:
    """Stride over heads of a weight or bias: 0 where all heads share it."""
    return gate.stride(0) if gate is not None and gate.dim() > shared_dims else 0


# (kernel, head dimension in registers up to) -> launch, for 16-bit inputs
_HALF: dict[tuple[str, int], Launch] = {
    ("states", 64): Launch(64, 64, 64, 4, 2),
    ("states", 128): Launch(64, 64, 128, 4, 2),
    ("states", 256): Launch(64, 64, 64, 8, 2),
    ("forward", 64): Launch(64, 64, 64, 4, 3),
    ("forward", 128): Launch(64, 64, 64, 4, 3),
    ("forward", 256): Launch(64, 32, 32, 4, 2),
    ("linear_backward", 64): Launch(64, 64, 64, 4, 2),
    ("linear_backward", 128): Launch(64, 64, 64, 8, 2),
    ("linear_backward", 256): Launch(32, 32, 32, 4, 1),
    ("backward_query", 64): Launch(64, 64, 64, 4, 2),
    ("backward_query", 128): Launch(64, 64, 32, 4, 2),
    ("backward_query", 256): Launch(32, 32, 32, 4, 1),
    ("backward_key", 64): Launch(64, 64, 64, 4, 2),
    ("backward_key", 128): Launch(64, 64, 32, 4, 2),
    ("backward_key", 256): Launch(32, 32, 32, 4, 1),
    ("gate", 64): Launch(64, 64, 64, 8, 3),
    ("gate", 128): Launch(64, 64, 128, 8, 3),
    ("gate", 256): Launch(64, 64, 64, 8, 3),
}

# the same above a head dimension of 128 where a program has 227 KiB of shared memory: of several the first whose tiles
# are no larger than the blocks; without one, that above
_HOPPER: dict[str, tuple[Launch, ...]] = {
    "states": (Launch(64, 128, 128, 8, 1),),
    "forward": (Launch(128, 64, 64, 8, 2),),
    "linear_backward": (Launch(64, 64, 64, 8, 1),),
    "backward_query": (Launch(128, 32, 64, 8, 3), Launch(64, 64, 64, 8, 2)),
    # the first makes dK and dV by programs of their own; the second in 1 stage ended in an illegal access (memcheck: a
    # product of the linear part), which in 2 neither is seen nor is wrong
    "backward_key": (Launch(32, 128, 64, 8, 3), Launch(64, 64, 32, 8, 2)),
    "gate": (Launch(64, 64, 128, 8, 3),),
}

# float32 products run on the plain arithmetic units and twice the bytes fill shared memory: smaller tiles
_SINGLE: dict[int, Launch] = {
    64: Launch(32, 32, 32, 8, 1),
    128: Launch(32, 32, 32, 8, 1),
    256: Launch(16, 16, 16, 8, 1),
}


# the same for the kernels of virtual keys
_VIRTUAL: dict[tuple[str, int], Launch] = {
    # not pipelined: Triton 3.6 would write into a tile that a product, not waited for, still reads
    ("moments", 64): Launch(64, 64, 64, 4, 1),
    ("moments", 128): Launch(64, 32, 128, 4, 1),
    ("moments", 256): Launch(64, 32, 64, 8, 1),
    ("query_moments", 64): Launch(64, 64, 64, 4, 1),
    ("query_moments", 128): Launch(16, 64, 64, 1, 1),
    ("query_moments", 256): Launch(64, 64, 64, 4, 1),
    ("query_gradients", 64): Launch(64, 64, 64, 4, 1),
    ("query_gradients", 128): Launch(64, 64, 64, 2, 1),
    ("query_gradients", 256): Launch(64, 64, 64, 4, 1),
    ("key_gradients", 64): Launch(64, 64, 64, 4, 1),
    ("key_gradients", 128): Launch(64, 64, 64, 8, 1),
    ("key_gradients", 256): Launch(32, 32, 32, 8, 1),
    ("forward", 64): Launch(64, 64, 64, 4, 2),
    ("forward", 128): Launch(64, 64, 64, 4, 2),
    ("forward", 256): Launch(64, 32, 32, 8, 1),
    ("backward_query", 64): Launch(128, 64, 64, 8, 2),
    ("backward_query", 128): Launch(128, 64, 128, 8, 1),
    ("backward_query", 256): Launch(32, 32, 32, 8, 1),
    ("backward_key", 64): Launch(64, 64, 64, 4, 2),
    ("backward_key", 128): Launch(32, 128, 64, 8, 3),
    ("backward_key", 256): Launch(32, 32, 32, 8, 1),
}


def virtual_launch(kernel: str, head_dim: int, dtype: torch.dtype) -> Launch:
    """The launch of a kernel of virtual keys; its tiles may be larger than blocks."""
    row = row_of(head_dim)
    return _SINGLE[row] if dtype == torch.float32 else _VIRTUAL[kernel, row]


def row_of(head_dim: int) -> int:
    """The head dimension by which launches are chosen: 64, 128 or 256."""
    return max(64, padded_dim(head_dim))


def shipped_launch(kernel: str, row: int, precision: str, block_q: int = 64, block_k: int = 64) -> Launch:
    """The launch of ``kernel`` in these tables, for "half" or "single" inputs in such blocks on the current device."""
    return _of_tables(kernel, row, precision, block_q, block_k, _is_wide_on_hopper(row, precision))


def _is_wide_on_hopper(row: int, precision: str) -> bool:
    return row > 128 and precision == "half" and on_hopper()


def _of_tables(kernel: str, row: int, precision: str, block_q: int, block_k: int, wide_on_hopper: bool) -> Launch:
    if wide_on_hopper:
        for launch in _HOPPER.get(kernel, ()):
            if launch.tile_q <= block_q and launch.tile_k <= block_k:
                return launch
    return _SINGLE[row] if precision == "single" else _HALF[kernel, row]


@cache
def clamped(launch: Launch, head_dim: int, block_q: int, block_k: int) -> Launch:
    """``launch`` with tiles that divide the blocks, and no more columns than there are."""
    return Launch(
        min(launch.tile_q, block_q),
        min(launch.tile_k, block_k),
        min(launch.chunk, padded_dim(head_dim)),
        launch.warps,
        launch.stages,
    )


@cache
def _shipped(kernel: str, head_dim: int, precision: str, block_q: int, block_k: int, wide_on_hopper: bool) -> Launch:
    launch = _of_tables(kernel, row_of(head_dim), precision, block_q, block_k, wide_on_hopper)
    return clamped(launch, head_dim, block_q, block_k)


def launch_for(kernel: str, head_dim: int, dtype: torch.dtype, block_q: int, block_k: int) -> Launch:
    """The launch of ``kernel`` (one of ``KERNELS``) on the current device, the user's or else the shipped one; tiles
    never larger than the blocks they divide."""
    launches = replaced()
    row, precision = row_of(head_dim), "single" if dtype == torch.float32 else "half"
    if launches:
        launch = launches.get((kernel, row, precision))
        if launch is not None:
            return clamped(launch, head_dim, block_q, block_k)
    return _shipped(kernel, head_dim, precision, block_q, block_k, _is_wide_on_hopper(row, precision))


def check_supported(q: torch.Tensor, options: BackwardOptions) -> None:
    """Raise a TypeError or ValueError, before anything is launched, for what these kernels cannot do or for a mistake
    in the user's file of launches."""
    check_environment()
    if q.dtype not in DTYPES["cuda"]:
        accepted = ", ".join(map(str, DTYPES["cuda"]))
        raise TypeError(f"sla on CUDA: dtype of q is {q.dtype}; accepted: {accepted} (float64 runs on the CPU only)")
    if not MIN_HEAD_DIM <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"sla on CUDA: head dimension is {q.shape[-1]}; accepted: {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")
    for name, block in (("block_q", options.block_q), ("block_k", options.block_k)):
        if block not in BLOCK_SIZES:
            raise ValueError(f"sla on CUDA: {name} is {block}; accepted: {', '.join(map(str, BLOCK_SIZES))}")
    if options.feature_map not in FEATURE_MAPS:
        raise ValueError(f"sla on CUDA: feature_map is {options.feature_map!r}; accepted: {', '.join(FEATURE_MAPS)}")
    if options.linear not in LINEAR_BRANCHES:
        raise ValueError(f"sla on CUDA: linear is {options.linear!r}; accepted: {', '.join(LINEAR_BRANCHES)}")
