"""Virtual keys on the GPU: their logits by blocks, their part of the attention, and its backward.

With l = scale q.kbar_j + b_ij over the marginal blocks j of query block i, b_ij = ln n_j + w_ij + shift, and the row's
matrix S_i, the output of a query is

    O = (e^{lse_s} O^s + sum_j e^l (vbar_j + scale S_i^T q)) / (e^{lse_s} + sum_j e^l)

where O^s and lse_s are the attention to the critical keys alone, which the kernels of the sparse branch have made. In
the backward these kernels do the rest from the lse of all: P = exp(l - lse) and dl = P (dO.(vbar_j + scale S_i^T q) -
D^s). Each program owns its outputs: no atomics, the same bits every time. "log2" is of base 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sla_compile.common.options import BackwardOptions

from ..steps import (
    BlockLists,
    KernelInputs,
    KeyMoments,
    MomentGradients,
    QueryGradients,
    Upstream,
    VirtualKeys,
    VirtualQueryGradients,
)
from .backward import attention_backward_key, attention_backward_query
from .forward import attention_forward
from .moments import add_key_gradients
from .primitives import (
    LOG2E,
    bias_pitch,
    head_pointer,
    load_tile,
    locate_program,
    store_tile,
    tile_mask,
    tile_pointer,
    token_major_pointer,
)
from .tiles import FULL_PRECISION, ceil_div, clamped, padded_dim, power_of_two, stacked, vector_strides, virtual_launch

__all__ = [
    "RowGradients",
    "VirtualRows",
    "mixture_backward",
    "span_gradients",
    "virtual_backward_key",
    "virtual_backward_query",
    "virtual_forward",
    "virtual_key_gradients",
    "virtual_logits",
    "virtual_rows",
]


class VirtualRows(NamedTuple):
    """What each query block adds to the logits of virtual keys, and how it mixes their slopes."""

    bias: torch.Tensor
    """b, float32 (B, H, Tm, Tn up to a multiple of 64); -inf where there is no virtual key."""
    mixture: torch.Tensor
    """a (B*H, Tm, Tn up to a multiple of 8 with zeros) in the type of block states, rows in memory as wide as of
    ``bias``; a row sums to 1, or is 0."""


class RowGradients(NamedTuple):
    """Gradients of what stands between the moments of query blocks and of key blocks."""

    of_spans: torch.Tensor
    """Of mean(q).kbar, and of mean(q^2).var where w is below its bound, float32 (2, B, H, Tm, Tn)."""
    of_shift: torch.Tensor
    """Of the shift, by rows: float32 (B, H, Tm)."""


@triton.jit
def bounded_spread(spread, size):
    """w: ``spread``, at most the logarithm of the block's size."""
    return tl.minimum(spread, tl.maximum(size, 0.0))


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def logit_kernel(
    query_means,
    query_squares,
    means,
    variances,
    sizes,
    logits,
    spreads,
    ranks,
    scale,
    num_queries,
    num_keys,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_RANKS: tl.constexpr,
):
    batch_head = tl.program_id(0).to(tl.int64)
    queries = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keys = tl.program_id(2) * TILE + tl.arange(0, TILE)
    query_base = batch_head * num_queries * HEAD_DIM
    key_base = batch_head * num_keys * HEAD_DIM
    score = tl.zeros([TILE, TILE], tl.float32)
    spread = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, HEAD_DIM, STEP):
        dims = first + tl.arange(0, STEP)
        query_mask = (queries < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
        key_mask = (keys < num_keys)[:, None] & (dims < HEAD_DIM)[None, :]
        query_at = query_base + queries[:, None] * HEAD_DIM + dims[None, :]
        key_at = key_base + keys[:, None] * HEAD_DIM + dims[None, :]
        query = tl.load(query_means + query_at, mask=query_mask, other=0.0)
        key = tl.load(means + key_at, mask=key_mask, other=0.0)
        score = tl.dot(query, tl.trans(key), score, input_precision=PRECISION)
        square = tl.load(query_squares + query_at, mask=query_mask, other=0.0)
        variance = tl.load(variances + key_at, mask=key_mask, other=0.0)
        spread = tl.dot(square, tl.trans(variance), spread, input_precision=PRECISION)
    spread *= scale * scale * 0.5
    size = tl.load(sizes + batch_head * num_keys + keys, mask=keys < num_keys, other=0.0)[None, :]
    at = batch_head * num_queries * num_keys + queries[:, None].to(tl.int64) * num_keys + keys[None, :]
    mask = (queries < num_queries)[:, None] & (keys < num_keys)[None, :]
    tl.store(logits + at, score * scale + bounded_spread(spread, size) + size, mask=mask)
    tl.store(spreads + at, spread, mask=mask)
    if HAS_RANKS:
        tl.store(ranks + at, score * scale + spread + size, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_keys", "num_heads", "width"])
def row_kernel(
    logits, spreads, sizes, shift, block_map, bias, mixture, num_rows, num_keys, num_heads, width,
    LANES: tl.constexpr, HAS_SHIFT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """b and a of one row of the block map."""
    row = tl.program_id(0).to(tl.int64)
    batch_head = row // num_rows
    lanes = tl.arange(0, LANES)
    valid = lanes < num_keys
    virtual = tl.load(block_map + row * num_keys + lanes, mask=valid, other=1) == 0
    logit = tl.load(logits + row * num_keys + lanes, mask=virtual, other=float("-inf"))
    spread = tl.load(spreads + row * num_keys + lanes, mask=virtual, other=0.0)
    size = tl.load(sizes + batch_head // GROUP * num_keys + lanes, mask=virtual, other=0.0)
    added = bounded_spread(spread, size) + size
    if HAS_SHIFT:
        added += tl.load(shift + batch_head % num_heads).to(tl.float32)
    tl.store(bias + row * width + lanes, tl.where(virtual, added, float("-inf")), mask=lanes < width)
    # the shift is the same for all, so it does not change their mixture
    largest = tl.max(logit, 0)
    weight = tl.where(virtual, tl.exp(logit - tl.where(largest == float("-inf"), 0.0, largest)), 0.0)
    total = tl.sum(weight, 0)
    weight /= tl.where(total > 0, total, 1.0)
    tl.store(mixture + row * width + lanes, weight.to(mixture.dtype.element_ty), mask=lanes < width)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "num_heads", "num_virtual"])
def virtual_forward_kernel(
    q,
    sparse_out,
    sparse_lse,
    mean_keys,
    mean_values,
    bias,
    slopes,
    out,
    lse,
    shares,
    stride_qb,
    stride_qh,
    stride_qn,
    scale,
    num_tokens,
    num_tiles,
    num_heads,
    num_virtual,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Attention of one tile of queries to virtual keys, on top of that to critical ones, whose output it replaces."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    LN2: tl.constexpr = 0.6931471805599453
    tile, batch, head = locate_program(num_tiles, num_heads)
    batch_head = batch.to(tl.int64) * num_heads + head
    first_query = tile * TILE_Q
    line = batch_head * tl.cdiv(num_tokens, BLOCK_Q) + first_query // BLOCK_Q
    origin = tl.zeros([], tl.int32)
    rows = tl.arange(0, TILE_Q)
    keys = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    q_base = head_pointer(q, batch, head, stride_qb, stride_qh)
    query = load_tile(q_base, first_query, rows, dims, stride_qn, num_tokens, PITCH, PADDED)
    out_base = token_major_pointer(out, batch, head, num_tokens, num_heads, HEAD_DIM)
    out_row = num_heads * HEAD_DIM
    at = tile_pointer(
        token_major_pointer(sparse_out, batch, head, num_tokens, num_heads, HEAD_DIM), first_query, rows, dims, out_row
    )
    mask = tile_mask(first_query, rows, dims, num_tokens, HEAD_DIM, PADDED)
    accumulator = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    row_mask = first_query + rows < num_tokens
    row_at = batch_head * num_tokens + first_query + rows
    running_max = tl.load(sparse_lse + row_at, mask=row_mask, other=0.0) * LOG2E
    running_sum = tl.where(running_max == float("-inf"), 0.0, 1.0)
    share = tl.zeros([TILE_Q], tl.float32)
    scale_log2 = scale * LOG2E
    key_head = batch_head // GROUP
    key_base = mean_keys + key_head * num_virtual * PITCH
    value_base = mean_values + key_head * num_virtual * PITCH
    row_bias = bias + line * bias_pitch(num_virtual)
    for start in range(0, num_virtual, TILE_K):
        first = origin + start
        key = load_tile(key_base, first, keys, dims, PITCH // 8, num_virtual, PITCH, PADDED)
        added = tl.load(row_bias + start + keys, mask=start + keys < num_virtual, other=float("-inf"))
        # [TILE_Q, PADDED_DIM] x [PADDED_DIM, TILE_K]
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2 + (added * LOG2E)[None, :]
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        against = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(running_max - against)
        weights = tl.exp2(scores - against[:, None])
        found = tl.sum(weights, 1)
        running_sum = running_sum * rescale + found
        share = share * rescale + found
        running_max = new_max
        value = load_tile(value_base, first, keys, dims, PITCH // 8, num_virtual, PITCH, PADDED)
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator * rescale[:, None], input_precision="ieee")
    safe_sum = tl.where(running_sum > 0.0, running_sum, 1.0)
    accumulator = accumulator / safe_sum[:, None]
    tl.store(lse + row_at, (running_max + tl.log2(safe_sum)) * LN2, mask=row_mask)

    slope_base = slopes + line * HEAD_DIM * PITCH
    share /= safe_sum
    tl.store(shares + row_at, share, mask=row_mask)
    factor = share * scale
    state_type = slopes.dtype.element_ty
    for first in tl.range(0, PADDED_DIM, CHUNK, num_stages=1):
        columns = first + tl.arange(0, CHUNK)
        part = load_tile(q_base, first_query, rows, columns, stride_qn, num_tokens, PITCH, PADDED).to(tl.float32)
        part = (part * factor[:, None]).to(state_type)
        slope = load_tile(
            slope_base + first * PITCH, origin, tl.arange(0, CHUNK), dims, PITCH // 8, HEAD_DIM - first, PITCH, PADDED
        )
        # [TILE_Q, CHUNK] x [CHUNK, PADDED_DIM]
        accumulator = tl.dot(part, slope, accumulator, input_precision="ieee")
    store_tile(out_base, accumulator, first_query, rows, dims, out_row, num_tokens, HEAD_DIM, PADDED)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "num_heads", "num_virtual"])
def virtual_backward_query_kernel(
    grad_out,
    q,
    out,
    lse,
    mean_keys,
    mean_values,
    bias,
    slopes,
    shares,
    grad_q,
    statistics,
    virtual_statistics,
    grad_slopes,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_ob,
    stride_oh,
    stride_on,
    scale,
    num_tokens,
    num_tiles,
    num_heads,
    num_virtual,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of one tile of queries: both statistics, the virtual keys' part of dQ, and dS."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    # there are registers for dO S^T, which is wanted before and after the loop
    WHOLE: tl.constexpr = CHUNK == PADDED_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    tile, batch, head = locate_program(num_tiles, num_heads)
    batch_head = batch.to(tl.int64) * num_heads + head
    first_query = tile * TILE_Q
    line = batch_head * tl.cdiv(num_tokens, BLOCK_Q) + first_query // BLOCK_Q
    slot = tl.program_id(0).to(tl.int64)
    origin = tl.zeros([], tl.int32)
    rows = tl.arange(0, TILE_Q)
    keys = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    grad_base = head_pointer(grad_out, batch, head, stride_gb, stride_gh)
    q_base = head_pointer(q, batch, head, stride_qb, stride_qh)
    out_base = head_pointer(out, batch, head, stride_ob, stride_oh)
    grad = load_tile(grad_base, first_query, rows, dims, stride_gn, num_tokens, PITCH, PADDED)
    output = load_tile(out_base, first_query, rows, dims, stride_on, num_tokens, PITCH, PADDED)
    delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1) * scale
    query = load_tile(q_base, first_query, rows, dims, stride_qn, num_tokens, PITCH, PADDED)
    row_mask = first_query + rows < num_tokens
    row_lse = tl.load(lse + batch_head * num_tokens + first_query + rows, mask=row_mask, other=float("inf"))
    # a query without a key: every score is -inf
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse * LOG2E)

    slope_base = slopes + line * HEAD_DIM * PITCH
    state_type = slopes.dtype.element_ty
    if WHOLE:
        slope = load_tile(slope_base, origin, dims, dims, PITCH // 8, HEAD_DIM, PITCH, PADDED)
        # [TILE_Q, PADDED_DIM] x [PADDED_DIM, PADDED_DIM]
        along = tl.dot(grad.to(state_type), tl.trans(slope), input_precision="ieee")
        gain = tl.sum(along * query.to(tl.float32), 1)
    else:
        gain = tl.zeros([TILE_Q], tl.float32)
        for first in tl.range(0, PADDED_DIM, CHUNK, num_stages=1):
            columns = first + tl.arange(0, CHUNK)
            slope = load_tile(
                slope_base + first * PITCH, origin, tl.arange(0, CHUNK), dims, PITCH // 8, HEAD_DIM - first, PITCH,
                PADDED,
            )  # fmt: skip
            # [TILE_Q, PADDED_DIM] x [PADDED_DIM, CHUNK]
            part = tl.dot(grad.to(state_type), tl.trans(slope), input_precision="ieee")
            query_part = load_tile(q_base, first_query, rows, columns, stride_qn, num_tokens, PITCH, PADDED)
            gain += tl.sum(part * query_part.to(tl.float32), 1)
    gain *= scale * scale
    pitch = num_tiles * TILE_Q
    row_at = batch_head * 2 * pitch + first_query + rows
    against = delta - gain
    tl.store(statistics + row_at, row_lse)
    tl.store(statistics + row_at + pitch, delta)
    tl.store(virtual_statistics + row_at, row_lse)
    tl.store(virtual_statistics + row_at + pitch, against)

    scale_log2 = scale * LOG2E
    accumulator = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    key_head = batch_head // GROUP
    key_base = mean_keys + key_head * num_virtual * PITCH
    value_base = mean_values + key_head * num_virtual * PITCH
    row_bias = bias + line * bias_pitch(num_virtual)
    for start in range(0, num_virtual, TILE_K):
        first = origin + start
        key = load_tile(key_base, first, keys, dims, PITCH // 8, num_virtual, PITCH, PADDED)
        added = tl.load(row_bias + start + keys, mask=start + keys < num_virtual, other=float("-inf"))
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2 + (added * LOG2E)[None, :]
        probability = tl.exp2(scores - row_lse[:, None])
        value = load_tile(value_base, first, keys, dims, PITCH // 8, num_virtual, PITCH, PADDED)
        grad_scores = tl.dot(grad, tl.trans(value), input_precision="ieee") * scale - against[:, None]
        grad_scores *= probability
        # [TILE_Q, TILE_K] x [TILE_K, PADDED_DIM]
        accumulator = tl.dot(grad_scores.to(key.dtype), key, accumulator, input_precision="ieee")

    factor = tl.load(shares + batch_head * num_tokens + first_query + rows, mask=row_mask, other=0.0) * scale
    transposed = tl.trans(query.to(state_type))
    grad_slope_base = grad_slopes + slot * HEAD_DIM * PITCH
    if WHOLE:
        accumulator += along * factor[:, None]
        # [PADDED_DIM, TILE_Q] x [TILE_Q, PADDED_DIM]
        weighed = (grad.to(tl.float32) * factor[:, None]).to(state_type)
        grad_slope = tl.dot(transposed, weighed, input_precision="ieee")
        store_tile(grad_slope_base, grad_slope, origin, dims, dims, PITCH, HEAD_DIM, PITCH, PADDED)
    else:
        for first in tl.range(0, PADDED_DIM, CHUNK, num_stages=1):
            columns = first + tl.arange(0, CHUNK)
            part = load_tile(grad_base, first_query, rows, columns, stride_gn, num_tokens, PITCH, PADDED)
            part = (part.to(tl.float32) * factor[:, None]).to(state_type)
            slope = load_tile(slope_base, origin, dims, columns, PITCH // 8, HEAD_DIM, PITCH, PADDED)
            # [TILE_Q, CHUNK] x [CHUNK, PADDED_DIM]
            accumulator = tl.dot(part, tl.trans(slope), accumulator, input_precision="ieee")
            # [PADDED_DIM, TILE_Q] x [TILE_Q, CHUNK]
            grad_slope = tl.dot(transposed, part, input_precision="ieee")
            store_tile(grad_slope_base, grad_slope, origin, dims, columns, PITCH, HEAD_DIM, PITCH, PADDED)
    grad_q_base = token_major_pointer(grad_q, batch, head, num_tokens, num_heads, HEAD_DIM)
    store_tile(grad_q_base, accumulator, first_query, rows, dims, num_heads * HEAD_DIM, num_tokens, HEAD_DIM, PADDED)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "num_heads", "num_virtual", "num_query_tiles", "num_splits"])
def virtual_backward_key_kernel(
    grad_out,
    q,
    mean_keys,
    mean_values,
    bias,
    statistics,
    grad_keys,
    grad_values,
    grad_bias,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    scale,
    num_tokens,
    num_tiles,
    num_heads,
    num_virtual,
    num_query_tiles,
    num_splits,
    row_pitch,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradients of one tile of virtual keys and their values, over one stretch of the queries, and the sums of dl over
    each tile of queries."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    tile, batch, head = locate_program(num_tiles, num_heads)
    split = tl.program_id(1)
    batch_head = batch.to(tl.int64) * num_heads + head
    first_key = tile * TILE_K
    rows = tl.arange(0, TILE_Q)
    keys = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    key_head = batch_head // GROUP
    key_base = mean_keys + key_head * num_virtual * PITCH
    value_base = mean_values + key_head * num_virtual * PITCH
    key = load_tile(key_base, first_key, keys, dims, PITCH // 8, num_virtual, PITCH, PADDED)
    value = load_tile(value_base, first_key, keys, dims, PITCH // 8, num_virtual, PITCH, PADDED)
    grad_base = head_pointer(grad_out, batch, head, stride_gb, stride_gh)
    q_base = head_pointer(q, batch, head, stride_qb, stride_qh)
    num_rows = tl.cdiv(num_tokens, BLOCK_Q)
    line_pitch = bias_pitch(num_virtual)
    key_mask = first_key + keys < num_virtual
    scale_log2 = scale * LOG2E
    key_accumulator = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    value_accumulator = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    for query_tile in range(split, num_query_tiles, num_splits):
        start = query_tile * TILE_Q
        line = batch_head * num_rows + start // BLOCK_Q
        query = load_tile(q_base, start, rows, dims, stride_qn, num_tokens, PITCH, PADDED)
        added = tl.load(bias + line * line_pitch + first_key + keys, mask=key_mask, other=float("-inf"))
        row_at = batch_head * 2 * row_pitch + start + rows
        row_lse = tl.load(statistics + row_at)
        delta = tl.load(statistics + row_at + row_pitch)
        # [TILE_K, PADDED_DIM] x [PADDED_DIM, TILE_Q]
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2 + (added * LOG2E)[:, None]
        probability = tl.exp2(scores - row_lse[None, :])
        grad = load_tile(grad_base, start, rows, dims, stride_gn, num_tokens, PITCH, PADDED)
        value_accumulator = tl.dot(probability.to(grad.dtype), grad, value_accumulator, input_precision="ieee")
        grad_scores = tl.dot(value, tl.trans(grad), input_precision="ieee") * scale - delta[None, :]
        grad_scores *= probability
        tl.store(
            grad_bias + (batch_head * num_query_tiles + query_tile) * line_pitch + first_key + keys,
            tl.sum(grad_scores, 1) / scale,
            mask=key_mask,
        )
        key_accumulator = tl.dot(grad_scores.to(query.dtype), query, key_accumulator, input_precision="ieee")
    part = (split * (tl.num_programs(0) // num_tiles) + batch_head) * num_virtual * HEAD_DIM
    at = part + (first_key + keys)[:, None] * HEAD_DIM + dims[None, :]
    mask = key_mask[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(grad_keys + at, key_accumulator, mask=mask)
    tl.store(grad_values + at, value_accumulator, mask=mask)


@triton.jit(
    do_not_specialize=["num_rows", "num_keys", "width", "grad_width", "bias_width", "mixture_parts", "bias_parts"]
)
def mixture_backward_kernel(
    mixture, grad_mixture, grad_bias, spreads, sizes, of_logits, of_spread, of_shift, scale, num_rows, num_keys, width,
    grad_width, bias_width, mixture_parts, bias_parts, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    valid = lanes < num_keys
    grad = tl.zeros([LANES], tl.float32)
    summed = tl.zeros([LANES], tl.float32)
    for part in range(mixture_parts):
        at = (row * mixture_parts + part) * grad_width + lanes
        grad += tl.load(grad_mixture + at, mask=valid, other=0.0).to(tl.float32)
    for part in range(bias_parts):
        summed += tl.load(grad_bias + (row * bias_parts + part) * bias_width + lanes, mask=valid, other=0.0)
    share = tl.load(mixture + row * width + lanes, mask=valid, other=0.0).to(tl.float32)
    grad = share * (grad - tl.sum(share * grad, 0))
    summed += grad
    at = row * num_keys + lanes
    tl.store(of_logits + at, grad * scale, mask=valid)
    spread = tl.load(spreads + at, mask=valid, other=0.0)
    size = tl.load(sizes + row // num_rows * num_keys + lanes, mask=valid, other=0.0)
    below = spread <= tl.maximum(size, 0.0)
    tl.store(of_spread + at, tl.where(below, summed * (scale * scale * 0.5), 0.0), mask=valid)
    tl.store(of_shift + row, tl.sum(tl.where(valid, summed, 0.0), 0))


@triton.jit(do_not_specialize=["num_rows", "num_keys", "num_heads", "row_tiles"])
def span_gradient_kernel(
    of_rows, query_moments, spans, of_keys, of_queries, of_spans, num_rows, num_keys, num_heads, row_tiles,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the gradients of the moments of query blocks, or of key blocks."""
    batch_head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    inside = (dims < HEAD_DIM)[None, :]
    lines = tl.arange(0, TILE)
    steps = tl.arange(0, STEP)
    matrix = of_rows + batch_head * num_rows * num_keys
    query_base = batch_head * num_rows * HEAD_DIM
    key_base = batch_head * num_keys * HEAD_DIM
    total = tl.zeros([TILE, PADDED_DIM], tl.float32)
    if tl.program_id(1) < row_tiles:
        rows = tl.program_id(1) * TILE + lines
        for first in range(0, num_keys, STEP):
            keys = first + steps
            mask = (rows < num_rows)[:, None] & (keys < num_keys)[None, :]
            weights = tl.load(matrix + rows[:, None].to(tl.int64) * num_keys + keys[None, :], mask=mask, other=0.0)
            at = key_base + keys[:, None] * HEAD_DIM + dims[None, :]
            span = tl.load(spans + at, mask=(keys < num_keys)[:, None] & inside, other=0.0)
            total = tl.dot(weights, span, total, input_precision=PRECISION)
        at = query_base + rows[:, None] * HEAD_DIM + dims[None, :]
        tl.store(of_queries + at, total, mask=(rows < num_rows)[:, None] & inside)
    else:
        keys = (tl.program_id(1) - row_tiles) * TILE + lines
        for first in range(0, num_rows, STEP):
            rows = first + steps
            mask = (rows < num_rows)[:, None] & (keys < num_keys)[None, :]
            weights = tl.load(matrix + rows[:, None].to(tl.int64) * num_keys + keys[None, :], mask=mask, other=0.0)
            at = query_base + rows[:, None] * HEAD_DIM + dims[None, :]
            moment = tl.load(query_moments + at, mask=(rows < num_rows)[:, None] & inside, other=0.0)
            total = tl.dot(tl.trans(weights), moment, total, input_precision=PRECISION)
        at = key_base + keys[:, None] * HEAD_DIM + dims[None, :]
        mask = (keys < num_keys)[:, None] & inside
        # the virtual keys are the means, which come first
        if tl.program_id(0) < num_heads:
            total += tl.load(of_keys + at, mask=mask, other=0.0)
        tl.store(of_spans + at, total, mask=mask)


def _lanes(items: int) -> tuple[int, int]:
    """Lanes for a row of ``items``, and warps."""
    lanes = max(32, power_of_two(items))
    return lanes, max(1, min(8, lanes // 256))


def virtual_logits(
    query_moments: torch.Tensor, moments: KeyMoments, scale: float, ranked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of the mean query of each query block, the logit of each key block without shift; scale^2 / 2 mean(q^2).var,
    which is w up to its bound; and, if ``ranked``, the logit without the bound, by which blocks are ranked. All float32
    (B, H, Tm, Tn), contiguous."""
    batch, heads, num_keys = moments.sizes.shape
    shape = (*query_moments.shape[1:4], num_keys)
    logits, spreads, *ranks = (query_moments.new_empty(shape) for _ in range(2 + ranked))
    query_moments = stacked(query_moments, heads, 2)
    num_queries, head_dim = query_moments.shape[3:]
    tile = 64 if max(num_queries, num_keys) > 64 else 32
    logit_kernel[(batch * heads, ceil_div(num_queries, tile), ceil_div(num_keys, tile))](
        query_moments[0],
        query_moments[1],
        moments.spans[0],
        moments.spans[1],
        moments.sizes,
        logits,
        spreads,
        ranks[0] if ranked else logits,
        scale,
        num_queries,
        num_keys,
        HEAD_DIM=head_dim,
        TILE=tile,
        STEP=32,
        PRECISION=FULL_PRECISION,
        HAS_RANKS=ranked,
    )
    return logits, spreads, ranks[0] if ranked else None


def virtual_rows(
    logits: torch.Tensor,
    spreads: torch.Tensor,
    moments: KeyMoments,
    block_map: torch.Tensor,
    shift: torch.Tensor | None,
) -> VirtualRows:
    """The rows of a block map whose marginal blocks have virtual keys."""
    batch, heads, rows, columns = logits.shape
    width = ceil_div(columns, 64) * 64
    bias = logits.new_empty(batch, heads, rows, width)
    mixture = moments.slopes.new_empty(batch * heads, rows, width)
    lanes, warps = _lanes(width)
    row_kernel[(batch * heads * rows,)](
        logits,
        spreads,
        moments.sizes,
        shift if shift is not None else logits,
        block_map,
        bias,
        mixture,
        rows,
        columns,
        heads,
        width,
        LANES=lanes,
        HAS_SHIFT=shift is not None,
        GROUP=heads // max(1, moments.sizes.shape[1]),
        num_warps=warps,
    )
    return VirtualRows(bias, mixture[:, :, : moments.slopes.shape[2]])


def virtual_forward(
    inputs: KernelInputs, lists: BlockLists, virtual: VirtualKeys, options: BackwardOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Steps.virtual_forward`: the critical keys by the sparse branch's kernel, then the virtual ones on top."""
    q, block_q = inputs.q, options.block_q
    out, _, lse = attention_forward(inputs, lists, None, options)
    batch, heads, tokens, head_dim = q.shape
    launch = clamped(virtual_launch("forward", head_dim, q.dtype), head_dim, block_q, block_q)
    tiles = ceil_div(tokens, launch.tile_q)
    virtual_forward_kernel[(tiles * batch * heads,)](
        q,
        out,
        lse,
        virtual.keys,
        virtual.values,
        virtual.bias,
        virtual.slopes,
        out,
        lse,
        virtual.shares,
        *vector_strides(q),
        options.scale,
        tokens,
        tiles,
        heads,
        virtual.keys.shape[2],
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_Q=block_q,
        TILE_Q=launch.tile_q,
        TILE_K=launch.tile_k,
        CHUNK=launch.chunk,
        GROUP=inputs.group,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out, lse


def virtual_backward_query(
    upstream: Upstream, inputs: KernelInputs, lists: BlockLists, virtual: VirtualKeys, options: BackwardOptions
) -> VirtualQueryGradients:
    """As `Steps.virtual_backward_query`: the virtual keys, then by the sparse branch's kernel the rest of dQ."""
    grad_out, out, _, lse = upstream
    q, block_q = inputs.q, options.block_q
    batch, heads, tokens, head_dim = q.shape
    count = virtual.keys.shape[2]
    launch = clamped(virtual_launch("backward_query", head_dim, q.dtype), head_dim, block_q, block_q)
    tiles = ceil_div(tokens, block_q) * (block_q // launch.tile_q)
    dq = q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    statistics = torch.empty((batch, heads, 2, tiles * launch.tile_q), dtype=torch.float32, device=q.device)
    virtual_statistics = torch.empty_like(statistics)
    grad_slopes = virtual.slopes.new_empty(batch, heads, tiles, *virtual.slopes.shape[3:])
    virtual_backward_query_kernel[(tiles * batch * heads,)](
        grad_out,
        q,
        out,
        lse,
        virtual.keys,
        virtual.values,
        virtual.bias,
        virtual.slopes,
        virtual.shares,
        dq,
        statistics,
        virtual_statistics,
        grad_slopes,
        *vector_strides(grad_out),
        *vector_strides(q),
        *vector_strides(out),
        options.scale,
        tokens,
        tiles,
        heads,
        count,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_Q=block_q,
        TILE_Q=launch.tile_q,
        TILE_K=launch.tile_k,
        CHUNK=launch.chunk,
        GROUP=inputs.group,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    started = QueryGradients(dq, statistics, complete=True, started=True)
    attention_backward_query(upstream, inputs, lists, started, options)
    return VirtualQueryGradients(dq, statistics, virtual_statistics, grad_slopes)


def virtual_backward_key(
    upstream: Upstream,
    inputs: KernelInputs,
    lists: BlockLists,
    order: torch.Tensor,
    statistics: torch.Tensor,
    moments: KeyMoments,
    gradients: MomentGradients,
    options: BackwardOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Steps.virtual_backward_key`: by the sparse branch's kernel first, then what the moments add."""
    dk, dv = attention_backward_key(upstream, inputs, lists, order, statistics, None, options)
    add_key_gradients(inputs, moments, gradients, dk, dv, options.block_k)
    return dk, dv


_SHORT_PRECISION = "ieee" if torch.version.hip is not None else "tf32"
"""Of gradients of 16-bit numbers."""
_PROGRAMS = 264
"""At least as many programs for the virtual keys' gradients, where there are queries enough."""


def virtual_key_gradients(
    upstream: Upstream,
    inputs: KernelInputs,
    virtual: VirtualKeys,
    statistics: torch.Tensor,
    options: BackwardOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `Steps.virtual_key_gradients`."""
    q, grad_out = inputs.q, upstream.grad_out
    batch, heads, tokens, head_dim = q.shape
    count = virtual.keys.shape[2]
    launch = clamped(virtual_launch("backward_key", head_dim, q.dtype), head_dim, options.block_q, 256)
    tiles = ceil_div(count, launch.tile_k)
    pitch = statistics.shape[3]
    query_tiles = pitch // launch.tile_q
    splits = max(1, min(query_tiles, ceil_div(_PROGRAMS, max(1, tiles * batch * heads))))
    grads = statistics.new_empty(2, splits, batch, heads, count, head_dim)
    grad_bias = grads.new_empty(batch, heads, query_tiles, virtual.bias.shape[3])
    virtual_backward_key_kernel[(tiles * batch * heads, splits)](
        grad_out,
        q,
        virtual.keys,
        virtual.values,
        virtual.bias,
        statistics,
        grads[0],
        grads[1],
        grad_bias,
        *vector_strides(grad_out),
        *vector_strides(q),
        options.scale,
        tokens,
        tiles,
        heads,
        count,
        query_tiles,
        splits,
        pitch,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_Q=options.block_q,
        TILE_Q=launch.tile_q,
        TILE_K=launch.tile_k,
        GROUP=inputs.group,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    of_keys, of_values = grads.unflatten(3, (-1, inputs.group)).sum(dim=(1, 4))
    return of_keys, of_values, grad_bias


def mixture_backward(
    mixture: torch.Tensor,
    grad_mixture: torch.Tensor,
    grad_bias: torch.Tensor,
    spreads: torch.Tensor,
    moments: KeyMoments,
    scale: float,
) -> RowGradients:
    """From the gradients of a (B*H, tiles, ...) and the sums of dl (B, H, tiles, ...), each by tiles of its own."""
    batch, heads, rows, columns = spreads.shape
    lanes, warps = _lanes(columns)
    of_spans = spreads.new_empty(2, *spreads.shape)
    of_shift = spreads.new_empty(batch, heads, rows)
    mixture_backward_kernel[(batch * heads * rows,)](
        mixture,
        grad_mixture,
        grad_bias,
        spreads,
        moments.sizes,
        of_spans[0],
        of_spans[1],
        of_shift,
        scale,
        # of a key head, whose moments these rows have
        rows * heads // max(1, moments.sizes.shape[1]),
        columns,
        mixture.stride(1),
        grad_mixture.shape[2],
        grad_bias.shape[3],
        grad_mixture.shape[1] // rows,
        grad_bias.shape[2] // rows,
        LANES=lanes,
        num_warps=warps,
    )
    return RowGradients(of_spans, of_shift)


def span_gradients(
    of_rows: torch.Tensor, query_moments: torch.Tensor, moments: KeyMoments, of_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``query_moments`` (2, B, H, Tm, D) and of the spans of ``moments`` from those of their products
    (2, B, H, Tm, Tn), the former contiguous, to the latter's means ``of_keys`` (B, Hk, Tn, D) added. All float32; for
    16-bit inputs, products are TF32's."""
    batch, heads, num_keys, head_dim = of_keys.shape
    spans = moments.spans
    of_queries, of_spans = torch.empty_like(query_moments), torch.empty_like(spans)
    of_rows, query_moments = stacked(of_rows, heads, 2), stacked(query_moments, heads, 2)
    num_rows, tile = of_rows.shape[3], 32
    row_tiles = ceil_div(num_rows, tile)
    span_gradient_kernel[(2 * batch * heads, row_tiles + ceil_div(num_keys, tile))](
        of_rows,
        query_moments,
        spans,
        of_keys,
        of_queries,
        of_spans,
        num_rows,
        num_keys,
        batch * heads,
        row_tiles,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        TILE=tile,
        STEP=32,
        PRECISION=FULL_PRECISION if moments.keys.dtype == torch.float32 else _SHORT_PRECISION,
    )
    return of_queries, of_spans
