"""dQ for Hopper at head dimensions above 128, in Gluon: one producer warp, one or two consumer warpgroups of 64 queries
each.

The arithmetic is that of ``triton/backward.py``; dS is made in the registers in which the next product reads it.
Queries and dO stay in shared memory, for dQ alone takes half of the registers, and leave room for few tiles of keys: a
value's place is free once dO V^T is made, a key's only after dQ.
"""

from __future__ import annotations

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

from ..steps import BlockLists, KernelInputs, QueryGradients, Upstream
from ..triton.primitives import LOG2E
from ..triton.tiles import ceil_div
from .pairs import make_barrier_ring
from .primitives import all_threads, load_tile, locate_tile, multiprocessors, store_tile, tile_descriptor

__all__ = ["attention_backward_query"]


@gluon.jit
def produce(desc, at, ring, full, empty, filled):
    """The next tile of a ring."""
    STAGES: gl.constexpr = ring.type.shape[0]
    index = filled % STAGES
    mbarrier.wait(empty.index(index), (filled // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(index), desc.block_type.nbytes)
    load_tile(desc, at, full.index(index), ring.index(index))


@gluon.jit
def query_producer(
    descriptors, buffers, barriers, lists, counts, extents, BLOCK_Q: gl.constexpr, TILE_Q: gl.constexpr,
    BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, STARTED: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Queries and dO, then in the rings the linear branch's part of dQ and tiles of keys and values."""
    q_desc, grad_desc, k_desc, v_desc, out_desc = descriptors
    own_q, own_grad, k_ring, v_ring = buffers
    own_full, own_empty, k_full, k_empty, v_full, v_empty = barriers
    num_rows, total_tiles, tiles_per_head, num_heads, list_width = extents
    CONSUMERS: gl.constexpr = TILE_Q // 64
    PARTS: gl.constexpr = BLOCK_K // TILE_K
    keys_filled = 0
    values_filled = 0
    turn = 0
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        query_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        line = (batch * num_heads + head) * num_rows + query_tile * TILE_Q // BLOCK_Q
        listed = lists + line.to(gl.int64) * list_width
        count = gl.load(counts + line)
        block = gl.load(listed, mask=count > 0, other=0)
        mbarrier.wait(own_empty, (turn & 1) ^ 1)
        mbarrier.expect(own_full, CONSUMERS * (q_desc.block_type.nbytes + grad_desc.block_type.nbytes))
        for consumer in gl.static_range(CONSUMERS):
            at = [batch, head, query_tile * TILE_Q + consumer * 64, 0]
            load_tile(q_desc, at, own_full, own_q.index(consumer))
            load_tile(grad_desc, at, own_full, own_grad.index(consumer))
        turn += 1
        if STARTED:
            for consumer in gl.static_range(CONSUMERS):
                at = [batch, head, query_tile * TILE_Q + consumer * 64, 0]
                produce(out_desc, at, k_ring, k_full, k_empty, keys_filled)
                keys_filled += 1
        for step in range(count):
            first = block * BLOCK_K
            # read one ahead
            block = gl.load(listed + gl.minimum(step + 1, count - 1))
            for part in gl.static_range(PARTS):
                at = [batch, head // GROUP, first + part * TILE_K, 0]
                produce(k_desc, at, k_ring, k_full, k_empty, keys_filled)
                keys_filled += 1
                produce(v_desc, at, v_ring, v_full, v_empty, values_filled)
                values_filled += 1


@gluon.jit
def query_consumer(
    buffers, barriers, counts, statistics, out_desc, scale, row_pitch, extents, CONSUMER: gl.constexpr,
    BLOCK_Q: gl.constexpr, TILE_Q: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, STARTED: gl.constexpr,
):  # fmt: skip
    """dQ of 64 queries."""
    own_q, own_grad, k_ring, v_ring = buffers
    own_full, own_empty, k_full, k_empty, v_full, v_empty = barriers
    num_rows, total_tiles, tiles_per_head, num_heads, list_width = extents
    ROWS: gl.constexpr = 64
    CONSUMERS: gl.constexpr = TILE_Q // ROWS
    PARTS: gl.constexpr = BLOCK_K // TILE_K
    PADDED_DIM: gl.constexpr = own_q.type.shape[4]
    KEYS: gl.constexpr = k_ring.type.shape[0]
    VALUES: gl.constexpr = v_ring.type.shape[0]
    dtype: gl.constexpr = k_ring.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores_layout))
    query = own_q.index(CONSUMER).reshape([ROWS, PADDED_DIM])
    grad = own_grad.index(CONSUMER).reshape([ROWS, PADDED_DIM])
    zero_scores = gl.zeros([ROWS, TILE_K], gl.float32, scores_layout)
    scale_log2 = scale * LOG2E
    keys_taken = 0
    values_taken = 0
    turn = 0
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        query_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        batch_head = (batch * num_heads + head).to(gl.int64)
        steps = gl.load(counts + batch_head * num_rows + query_tile * TILE_Q // BLOCK_Q) * PARTS
        first = query_tile * TILE_Q + CONSUMER * ROWS
        row_statistics = statistics + batch_head * row_pitch * 2 + first
        row_lse = gl.load(row_statistics + rows)
        delta = gl.load(row_statistics + row_pitch + rows)
        mbarrier.wait(own_full, turn & 1)
        turn += 1
        accumulator = gl.zeros([ROWS, PADDED_DIM], gl.float32, out_layout)
        if STARTED:
            for consumer in gl.static_range(CONSUMERS):
                index = keys_taken % KEYS
                # the other consumer's too: who lets a turn of a barrier pass takes the one before it for the next
                mbarrier.wait(k_full.index(index), keys_taken // KEYS & 1)
                if consumer == CONSUMER:
                    accumulator = k_ring.index(index).reshape([ROWS, PADDED_DIM]).load(out_layout).to(gl.float32)
                    fence_async_shared()
                mbarrier.arrive(k_empty.index(index), count=1)
                keys_taken += 1
        if steps > 0:
            index = keys_taken % KEYS
            mbarrier.wait(k_full.index(index), keys_taken // KEYS & 1)
            key = k_ring.index(index).reshape([TILE_K, PADDED_DIM])
            scoring = warpgroup_mma(query, key.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
            for step in range(steps):
                index = keys_taken % KEYS
                key = k_ring.index(index).reshape([TILE_K, PADDED_DIM])
                value_index = values_taken % VALUES
                mbarrier.wait(v_full.index(value_index), values_taken // VALUES & 1)
                value = v_ring.index(value_index).reshape([TILE_K, PADDED_DIM])
                making = warpgroup_mma(grad, value.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scoring,))
                # at most 1 by the definition of lse; past the last key, where K is 0, it could be infinite
                weights = gl.exp2(gl.minimum(scores * scale_log2 - row_lse[:, None], 0.0))
                grad_weights = warpgroup_mma_wait(0, deps=(making,))
                mbarrier.arrive(v_empty.index(value_index), count=1)
                values_taken += 1
                grad_scores = weights * (grad_weights * scale - delta[:, None])
                operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
                accumulator = warpgroup_mma(operand, key, accumulator, is_async=True)
                # the last step makes its own scores again, which nobody reads
                following = keys_taken + gl.where(step + 1 < steps, 1, 0)
                coming = following % KEYS
                mbarrier.wait(k_full.index(coming), following // KEYS & 1)
                next_key = k_ring.index(coming).reshape([TILE_K, PADDED_DIM])
                scoring = warpgroup_mma(query, next_key.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
                accumulator, _operand = warpgroup_mma_wait(1, deps=(accumulator, operand))
                mbarrier.arrive(k_empty.index(index), count=1)
                keys_taken += 1
            warpgroup_mma_wait(0, deps=(scoring,))
        # it leaves from where the queries were
        query.store(accumulator.to(dtype))
        fence_async_shared()
        store_tile(out_desc, [batch, head, first, 0], own_q.index(CONSUMER))
        tma.store_wait(0)
        mbarrier.arrive(own_empty, count=1)


@gluon.jit(do_not_specialize=["row_pitch", "num_rows", "total_tiles", "list_width"])
def wide_query_kernel(
    q_desc,
    grad_desc,
    k_desc,
    v_desc,
    out_desc,
    lists,
    counts,
    statistics,
    scale,
    row_pitch,
    num_rows,
    total_tiles,
    tiles_per_head,
    num_heads,
    list_width,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr,
    VALUES: gl.constexpr,
    STARTED: gl.constexpr,
    GROUP: gl.constexpr,
):
    CONSUMERS: gl.constexpr = TILE_Q // 64
    own_shape: gl.constexpr = [CONSUMERS] + q_desc.block_type.shape
    own_q = gl.allocate_shared_memory(q_desc.dtype, own_shape, q_desc.layout)
    own_grad = gl.allocate_shared_memory(q_desc.dtype, own_shape, q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(k_desc.dtype, [VALUES] + k_desc.block_type.shape, k_desc.layout)
    own_full = make_barrier_ring(1, 1)
    own_empty = make_barrier_ring(1, CONSUMERS)
    k_full = make_barrier_ring(2, 1)
    k_empty = make_barrier_ring(2, CONSUMERS)
    v_full = make_barrier_ring(VALUES, 1)
    v_empty = make_barrier_ring(VALUES, CONSUMERS)
    fence_async_shared()
    all_threads()
    buffers = (own_q, own_grad, k_ring, v_ring)
    barriers = (own_full.index(0), own_empty.index(0), k_full, k_empty, v_full, v_empty)
    extents = (num_rows, total_tiles, tiles_per_head, num_heads, list_width)
    descriptors = (q_desc, grad_desc, k_desc, v_desc, out_desc)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (query_consumer, (
                    buffers, barriers, counts, statistics, out_desc, scale, row_pitch, extents, 0, BLOCK_Q, TILE_Q,
                    BLOCK_K, TILE_K, STARTED,
                )),
                (query_producer, (
                    descriptors, buffers, barriers, lists, counts, extents, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K, STARTED,
                    GROUP,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (query_consumer, (
                    buffers, barriers, counts, statistics, out_desc, scale, row_pitch, extents, 0, BLOCK_Q, TILE_Q,
                    BLOCK_K, TILE_K, STARTED,
                )),
                (query_consumer, (
                    buffers, barriers, counts, statistics, out_desc, scale, row_pitch, extents, 1, BLOCK_Q, TILE_Q,
                    BLOCK_K, TILE_K, STARTED,
                )),
                (query_producer, (
                    descriptors, buffers, barriers, lists, counts, extents, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K, STARTED,
                    GROUP,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def attention_backward_query(
    upstream: Upstream,
    inputs: KernelInputs,
    lists: BlockLists,
    gradients: QueryGradients,
    options: BackwardOptions,
) -> None:
    """As `Steps.attention_backward_query`, with complete statistics and without a mask."""
    q, k, v = inputs[:3]
    block_q, block_k = options.block_q, options.block_k
    batch, heads, queries, _ = q.shape
    tile_q = min(block_q, 128)
    num_rows = ceil_div(queries, block_q)
    tiles_per_head = ceil_div(queries, tile_q)
    total = tiles_per_head * batch * heads
    wide_query_kernel[(min(total, multiprocessors(q.device.index)),)](
        tile_descriptor(q, 64),
        tile_descriptor(upstream.grad_out, 64),
        tile_descriptor(k, 64),
        tile_descriptor(v, 64),
        tile_descriptor(gradients.dq, 64),
        lists.blocks,
        lists.counts,
        gradients.statistics,
        options.scale,
        num_rows * block_q,
        num_rows,
        total,
        tiles_per_head,
        heads,
        lists.blocks.shape[3],
        BLOCK_Q=block_q,
        TILE_Q=tile_q,
        BLOCK_K=block_k,
        TILE_K=64,
        VALUES=1 if tile_q == 128 else 2,
        STARTED=gradients.started,
        GROUP=inputs.group,
        num_warps=4,
        maxnreg=168 if tile_q == 128 else 240,
    )
