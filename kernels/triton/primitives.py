"""Steps that the Triton kernels share: where a tile lies, how it is loaded, the feature map and its backward.

Tiles: a *block* is the unit of the classification (``block_q`` or ``block_k`` tokens); a *tile* is what one
program holds in registers, a block or a power-of-two part of one. A head dimension that is no power of two is
padded with zeros in registers; the feature maps send the padding to zero, so it never reaches a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LOG2E",
    "bias_pitch",
    "feature_map",
    "feature_map_backward",
    "head_pointer",
    "load_key_bias",
    "load_tile",
    "locate_program",
    "reciprocal_or_zero",
    "store_tile",
    "token_major_pointer",
]

# what a kernel reads of its module must be a constexpr
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate_program(num_tiles, num_heads):
    """Tile, batch and head of this program; neighbours share a head, and with it the cache."""
    program = tl.program_id(0)
    batch_head = program // num_tiles
    return program % num_tiles, batch_head // num_heads, batch_head % num_heads


@triton.jit
def bias_pitch(num_virtual):
    """From one row of the virtual keys' bias to the next."""
    return tl.cdiv(num_virtual, 64) * 64


@triton.jit
def head_pointer(pointer, batch, head, stride_batch, stride_head):
    """Where one head of an input (B, H, N, D) begins; strides in vectors of 8 elements."""
    # the 8 shows the compiler that rows are aligned: by itself it only asks whether a stride is a multiple of 16
    return pointer + (batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head) * 8


@triton.jit
def token_major_pointer(pointer, batch, head, num_tokens, num_heads, HEAD_DIM: tl.constexpr):
    """Where one head of an output begins, whose memory is (B, N, H, D); its rows are num_heads * D apart."""
    return pointer + (batch.to(tl.int64) * num_tokens * num_heads + head) * HEAD_DIM


@triton.jit
def tile_pointer(pointer, start, rows, columns, stride_row):
    # only the start can be far away: 64 bits there, 32 inside the tile
    first = pointer + start.to(tl.int64) * stride_row
    return first + (rows[:, None] * stride_row + columns[None, :])


@triton.jit
def tile_mask(start, rows, columns, num_rows, NUM_COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    mask = (start + rows < num_rows)[:, None]
    if PADDED:
        mask = mask & (columns < NUM_COLUMNS)[None, :]
    return mask


@triton.jit
def load_tile(
    pointer,
    start,
    rows,
    columns,
    stride_row,
    num_rows,
    NUM_COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """[rows, columns] from row ``start`` of a (num_rows, NUM_COLUMNS) matrix; zero outside of it.

    ``stride_row`` counts vectors of 8 elements (`vector_strides` on the host).
    """
    mask = tile_mask(start, rows, columns, num_rows, NUM_COLUMNS, PADDED)
    return tl.load(tile_pointer(pointer, start, rows, columns, stride_row * 8), mask=mask, other=0.0)


@triton.jit
def load_key_bias(pointer, start, keys, num_keys):
    """[keys] of one batch row's bias of the logits, float32; -inf past the end."""
    return tl.load(pointer + start + keys, mask=start + keys < num_keys, other=float("-inf"))


@triton.jit
def store_tile(
    pointer,
    value,
    start,
    rows,
    columns,
    stride_row,
    num_rows,
    NUM_COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    mask = tile_mask(start, rows, columns, num_rows, NUM_COLUMNS, PADDED)
    address = tile_pointer(pointer, start, rows, columns, stride_row)
    tl.store(address, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def reciprocal_or_zero(denominator):
    # below this a float32 reciprocal times a sum over keys can overflow; exactly 0 is a row without marginal keys
    SMALLEST: tl.constexpr = 1e-30
    usable = denominator > SMALLEST
    return tl.where(usable, 1.0 / tl.where(usable, denominator, 1.0), 0.0)


@triton.jit
def feature_map(x, columns, NUM_COLUMNS: tl.constexpr, PADDED: tl.constexpr, FEATURE_MAP: tl.constexpr):
    """phi of each row of x [rows, columns] in float32; 0 in padded columns."""
    x = x.to(tl.float32)
    inside = (columns < NUM_COLUMNS)[None, :]
    if FEATURE_MAP == "softmax":
        if PADDED:
            x = tl.where(inside, x, float("-inf"))
        phi = tl.exp(x - tl.max(x, 1)[:, None])
        phi = phi / tl.sum(phi, 1)[:, None]
    elif FEATURE_MAP == "elu":
        phi = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
        if PADDED:
            phi = tl.where(inside, phi, 0.0)
    else:
        tl.static_assert(FEATURE_MAP == "relu", "feature map")
        phi = tl.maximum(x, 0.0)
    return phi


@triton.jit
def feature_map_backward(x, phi, grad_phi, FEATURE_MAP: tl.constexpr):
    """Gradient of x [rows, columns] in float32 from that of phi = feature_map(x)."""
    if FEATURE_MAP == "softmax":
        grad = phi * (grad_phi - tl.sum(phi * grad_phi, 1)[:, None])
    elif FEATURE_MAP == "elu":
        grad = grad_phi * tl.where(x.to(tl.float32) > 0, 1.0, phi)
    else:
        grad = tl.where(x.to(tl.float32) > 0, grad_phi, 0.0)
    return grad
