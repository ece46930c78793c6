"""dQ for Hopper, written in Gluon: one producer warp, one or two consumer warpgroups of 64 queries each.

The arithmetic is that of ``triton/backward.py``; dS is made in the registers in which the next product reads it. The
linear branch's part of dQ is in the output already.
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
from .pairs import make_buffers, pair_producer, split_pair, statistics_descriptor
from .primitives import (
    locate_tile,
    multiprocessors,
    padded_dim,
    store_tile,
    tile_descriptor,
)

__all__ = ["attention_backward_query"]


@gluon.jit
def query_consumer(
    buffers,
    barriers,
    counts,
    lse,
    statistics,
    out_desc,
    scale,
    num_queries,
    row_pitch,
    extents,
    CONSUMER: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
    MAKES_STATISTICS: gl.constexpr,
):
    """dQ of 64 queries, to which the linear branch's part, which is there already, is added."""
    own_q, own_grad, ring, _statistics_ring, _turns, out_buffers = buffers
    own_full, own_empty, ring_full, ring_empty, prior_full, prior_empty = barriers
    num_rows, total_tiles, tiles_per_head, num_heads, list_width, matrix_rows = extents
    ROWS: gl.constexpr = 64
    STAGES: gl.constexpr = ring.type.shape[0]
    PARTS: gl.constexpr = BLOCK_K // TILE_K
    tile_layout: gl.constexpr = own_q.layout
    dtype: gl.constexpr = ring.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    score_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores_layout))
    leaving = out_buffers.index(CONSUMER)
    staged = leaving.reshape([ROWS, PADDED_DIM])
    # its own rows stay in registers: products of 64 columns would take all that shared memory gives in a cycle
    own_layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    scale_log2 = scale * LOG2E

    taken = 0
    turn = 0
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        query_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        batch_head = (batch * num_heads + head).to(gl.int64)
        count = gl.load(counts + batch_head * num_rows + query_tile * TILE_Q // BLOCK_Q)
        first = query_tile * TILE_Q + CONSUMER * ROWS
        row_statistics = statistics + batch_head * row_pitch * 2 + first
        if not MAKES_STATISTICS:
            row_lse = gl.load(row_statistics + score_rows)
            delta = gl.load(row_statistics + row_pitch + score_rows)

        mbarrier.wait(own_full, turn & 1)
        query = own_q.index(CONSUMER).reshape([ROWS, PADDED_DIM]).load(own_layout)
        grad = own_grad.index(CONSUMER).reshape([ROWS, PADDED_DIM]).load(own_layout)
        fence_async_shared()
        mbarrier.arrive(own_empty, count=1)
        # the output before has left
        tma.store_wait(0)
        if HAS_LINEAR:
            mbarrier.arrive(prior_empty, count=1)
        if MAKES_STATISTICS:
            rows = first + score_rows
            row_lse = gl.load(lse + batch_head * num_queries + rows, mask=rows < num_queries, other=float("inf"))
            # a query without a key: every score is -inf
            row_lse = gl.where(row_lse == float("-inf"), 0.0, row_lse * LOG2E)
            index = taken % STAGES
            mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
            saved = split_pair(ring.index(index), ROWS, tile_layout)[CONSUMER].reshape([ROWS, PADDED_DIM])
            output = saved.load(out_layout).to(gl.float32)
            fence_async_shared()
            mbarrier.arrive(ring_empty.index(index), count=1)
            taken += 1
            delta = gl.sum(gl.convert_layout(grad, out_layout).to(gl.float32) * output, 1) * scale
            delta = gl.convert_layout(delta, gl.SliceLayout(1, scores_layout))
            gl.store(row_statistics + score_rows, row_lse)
            gl.store(row_statistics + row_pitch + score_rows, delta)
        accumulator = gl.zeros([ROWS, PADDED_DIM], gl.float32, out_layout)
        for _step in range(count * PARTS):
            index = taken % STAGES
            key, value = split_pair(ring.index(index), TILE_K, tile_layout)
            key = key.reshape([TILE_K, PADDED_DIM])
            value = value.reshape([TILE_K, PADDED_DIM])
            zero_scores = gl.zeros([ROWS, TILE_K], gl.float32, scores_layout)
            mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
            scores = warpgroup_mma(query, key.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
            grad_weights = warpgroup_mma(grad, value.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            # at most 1 by the definition of lse; past the last key, where K is 0, it could be infinite
            weights = gl.exp2(gl.minimum(scores * scale_log2 - row_lse[:, None], 0.0))
            grad_weights = warpgroup_mma_wait(0, deps=(grad_weights,))
            grad_scores = weights * (grad_weights * scale - delta[:, None])
            operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
            accumulator = warpgroup_mma(operand, key, accumulator, is_async=True)
            accumulator, _ = warpgroup_mma_wait(0, deps=(accumulator, operand))
            mbarrier.arrive(ring_empty.index(index), count=1)
            taken += 1
        if HAS_LINEAR:
            mbarrier.wait(prior_full, turn & 1)
            accumulator += staged.load(out_layout).to(gl.float32)
        staged.store(accumulator.to(dtype))
        fence_async_shared()
        store_tile(out_desc, [batch, head, first, 0], leaving)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "row_pitch", "num_rows", "total_tiles", "list_width"])
def query_kernel(
    q_desc,
    grad_desc,
    k_desc,
    v_desc,
    saved_desc,
    statistics_desc,
    out_desc,
    lists,
    counts,
    lse,
    statistics,
    scale,
    num_queries,
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
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
    MAKES_STATISTICS: gl.constexpr,
):
    CONSUMERS: gl.constexpr = TILE_Q // 64
    buffers, barriers = make_buffers(q_desc, k_desc, statistics_desc, STAGES, CONSUMERS, False, True)
    extents = (num_rows, total_tiles, tiles_per_head, num_heads, list_width, 1)
    descriptors = (q_desc, grad_desc, k_desc, v_desc, saved_desc, statistics_desc, out_desc)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (query_consumer, (
                    buffers, barriers, counts, lse, statistics, out_desc, scale, num_queries, row_pitch, extents, 0,
                    BLOCK_Q, TILE_Q, BLOCK_K, TILE_K, HEAD_DIM, PADDED_DIM, HAS_LINEAR, MAKES_STATISTICS,
                )),
                (pair_producer, (
                    descriptors, buffers, barriers, lists, counts, lists, extents, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K,
                    False, False, False, MAKES_STATISTICS, HAS_LINEAR,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (query_consumer, (
                    buffers, barriers, counts, lse, statistics, out_desc, scale, num_queries, row_pitch, extents, 0,
                    BLOCK_Q, TILE_Q, BLOCK_K, TILE_K, HEAD_DIM, PADDED_DIM, HAS_LINEAR, MAKES_STATISTICS,
                )),
                (query_consumer, (
                    buffers, barriers, counts, lse, statistics, out_desc, scale, num_queries, row_pitch, extents, 1,
                    BLOCK_Q, TILE_Q, BLOCK_K, TILE_K, HEAD_DIM, PADDED_DIM, HAS_LINEAR, MAKES_STATISTICS,
                )),
                (pair_producer, (
                    descriptors, buffers, barriers, lists, counts, lists, extents, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K,
                    False, False, False, MAKES_STATISTICS, HAS_LINEAR,
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
    """As `Steps.attention_backward_query`; there is no key_bias. Statistics that are not complete, which is without
    linear branch and bias, are made here from the output and its lse."""
    q, k, v = inputs[:3]
    grad_out, statistics = upstream.grad_out, gradients.statistics
    block_q, makes_statistics = options.block_q, not gradients.complete
    batch, heads, queries, head_dim = q.shape
    padded = padded_dim(head_dim)
    tile_q = 128 if block_q % 128 == 0 else 64
    tile_k = 64
    # statistics are wanted up to the end of the last block
    tiles_per_head = ceil_div(statistics.shape[3] if makes_statistics else queries, tile_q)
    total = tiles_per_head * batch * heads
    programs = min(total, multiprocessors(q.device.index) * (2 if tile_q == 64 else 1))
    query_kernel[(programs,)](
        tile_descriptor(q, 64),
        tile_descriptor(grad_out, 64),
        tile_descriptor(k, tile_k),
        tile_descriptor(v, tile_k),
        tile_descriptor(upstream.out if makes_statistics else q, 64),
        statistics_descriptor(statistics, tile_q),
        tile_descriptor(gradients.dq, 64),
        lists.blocks,
        lists.counts,
        upstream.lse if makes_statistics else statistics,
        statistics,
        options.scale,
        queries,
        statistics.shape[3],
        ceil_div(queries, block_q),
        total,
        tiles_per_head,
        heads,
        lists.blocks.shape[3],
        BLOCK_Q=block_q,
        TILE_Q=tile_q,
        BLOCK_K=options.block_k,
        TILE_K=tile_k,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        STAGES=(4 if tile_q == 128 else 2) * (128 // padded),
        HAS_LINEAR=gradients.started,
        MAKES_STATISTICS=makes_statistics,
        num_warps=4,
        maxnreg=168 if tile_q == 128 else 128,
    )
