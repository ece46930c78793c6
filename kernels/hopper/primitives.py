"""What the Gluon kernels share: tile order, feature maps, and TMA descriptors on the host.

Results leave by TMA from shared memory: stored from the registers of a product, four bytes a thread, a tile of 64 x 128
took a warpgroup 2 us (H100).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..triton.primitives import LOG2E

__all__ = [
    "all_threads",
    "descriptor_of",
    "edge_blocks",
    "feature_map_backward",
    "load_row",
    "load_tile",
    "locate_tile",
    "map_features",
    "matrix_descriptor",
    "multiprocessors",
    "padded_dim",
    "reciprocal_or_zero",
    "store_tile",
    "tile_descriptor",
    "vectors_descriptor",
    "view_as",
]

# names of later Tritons, or those of 3.6, torch 2.11's
all_threads = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

_ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.jit
def view_as(buffer, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The bytes of a shared buffer under another type, shape and layout."""
    if RENAMED:
        return buffer.reinterpret(dtype, shape, layout)
    else:  # noqa: RET505 - a branch that is not taken is not compiled
        return buffer._reinterpret(dtype, shape, layout)


@gluon.jit
def locate_tile(tile, tiles_per_head, num_heads):
    """(query tile, batch, head) of a flat index; the tiles of one head are neighbours, so share L2."""
    batch_head = tile // tiles_per_head
    return tile % tiles_per_head, batch_head // num_heads, batch_head % num_heads


@gluon.jit
def edge_blocks(first_query, row, num_queries, BLOCK_Q: gl.constexpr, TILE_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """In causal attention, of a tile of queries: the first of the key blocks on the diagonal, which end its row's list,
    their number, and how many of that list come after them, which the tile does not see."""
    first = first_query // BLOCK_K
    last = (gl.minimum(first_query + TILE_Q, num_queries) - 1) // BLOCK_K
    last_of_row = (gl.minimum((row + 1) * BLOCK_Q, num_queries) - 1) // BLOCK_K
    return first, gl.maximum(last - first + 1, 0), last_of_row - last


@gluon.jit
def softmax_over_dims(query, HEAD_DIM: gl.constexpr, PADDED_DIM: gl.constexpr, layout: gl.constexpr):
    """Softmax of each row over its true head dimension; 0 past it."""
    if HEAD_DIM != PADDED_DIM:
        dims = gl.arange(0, PADDED_DIM, layout=gl.SliceLayout(0, layout))
        query = gl.where((dims < HEAD_DIM)[None, :], query, float("-inf"))
    weights = gl.exp2((query - gl.max(query, 1)[:, None]) * LOG2E)
    return weights * (1.0 / gl.sum(weights, 1))[:, None]


@gluon.jit
def map_features(
    query, HEAD_DIM: gl.constexpr, PADDED_DIM: gl.constexpr, FEATURE_MAP: gl.constexpr, layout: gl.constexpr
):
    """phi of float32 rows [rows, PADDED_DIM], 0 past the true head dimension."""
    if FEATURE_MAP == "softmax":
        phi = softmax_over_dims(query, HEAD_DIM, PADDED_DIM, layout)
    else:
        if FEATURE_MAP == "elu":
            phi = gl.where(query > 0, query + 1.0, gl.exp2(gl.minimum(query, 0.0) * LOG2E))
            if HEAD_DIM != PADDED_DIM:
                dims = gl.arange(0, PADDED_DIM, layout=gl.SliceLayout(0, layout))
                phi = gl.where((dims < HEAD_DIM)[None, :], phi, 0.0)
        else:
            phi = gl.maximum(query, 0.0)
    return phi


@gluon.jit
def load_row(base, dims, HEAD_DIM: gl.constexpr, PADDED_DIM: gl.constexpr):
    """One row of HEAD_DIM contiguous elements, 0 past it."""
    if HEAD_DIM == PADDED_DIM:
        row = gl.load(base + dims)
    else:
        row = gl.load(base + dims, mask=dims < HEAD_DIM, other=0.0)
    return row


@gluon.jit
def feature_map_backward(x, phi, grad_phi, FEATURE_MAP: gl.constexpr):
    """Gradient of x [rows, columns] in float32 from that of phi = feature_map(x)."""
    if FEATURE_MAP == "softmax":
        grad = phi * (grad_phi - gl.sum(phi * grad_phi, 1)[:, None])
    else:
        if FEATURE_MAP == "elu":
            grad = gl.where(x > 0, grad_phi, grad_phi * phi)
        else:
            grad = gl.where(x > 0, grad_phi, 0.0)
    return grad


@gluon.jit
def reciprocal_or_zero(denominator):
    """1 / denominator, or 0 where that could overflow: exactly 0 is a row without marginal keys."""
    SMALLEST: gl.constexpr = 1e-30
    return gl.where(denominator > SMALLEST, 1.0 / denominator, 0.0)


def padded_dim(head_dim: int) -> int:
    """Head dimension in shared memory: 64, 128 or 256."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


@functools.cache
def multiprocessors(device: int) -> int:
    """How many programs a device runs side by side, at one each."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_CHECKED: dict[tuple[Any, ...], dict[str, Any]] = {}


def descriptor_of(key: tuple[Any, ...], base: torch.Tensor, make: Callable[[], TensorDescriptor]) -> TensorDescriptor:
    """What ``make`` makes, or made for the same ``key``, over ``base``: Triton's checks cost more than the rest."""
    fields = _CHECKED.get(key)
    if fields is None:
        made = make()
        if len(_CHECKED) >= 1024:
            _CHECKED.clear()
        _CHECKED[key] = {name: value for name, value in vars(made).items() if name != "base"}
        return made
    made = object.__new__(TensorDescriptor)
    vars(made).update(fields, base=base)
    return made


def tile_descriptor(x: torch.Tensor, tile: int, columns: int | None = None) -> TensorDescriptor:
    """TMA over x (B, H, N, D), `vector_readable`, in tiles of ``tile`` tokens and the padded head dimension, or
    ``columns`` of it."""
    shape, strides = x.shape, x.stride()

    def make() -> TensorDescriptor:
        block = [1, 1, tile, columns or padded_dim(shape[3])]
        layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[x.dtype])
        # an axis of one element may have any stride; TMA wants whole vectors
        pitches = [stride if size > 1 else block[3] for stride, size in zip(strides[:3], shape[:3], strict=True)]
        return TensorDescriptor(x, list(shape), [*pitches, 1], block, layout)

    return descriptor_of((shape, strides, x.dtype, tile, columns), x, make)


def matrix_descriptor(
    matrix: torch.Tensor, head_dim: int, rows: int | None = None, columns: int | None = None
) -> TensorDescriptor:
    """TMA over a contiguous stack of (D, D) matrices whose rows are padded to 16 bytes, one matrix, ``rows`` or
    ``columns`` of it a tile."""
    shape, pitch = matrix.shape, matrix.stride(-2)

    def make() -> TensorDescriptor:
        padded = padded_dim(head_dim)
        block = [1, rows or padded, columns or padded]
        count = max(1, matrix.numel() // (head_dim * shape[-1]))
        layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[matrix.dtype])
        return TensorDescriptor(matrix, [count, head_dim, head_dim], [head_dim * pitch, pitch, 1], block, layout)

    return descriptor_of((shape, pitch, matrix.dtype, head_dim, rows, columns, "matrix"), matrix, make)


def vectors_descriptor(vectors: torch.Tensor, tile: int) -> TensorDescriptor:
    """TMA over contiguous float32 rows, of a multiple of 16 bytes, in parts of ``tile`` numbers."""
    shape = vectors.shape

    def make() -> TensorDescriptor:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        rows = shape[-1]
        return TensorDescriptor(vectors, [vectors.numel() // rows, rows], [rows, 1], [1, tile], layout)

    return descriptor_of((shape, tile, "vectors"), vectors, make)
