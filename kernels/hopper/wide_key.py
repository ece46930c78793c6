"""dK and dV for Hopper at head dimensions above 128, in Gluon: one producer warp and two consumer warpgroups.

The arithmetic is that of ``triton/backward.py``, on S^T. dK and dV of 64 keys would be more registers than a thread
has, so each warpgroup has one of them and two of the four products: one makes S and dV, and hands P over in shared
memory; the other makes dO V^T and dK. Programs take tiles of keys as they come, the longest lists first.
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

from ..steps import BlockLists, KernelInputs, LinearStates, Upstream
from ..triton.primitives import LOG2E
from ..triton.tiles import ceil_div
from .pairs import make_barrier_ring, produce_pair, read_turn, split_pair
from .primitives import (
    all_threads,
    feature_map_backward,
    load_row,
    load_tile,
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

__all__ = ["attention_backward_key"]


@gluon.jit
def half_of_matrix(unit, dtype: gl.constexpr):
    """Half of the columns of a matrix, [1, dims, dims / 2], in the place of a stage of the ring."""
    dims: gl.constexpr = unit.type.shape[2]
    shape: gl.constexpr = [1, dims, dims // 2]
    return view_as(unit, dtype, shape, gl.NVMMASharedLayout.get_default_for(shape, dtype))


@gluon.jit
def key_producer(
    descriptors, buffers, barriers, lists, counts, order, extents, BLOCK_K: gl.constexpr, BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr, HAS_LINEAR: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Keys and values, then through the ring two halves of dh and pairs of tiles of queries and dO."""
    k_desc, v_desc, q_desc, grad_desc, state_desc, statistics_desc = descriptors
    own_k, own_v, ring, statistics_ring, _weights_ring, turns = buffers
    own_full, own_empty, ring_full, ring_empty, _weights_full, _weights_empty, _key_free = barriers
    total_tiles, num_columns, num_heads, list_width, state_rows = extents
    STAGES: gl.constexpr = ring.type.shape[0]
    SPLIT: gl.constexpr = BLOCK_K // 64
    PARTS: gl.constexpr = BLOCK_Q // TILE_Q
    HALF: gl.constexpr = ring.type.shape[3] // 2
    turn_layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    taken_so_far = order + total_tiles // SPLIT
    filled = 0
    turn = 0
    position = gl.atomic_add(taken_so_far, 1)
    while position < total_tiles:
        column = gl.load(order + position // SPLIT)
        part_of_block = position % SPLIT
        block, batch, head = locate_tile(column, num_columns, num_heads)
        batch_head = batch * num_heads + head
        listed = lists + column.to(gl.int64) * list_width
        count = gl.load(counts + column)
        entry = gl.load(listed, mask=count > 0, other=0)
        mbarrier.wait(own_empty, (turn & 1) ^ 1)
        turns.index(0).store(gl.full([1], column * SPLIT + part_of_block, gl.int32, turn_layout))
        turns.index(1).store(gl.full([1], count, gl.int32, turn_layout))
        all_threads()
        mbarrier.expect(own_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        at = [batch, head, block * BLOCK_K + part_of_block * 64, 0]
        load_tile(k_desc, at, own_full, own_k)
        load_tile(v_desc, at, own_full, own_v)
        turn += 1
        if HAS_LINEAR:
            state_row = batch_head * state_rows + gl.minimum(block, state_rows - 1)
            state_dtype: gl.constexpr = state_desc.dtype
            for half in gl.static_range(2):
                index = filled % STAGES
                mbarrier.wait(ring_empty.index(index), (filled // STAGES & 1) ^ 1)
                mbarrier.expect(ring_full.index(index), state_desc.block_type.nbytes)
                place = half_of_matrix(ring.index(index), state_dtype)
                load_tile(state_desc, [state_row, 0, half * HALF], ring_full.index(index), place)
                filled += 1
        for step in range(count):
            query_head = head * GROUP + entry % GROUP
            vector = (batch_head * GROUP + entry % GROUP) * 2
            first = entry // GROUP * BLOCK_Q
            # read one ahead
            entry = gl.load(listed + gl.minimum(step + 1, count - 1))
            for part in gl.static_range(PARTS):
                produce_pair(
                    q_desc, grad_desc, statistics_desc, batch, query_head, vector, first + part * TILE_Q, ring,
                    statistics_ring, ring_full, ring_empty, filled, 2,
                )  # fmt: skip
                filled += 1
        position = gl.atomic_add(taken_so_far, 1)
    mbarrier.wait(own_empty, (turn & 1) ^ 1)
    turns.index(0).store(gl.full([1], -1, gl.int32, turn_layout))
    all_threads()
    mbarrier.arrive(own_full, count=1)


@gluon.jit
def value_consumer(
    buffers, barriers, grad_v_desc, scale, extents, BLOCK_K: gl.constexpr, BLOCK_Q: gl.constexpr, TILE_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr, FEATURE_MAP: gl.constexpr, HAS_LINEAR: gl.constexpr,
):  # fmt: skip
    """dV of 64 keys, in two halves of its columns, and P of each tile of queries for the other consumer."""
    own_k, _own_v, ring, statistics_ring, weights_ring, turns = buffers
    own_full, own_empty, ring_full, ring_empty, weights_full, weights_empty, key_free = barriers
    total_tiles, num_columns, num_heads, list_width, state_rows = extents
    ROWS: gl.constexpr = 64
    PADDED_DIM: gl.constexpr = own_k.type.shape[3]
    HALF: gl.constexpr = PADDED_DIM // 2
    STAGES: gl.constexpr = ring.type.shape[0]
    SPLIT: gl.constexpr = BLOCK_K // ROWS
    PARTS: gl.constexpr = BLOCK_Q // TILE_Q
    dtype: gl.constexpr = ring.dtype
    tile_layout: gl.constexpr = own_k.layout
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    half_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, half_layout, 2)
    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    key = own_k.reshape([ROWS, PADDED_DIM])
    zero_scores = gl.zeros([ROWS, TILE_Q], gl.float32, scores_layout)
    zero = gl.zeros([ROWS, HALF], gl.float32, half_layout)
    scale_log2 = scale * LOG2E
    taken = 0
    handed = 0
    turn = 0
    mbarrier.wait(own_full, 0)
    tile = read_turn(turns, 0)
    while tile >= 0:
        steps = read_turn(turns, 1) * PARTS
        block, batch, head = locate_tile(tile // SPLIT, num_columns, num_heads)
        left = zero
        right = zero
        if HAS_LINEAR:
            own = key.load(out_layout).to(gl.float32)
            phi = map_features(own, HEAD_DIM, PADDED_DIM, FEATURE_MAP, out_layout)
            phi = gl.convert_layout(phi.to(gl.bfloat16), operand_layout)
            index = taken % STAGES
            mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
            grad_state = half_of_matrix(ring.index(index), gl.bfloat16).reshape([PADDED_DIM, HALF])
            left = warpgroup_mma(phi, grad_state, zero, use_acc=False, is_async=True)
            left = warpgroup_mma_wait(0, deps=(left,))
            mbarrier.arrive(ring_empty.index(index), count=1)
            taken += 1
            index = taken % STAGES
            mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
            grad_state = half_of_matrix(ring.index(index), gl.bfloat16).reshape([PADDED_DIM, HALF])
            right = warpgroup_mma(phi, grad_state, zero, use_acc=False, is_async=True)
            right = warpgroup_mma_wait(0, deps=(right,))
            mbarrier.arrive(ring_empty.index(index), count=1)
            taken += 1
        if steps > 0:
            index = taken % STAGES
            mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
            query = split_pair(ring.index(index), TILE_Q, tile_layout)[0].reshape([TILE_Q, PADDED_DIM])
            scoring = warpgroup_mma(key, query.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
            for step in range(steps):
                index = taken % STAGES
                grad = split_pair(ring.index(index), TILE_Q, tile_layout)[1].reshape([TILE_Q, PADDED_DIM])
                scores = warpgroup_mma_wait(0, deps=(scoring,))
                lse = view_as(statistics_ring.index(index * 2), gl.float32, [TILE_Q], vector_layout)
                weights = gl.exp2(scores * scale_log2 - lse.load(gl.SliceLayout(0, scores_layout))[None, :]).to(dtype)
                # [keys, queries] x [queries, dims]
                operand = gl.convert_layout(weights, operand_layout)
                left = warpgroup_mma(operand, grad.slice(0, HALF, dim=1), left, is_async=True)
                right = warpgroup_mma(operand, grad.slice(HALF, HALF, dim=1), right, is_async=True)
                mbarrier.wait(weights_empty.index(handed & 1), (handed // 2 & 1) ^ 1)
                weights_ring.index(handed & 1).store(weights)
                all_threads()
                mbarrier.arrive(weights_full.index(handed & 1), count=1)
                handed += 1
                # the last step makes its own scores again, which nobody reads
                following = taken + gl.where(step + 1 < steps, 1, 0)
                coming = following % STAGES
                mbarrier.wait(ring_full.index(coming), following // STAGES & 1)
                query = split_pair(ring.index(coming), TILE_Q, tile_layout)[0].reshape([TILE_Q, PADDED_DIM])
                scoring = warpgroup_mma(key, query.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
                left, right, _operand = warpgroup_mma_wait(1, deps=(left, right, operand))
                fence_async_shared()
                mbarrier.arrive(ring_empty.index(index), count=1)
                taken += 1
            warpgroup_mma_wait(0, deps=(scoring,))
        if HAS_LINEAR:
            mbarrier.wait(key_free, turn & 1)
        # it leaves from where the keys were
        key.slice(0, HALF, dim=1).store(left.to(dtype))
        key.slice(HALF, HALF, dim=1).store(right.to(dtype))
        fence_async_shared()
        store_tile(grad_v_desc, [batch, head, block * BLOCK_K + tile % SPLIT * ROWS, 0], own_k)
        tma.store_wait(0)
        mbarrier.arrive(own_empty, count=1)
        turn += 1
        mbarrier.wait(own_full, turn & 1)
        tile = read_turn(turns, 0)
    tma.store_wait(0)


@gluon.jit
def key_consumer(
    buffers, barriers, grad_normalizers, grad_k_desc, scale, extents, BLOCK_K: gl.constexpr, BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr, HEAD_DIM: gl.constexpr, FEATURE_MAP: gl.constexpr, HAS_LINEAR: gl.constexpr,
):  # fmt: skip
    """dK of 64 keys, from the P that the other consumer makes."""
    own_k, own_v, ring, statistics_ring, weights_ring, turns = buffers
    own_full, own_empty, ring_full, ring_empty, weights_full, weights_empty, key_free = barriers
    total_tiles, num_columns, num_heads, list_width, state_rows = extents
    ROWS: gl.constexpr = 64
    PADDED_DIM: gl.constexpr = own_k.type.shape[3]
    HALF: gl.constexpr = PADDED_DIM // 2
    STAGES: gl.constexpr = ring.type.shape[0]
    SPLIT: gl.constexpr = BLOCK_K // ROWS
    PARTS: gl.constexpr = BLOCK_Q // TILE_Q
    dtype: gl.constexpr = ring.dtype
    tile_layout: gl.constexpr = own_k.layout
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_Q, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    half_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dims = gl.arange(0, PADDED_DIM, layout=gl.SliceLayout(0, out_layout))
    value = own_v.reshape([ROWS, PADDED_DIM])
    zero_scores = gl.zeros([ROWS, TILE_Q], gl.float32, scores_layout)
    zero = gl.zeros([ROWS, PADDED_DIM], gl.float32, out_layout)
    taken = 0
    handed = 0
    turn = 0
    mbarrier.wait(own_full, 0)
    tile = read_turn(turns, 0)
    while tile >= 0:
        steps = read_turn(turns, 1) * PARTS
        block, batch, head = locate_tile(tile // SPLIT, num_columns, num_heads)
        accumulator = zero
        if HAS_LINEAR:
            for half in gl.static_range(2):
                index = taken % STAGES
                part = value.slice(half * HALF, HALF, dim=1)
                mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
                grad_state = half_of_matrix(ring.index(index), gl.bfloat16).reshape([PADDED_DIM, HALF])
                if dtype == gl.bfloat16:
                    accumulator = warpgroup_mma(part, grad_state.permute((1, 0)), accumulator, is_async=True)
                else:
                    # states are bfloat16 beside float16 inputs
                    value_operand = gl.convert_layout(part.load(half_layout).to(gl.bfloat16), operand_layout)
                    accumulator = warpgroup_mma(value_operand, grad_state.permute((1, 0)), accumulator, is_async=True)
                accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
                mbarrier.arrive(ring_empty.index(index), count=1)
                taken += 1
            batch_head = (batch * num_heads + head).to(gl.int64)
            state_row = batch_head * state_rows + gl.minimum(block, state_rows - 1)
            accumulator += load_row(grad_normalizers + state_row * HEAD_DIM, dims, HEAD_DIM, PADDED_DIM)[None, :]
            own = own_k.reshape([ROWS, PADDED_DIM]).load(out_layout).to(gl.float32)
            phi = map_features(own, HEAD_DIM, PADDED_DIM, FEATURE_MAP, out_layout)
            accumulator = feature_map_backward(own, phi, accumulator, FEATURE_MAP)
            fence_async_shared()
            mbarrier.arrive(key_free, count=1)
        if steps > 0:
            index = taken % STAGES
            mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
            grad = split_pair(ring.index(index), TILE_Q, tile_layout)[1].reshape([TILE_Q, PADDED_DIM])
            making = warpgroup_mma(value, grad.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
            for step in range(steps):
                index = taken % STAGES
                query = split_pair(ring.index(index), TILE_Q, tile_layout)[0].reshape([TILE_Q, PADDED_DIM])
                grad_weights = warpgroup_mma_wait(0, deps=(making,))
                delta = view_as(statistics_ring.index(index * 2 + 1), gl.float32, [TILE_Q], vector_layout)
                grad_weights = grad_weights * scale - delta.load(gl.SliceLayout(0, scores_layout))[None, :]
                mbarrier.wait(weights_full.index(handed & 1), handed // 2 & 1)
                grad_scores = weights_ring.index(handed & 1).load(scores_layout).to(gl.float32) * grad_weights
                mbarrier.arrive(weights_empty.index(handed & 1), count=1)
                handed += 1
                # [keys, queries] x [queries, dims]
                operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
                accumulator = warpgroup_mma(operand, query, accumulator, is_async=True)
                # the last step makes its own again, which nobody reads
                following = taken + gl.where(step + 1 < steps, 1, 0)
                coming = following % STAGES
                mbarrier.wait(ring_full.index(coming), following // STAGES & 1)
                grad = split_pair(ring.index(coming), TILE_Q, tile_layout)[1].reshape([TILE_Q, PADDED_DIM])
                making = warpgroup_mma(value, grad.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
                accumulator, _operand = warpgroup_mma_wait(1, deps=(accumulator, operand))
                fence_async_shared()
                mbarrier.arrive(ring_empty.index(index), count=1)
                taken += 1
            warpgroup_mma_wait(0, deps=(making,))
        # it leaves from where the values were
        value.store(accumulator.to(dtype))
        fence_async_shared()
        store_tile(grad_k_desc, [batch, head, block * BLOCK_K + tile % SPLIT * ROWS, 0], own_v)
        tma.store_wait(0)
        mbarrier.arrive(own_empty, count=1)
        turn += 1
        mbarrier.wait(own_full, turn & 1)
        tile = read_turn(turns, 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["total_tiles", "list_width", "state_rows"])
def wide_key_kernel(
    k_desc,
    v_desc,
    q_desc,
    grad_desc,
    state_desc,
    statistics_desc,
    grad_k_desc,
    grad_v_desc,
    lists,
    counts,
    order,
    grad_normalizers,
    scale,
    total_tiles,
    num_columns,
    num_heads,
    list_width,
    state_rows,
    BLOCK_K: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
    GROUP: gl.constexpr,
):
    dims: gl.constexpr = k_desc.block_type.shape[3]
    own_k = gl.allocate_shared_memory(k_desc.dtype, k_desc.block_type.shape, k_desc.layout)
    own_v = gl.allocate_shared_memory(k_desc.dtype, k_desc.block_type.shape, k_desc.layout)
    ring_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 2 * TILE_Q, dims], q_desc.dtype)
    ring = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 2 * TILE_Q, dims], ring_layout)
    statistics_ring = gl.allocate_shared_memory(
        gl.float32, [STAGES * 2] + statistics_desc.block_type.shape, statistics_desc.layout
    )
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, TILE_Q], q_desc.dtype)
    weights_ring = gl.allocate_shared_memory(q_desc.dtype, [2, 64, TILE_Q], weights_layout)
    turns = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    own_full = make_barrier_ring(1, 1)
    own_empty = make_barrier_ring(1, 2)
    ring_full = make_barrier_ring(STAGES, 1)
    ring_empty = make_barrier_ring(STAGES, 2)
    weights_full = make_barrier_ring(2, 1)
    weights_empty = make_barrier_ring(2, 1)
    # `make_buffers` says why an unused barrier is not made
    key_free = own_full
    if HAS_LINEAR:
        key_free = make_barrier_ring(1, 1)
    fence_async_shared()
    all_threads()
    buffers = (own_k, own_v, ring, statistics_ring, weights_ring, turns)
    barriers = (
        own_full.index(0), own_empty.index(0), ring_full, ring_empty, weights_full, weights_empty, key_free.index(0)
    )  # fmt: skip
    extents = (total_tiles, num_columns, num_heads, list_width, state_rows)
    descriptors = (k_desc, v_desc, q_desc, grad_desc, state_desc, statistics_desc)
    gl.warp_specialize(
        [
            (value_consumer, (
                buffers, barriers, grad_v_desc, scale, extents, BLOCK_K, BLOCK_Q, TILE_Q, HEAD_DIM, FEATURE_MAP,
                HAS_LINEAR,
            )),
            (key_consumer, (
                buffers, barriers, grad_normalizers, grad_k_desc, scale, extents, BLOCK_K, BLOCK_Q, TILE_Q, HEAD_DIM,
                FEATURE_MAP, HAS_LINEAR,
            )),
            (key_producer, (
                descriptors, buffers, barriers, lists, counts, order, extents, BLOCK_K, BLOCK_Q, TILE_Q, HAS_LINEAR,
                GROUP,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


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
    """As `Steps.attention_backward_key`, without a mask; never beside the kernel before it."""
    q, k, v = inputs[:3]
    block_k, tile_q = options.block_k, 64
    batch, heads, keys, head_dim = k.shape
    columns = ceil_div(keys, block_k)
    total = columns * batch * heads * (block_k // 64)
    grad_k, grad_v = (k.new_empty(batch, keys, heads, head_dim).transpose(1, 2) for _ in range(2))
    # an absent tensor's place is taken by one that is there; the kernel does not touch it
    states = linear.states if linear is not None else q
    wide_key_kernel[(min(total, multiprocessors(k.device.index)),)](
        tile_descriptor(k, 64),
        tile_descriptor(v, 64),
        tile_descriptor(q, tile_q),
        tile_descriptor(upstream.grad_out, tile_q),
        matrix_descriptor(states, head_dim, columns=padded_dim(head_dim) // 2),
        vectors_descriptor(statistics, tile_q),
        tile_descriptor(grad_k, 64),
        tile_descriptor(grad_v, 64),
        lists.blocks,
        lists.counts,
        order,
        linear.normalizers if linear is not None else statistics,
        options.scale,
        total,
        columns,
        heads,
        lists.blocks.shape[3],
        linear.states.shape[2] if linear is not None else 1,
        BLOCK_K=block_k,
        BLOCK_Q=options.block_q,
        TILE_Q=tile_q,
        HEAD_DIM=head_dim,
        STAGES=2,
        FEATURE_MAP=options.feature_map,
        HAS_LINEAR=linear is not None,
        GROUP=inputs.group,
        num_warps=4,
        maxnreg=168,
    )
    return grad_k, grad_v
