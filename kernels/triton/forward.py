"""The forward attention kernel: sparse branch, linear branch and gate of one tile of queries in one launch.

O^s = softmax over the keys of the critical blocks (online, base 2); O^l = phi(Q) H_i / (phi(Q) Z_i), 0 where
that denominator is 0; O = O^s + O^l W^T + b. Shapes above the products name registers: TILE_Q, TILE_K,
PADDED_DIM (the head dimension up to a power of two) and CHUNK (columns of O^l made, stored and gated at a
time).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sla_compile.common.options import BackwardOptions

from ..steps import BlockLists, KernelInputs, LinearStates
from .masks import batch_stride
from .primitives import (
    LOG2E,
    feature_map,
    head_pointer,
    load_key_bias,
    load_tile,
    locate_program,
    reciprocal_or_zero,
    store_tile,
    token_major_pointer,
)
from .tiles import ceil_div, head_stride, launch_for, padded_dim, vector_strides

__all__ = ["attention_forward"]


@triton.jit
def online_softmax_update(scores, value, running_max, running_sum, accumulator, MASKED: tl.constexpr):
    """Fold one tile of base-2 scores [TILE_Q, TILE_K] and its values into the running softmax."""
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    shift = new_max
    if MASKED:
        # a row that has had no key so far
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(running_max - shift)
    weights = tl.exp2(scores - shift[:, None])
    running_sum = running_sum * rescale + tl.sum(weights, 1)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")
    return new_max, running_sum, accumulator


@triton.jit(
    do_not_specialize=[
        "stride_key_bias",
        "num_tokens",
        "num_keys",
        "num_tiles",
        "num_heads",
        "list_width",
        "state_rows",
    ]
)
def attention_forward_kernel(
    q,
    k,
    v,
    lists,
    counts,
    key_bias,
    states,
    normalizers,
    weight,
    bias,
    out,
    linear_out,
    lse,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_wh,
    stride_bh,
    stride_bd,
    stride_key_bias,
    scale_log2,
    num_tokens,
    num_keys,
    num_tiles,
    num_heads,
    list_width,
    state_rows,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNK: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
):
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    PARTS: tl.constexpr = BLOCK_K // TILE_K
    MASKED: tl.constexpr = HAS_KEY_BIAS or CAUSAL
    tile, batch, head = locate_program(num_tiles, num_heads)
    batch_head = batch.to(tl.int64) * num_heads + head
    first_query = tile * TILE_Q
    out_row = num_heads * HEAD_DIM
    block_row = first_query // BLOCK_Q
    num_rows = tl.cdiv(num_tokens, BLOCK_Q)

    rows = tl.arange(0, TILE_Q)
    keys = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    k_base = head_pointer(k, batch, head // GROUP, stride_kb, stride_kh)
    v_base = head_pointer(v, batch, head // GROUP, stride_vb, stride_vh)
    q_base = head_pointer(q, batch, head, stride_qb, stride_qh)
    query = load_tile(q_base, first_query, rows, dims, stride_qn, num_tokens, PITCH, PADDED)

    running_max = tl.full([TILE_Q], float("-inf"), tl.float32)
    running_sum = tl.zeros([TILE_Q], tl.float32)
    accumulator = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    row_list = lists + (batch_head * num_rows + block_row) * list_width
    num_critical = list_width
    if HAS_COUNTS:
        num_critical = tl.load(counts + batch_head * num_rows + block_row)
    key_bias_base = key_bias + batch.to(tl.int64) * stride_key_bias
    for step in range(num_critical * PARTS):
        start = tl.load(row_list + step // PARTS) * BLOCK_K + (step % PARTS) * TILE_K
        key = load_tile(k_base, start, keys, dims, stride_kn, num_keys, PITCH, PADDED)
        # [TILE_Q, PADDED_DIM] x [PADDED_DIM, TILE_K]
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        if HAS_KEY_BIAS:
            # natural log -> log2
            scores += load_key_bias(key_bias_base, start, keys, num_keys)[None, :] * LOG2E
        # with a bias too: where only addresses need `start`, Triton 3.6 buffers the list, and fewer keys and values
        scores = tl.where((start + keys < num_keys)[None, :], scores, float("-inf"))
        if CAUSAL:
            scores = tl.where((first_query + rows)[:, None] >= (start + keys)[None, :], scores, float("-inf"))
        value = load_tile(v_base, start, keys, dims, stride_vn, num_keys, PITCH, PADDED)
        running_max, running_sum, accumulator = online_softmax_update(
            scores, value, running_max, running_sum, accumulator, MASKED
        )
    if MASKED:
        # a query without a key: its maximum, and so its lse, is -inf
        running_sum = tl.where(running_sum > 0.0, running_sum, 1.0)
    accumulator = accumulator / running_sum[:, None]
    # log2 -> natural log
    LN2: tl.constexpr = 0.6931471805599453
    row_lse = (running_max + tl.log2(running_sum)) * LN2
    tl.store(lse + batch_head * num_tokens + first_query + rows, row_lse, mask=first_query + rows < num_tokens)

    if HAS_LINEAR:
        state_index = batch_head * state_rows + tl.minimum(block_row, state_rows - 1)
        state_base = states + state_index * HEAD_DIM * PITCH
        weight_base = weight + head.to(tl.int64) * stride_wh * 8
        linear_base = token_major_pointer(linear_out, batch, head, num_tokens, num_heads, HEAD_DIM)
        origin = tl.zeros([], tl.int32)
        # loaded again: kept in registers it would slow the loop above
        query = load_tile(q_base, first_query, rows, dims, stride_qn, num_tokens, PITCH, PADDED)
        phi = feature_map(query, dims, HEAD_DIM, PADDED, FEATURE_MAP)
        normalizer = tl.load(normalizers + state_index * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        inverse = reciprocal_or_zero(tl.sum(phi * normalizer[None, :], 1))
        phi = phi.to(states.dtype.element_ty)
        for first in tl.range(0, PADDED_DIM, CHUNK, num_stages=1):
            columns = first + tl.arange(0, CHUNK)
            state = load_tile(state_base, origin, dims, columns, PITCH // 8, HEAD_DIM, PITCH, PADDED)
            # [TILE_Q, PADDED_DIM] x [PADDED_DIM, CHUNK]
            linear = tl.dot(phi, state, input_precision="ieee") * inverse[:, None]
            linear = linear.to(query.dtype)
            store_tile(linear_base, linear, first_query, rows, columns, out_row, num_tokens, HEAD_DIM, PADDED)
            gate = load_tile(weight_base, origin, dims, columns, PITCH // 8, HEAD_DIM, PITCH, PADDED)
            # [TILE_Q, CHUNK] x [CHUNK, PADDED_DIM]
            gate = tl.trans(gate)
            accumulator = tl.dot(linear, gate, accumulator, input_precision="ieee")

    if HAS_BIAS:
        bias_base = bias + head.to(tl.int64) * stride_bh
        shift = tl.load(bias_base + dims * stride_bd, mask=dims < HEAD_DIM, other=0.0)
        accumulator += shift.to(tl.float32)[None, :]
    out_base = token_major_pointer(out, batch, head, num_tokens, num_heads, HEAD_DIM)
    store_tile(out_base, accumulator, first_query, rows, dims, out_row, num_tokens, HEAD_DIM, PADDED)


def attention_forward(
    inputs: KernelInputs,
    lists: BlockLists,
    linear: LinearStates | None,
    options: BackwardOptions,
    *,
    runs_beside: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `Steps.attention_forward`; never beside the kernel before it."""
    q, k, v, gate, bias, _ = inputs
    key_bias = inputs.key_bias
    batch, heads, tokens, head_dim = q.shape
    out = q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    linear_out = q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2) if linear is not None else q.new_empty(0)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    launch = launch_for("forward", head_dim, q.dtype, options.block_q, options.block_k)
    tiles = ceil_div(tokens, launch.tile_q)
    # an absent tensor's place is taken by one that is there; the kernel does not touch it
    attention_forward_kernel[(tiles * batch * heads,)](
        q,
        k,
        v,
        lists.blocks,
        lists.counts if lists.counts is not None else lists.blocks,
        key_bias if key_bias is not None else lse,
        linear.states if linear is not None else q,
        linear.normalizers if linear is not None else lse,
        gate if gate is not None else q,
        bias if bias is not None else q,
        out,
        linear_out if linear is not None else out,
        lse,
        *vector_strides(q),
        *vector_strides(k),
        *vector_strides(v),
        head_stride(gate, 2) // 8,
        head_stride(bias, 1),
        bias.stride(-1) if bias is not None else 0,
        batch_stride(key_bias),
        options.scale * LOG2E.value,
        tokens,
        k.shape[2],
        tiles,
        heads,
        lists.blocks.shape[3],
        linear.states.shape[2] if linear is not None else 1,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_Q=options.block_q,
        BLOCK_K=options.block_k,
        TILE_Q=launch.tile_q,
        TILE_K=launch.tile_k,
        CHUNK=launch.chunk,
        FEATURE_MAP=options.feature_map,
        HAS_LINEAR=linear is not None,
        HAS_BIAS=bias is not None,
        HAS_COUNTS=lists.counts is not None,
        HAS_KEY_BIAS=key_bias is not None,
        CAUSAL=options.causal,
        GROUP=inputs.group,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out, linear_out, lse
