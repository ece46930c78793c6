"""Moments of query and key blocks on the GPU, for ``linear="taylor"``, and how their gradients reach q, k and v.

For key block j under the weights of its keys: ln n_j, their sum; kbar_j = mean K_j; var_j = mean (K_j - kbar_j)^2;
vbar_j = mean V_j; C_j = mean (K_j - kbar_j) V_j^T [D, D]. For query block i: mean Q_i and mean Q_i^2. C has the type of
block states, kbar and vbar are there in the inputs' type for products, the rest is float32. Of C there are zeros past
the last block, so that what is multiplied with it has a multiple of 8 blocks (`empty_states`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sla_compile.common.options import BackwardOptions

from ..steps import KernelInputs, KeyMoments, MomentGradients
from .masks import batch_stride
from .primitives import (
    head_pointer,
    load_key_bias,
    load_tile,
    locate_program,
    store_tile,
    tile_mask,
    tile_pointer,
    token_major_pointer,
)
from .states import empty_states, state_dtype
from .tiles import ceil_div, clamped, padded_dim, row_pitch, vector_strides, virtual_launch

__all__ = ["add_key_gradients", "add_query_gradients", "fill_query_moments", "fresh_moments", "key_moments"]


@triton.jit
def add_tile(pointer, value, start, rows, columns, num_heads, num_tokens, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    """Add a tile to one head of a tensor whose memory is (B, N, H, D)."""
    address = tile_pointer(pointer, start, rows, columns, num_heads * HEAD_DIM)
    mask = tile_mask(start, rows, columns, num_tokens, HEAD_DIM, PADDED)
    value += tl.load(address, mask=mask, other=0.0).to(tl.float32)
    tl.store(address, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "num_heads"])
def query_moment_kernel(
    x,
    means,
    squares,
    stride_batch,
    stride_head,
    stride_token,
    num_tokens,
    num_blocks,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    block, batch, head = locate_program(num_blocks, num_heads)
    rows = tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    base = head_pointer(x, batch, head, stride_batch, stride_head)
    totals = tl.zeros([TILE, PADDED_DIM], tl.float32)
    squared = tl.zeros([TILE, PADDED_DIM], tl.float32)
    for part in range(BLOCK // TILE):
        tile = load_tile(base, block * BLOCK + part * TILE, rows, dims, stride_token, num_tokens, PITCH, PADDED)
        tile = tile.to(tl.float32)
        totals += tile
        squared += tile * tile
    count = tl.zeros([PADDED_DIM], tl.float32) + tl.minimum(num_tokens - block * BLOCK, BLOCK).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * HEAD_DIM + dims
    tl.store(means + at, tl.div_rn(tl.sum(totals, 0), count), mask=dims < HEAD_DIM)
    tl.store(squares + at, tl.div_rn(tl.sum(squared, 0), count), mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=["stride_bias", "num_tokens", "num_blocks", "num_slopes", "num_heads"])
def key_moment_kernel(
    k,
    v,
    bias,
    sizes,
    mean_out,
    variance_out,
    mean_keys,
    mean_values,
    slopes,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_bias,
    num_tokens,
    num_blocks,
    num_slopes,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
):
    """All moments of one block but, of vbar and C, only CHUNK columns; past the last block the zeros of C alone."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    block, batch, head = locate_program(num_slopes, num_heads)
    slot = (batch.to(tl.int64) * num_heads + head) * num_blocks + block
    rows = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    k_base = head_pointer(k, batch, head, stride_kb, stride_kh)
    v_base = head_pointer(v, batch, head, stride_vb, stride_vh)
    bias_base = bias + batch.to(tl.int64) * stride_bias

    state_type = slopes.dtype.element_ty
    size = tl.zeros([], tl.float32)
    # added up by rows of tiles, which are added up once, after the loop
    means = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    squares = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    value_means = tl.zeros([TILE_K, CHUNK], tl.float32)
    slope = tl.zeros([PADDED_DIM, CHUNK], tl.float32)
    for part in range(BLOCK_K // TILE_K):
        start = block * BLOCK_K + part * TILE_K
        key = load_tile(k_base, start, rows, dims, stride_kn, num_tokens, PITCH, PADDED)
        value = load_tile(v_base, start, rows, columns, stride_vn, num_tokens, PITCH, PADDED)
        weighted = key.to(tl.float32)
        weighted_value = value.to(tl.float32)
        if HAS_KEY_BIAS:
            weights = tl.exp(load_key_bias(bias_base, start, rows, num_tokens))
            size += tl.sum(weights, 0)
            squares += weighted * weighted * weights[:, None]
            weighted *= weights[:, None]
            weighted_value *= weights[:, None]
            key = weighted
        else:
            squares += weighted * weighted
        means += weighted
        value_means += weighted_value
        # [PADDED_DIM, TILE_K] x [TILE_K, CHUNK]
        slope = tl.dot(tl.trans(key.to(state_type)), value.to(state_type), slope, input_precision="ieee")
    if not HAS_KEY_BIAS:
        size += tl.minimum(num_tokens - block * BLOCK_K, BLOCK_K).to(tl.float32)
    divisor = tl.where(size > 0, size, 1.0)
    mean = tl.div_rn(tl.sum(means, 0), tl.zeros([PADDED_DIM], tl.float32) + divisor)

    origin = tl.zeros([], tl.int32)
    inverse = 1.0 / divisor
    mean_value = tl.sum(value_means, 0) * inverse
    # (K - kbar)^T V is K^T V - n kbar vbar^T
    slope = slope * inverse - mean[:, None] * mean_value[None, :]
    slope_base = slopes + tl.program_id(0).to(tl.int64) * HEAD_DIM * PITCH
    store_tile(slope_base, slope, origin, dims, columns, PITCH, HEAD_DIM, PITCH, PADDED)
    if block < num_blocks:
        short_value = mean_value.to(mean_values.dtype.element_ty)
        tl.store(mean_values + slot * PITCH + columns, short_value, mask=columns < PITCH)
        if tl.program_id(1) == 0:
            tl.store(sizes + slot, tl.where(size > 0, tl.log(size), float("-inf")))
            tl.store(mean_out + slot * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)
            variance = tl.maximum(tl.sum(squares, 0) * inverse - mean * mean, 0.0)
            tl.store(variance_out + slot * HEAD_DIM + dims, variance, mask=dims < HEAD_DIM)
            tl.store(mean_keys + slot * PITCH + dims, mean.to(mean_keys.dtype.element_ty), mask=dims < PITCH)


@triton.jit(do_not_specialize=["stride_bias", "num_tokens", "num_tiles", "num_blocks", "num_slopes", "num_heads"])
def key_gradient_kernel(
    k,
    v,
    bias,
    sizes,
    means,
    mean_values,
    grad_means,
    grad_variances,
    grad_values,
    grad_slopes,
    grad_k,
    grad_v,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_bias,
    num_tokens,
    num_tiles,
    num_blocks,
    num_slopes,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
):
    """What `Steps.virtual_backward_key` says that the moments make of dK and dV."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    tile, batch, head = locate_program(num_tiles, num_heads)
    first_key = tile * TILE_K
    batch_head = batch.to(tl.int64) * num_heads + head
    slot = batch_head * num_blocks + first_key // BLOCK_K
    keys = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    origin = tl.zeros([], tl.int32)
    k_base = head_pointer(k, batch, head, stride_kb, stride_kh)
    v_base = head_pointer(v, batch, head, stride_vb, stride_vh)
    size = tl.load(sizes + slot)
    # of a block without weight, all of whose weights are 0, the size is -inf
    share = tl.zeros([TILE_K], tl.float32) + tl.exp(tl.where(size == float("-inf"), 0.0, -size))
    if HAS_KEY_BIAS:
        share *= tl.exp(load_key_bias(bias + batch.to(tl.int64) * stride_bias, first_key, keys, num_tokens))

    state_type = grad_slopes.dtype.element_ty
    mean = tl.load(means + slot * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
    key = load_tile(k_base, first_key, keys, dims, stride_kn, num_tokens, PITCH, PADDED).to(tl.float32)
    off_key = (key - mean[None, :]).to(state_type)
    mean_value = tl.load(mean_values + slot * PITCH + dims, mask=dims < PITCH, other=0.0).to(tl.float32)
    value = load_tile(v_base, first_key, keys, dims, stride_vn, num_tokens, PITCH, PADDED).to(tl.float32)
    off_value = (value - mean_value[None, :]).to(state_type)
    slope_base = grad_slopes + (batch_head * num_slopes + first_key // BLOCK_K) * HEAD_DIM * PITCH
    grad_k_base = token_major_pointer(grad_k, batch, head, num_tokens, num_heads, HEAD_DIM)
    grad_v_base = token_major_pointer(grad_v, batch, head, num_tokens, num_heads, HEAD_DIM)
    for first in tl.range(0, PADDED_DIM, CHUNK, num_stages=1):
        columns = first + tl.arange(0, CHUNK)
        inside = columns < HEAD_DIM
        of_mean = tl.load(grad_means + slot * HEAD_DIM + columns, mask=inside, other=0.0)
        of_variance = tl.load(grad_variances + slot * HEAD_DIM + columns, mask=inside, other=0.0)
        mean_part = tl.load(means + slot * HEAD_DIM + columns, mask=inside, other=0.0)
        key_part = load_tile(k_base, first_key, keys, columns, stride_kn, num_tokens, PITCH, PADDED).to(tl.float32)
        # rows `columns` of dC: [TILE_K, PADDED_DIM] x [PADDED_DIM, CHUNK]
        slope = load_tile(
            slope_base + first * PITCH, origin, tl.arange(0, CHUNK), dims, PITCH // 8, HEAD_DIM - first, PITCH, PADDED
        )
        found = tl.dot(off_value, tl.trans(slope), input_precision="ieee")
        found += of_mean[None, :] + 2.0 * (key_part - mean_part[None, :]) * of_variance[None, :]
        add_tile(grad_k_base, share[:, None] * found, first_key, keys, columns, num_heads, num_tokens, HEAD_DIM, PADDED)
        of_value = tl.load(grad_values + slot * HEAD_DIM + columns, mask=inside, other=0.0)
        slope = load_tile(slope_base, origin, dims, columns, PITCH // 8, HEAD_DIM, PITCH, PADDED)
        found = tl.dot(off_key, slope, input_precision="ieee") + of_value[None, :]
        add_tile(grad_v_base, share[:, None] * found, first_key, keys, columns, num_heads, num_tokens, HEAD_DIM, PADDED)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "num_blocks", "num_heads"])
def query_gradient_kernel(
    q,
    grad_means,
    grad_squares,
    grad_q,
    stride_qb,
    stride_qh,
    stride_qn,
    num_tokens,
    num_tiles,
    num_blocks,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
):
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    tile, batch, head = locate_program(num_tiles, num_heads)
    first_query = tile * TILE_Q
    block = first_query // BLOCK_Q
    slot = (batch.to(tl.int64) * num_heads + head) * num_blocks + block
    rows = tl.arange(0, TILE_Q)
    dims = tl.arange(0, PADDED_DIM)
    inverse = 1.0 / tl.minimum(num_tokens - block * BLOCK_Q, BLOCK_Q).to(tl.float32)
    of_mean = tl.load(grad_means + slot * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
    of_square = tl.load(grad_squares + slot * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
    q_base = head_pointer(q, batch, head, stride_qb, stride_qh)
    query = load_tile(q_base, first_query, rows, dims, stride_qn, num_tokens, PITCH, PADDED).to(tl.float32)
    grad = (of_mean[None, :] + 2.0 * query * of_square[None, :]) * inverse
    grad_base = token_major_pointer(grad_q, batch, head, num_tokens, num_heads, HEAD_DIM)
    add_tile(grad_base, grad, first_query, rows, dims, num_heads, num_tokens, HEAD_DIM, PADDED)


def fill_query_moments(q: torch.Tensor, moments: torch.Tensor, block_q: int) -> None:
    """Fill ``moments``, float32 (2, B, H, Tm, D), with the means of q, `vector_readable`, and of q^2 by blocks."""
    batch, heads, tokens, head_dim = q.shape
    blocks = moments.shape[3]
    launch = clamped(virtual_launch("query_moments", head_dim, q.dtype), head_dim, block_q, block_q)
    query_moment_kernel[(blocks * batch * heads,)](
        q,
        moments[0],
        moments[1],
        *vector_strides(q),
        tokens,
        blocks,
        heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK=block_q,
        TILE=launch.tile_q,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def fresh_moments(k: torch.Tensor, block_k: int) -> KeyMoments:
    """Uninitialised, for k (B, H, Lk, D)."""
    batch, heads, tokens, head_dim = k.shape
    lead, pitch = (batch, heads, ceil_div(tokens, block_k)), row_pitch(head_dim)
    sizes = torch.empty(lead, dtype=torch.float32, device=k.device)
    return KeyMoments(
        sizes,
        sizes.new_empty((2, *lead, head_dim)),
        k.new_empty((*lead, pitch)),
        k.new_empty((*lead, pitch)),
        empty_states((*lead, head_dim), state_dtype(k.dtype), k.device),
    )


def key_moments(inputs: KernelInputs, options: BackwardOptions) -> KeyMoments:
    """As `Steps.key_moments`."""
    k, v, key_bias = inputs.k, inputs.v, inputs.key_bias
    block_k = options.block_k
    batch, heads, tokens, head_dim = k.shape
    moments = fresh_moments(k, block_k)
    sizes, slopes = moments.sizes, moments.slopes.shape[2]
    launch = clamped(virtual_launch("moments", head_dim, k.dtype), head_dim, block_k, block_k)
    key_moment_kernel[(slopes * batch * heads, ceil_div(padded_dim(head_dim), launch.chunk))](
        k,
        v,
        key_bias if key_bias is not None else sizes,
        sizes,
        moments.spans[0],
        moments.spans[1],
        *moments[2:],
        *vector_strides(k),
        *vector_strides(v),
        batch_stride(key_bias),
        tokens,
        sizes.shape[2],
        slopes,
        heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_K=block_k,
        TILE_K=launch.tile_k,
        CHUNK=launch.chunk,
        HAS_KEY_BIAS=key_bias is not None,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return moments


def add_key_gradients(
    inputs: KernelInputs,
    moments: KeyMoments,
    gradients: MomentGradients,
    dk: torch.Tensor,
    dv: torch.Tensor,
    block_k: int,
) -> None:
    """Add to dk and dv (B, H, Lk, D), in memory (B, Lk, H, D), what ``gradients`` of the key blocks make of them."""
    k, v, key_bias = inputs.k, inputs.v, inputs.key_bias
    batch, heads, tokens, head_dim = k.shape
    launch = clamped(virtual_launch("key_gradients", head_dim, k.dtype), head_dim, block_k, block_k)
    tiles = ceil_div(tokens, launch.tile_k)
    key_gradient_kernel[(tiles * batch * heads,)](
        k,
        v,
        key_bias if key_bias is not None else moments.sizes,
        moments.sizes,
        moments.spans[0],
        moments.values,
        gradients.spans[0],
        gradients.spans[1],
        gradients.values,
        gradients.slopes,
        dk,
        dv,
        *vector_strides(k),
        *vector_strides(v),
        batch_stride(key_bias),
        tokens,
        tiles,
        moments.sizes.shape[2],
        gradients.slopes.shape[2],
        heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_K=block_k,
        TILE_K=launch.tile_k,
        CHUNK=launch.chunk,
        HAS_KEY_BIAS=key_bias is not None,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def add_query_gradients(q: torch.Tensor, gradients: torch.Tensor, dq: torch.Tensor, block_q: int) -> None:
    """Add to dq (B, H, Lq, D), in memory (B, Lq, H, D), what ``gradients`` of the queries' moments make of it."""
    batch, heads, tokens, head_dim = q.shape
    launch = clamped(virtual_launch("query_gradients", head_dim, q.dtype), head_dim, block_q, block_q)
    tiles = ceil_div(tokens, launch.tile_q)
    query_gradient_kernel[(tiles * batch * heads,)](
        q,
        gradients[0],
        gradients[1],
        dq,
        *vector_strides(q),
        tokens,
        tiles,
        gradients.shape[3],
        heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_Q=block_q,
        TILE_Q=launch.tile_q,
        num_warps=launch.warps,
    )
