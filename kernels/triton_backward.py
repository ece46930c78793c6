"""The backward kernels: one over tiles of queries, one over tiles of keys, one for the gate.

With P = exp(S - lse) on critical blocks and D^s = rowsum(dO * O^s):
    dS = P * (dO V^T - D^s) * scale;  dQ += dS K;  dK += dS^T Q;  dV += P^T dO.
With dO^l = dO W, den = phi(Q) Z, D^l = rowsum(dO^l * O^l), all gradients 0 where den is 0:
    dphi(Q) = (dO^l H^T - D^l Z^T) / den;  dH = (phi(Q)/den)^T dO^l;  dZ = -(phi(Q)/den)^T D^l;
    dphi(K_j) = V_j dh_j^T + 1 dz_j^T;  dV_j += phi(K_j) dh_j;  dW = dO^T O^l;  db = sum of dO.
D^s needs no O^s: D^s = rowsum(dO * O) - D^l - dO b. Each program owns its outputs and sums in a fixed order:
no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_primitives import (
    feature_map,
    feature_map_backward,
    head_pointer,
    load_key_bias,
    load_tile,
    locate_program,
    reciprocal_or_zero,
    store_tile,
    token_major_pointer,
)

__all__ = ["attention_backward_key_kernel", "attention_backward_query_kernel", "gate_gradient_kernel"]


@triton.jit(
    do_not_specialize=[
        "stride_key_bias",
        "num_tokens",
        "num_keys",
        "num_tiles",
        "num_heads",
        "num_columns",
        "state_rows",
    ]
)
def attention_backward_query_kernel(
    grad_out,
    q,
    k,
    v,
    out,
    linear_out,
    lse,
    weight,
    bias,
    states,
    normalizers,
    lists,
    counts,
    key_bias,
    grad_q,
    delta,
    grad_states,
    grad_normalizers,
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
    stride_ob,
    stride_oh,
    stride_on,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_wh,
    stride_bh,
    stride_bd,
    stride_key_bias,
    scale,
    num_tokens,
    num_keys,
    num_tiles,
    num_heads,
    num_columns,
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
    HAS_KEY_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """dQ of one tile of queries, its D^s, and its share of dH and dZ: one (D, D) state a tile."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    PARTS: tl.constexpr = BLOCK_K // TILE_K
    tile, batch, head = locate_program(num_tiles, num_heads)
    batch_head = batch.to(tl.int64) * num_heads + head
    first_query = tile * TILE_Q
    block_row = first_query // BLOCK_Q
    num_rows = tl.cdiv(num_tokens, BLOCK_Q)
    origin = tl.zeros([], tl.int32)

    rows = tl.arange(0, TILE_Q)
    keys = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    row_mask = first_query + rows < num_tokens
    grad_base = head_pointer(grad_out, batch, head, stride_gb, stride_gh)
    out_base = head_pointer(out, batch, head, stride_ob, stride_oh)
    q_base = head_pointer(q, batch, head, stride_qb, stride_qh)
    grad = load_tile(grad_base, first_query, rows, dims, stride_gn, num_tokens, PITCH, PADDED)
    output = load_tile(out_base, first_query, rows, dims, stride_on, num_tokens, PITCH, PADDED)
    query = load_tile(q_base, first_query, rows, dims, stride_qn, num_tokens, PITCH, PADDED)

    row_delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
    if HAS_BIAS:
        bias_base = bias + head.to(tl.int64) * stride_bh
        shift = tl.load(bias_base + dims * stride_bd, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        row_delta -= tl.sum(grad.to(tl.float32) * shift[None, :], 1)

    if HAS_LINEAR:
        state_index = batch_head * state_rows + tl.minimum(block_row, state_rows - 1)
        state_base = states + state_index * HEAD_DIM * PITCH
        slot = tl.program_id(0).to(tl.int64)
        grad_state_base = grad_states + slot * HEAD_DIM * PITCH
        weight_base = weight + head.to(tl.int64) * stride_wh * 8
        linear_base = head_pointer(linear_out, batch, head, stride_lb, stride_lh)
        state_type = states.dtype.element_ty

        phi = feature_map(query, dims, HEAD_DIM, PADDED, FEATURE_MAP)
        normalizer = tl.load(normalizers + state_index * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        inverse = reciprocal_or_zero(tl.sum(phi * normalizer[None, :], 1))
        share = tl.trans((phi * inverse[:, None]).to(state_type))
        linear_delta = tl.zeros([TILE_Q], tl.float32)
        grad_phi = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
        for first in tl.range(0, PADDED_DIM, CHUNK, num_stages=1):
            columns = first + tl.arange(0, CHUNK)
            gate = load_tile(weight_base, origin, dims, columns, PITCH // 8, HEAD_DIM, PITCH, PADDED)
            # [TILE_Q, PADDED_DIM] x [PADDED_DIM, CHUNK]
            grad_linear = tl.dot(grad, gate, input_precision="ieee")
            linear = load_tile(linear_base, first_query, rows, columns, stride_ln, num_tokens, PITCH, PADDED)
            linear_delta += tl.sum(grad_linear * linear.to(tl.float32), 1)
            grad_linear = grad_linear.to(state_type)
            state = load_tile(state_base, origin, dims, columns, PITCH // 8, HEAD_DIM, PITCH, PADDED)
            # [TILE_Q, CHUNK] x [CHUNK, PADDED_DIM]
            grad_phi = tl.dot(grad_linear, tl.trans(state), grad_phi, input_precision="ieee")
            # [PADDED_DIM, TILE_Q] x [TILE_Q, CHUNK]
            grad_state = tl.dot(share, grad_linear, input_precision="ieee")
            store_tile(grad_state_base, grad_state, origin, dims, columns, PITCH, HEAD_DIM, PITCH, PADDED)
        # loaded and mapped again: kept in registers they would make the loop above spill
        query = load_tile(q_base, first_query, rows, dims, stride_qn, num_tokens, PITCH, PADDED)
        phi = feature_map(query, dims, HEAD_DIM, PADDED, FEATURE_MAP)
        grad_normalizer = -tl.sum(phi * (inverse * linear_delta)[:, None], 0)
        tl.store(grad_normalizers + slot * HEAD_DIM + dims, grad_normalizer, mask=dims < HEAD_DIM)
        grad_phi = (grad_phi - linear_delta[:, None] * normalizer[None, :]) * inverse[:, None]
        accumulator = feature_map_backward(query, phi, grad_phi, FEATURE_MAP)
        row_delta -= linear_delta
    else:
        accumulator = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    tl.store(delta + batch_head * num_tokens + first_query + rows, row_delta, mask=row_mask)

    scale_log2 = scale * 1.4426950408889634
    row_lse = tl.load(lse + batch_head * num_tokens + first_query + rows, mask=row_mask, other=0.0)
    row_lse = row_lse * 1.4426950408889634
    if HAS_KEY_BIAS or CAUSAL:
        # a query without a key: every score is -inf
        row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    scaled_delta = row_delta * scale
    k_base = head_pointer(k, batch, head, stride_kb, stride_kh)
    v_base = head_pointer(v, batch, head, stride_vb, stride_vh)
    row_list = lists + (batch_head * num_rows + block_row) * num_columns
    num_critical = tl.load(counts + batch_head * num_rows + block_row)
    key_bias_base = key_bias + batch.to(tl.int64) * stride_key_bias
    for step in range(num_critical * PARTS):
        start = tl.load(row_list + step // PARTS) * BLOCK_K + (step % PARTS) * TILE_K
        key = load_tile(k_base, start, keys, dims, stride_kn, num_keys, PITCH, PADDED)
        # [TILE_Q, PADDED_DIM] x [PADDED_DIM, TILE_K]
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if HAS_KEY_BIAS:
            logit_bias = load_key_bias(key_bias_base, start, keys, num_keys) * 1.4426950408889634
            probability = tl.exp2(scores * scale_log2 + logit_bias[None, :] - row_lse[:, None])
        else:
            probability = tl.exp2(scores * scale_log2 - row_lse[:, None])
            probability = tl.where((start + keys < num_keys)[None, :], probability, 0.0)
        if CAUSAL:
            probability = tl.where((first_query + rows)[:, None] >= (start + keys)[None, :], probability, 0.0)
        value = load_tile(v_base, start, keys, dims, stride_vn, num_keys, PITCH, PADDED)
        grad_probability = tl.dot(grad, tl.trans(value), input_precision="ieee")
        grad_scores = probability * (grad_probability * scale - scaled_delta[:, None])
        # [TILE_Q, TILE_K] x [TILE_K, PADDED_DIM]
        accumulator = tl.dot(grad_scores.to(key.dtype), key, accumulator, input_precision="ieee")
    grad_q_base = token_major_pointer(grad_q, batch, head, num_tokens, num_heads, HEAD_DIM)
    store_tile(grad_q_base, accumulator, first_query, rows, dims, num_heads * HEAD_DIM, num_tokens, HEAD_DIM, PADDED)


@triton.jit(
    do_not_specialize=["stride_key_bias", "num_tokens", "num_keys", "num_tiles", "num_heads", "num_rows", "state_rows"]
)
def attention_backward_key_kernel(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    grad_states,
    grad_normalizers,
    lists,
    counts,
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
    num_tiles,
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
):
    """dK and dV of one tile of keys: the linear part from dh_j and dz_j, then its critical rows."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    PARTS: tl.constexpr = BLOCK_Q // TILE_Q
    tile, batch, head = locate_program(num_tiles, num_heads)
    batch_head = batch.to(tl.int64) * num_heads + head
    first_key = tile * TILE_K
    block_column = first_key // BLOCK_K
    num_columns = tl.cdiv(num_keys, BLOCK_K)

    keys = tl.arange(0, TILE_K)
    rows = tl.arange(0, TILE_Q)
    dims = tl.arange(0, PADDED_DIM)
    k_base = head_pointer(k, batch, head, stride_kb, stride_kh)
    v_base = head_pointer(v, batch, head, stride_vb, stride_vh)
    key = load_tile(k_base, first_key, keys, dims, stride_kn, num_keys, PITCH, PADDED)
    value = load_tile(v_base, first_key, keys, dims, stride_vn, num_keys, PITCH, PADDED)

    if HAS_KEY_BIAS:
        logit_bias = load_key_bias(key_bias + batch.to(tl.int64) * stride_key_bias, first_key, keys, num_keys)
        key_weight = tl.exp(logit_bias)
        # natural log -> log2
        logit_bias = logit_bias * 1.4426950408889634

    value_accumulator = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    if HAS_LINEAR:
        state_index = batch_head * state_rows + tl.minimum(block_column, state_rows - 1)
        state_base = grad_states + state_index * HEAD_DIM * PITCH
        state_type = grad_states.dtype.element_ty
        origin = tl.zeros([], tl.int32)
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
        if HAS_KEY_BIAS:
            grad_phi *= key_weight[:, None]
        key_accumulator = feature_map_backward(key, phi, grad_phi, FEATURE_MAP)
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
    else:
        key_accumulator = tl.zeros([TILE_K, PADDED_DIM], tl.float32)

    scale_log2 = scale * 1.4426950408889634
    q_base = head_pointer(q, batch, head, stride_qb, stride_qh)
    grad_base = head_pointer(grad_out, batch, head, stride_gb, stride_gh)
    vector_base = batch_head * num_tokens
    column_list = lists + (batch_head * num_columns + block_column) * num_rows
    num_critical = tl.load(counts + batch_head * num_columns + block_column)
    for step in range(num_critical * PARTS):
        start = tl.load(column_list + step // PARTS) * BLOCK_Q + (step % PARTS) * TILE_Q
        row_mask = start + rows < num_tokens
        query = load_tile(q_base, start, rows, dims, stride_qn, num_tokens, PITCH, PADDED)
        row_lse = tl.load(lse + vector_base + start + rows, mask=row_mask, other=0.0) * 1.4426950408889634
        # [TILE_K, PADDED_DIM] x [PADDED_DIM, TILE_Q]; keys past the end make rows that are never stored
        scores = tl.dot(key, tl.trans(query), input_precision="ieee")
        if HAS_KEY_BIAS or CAUSAL:
            # a query without a key: every score is -inf
            row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
        if HAS_KEY_BIAS:
            probability = tl.exp2(scores * scale_log2 + logit_bias[:, None] - row_lse[None, :])
        else:
            probability = tl.exp2(scores * scale_log2 - row_lse[None, :])
        if CAUSAL:
            probability = tl.where((start + rows)[None, :] >= (first_key + keys)[:, None], probability, 0.0)
        grad = load_tile(grad_base, start, rows, dims, stride_gn, num_tokens, PITCH, PADDED)
        # [TILE_K, TILE_Q] x [TILE_Q, PADDED_DIM]
        value_accumulator = tl.dot(probability.to(grad.dtype), grad, value_accumulator, input_precision="ieee")
        grad_probability = tl.dot(value, tl.trans(grad), input_precision="ieee")
        scaled_delta = tl.load(delta + vector_base + start + rows, mask=row_mask, other=0.0) * scale
        grad_scores = probability * (grad_probability * scale - scaled_delta[None, :])
        key_accumulator = tl.dot(grad_scores.to(query.dtype), query, key_accumulator, input_precision="ieee")
    grad_k_base = token_major_pointer(grad_k, batch, head, num_keys, num_heads, HEAD_DIM)
    grad_v_base = token_major_pointer(grad_v, batch, head, num_keys, num_heads, HEAD_DIM)
    store_tile(
        grad_k_base,
        key_accumulator,
        first_key,
        keys,
        dims,
        num_heads * HEAD_DIM,
        num_keys,
        HEAD_DIM,
        PADDED,
    )
    store_tile(
        grad_v_base,
        value_accumulator,
        first_key,
        keys,
        dims,
        num_heads * HEAD_DIM,
        num_keys,
        HEAD_DIM,
        PADDED,
    )


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "num_heads", "tiles_per_split"])
def gate_gradient_kernel(
    grad_out,
    linear_out,
    grad_weight,
    grad_bias,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_lb,
    stride_lh,
    stride_ln,
    num_tokens,
    num_splits,
    num_heads,
    tiles_per_split,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
):
    """dO^T O^l and the sum of dO over one stretch of tokens of one head, in float32."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    split, batch, head = locate_program(num_splits, num_heads)
    slot = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    grad_base = head_pointer(grad_out, batch, head, stride_gb, stride_gh)
    linear_base = head_pointer(linear_out, batch, head, stride_lb, stride_lh)
    weight_sum = tl.zeros([PADDED_DIM, CHUNK], tl.float32)
    bias_sum = tl.zeros([PADDED_DIM], tl.float32)
    for step in range(tiles_per_split):
        start = (split * tiles_per_split + step) * TILE
        grad = load_tile(grad_base, start, rows, dims, stride_gn, num_tokens, PITCH, PADDED)
        bias_sum += tl.sum(grad.to(tl.float32), 0)
        if HAS_LINEAR:
            linear = load_tile(linear_base, start, rows, columns, stride_ln, num_tokens, PITCH, PADDED)
            # [PADDED_DIM, TILE] x [TILE, CHUNK]
            weight_sum = tl.dot(tl.trans(grad), linear, weight_sum, input_precision="ieee")
    if HAS_LINEAR:
        base = grad_weight + slot * HEAD_DIM * HEAD_DIM
        origin = tl.zeros([], tl.int32)
        store_tile(base, weight_sum, origin, dims, columns, HEAD_DIM, HEAD_DIM, HEAD_DIM, PADDED)
    if tl.program_id(1) == 0:
        tl.store(grad_bias + slot * HEAD_DIM + dims, bias_sum, mask=dims < HEAD_DIM)
