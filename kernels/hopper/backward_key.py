"""dK and dV for Hopper, written in Gluon: one producer warp, one or two consumer warpgroups of 64 keys each.

The arithmetic is that of ``triton/backward.py``, on S^T, so that P^T and dS^T are made in the registers in which the
next product reads them. Each warpgroup owns its outputs, so the bits are the same every time. Some keys are popular (18
times the mean in a Wan2.1 with random weights): programs take blocks of keys as they come, the longest lists first, and
where there are few, long lists in parts (``column_parts.py``).
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sla_compile.common.options import BackwardOptions

from ..steps import BlockLists, KernelInputs, KeyMoments, LinearStates, MomentGradients, Upstream
from ..triton.classify import longest_first
from ..triton.overlap import beside, end_beside, start_beside
from ..triton.primitives import LOG2E
from ..triton.tiles import ceil_div
from .column_parts import LEAST, cut_columns, worth_cutting
from .pairs import make_buffers, matrix_of, pair_producer, read_turn, split_pair
from .primitives import (
    all_threads,
    feature_map_backward,
    load_row,
    locate_tile,
    map_features,
    matrix_descriptor,
    multiprocessors,
    padded_dim,
    store_tile,
    tile_descriptor,
    vectors_descriptor,
    view_as,
)

__all__ = ["attention_backward_key", "column_order", "few_columns", "key_steps", "virtual_backward_key"]


@gluon.jit
def key_steps(
    key_accumulator, value_accumulator, key, value, ring, statistics_ring, ring_full, ring_empty, taken, steps, scale,
    grad_bias, first_tile, line_pitch, num_keys, key_bias, CONSUMER: gl.constexpr, BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr, AHEAD: gl.constexpr, tile_layout: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_KEY_BIAS: gl.constexpr, CAUSAL: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Add to dK and dV of 64 keys those of at least one tile of queries; and how many stages of the ring were taken.

    A bias of the keys, where there is one, comes with each tile of queries, for each consumer after the statistics; its
    gradients go to ``grad_bias`` (tiles, keys), which begins at these keys, from line ``first_tile`` on. A ``key_bias``
    is the same for all queries. Causal, the first of these queries is ``first_tile`` ahead of the first key; of each
    block of them come those of GROUP heads.
    """
    STAGES: gl.constexpr = ring.type.shape[0]
    VECTORS: gl.constexpr = 4 if HAS_BIAS else 2
    ROWS: gl.constexpr = key_accumulator.shape[0]
    PADDED_DIM: gl.constexpr = key_accumulator.shape[1]
    dtype: gl.constexpr = ring.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    out_layout: gl.constexpr = key_accumulator.type.layout
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    query_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)
    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores_layout))
    scale_log2 = scale * LOG2E
    zero_scores = gl.zeros([ROWS, TILE_Q], gl.float32, scores_layout)
    if HAS_KEY_BIAS:
        own_added = gl.load(key_bias + rows) * LOG2E
    if HAS_BIAS:
        inverse_scale = 1.0 / scale
    if AHEAD:
        first = taken % STAGES
        mbarrier.wait(ring_full.index(first), taken // STAGES & 1)
        first_query = split_pair(ring.index(first), TILE_Q, tile_layout)[0].reshape([TILE_Q, PADDED_DIM])
        scoring = warpgroup_mma(key, first_query.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
    for step in range(steps):
        index = taken % STAGES
        tiles = split_pair(ring.index(index), TILE_Q, tile_layout)
        query = tiles[0].reshape([TILE_Q, PADDED_DIM])
        grad = tiles[1].reshape([TILE_Q, PADDED_DIM])
        # [keys, dims] x [dims, queries]
        if AHEAD:
            scores = warpgroup_mma_wait(0, deps=(scoring,))
            grad_weights = warpgroup_mma(value, grad.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
        else:
            mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
            scores = warpgroup_mma(key, query.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
            grad_weights = warpgroup_mma(value, grad.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
        lse = view_as(statistics_ring.index(index * VECTORS), gl.float32, [TILE_Q], vector_layout)
        exponents = scores * scale_log2 - lse.load(query_layout)[None, :]
        if HAS_KEY_BIAS:
            exponents += own_added[:, None]
        if HAS_BIAS:
            added = view_as(statistics_ring.index(index * VECTORS + 2 + CONSUMER), gl.float32, [ROWS], vector_layout)
            exponents += (added.load(gl.SliceLayout(1, scores_layout)) * LOG2E)[:, None]
        if CAUSAL:
            if GROUP > 1:
                PARTS: gl.constexpr = BLOCK_Q // TILE_Q
                first_row = first_tile + step // (PARTS * GROUP) * BLOCK_Q + step % PARTS * TILE_Q
            else:
                first_row = first_tile + step * TILE_Q
            queries = first_row + gl.arange(0, TILE_Q, layout=query_layout)
            exponents = gl.where(queries[None, :] >= rows[:, None], exponents, float("-inf"))
        weights = gl.exp2(exponents)
        weights_operand = gl.convert_layout(weights.to(dtype), operand_layout)
        # [keys, queries] x [queries, dims]
        value_accumulator = warpgroup_mma(weights_operand, grad, value_accumulator, is_async=True)
        grad_weights = warpgroup_mma_wait(1, deps=(grad_weights,))
        delta = view_as(statistics_ring.index(index * VECTORS + 1), gl.float32, [TILE_Q], vector_layout)
        grad_scores = weights * (grad_weights * scale - delta.load(query_layout)[None, :])
        scores_operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
        key_accumulator = warpgroup_mma(scores_operand, query, key_accumulator, is_async=True)
        if HAS_BIAS:
            # while products run
            line = (first_tile + step) * line_pitch
            gl.store(grad_bias + line + rows, gl.sum(grad_scores, 1) * inverse_scale, mask=rows < num_keys)
        if AHEAD:
            # the last step makes its own scores again, which nobody reads
            following = taken + gl.where(step + 1 < steps, 1, 0)
            coming = following % STAGES
            mbarrier.wait(ring_full.index(coming), following // STAGES & 1)
            next_query = split_pair(ring.index(coming), TILE_Q, tile_layout)[0].reshape([TILE_Q, PADDED_DIM])
            scoring = warpgroup_mma(key, next_query.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
        value_accumulator, key_accumulator, _weights, _scores = warpgroup_mma_wait(
            AHEAD, deps=(value_accumulator, key_accumulator, weights_operand, scores_operand)
        )
        fence_async_shared()
        mbarrier.arrive(ring_empty.index(index), count=1)
        taken += 1
    if AHEAD:
        warpgroup_mma_wait(0, deps=(scoring,))
    return key_accumulator, value_accumulator, taken


@gluon.jit
def linear_part(
    key, value, ring, ring_full, ring_empty, taken, grad_normalizers, state_row, key_weight, HEAD_DIM: gl.constexpr,
    FEATURE_MAP: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys by the linear branch, from dh, the ring's next matrix, and dz."""
    STAGES: gl.constexpr = ring.type.shape[0]
    ROWS: gl.constexpr = key.type.shape[0]
    PADDED_DIM: gl.constexpr = key.type.shape[1]
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    matrix_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, PADDED_DIM, PADDED_DIM], gl.bfloat16)
    dims = gl.arange(0, PADDED_DIM, layout=gl.SliceLayout(0, out_layout))
    zero = gl.zeros([ROWS, PADDED_DIM], gl.float32, out_layout)
    index = taken % STAGES
    mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
    grad_state = matrix_of(ring.index(index), gl.bfloat16, matrix_layout).reshape([PADDED_DIM, PADDED_DIM])
    if ring.dtype == gl.bfloat16:
        grad_phi = warpgroup_mma(value, grad_state.permute((1, 0)), zero, use_acc=False, is_async=True)
    else:
        # states are bfloat16 beside float16 inputs
        value_operand = gl.convert_layout(value.load(out_layout).to(gl.bfloat16), operand_layout)
        grad_phi = warpgroup_mma(value_operand, grad_state.permute((1, 0)), zero, use_acc=False, is_async=True)
    grad_phi = warpgroup_mma_wait(0, deps=(grad_phi,))
    normalizer = load_row(grad_normalizers + state_row * HEAD_DIM, dims, HEAD_DIM, PADDED_DIM)
    grad_phi += normalizer[None, :]
    if HAS_MASK:
        grad_phi *= key_weight[:, None]
    own = key.load(out_layout).to(gl.float32)
    phi = map_features(own, HEAD_DIM, PADDED_DIM, FEATURE_MAP, out_layout)
    grad_key = feature_map_backward(own, phi, grad_phi, FEATURE_MAP)
    if HAS_MASK:
        phi *= key_weight[:, None]
    phi_operand = gl.convert_layout(phi.to(gl.bfloat16), operand_layout)
    grad_value = warpgroup_mma(phi_operand, grad_state, zero, use_acc=False, is_async=True)
    grad_value = warpgroup_mma_wait(0, deps=(grad_value,))
    fence_async_shared()
    mbarrier.arrive(ring_empty.index(index), count=1)
    return grad_key, grad_value, taken + 1


@gluon.jit
def off_mean(tile, mean, weight, HAS_MASK: gl.constexpr, layout: gl.constexpr):
    """A tile less its mean, times the weights of the rows, as a left operand."""
    off = tile.load(layout).to(gl.float32) - mean.load(gl.SliceLayout(0, layout))[None, :]
    if HAS_MASK:
        off *= weight[:, None]
    else:
        off *= weight
    return gl.convert_layout(off.to(gl.bfloat16), gl.DotOperandLayout(0, layout, 2))


@gluon.jit
def moments_part(
    key, value, places, ring, ring_full, ring_empty, taken, moments, slot, variances, key_weight, inverse,
    HEAD_DIM: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    """What the gradients of their block's moments make of dK and dV of 64 keys: by the ring's next matrix, dC, and by
    vectors at ``slot``, those of ``variances`` so much further, which lie in ``places`` meanwhile."""
    means, mean_values, grad_spans, grad_values = moments
    STAGES: gl.constexpr = ring.type.shape[0]
    ROWS: gl.constexpr = key.type.shape[0]
    PADDED_DIM: gl.constexpr = key.type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    matrix_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, PADDED_DIM, PADDED_DIM], gl.bfloat16)
    dim_layout: gl.constexpr = gl.SliceLayout(0, layout)
    lanes = gl.arange(0, PADDED_DIM, layout=gl.BlockedLayout([1], [32], [4], [0]))
    # a number a thread
    mean_value = load_row(mean_values + slot, lanes, HEAD_DIM, PADDED_DIM).to(gl.float32)
    mean = load_row(means + slot, lanes, HEAD_DIM, PADDED_DIM)
    of_mean = load_row(grad_spans + slot, lanes, HEAD_DIM, PADDED_DIM)
    of_variance = load_row(grad_spans + variances + slot, lanes, HEAD_DIM, PADDED_DIM) * 2.0
    of_value = load_row(grad_values + slot, lanes, HEAD_DIM, PADDED_DIM)
    # results that leave from there
    tma.store_wait(0)
    places.index(0).store(mean_value)
    places.index(1).store(mean)
    places.index(2).store(of_mean - mean * of_variance)
    places.index(3).store(of_variance)
    places.index(4).store(of_value)
    weight = inverse
    if HAS_MASK:
        weight = key_weight * inverse
    zero = gl.zeros([ROWS, PADDED_DIM], gl.float32, layout)
    index = taken % STAGES
    grad_slope = matrix_of(ring.index(index), gl.bfloat16, matrix_layout).reshape([PADDED_DIM, PADDED_DIM])
    off_value = off_mean(value, places.index(0), weight, HAS_MASK, layout)
    mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
    grad_key = warpgroup_mma(off_value, grad_slope.permute((1, 0)), zero, use_acc=False, is_async=True)
    off_key = off_mean(key, places.index(1), weight, HAS_MASK, layout)
    grad_value = warpgroup_mma(off_key, grad_slope, zero, use_acc=False, is_async=True)
    grad_key, grad_value, _value, _key = warpgroup_mma_wait(0, deps=(grad_key, grad_value, off_value, off_key))
    by_key = key.load(layout).to(gl.float32) * places.index(3).load(dim_layout)[None, :]
    by_key += places.index(2).load(dim_layout)[None, :]
    of_values = places.index(4).load(dim_layout)
    if HAS_MASK:
        grad_key += by_key * weight[:, None]
        grad_value += of_values[None, :] * weight[:, None]
    else:
        grad_key += by_key * weight
        grad_value += (of_values * weight)[None, :]
    fence_async_shared()
    mbarrier.arrive(ring_empty.index(index), count=1)
    return grad_key, grad_value, taken + 1


@gluon.jit
def add_parts(
    key_accumulator, value_accumulator, sums, part, parts, first_sum, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr
):
    """Add what the ``parts`` of a column gave, a pair after the other, up a tree; and whether all of it is here now.

    Of two whose sum is due the one that is done first leaves its own in memory, and the other goes on: a + b is b + a,
    to the bit. Who is second waits at most while the first, which waits for none, writes.
    """
    partial_sums, meetings = sums
    ROWS: gl.constexpr = key_accumulator.shape[0]
    PADDED_DIM: gl.constexpr = key_accumulator.shape[1]
    layout: gl.constexpr = key_accumulator.type.layout
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, PADDED_DIM, layout=gl.SliceLayout(0, layout))
    offsets = rows[:, None] * PADDED_DIM + dims[None, :]
    WRITTEN: gl.constexpr = 2
    node = part
    nodes = parts
    span = 1
    is_whole = True
    while nodes > 1:
        if (node ^ 1) < nodes:
            # of the nodes above one another each has another first part of its second half
            place = (first_sum + (node | 1) * span - 1) * CONSUMERS + CONSUMER
            meeting = meetings + place
            of_keys = partial_sums + place.to(gl.int64) * (2 * ROWS * PADDED_DIM)
            of_values = of_keys + ROWS * PADDED_DIM
            if gl.atomic_add(meeting, 1) == 0:
                gl.store(of_keys + offsets, key_accumulator)
                gl.store(of_values + offsets, value_accumulator)
                all_threads()
                gl.atomic_add(meeting, WRITTEN)
                is_whole = False
                nodes = 1
            else:
                while gl.atomic_add(meeting, 0) <= WRITTEN:
                    pass
                key_accumulator += gl.load(of_keys + offsets, cache_modifier=".cg")
                value_accumulator += gl.load(of_values + offsets, cache_modifier=".cg")
        node = node // 2
        nodes = (nodes + 1) // 2
        span = span * 2
    return key_accumulator, value_accumulator, is_whole


@gluon.jit
def key_consumer(
    buffers,
    barriers,
    grad_normalizers,
    moments,
    places,
    mask,
    sums,
    grad_k_desc,
    grad_v_desc,
    scale,
    extents,
    CONSUMER: gl.constexpr,
    TILE_K: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
    HAS_MOMENTS: gl.constexpr,
    HAS_OUTPUTS: gl.constexpr,
    HAS_MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_PARTS: gl.constexpr,
):
    """dK and dV of 64 keys: the linear branch's part from dh and dz, or the moments', then one step for each tile of
    queries."""
    own_k, own_v, ring, statistics_ring, turns, out_buffers = buffers
    own_full, own_empty, ring_full, ring_empty, _prior_full, _prior_empty, _joint = barriers
    num_columns, total_tiles, tiles_per_head, num_heads, _list_width, matrix_rows, num_keys, slots = extents
    ROWS: gl.constexpr = 64
    PARTS: gl.constexpr = BLOCK_Q // TILE_Q
    # products in flight over the end of a step: the next S, but a lone consumer has no registers left for it
    AHEAD: gl.constexpr = 1 if TILE_K == 128 else 0
    dtype: gl.constexpr = ring.dtype
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    tile_layout: gl.constexpr = own_k.layout
    key_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
    key = own_k.index(CONSUMER).reshape([ROWS, PADDED_DIM])
    value = own_v.index(CONSUMER).reshape([ROWS, PADDED_DIM])
    leaving = out_buffers.index(CONSUMER)
    if HAS_MOMENTS and HAS_OUTPUTS:
        # where results leave
        places = view_as(leaving, gl.float32, [32, PADDED_DIM], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    taken = 0
    turn = 0
    mbarrier.wait(own_full, 0)
    tile = read_turn(turns, 0)
    while tile >= 0:
        count = read_turn(turns, 1)
        part = 0
        if HAS_PARTS:
            part = read_turn(turns, 2)
            parts = read_turn(turns, 3)
            first_sum = read_turn(turns, 4)
        key_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        batch_head = (batch * num_heads + head).to(gl.int64)
        zero = gl.zeros([ROWS, PADDED_DIM], gl.float32, out_layout)
        if HAS_MASK:
            key_bias, kinds, bias_rows, sizes = mask
            bias_block = gl.minimum(batch, bias_rows - 1) * tiles_per_head + key_tile
            kind = gl.load(kinds + bias_block)
            own_bias = key_bias + bias_block.to(gl.int64) * TILE_K + CONSUMER * ROWS
            key_weight = gl.exp2(gl.load(own_bias + key_rows) * LOG2E)
        else:
            key_weight = key_rows
        key_accumulator = zero
        value_accumulator = zero
        if HAS_LINEAR and part == 0:
            key_accumulator, value_accumulator, taken = linear_part(
                key, value, ring, ring_full, ring_empty, taken, grad_normalizers,
                batch_head * matrix_rows + gl.minimum(key_tile, matrix_rows - 1), key_weight, HEAD_DIM, FEATURE_MAP,
                HAS_MASK,
            )  # fmt: skip
        if HAS_MOMENTS and part == 0:
            slot = batch_head * num_columns + key_tile
            if HAS_MASK:
                # of a block without weight, all of whose weights are 0, the size is -inf
                inverse = gl.where(kind < 0, 0.0, gl.exp2(-gl.load(sizes + slot) * LOG2E))
            else:
                inverse = 1.0 / gl.minimum(num_keys - key_tile * TILE_K, TILE_K).to(gl.float32)
            key_accumulator, value_accumulator, taken = moments_part(
                key, value, places, ring, ring_full, ring_empty, taken, moments, slot * HEAD_DIM,
                total_tiles * HEAD_DIM, key_weight, inverse, HEAD_DIM, HAS_MASK,
            )  # fmt: skip

        whole = count
        if CAUSAL:
            # blocks of queries on the diagonal come first
            edge_block = key_tile * TILE_K // BLOCK_Q
            last_key = gl.minimum((key_tile + 1) * TILE_K, num_keys) - 1
            edge = gl.minimum((last_key // BLOCK_Q - edge_block + 1) * GROUP, count)
            if HAS_PARTS:
                # no part is shorter, so they are in the first
                edge = gl.where(part == 0, edge, 0)
            ahead = edge_block * BLOCK_Q - key_tile * TILE_K - CONSUMER * ROWS
            whole = count - edge
            if edge > 0:
                key_accumulator, value_accumulator, taken = key_steps(
                    key_accumulator, value_accumulator, key, value, ring, statistics_ring, ring_full, ring_empty, taken,
                    edge * PARTS, scale, grad_normalizers, ahead, 0, 0, grad_normalizers, CONSUMER, BLOCK_Q, TILE_Q,
                    AHEAD, tile_layout, False, False, True, GROUP,
                )  # fmt: skip
        if HAS_MASK:
            whole = gl.where(kind > 0, 0, count)
            if whole < count:
                key_accumulator, value_accumulator, taken = key_steps(
                    key_accumulator, value_accumulator, key, value, ring, statistics_ring, ring_full, ring_empty, taken,
                    count * PARTS, scale, grad_normalizers, 0, 0, 0, own_bias, CONSUMER, TILE_Q, TILE_Q, AHEAD,
                    tile_layout, False, True, False, GROUP,
                )  # fmt: skip
        if whole > 0:
            key_accumulator, value_accumulator, taken = key_steps(
                key_accumulator, value_accumulator, key, value, ring, statistics_ring, ring_full, ring_empty, taken,
                whole * PARTS, scale, grad_normalizers, 0, 0, 0, grad_normalizers, CONSUMER, TILE_Q, TILE_Q, AHEAD,
                tile_layout, False, False, False, GROUP,
            )  # fmt: skip
        is_whole = True
        if HAS_PARTS and parts > 1:
            key_accumulator, value_accumulator, is_whole = add_parts(
                key_accumulator, value_accumulator, sums, part, parts, first_sum, CONSUMER, TILE_K // ROWS
            )
        at = [batch, head, key_tile * TILE_K + CONSUMER * ROWS, 0]
        if HAS_OUTPUTS:
            mbarrier.arrive(own_empty, count=1)
            if is_whole:
                tma.store_wait(0)
                leaving.reshape([ROWS, PADDED_DIM]).store(value_accumulator.to(dtype))
                fence_async_shared()
                store_tile(grad_v_desc, at, leaving)
                tma.store_wait(0)
                leaving.reshape([ROWS, PADDED_DIM]).store(key_accumulator.to(dtype))
                fence_async_shared()
                store_tile(grad_k_desc, at, leaving)
        else:
            if is_whole:
                # where keys and values were
                value.store(value_accumulator.to(dtype))
                key.store(key_accumulator.to(dtype))
                fence_async_shared()
                store_tile(grad_v_desc, at, own_v.index(CONSUMER))
                store_tile(grad_k_desc, at, own_k.index(CONSUMER))
                tma.store_wait(0)
            mbarrier.arrive(own_empty, count=1)
        turn += 1
        mbarrier.wait(own_full, turn & 1)
        tile = read_turn(turns, 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["bias_rows", "slots", "total_tiles", "list_width", "matrix_rows", "num_keys"])
def key_kernel(
    k_desc,
    v_desc,
    q_desc,
    grad_desc,
    matrix_desc,
    statistics_desc,
    grad_k_desc,
    grad_v_desc,
    lists,
    counts,
    order,
    grad_normalizers,
    means,
    mean_values,
    grad_spans,
    grad_values,
    key_bias,
    kinds,
    bias_rows,
    sizes,
    partial_sums,
    slots,
    scale,
    total_tiles,
    tiles_per_head,
    num_heads,
    list_width,
    matrix_rows,
    num_keys,
    TILE_K: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
    HAS_MOMENTS: gl.constexpr,
    HAS_MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_PARTS: gl.constexpr,
    BESIDE: gl.constexpr,
):
    start_beside(BESIDE)
    CONSUMERS: gl.constexpr = TILE_K // 64
    # two programs side by side have no room for them
    HAS_OUTPUTS: gl.constexpr = CONSUMERS == 2
    TURNS: gl.constexpr = 5 if HAS_PARTS else 2
    buffers, barriers = make_buffers(
        k_desc, q_desc, statistics_desc, STAGES, CONSUMERS, 2, HAS_OUTPUTS, False, False, TURNS
    )
    extents = (tiles_per_head, total_tiles, tiles_per_head, num_heads, list_width, matrix_rows, num_keys, slots)
    of_columns = order + 2 + total_tiles + slots
    sums = (partial_sums, of_columns + 2 * total_tiles) if HAS_PARTS else ()
    listed_descs = (q_desc, grad_desc)
    descriptors = ((k_desc, v_desc), listed_descs, listed_descs, q_desc, matrix_desc, statistics_desc, k_desc)
    # where vectors of moments lie: without outputs, in a place of their own
    places = buffers[5]
    if HAS_MOMENTS and not HAS_OUTPUTS:
        places = gl.allocate_shared_memory(gl.float32, [5, PADDED_DIM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    moments = (means, mean_values, grad_spans, grad_values)
    mask = (key_bias, kinds, bias_rows, sizes) if HAS_MASK else ()
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (key_consumer, (
                    buffers, barriers, grad_normalizers, moments, places, mask, sums, grad_k_desc, grad_v_desc, scale,
                    extents, 0, TILE_K, BLOCK_Q, TILE_Q, HEAD_DIM, PADDED_DIM, FEATURE_MAP, HAS_LINEAR, HAS_MOMENTS,
                    HAS_OUTPUTS, HAS_MASK, CAUSAL, GROUP, HAS_PARTS,
                )),
                (pair_producer, (
                    descriptors, buffers, barriers, lists, counts, order, (), extents, TILE_K, TILE_K, BLOCK_Q, TILE_Q,
                    HAS_LINEAR or HAS_MOMENTS, True, True, False, False, False, False, False, GROUP, HAS_PARTS,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (key_consumer, (
                    buffers, barriers, grad_normalizers, moments, places, mask, sums, grad_k_desc, grad_v_desc, scale,
                    extents, 0, TILE_K, BLOCK_Q, TILE_Q, HEAD_DIM, PADDED_DIM, FEATURE_MAP, HAS_LINEAR, HAS_MOMENTS,
                    HAS_OUTPUTS, HAS_MASK, CAUSAL, GROUP, HAS_PARTS,
                )),
                (key_consumer, (
                    buffers, barriers, grad_normalizers, moments, places, mask, sums, grad_k_desc, grad_v_desc, scale,
                    extents, 1, TILE_K, BLOCK_Q, TILE_Q, HEAD_DIM, PADDED_DIM, FEATURE_MAP, HAS_LINEAR, HAS_MOMENTS,
                    HAS_OUTPUTS, HAS_MASK, CAUSAL, GROUP, HAS_PARTS,
                )),
                (pair_producer, (
                    descriptors, buffers, barriers, lists, counts, order, (), extents, TILE_K, TILE_K, BLOCK_Q, TILE_Q,
                    HAS_LINEAR or HAS_MOMENTS, True, True, False, False, False, False, False, GROUP, HAS_PARTS,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    end_beside(BESIDE)


def programs_for(k: torch.Tensor, block_k: int) -> int:
    """How many programs of `key_kernel` run side by side."""
    return multiprocessors(k.device.index) * (2 if block_k == 64 else 1)


def few_columns(inputs: KernelInputs, options: BackwardOptions) -> bool:
    """Whether columns are so few that long ones are cut, and that what kernels wait for each other counts."""
    batch, heads, keys, _ = inputs.k.shape
    columns = ceil_div(keys, options.block_k) * batch * heads
    return worth_cutting(columns, programs_for(inputs.k, options.block_k))


def column_order(inputs: KernelInputs, lists: BlockLists, options: BackwardOptions) -> torch.Tensor:
    """As `Steps.column_order`."""
    block_k = options.block_k
    if not few_columns(inputs, options):
        return longest_first(lists, lists.blocks.shape[3])
    least = LEAST // options.block_q
    if options.causal:
        # blocks on the diagonal are in the first part: no part is shorter than half of these
        least = max(least, 2 * (block_k // options.block_q + 1) * inputs.group)
    return cut_columns(lists, programs_for(inputs.k, block_k), block_k // 64, least)


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
    """As `Steps.attention_backward_key`. Tiles are blocks of keys."""
    return _backward_key(upstream, inputs, lists, order, statistics, linear, None, options, runs_beside)


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
    """As `Steps.virtual_backward_key`."""
    return _backward_key(upstream, inputs, lists, order, statistics, None, (moments, gradients), options)


def _backward_key(
    upstream: Upstream,
    inputs: KernelInputs,
    lists: BlockLists,
    order: torch.Tensor,
    statistics: torch.Tensor,
    linear: LinearStates | None,
    moments: tuple[KeyMoments, MomentGradients] | None,
    options: BackwardOptions,
    runs_beside: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, weights = *inputs[:3], inputs.key_weights
    block_k = options.block_k
    batch, heads, keys, head_dim = k.shape
    padded = padded_dim(head_dim)
    tile_q = 64
    tiles_per_head = ceil_div(keys, block_k)
    total = tiles_per_head * batch * heads
    programs, slots, sums = programs_for(k, block_k), 0, None
    if worth_cutting(total, programs):
        slots = programs
        sums = statistics.new_empty(slots * 2 * block_k * padded)
    else:
        programs = min(total, programs)
    grad_k, grad_v = (k.new_empty(batch, keys, heads, head_dim).transpose(1, 2) for _ in range(2))
    # an absent tensor's place is taken by one that is there; the kernel does not touch it
    matrices, vectors = q, (statistics, statistics, statistics, statistics)
    if linear is not None:
        matrices = linear.states
    if moments is not None:
        matrices = moments[1].slopes
        vectors = (moments[0].spans, moments[0].values, moments[1].spans, moments[1].values)
    key_kernel[(programs,)](
        tile_descriptor(k, 64),
        tile_descriptor(v, 64),
        tile_descriptor(q, tile_q),
        tile_descriptor(upstream.grad_out, tile_q),
        matrix_descriptor(matrices, head_dim),
        vectors_descriptor(statistics, tile_q),
        tile_descriptor(grad_k, 64),
        tile_descriptor(grad_v, 64),
        lists.blocks,
        lists.counts,
        order,
        linear.normalizers if linear is not None else statistics,
        *vectors,
        # what is None is no parameter of the compiled kernel
        weights.bias if weights is not None else None,
        weights.blocks if weights is not None else None,
        weights.bias.shape[0] if weights is not None else None,
        moments[0].sizes if weights is not None and moments is not None else None,
        sums,
        slots,
        options.scale,
        total,
        tiles_per_head,
        heads,
        lists.blocks.shape[3],
        matrices.shape[2] if matrices is not q else 1,
        keys,
        TILE_K=block_k,
        BLOCK_Q=options.block_q,
        TILE_Q=tile_q,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        STAGES=(4 if block_k == 128 else 2) * (128 // padded),
        FEATURE_MAP=options.feature_map,
        HAS_LINEAR=linear is not None,
        HAS_MOMENTS=moments is not None,
        HAS_MASK=weights is not None,
        CAUSAL=options.causal,
        GROUP=inputs.group,
        HAS_PARTS=sums is not None,
        num_warps=4,
        maxnreg=168 if block_k == 128 else 128,
        **beside(runs_beside),
    )
    return grad_k, grad_v
