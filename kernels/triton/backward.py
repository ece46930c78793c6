"""The backward's two hot kernels: dQ by tiles of queries, dK and dV by tiles of keys.

With P = exp(S - lse) on critical blocks and D^s = rowsum(dO * O^s):
    dS = P * (dO V^T - D^s) * scale;  dQ += dS K;  dK += dS^T Q;  dV += P^T dO;
and of the linear branch
    dphi(K_j) = V_j dh_j^T + 1 dz_j^T;  dV_j += phi(K_j) dh_j.
Its part of dQ, and lse and D^s as ``statistics``, come from ``linear_backward.py``. Each program owns its
outputs and sums in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sla_compile.common.options import BackwardOptions

from ..steps import BlockLists, KernelInputs, LinearStates, QueryGradients, Upstream
from .classify import longest_first
from .masks import batch_stride
from .primitives import (
    LOG2E,
    feature_map,
    feature_map_backward,
    head_pointer,
    load_key_bias,
    load_tile,
    locate_program,
    store_tile,
    tile_mask,
    tile_pointer,
    token_major_pointer,
)
from .tiles import ceil_div, launch_for, padded_dim, vector_strides

__all__ = ["attention_backward_key", "attention_backward_query"]


@triton.jit(
    do_not_specialize=[
        "stride_key_bias",
        "num_tokens",
        "num_keys",
        "num_tiles",
        "num_heads",
        "num_columns",
    ]
)
def attention_backward_query_kernel(
    grad_out,
    q,
    k,
    v,
    lists,
    counts,
    statistics,
    key_bias,
    grad_q,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_key_bias,
    scale,
    num_tokens,
    num_keys,
    num_tiles,
    num_heads,
    num_columns,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dQ of one tile of queries: the linear branch's part, which is in ``grad_q``, then its critical keys."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    PARTS: tl.constexpr = BLOCK_K // TILE_K
    tile, batch, head = locate_program(num_tiles, num_heads)
    batch_head = batch.to(tl.int64) * num_heads + head
    first_query = tile * TILE_Q
    block_row = first_query // BLOCK_Q
    num_rows = tl.cdiv(num_tokens, BLOCK_Q)

    rows = tl.arange(0, TILE_Q)
    keys = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    grad_base = head_pointer(grad_out, batch, head, stride_gb, stride_gh)
    q_base = head_pointer(q, batch, head, stride_qb, stride_qh)
    grad = load_tile(grad_base, first_query, rows, dims, stride_gn, num_tokens, PITCH, PADDED)
    query = load_tile(q_base, first_query, rows, dims, stride_qn, num_tokens, PITCH, PADDED)

    scale_log2 = scale * LOG2E
    row_pitch = num_rows * BLOCK_Q
    row_statistics = statistics + batch_head * 2 * row_pitch + first_query + rows
    row_lse = tl.load(row_statistics)
    row_delta = tl.load(row_statistics + row_pitch)
    grad_q_base = token_major_pointer(grad_q, batch, head, num_tokens, num_heads, HEAD_DIM)
    if HAS_LINEAR:
        mask = tile_mask(first_query, rows, dims, num_tokens, HEAD_DIM, PADDED)
        address = tile_pointer(grad_q_base, first_query, rows, dims, num_heads * HEAD_DIM)
        accumulator = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    else:
        accumulator = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    k_base = head_pointer(k, batch, head // GROUP, stride_kb, stride_kh)
    v_base = head_pointer(v, batch, head // GROUP, stride_vb, stride_vh)
    row_list = lists + (batch_head * num_rows + block_row) * num_columns
    num_critical = tl.load(counts + batch_head * num_rows + block_row)
    key_bias_base = key_bias + batch.to(tl.int64) * stride_key_bias
    for step in range(num_critical * PARTS):
        start = tl.load(row_list + step // PARTS) * BLOCK_K + (step % PARTS) * TILE_K
        key = load_tile(k_base, start, keys, dims, stride_kn, num_keys, PITCH, PADDED)
        # [TILE_Q, PADDED_DIM] x [PADDED_DIM, TILE_K]
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if HAS_KEY_BIAS:
            logit_bias = load_key_bias(key_bias_base, start, keys, num_keys) * LOG2E
            probability = tl.exp2(scores * scale_log2 + logit_bias[None, :] - row_lse[:, None])
        else:
            probability = tl.exp2(scores * scale_log2 - row_lse[:, None])
            probability = tl.where((start + keys < num_keys)[None, :], probability, 0.0)
        if CAUSAL:
            probability = tl.where((first_query + rows)[:, None] >= (start + keys)[None, :], probability, 0.0)
        value = load_tile(v_base, start, keys, dims, stride_vn, num_keys, PITCH, PADDED)
        grad_probability = tl.dot(grad, tl.trans(value), input_precision="ieee")
        grad_scores = probability * (grad_probability * scale - row_delta[:, None])
        # [TILE_Q, TILE_K] x [TILE_K, PADDED_DIM]
        accumulator = tl.dot(grad_scores.to(key.dtype), key, accumulator, input_precision="ieee")
    store_tile(grad_q_base, accumulator, first_query, rows, dims, num_heads * HEAD_DIM, num_tokens, HEAD_DIM, PADDED)


@triton.jit(
    do_not_specialize=[
        "stride_key_bias",
        "num_tokens",
        "num_keys",
        "num_columns",
        "num_heads",
        "num_rows",
        "state_rows",
    ]
)
def attention_backward_key_kernel(
    grad_out,
    q,
    k,
    v,
    statistics,
    grad_states,
    grad_normalizers,
    lists,
    counts,
    order,
    key_bias,
    grad_k,
    grad_v,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_key_bias,
    scale,
    num_tokens,
    num_keys,
    num_columns,
    num_heads,
    num_rows,
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
    HAS_KEY_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_GRAD_K: tl.constexpr,
    HAS_GRAD_V: tl.constexpr,
):
    """dK and dV, or one of them, of one tile of keys: the linear part from dh_j and dz_j, then its critical rows, of
    each query head that has these keys."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    PARTS: tl.constexpr = BLOCK_Q // TILE_Q
    COLUMN_PARTS: tl.constexpr = BLOCK_K // TILE_K
    column = tl.load(order + tl.program_id(0) // COLUMN_PARTS)
    block_column = column % num_columns
    batch_head = (column // num_columns).to(tl.int64)
    batch = column // num_columns // num_heads
    head = column // num_columns % num_heads
    first_key = block_column * BLOCK_K + tl.program_id(0) % COLUMN_PARTS * TILE_K

    keys = tl.arange(0, TILE_K)
    rows = tl.arange(0, TILE_Q)
    dims = tl.arange(0, PADDED_DIM)
    k_base = head_pointer(k, batch, head, stride_kb, stride_kh)
    v_base = head_pointer(v, batch, head, stride_vb, stride_vh)
    key = load_tile(k_base, first_key, keys, dims, stride_kn, num_keys, PITCH, PADDED)
    if HAS_GRAD_K:
        value = load_tile(v_base, first_key, keys, dims, stride_vn, num_keys, PITCH, PADDED)

    if HAS_KEY_BIAS:
        logit_bias = load_key_bias(key_bias + batch.to(tl.int64) * stride_key_bias, first_key, keys, num_keys)
        key_weight = tl.exp(logit_bias)
        # natural log -> log2
        logit_bias = logit_bias * LOG2E

    if HAS_GRAD_K:
        key_accumulator = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    if HAS_GRAD_V:
        value_accumulator = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    if HAS_LINEAR:
        state_index = batch_head * state_rows + tl.minimum(block_column, state_rows - 1)
        state_base = grad_states + state_index * HEAD_DIM * PITCH
        state_type = grad_states.dtype.element_ty
        origin = tl.zeros([], tl.int32)
        if HAS_GRAD_K:
            grad_phi = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
            for first in tl.range(0, PADDED_DIM, CHUNK, num_stages=1):
                columns = first + tl.arange(0, CHUNK)
                grad_state = load_tile(state_base, origin, dims, columns, PITCH // 8, HEAD_DIM, PITCH, PADDED)
                part = load_tile(v_base, first_key, keys, columns, stride_vn, num_keys, PITCH, PADDED)
                # [TILE_K, CHUNK] x [CHUNK, PADDED_DIM]
                grad_phi = tl.dot(part.to(state_type), tl.trans(grad_state), grad_phi, input_precision="ieee")
            normalizer_base = grad_normalizers + state_index * HEAD_DIM
            grad_phi += tl.load(normalizer_base + dims, mask=dims < HEAD_DIM, other=0.0)[None, :]
        phi = feature_map(key, dims, HEAD_DIM, PADDED, FEATURE_MAP)
        if HAS_GRAD_K:
            if HAS_KEY_BIAS:
                grad_phi *= key_weight[:, None]
            key_accumulator = feature_map_backward(key, phi, grad_phi, FEATURE_MAP)
        if HAS_GRAD_V:
            if HAS_KEY_BIAS:
                phi *= key_weight[:, None]
            phi = phi.to(state_type)
            for first in tl.range(0, PADDED_DIM, CHUNK, num_stages=1):
                columns = first + tl.arange(0, CHUNK)
                # a 0/1 product picks these columns of phi, exactly
                place = (dims[:, None] == columns[None, :]).to(state_type)
                part = tl.dot(phi, place, input_precision="ieee").to(state_type)
                grad_state = load_tile(
                    state_base, origin + first, tl.arange(0, CHUNK), dims, PITCH // 8, HEAD_DIM, PITCH, PADDED
                )
                # [TILE_K, CHUNK] x [CHUNK, PADDED_DIM]
                value_accumulator = tl.dot(part, grad_state, value_accumulator, input_precision="ieee")

    scale_log2 = scale * LOG2E
    q_base = head_pointer(q, batch, head, stride_qb, stride_qh)
    grad_base = head_pointer(grad_out, batch, head, stride_gb, stride_gh)
    row_pitch = tl.cdiv(num_tokens, BLOCK_Q) * BLOCK_Q
    row_statistics = statistics + batch_head * 2 * row_pitch
    column_list = lists + column.to(tl.int64) * num_rows
    num_critical = tl.load(counts + column)
    for step in range(num_critical * PARTS):
        if GROUP == 1:
            start = tl.load(column_list + step // PARTS) * BLOCK_Q + (step % PARTS) * TILE_Q
        else:
            entry = tl.load(column_list + step // PARTS)
            start = entry // GROUP * BLOCK_Q + (step % PARTS) * TILE_Q
            query_head = head * GROUP + entry % GROUP
            q_base = head_pointer(q, batch, query_head, stride_qb, stride_qh)
            grad_base = head_pointer(grad_out, batch, query_head, stride_gb, stride_gh)
            row_statistics = statistics + (batch_head * GROUP + entry % GROUP) * 2 * row_pitch
        query = load_tile(q_base, start, rows, dims, stride_qn, num_tokens, PITCH, PADDED)
        row_lse = tl.load(row_statistics + start + rows)
        # [TILE_K, PADDED_DIM] x [PADDED_DIM, TILE_Q]; keys past the end make rows that are never stored
        scores = tl.dot(key, tl.trans(query), input_precision="ieee")
        if HAS_KEY_BIAS:
            probability = tl.exp2(scores * scale_log2 + logit_bias[:, None] - row_lse[None, :])
        else:
            probability = tl.exp2(scores * scale_log2 - row_lse[None, :])
        if CAUSAL:
            probability = tl.where((start + rows)[None, :] >= (first_key + keys)[:, None], probability, 0.0)
        grad = load_tile(grad_base, start, rows, dims, stride_gn, num_tokens, PITCH, PADDED)
        # [TILE_K, TILE_Q] x [TILE_Q, PADDED_DIM]
        if HAS_GRAD_V:
            value_accumulator = tl.dot(probability.to(grad.dtype), grad, value_accumulator, input_precision="ieee")
        if HAS_GRAD_K:
            grad_probability = tl.dot(value, tl.trans(grad), input_precision="ieee")
            row_delta = tl.load(row_statistics + row_pitch + start + rows)
            grad_scores = probability * (grad_probability * scale - row_delta[None, :])
            key_accumulator = tl.dot(grad_scores.to(query.dtype), query, key_accumulator, input_precision="ieee")
    out_row = num_heads * HEAD_DIM
    if HAS_GRAD_K:
        grad_k_base = token_major_pointer(grad_k, batch, head, num_keys, num_heads, HEAD_DIM)
        store_tile(grad_k_base, key_accumulator, first_key, keys, dims, out_row, num_keys, HEAD_DIM, PADDED)
    if HAS_GRAD_V:
        grad_v_base = token_major_pointer(grad_v, batch, head, num_keys, num_heads, HEAD_DIM)
        store_tile(grad_v_base, value_accumulator, first_key, keys, dims, out_row, num_keys, HEAD_DIM, PADDED)


def attention_backward_query(
    upstream: Upstream,
    inputs: KernelInputs,
    lists: BlockLists,
    gradients: QueryGradients,
    options: BackwardOptions,
) -> None:
    """As `Steps.attention_backward_query`; ``gradients`` are complete."""
    q, k, v, key_bias = *inputs[:3], inputs.key_bias
    grad_out, statistics = upstream.grad_out, gradients.statistics
    batch, heads, tokens, head_dim = q.shape
    launch = launch_for("backward_query", head_dim, q.dtype, options.block_q, options.block_k)
    tiles = lists.blocks.shape[2] * (options.block_q // launch.tile_q)
    # an absent tensor's place is taken by one that is there; the kernel does not touch it
    attention_backward_query_kernel[(tiles * batch * heads,)](
        grad_out,
        q,
        k,
        v,
        lists.blocks,
        lists.counts,
        statistics,
        key_bias if key_bias is not None else statistics,
        gradients.dq,
        *vector_strides(grad_out),
        *vector_strides(q),
        *vector_strides(k),
        *vector_strides(v),
        batch_stride(key_bias),
        options.scale,
        tokens,
        k.shape[2],
        tiles,
        heads,
        lists.blocks.shape[3],
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_Q=options.block_q,
        BLOCK_K=options.block_k,
        TILE_Q=launch.tile_q,
        TILE_K=launch.tile_k,
        HAS_LINEAR=gradients.started,
        HAS_KEY_BIAS=key_bias is not None,
        CAUSAL=options.causal,
        GROUP=inputs.group,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def few_columns(inputs: KernelInputs, options: BackwardOptions) -> bool:
    """As `Steps.few_columns`: no kernel here makes a difference."""
    return False


def column_order(inputs: KernelInputs, lists: BlockLists, options: BackwardOptions) -> torch.Tensor:
    """As `Steps.column_order`."""
    return longest_first(lists, lists.blocks.shape[3])


def attention_backward_key(
    upstream: Upstream,
    inputs: KernelInputs,
    lists: BlockLists,
    order: torch.Tensor,
    statistics: torch.Tensor,
    linear: LinearStates | None,
    options: BackwardOptions,
    *,
    runs_beside: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Steps.attention_backward_key`; never beside the kernel before it."""
    q, k, v, key_bias = *inputs[:3], inputs.key_bias
    grad_out, block_k = upstream.grad_out, options.block_k
    batch, _, tokens, head_dim = q.shape
    heads = k.shape[1]
    launch = launch_for("backward_key", head_dim, q.dtype, options.block_q, block_k)
    columns = ceil_div(k.shape[2], block_k)
    programs = batch * heads * columns * (block_k // launch.tile_k)
    dk, dv = (q.new_empty(batch, k.shape[2], heads, head_dim).transpose(1, 2) for _ in range(2))
    # more of both than this would not fit the registers of 8 warps: dV then has a launch of its own
    fits = launch.tile_k * padded_dim(head_dim) <= 128 * 128
    for has_grad_k, has_grad_v in ((True, True),) if fits else ((False, True), (True, False)):
        attention_backward_key_kernel[(programs,)](
            grad_out,
            q,
            k,
            v,
            statistics,
            linear.states if linear is not None else q,
            linear.normalizers if linear is not None else statistics,
            lists.blocks,
            lists.counts,
            order,
            key_bias if key_bias is not None else statistics,
            dk,
            dv,
            *vector_strides(grad_out),
            *vector_strides(q),
            *vector_strides(k),
            *vector_strides(v),
            batch_stride(key_bias),
            options.scale,
            tokens,
            k.shape[2],
            columns,
            heads,
            lists.blocks.shape[3],
            linear.states.shape[2] if linear is not None else 1,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim(head_dim),
            BLOCK_Q=options.block_q,
            BLOCK_K=block_k,
            TILE_Q=launch.tile_q,
            TILE_K=launch.tile_k,
            CHUNK=launch.chunk,
            FEATURE_MAP=options.feature_map,
            HAS_LINEAR=linear is not None,
            HAS_KEY_BIAS=key_bias is not None,
            CAUSAL=options.causal,
            GROUP=inputs.group,
            HAS_GRAD_K=has_grad_k,
            HAS_GRAD_V=has_grad_v,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return dk, dv
