"""dQ for Hopper, written in Gluon: one producer warp, one or two consumer warpgroups of 64 queries each.

The arithmetic is that of ``triton/backward.py``; dS is made in the registers in which the next product reads it. The
linear branch's part of dQ is in the output already. Virtual keys, of ``triton/virtual_keys.py``, come before the
critical ones: their dQ joins the same sum, and what they need of the tile of queries is let go before the long loop.
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

from ..steps import BlockLists, KernelInputs, QueryGradients, Upstream, VirtualKeys, VirtualQueryGradients
from ..triton.overlap import let_next_start
from ..triton.primitives import LOG2E
from ..triton.tiles import ceil_div
from .pairs import make_buffers, matrix_of, pair_producer, split_pair
from .primitives import (
    edge_blocks,
    locate_tile,
    matrix_descriptor,
    multiprocessors,
    padded_dim,
    store_tile,
    tile_descriptor,
    vectors_descriptor,
    view_as,
)

__all__ = ["attention_backward_query", "fresh_gradients", "virtual_backward_query"]


@gluon.jit
def query_step(
    accumulator, query, grad, unit, full, empty, phase, row_lse, delta, scale, bias, TILE_K: gl.constexpr,
    tile_layout: gl.constexpr, scores_layout: gl.constexpr, operand_layout: gl.constexpr, HAS_BIAS: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """dQ of the pair of tiles in ``unit``, maybe with a ``bias``, which comes with it. Causal, the first query is
    ``bias`` ahead of the first key."""
    dtype: gl.constexpr = unit.dtype
    ROWS: gl.constexpr = accumulator.shape[0]
    PADDED_DIM: gl.constexpr = accumulator.shape[1]
    key, value = split_pair(unit, TILE_K, tile_layout)
    key = key.reshape([TILE_K, PADDED_DIM])
    value = value.reshape([TILE_K, PADDED_DIM])
    zero_scores = gl.zeros([ROWS, TILE_K], gl.float32, scores_layout)
    mbarrier.wait(full, phase)
    scores = warpgroup_mma(query, key.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
    grad_weights = warpgroup_mma(grad, value.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    exponents = scores * (scale * LOG2E) - row_lse[:, None]
    if HAS_BIAS:
        vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        added = view_as(bias, gl.float32, [TILE_K], vector_layout).load(gl.SliceLayout(0, scores_layout))
        exponents += (added * LOG2E)[None, :]
    if CAUSAL:
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores_layout))
        keys = gl.arange(0, TILE_K, layout=gl.SliceLayout(0, scores_layout))
        exponents = gl.where((bias + rows)[:, None] >= keys[None, :], exponents, float("-inf"))
    # at most 1 by the definition of lse; past the last key, where K is 0, it could be infinite
    weights = gl.exp2(gl.minimum(exponents, 0.0))
    grad_weights = warpgroup_mma_wait(0, deps=(grad_weights,))
    grad_scores = weights * (grad_weights * scale - delta[:, None])
    operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
    accumulator = warpgroup_mma(operand, key, accumulator, is_async=True)
    accumulator, _ = warpgroup_mma_wait(0, deps=(accumulator, operand))
    if HAS_BIAS:
        fence_async_shared()
    mbarrier.arrive(empty, count=1)
    return accumulator


@gluon.jit
def slope_rows(queries, weighed, PART: gl.constexpr, layout: gl.constexpr):
    """64 rows of a tile's dS, on their way: of all its queries and, weighed, their gradients (consumers, 1, 1, 64,
    dims)."""
    CONSUMERS: gl.constexpr = queries.type.shape[0]
    ROWS: gl.constexpr = queries.type.shape[3]
    PADDED_DIM: gl.constexpr = queries.type.shape[4]
    grad_slope = gl.zeros([ROWS, PADDED_DIM], gl.float32, layout)
    for consumer in gl.static_range(CONSUMERS):
        left = queries.index(consumer).reshape([ROWS, PADDED_DIM]).slice(PART * ROWS, ROWS, dim=1)
        right = weighed.index(consumer).reshape([ROWS, PADDED_DIM])
        # [dims, queries] x [queries, dims]
        grad_slope = warpgroup_mma(left.permute((1, 0)), right, grad_slope, is_async=True)
    return grad_slope


@gluon.jit
def query_consumer(
    buffers,
    barriers,
    counts,
    partial,
    lse,
    statistics,
    virtual_statistics,
    shares,
    out_desc,
    grad_slope_desc,
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
    HAS_VIRTUAL: gl.constexpr,
    MAKES_STATISTICS: gl.constexpr,
    HAS_MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """dQ of 64 queries, to which the linear branch's part, which is there already, is added; with virtual keys also its
    share of the tile's dS."""
    own_q, own_grad, ring, bias_ring, _turns, out_buffers = buffers
    own_full, own_empty, ring_full, ring_empty, prior_full, prior_empty, joint = barriers
    num_rows, total_tiles, tiles_per_head, num_heads, list_width, matrix_rows, num_virtual, _slots = extents
    ROWS: gl.constexpr = 64
    STAGES: gl.constexpr = ring.type.shape[0]
    PARTS: gl.constexpr = BLOCK_K // TILE_K
    CONSUMERS: gl.constexpr = TILE_Q // ROWS
    tile_layout: gl.constexpr = own_q.layout
    dtype: gl.constexpr = ring.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    matrix_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, PADDED_DIM, PADDED_DIM], gl.bfloat16)
    score_rows = gl.arange(0, ROWS, layout=row_layout)
    leaving = out_buffers.index(CONSUMER)
    staged = leaving.reshape([ROWS, PADDED_DIM])
    # its own rows stay in registers: products of 64 columns would take all that shared memory gives in a cycle
    own_layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)

    taken = 0
    turn = 0
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        query_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        batch_head = (batch * num_heads + head).to(gl.int64)
        line = batch_head * num_rows + query_tile * TILE_Q // BLOCK_Q
        count = gl.load(counts + line)
        first = query_tile * TILE_Q + CONSUMER * ROWS
        row_statistics = statistics + batch_head * row_pitch * 2 + first
        if not MAKES_STATISTICS:
            row_lse = gl.load(row_statistics + score_rows)
            delta = gl.load(row_statistics + row_pitch + score_rows)
        else:
            rows = first + score_rows
            row_lse = gl.load(lse + batch_head * num_queries + rows, mask=rows < num_queries, other=float("inf"))
        if HAS_VIRTUAL:
            share = gl.load(shares + batch_head * num_queries + rows, mask=rows < num_queries, other=0.0)

        mbarrier.wait(own_full, turn & 1)
        query = own_q.index(CONSUMER).reshape([ROWS, PADDED_DIM]).load(own_layout)
        grad = own_grad.index(CONSUMER).reshape([ROWS, PADDED_DIM]).load(own_layout)
        if not HAS_VIRTUAL:
            fence_async_shared()
            mbarrier.arrive(own_empty, count=1)
        if HAS_LINEAR:
            # the output before has left
            tma.store_wait(0)
            mbarrier.arrive(prior_empty, count=1)
        if MAKES_STATISTICS:
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
            delta = gl.convert_layout(delta, row_layout)
            gl.store(row_statistics + score_rows, row_lse)
            gl.store(row_statistics + row_pitch + score_rows, delta)
        accumulator = gl.zeros([ROWS, PADDED_DIM], gl.float32, out_layout)
        if HAS_VIRTUAL:
            factor = gl.convert_layout(share * scale, gl.SliceLayout(1, out_layout))
            index = taken % STAGES
            slope = matrix_of(ring.index(index), gl.bfloat16, matrix_layout).reshape([PADDED_DIM, PADDED_DIM])
            grad_operand = gl.convert_layout(grad.to(gl.bfloat16), operand_layout)
            mbarrier.wait(ring_full.index(index), taken // STAGES & 1)
            # dO S^T
            along = warpgroup_mma(grad_operand, slope.permute((1, 0)), accumulator, use_acc=False, is_async=True)
            # what dS is made of lies where queries and gradients lay, in the type of the states; these are read again:
            # the compiler would keep what was made of the registers above, in local memory
            own_shape: gl.constexpr = [CONSUMERS, 1, 1, ROWS, PADDED_DIM]
            queries = view_as(own_q, gl.bfloat16, own_shape, tile_layout)
            weighed = view_as(own_grad, gl.bfloat16, own_shape, tile_layout)
            own_weighed = weighed.index(CONSUMER).reshape([ROWS, PADDED_DIM])
            again = own_grad.index(CONSUMER).reshape([ROWS, PADDED_DIM]).load(out_layout).to(gl.float32)
            own_weighed.store((again * factor[:, None]).to(gl.bfloat16))
            if dtype != gl.bfloat16:
                again = own_q.index(CONSUMER).reshape([ROWS, PADDED_DIM]).load(out_layout).to(gl.float32)
                queries.index(CONSUMER).reshape([ROWS, PADDED_DIM]).store(again.to(gl.bfloat16))
            fence_async_shared()
            mbarrier.arrive(joint, count=1)
            # of dS 64 rows at a time, the first while dO S^T is worked on
            mbarrier.wait(joint, turn & 1)
            HAS_ROWS: gl.constexpr = CONSUMER < PADDED_DIM // ROWS
            if HAS_ROWS:
                grad_slope = slope_rows(queries, weighed, CONSUMER, out_layout)
            along, _grad = warpgroup_mma_wait(CONSUMERS if HAS_ROWS else 0, deps=(along, grad_operand))
            mbarrier.arrive(ring_empty.index(index), count=1)
            taken += 1
            gain = gl.sum(along * gl.convert_layout(query, out_layout).to(gl.float32), 1) * (scale * scale)
            gain = gl.convert_layout(gain, row_layout)
            against = delta - gain
            row_statistics = virtual_statistics + batch_head * row_pitch * 2 + first
            gl.store(row_statistics + score_rows, row_lse)
            gl.store(row_statistics + row_pitch + score_rows, against)
            accumulator = along * factor[:, None]
            slope_shape: gl.constexpr = [1, ROWS, PADDED_DIM]
            slope_layout: gl.constexpr = grad_slope_desc.layout
            slope_leaving = view_as(leaving, gl.bfloat16, slope_shape, slope_layout)
            for part in gl.static_range(CONSUMER, PADDED_DIM // ROWS, CONSUMERS):
                if part > CONSUMER:
                    grad_slope = slope_rows(queries, weighed, part, out_layout)
                grad_slope = warpgroup_mma_wait(0, deps=(grad_slope,))
                tma.store_wait(0)
                slope_leaving.reshape([ROWS, PADDED_DIM]).store(grad_slope.to(gl.bfloat16))
                fence_async_shared()
                store_tile(grad_slope_desc, [tile, part * ROWS, 0], slope_leaving)
            mbarrier.arrive(own_empty, count=1)
            for _start in range(0, num_virtual, TILE_K):
                index = taken % STAGES
                accumulator = query_step(
                    accumulator, query, grad, ring.index(index), ring_full.index(index), ring_empty.index(index),
                    taken // STAGES & 1, row_lse, against, scale, bias_ring.index(index), TILE_K, tile_layout,
                    scores_layout, operand_layout, True, False,
                )  # fmt: skip
                taken += 1
        whole = count
        if HAS_MASK:
            whole = count - gl.load(partial + line)
        if CAUSAL:
            row = query_tile * TILE_Q // BLOCK_Q
            edge_block, edge, unseen = edge_blocks(query_tile * TILE_Q, row, num_queries, BLOCK_Q, TILE_Q, BLOCK_K)
            count -= unseen
            whole = count - edge
        for _step in range(whole * PARTS):
            index = taken % STAGES
            accumulator = query_step(
                accumulator, query, grad, ring.index(index), ring_full.index(index), ring_empty.index(index),
                taken // STAGES & 1, row_lse, delta, scale, bias_ring, TILE_K, tile_layout, scores_layout,
                operand_layout, False, False,
            )  # fmt: skip
            taken += 1
        if HAS_MASK:
            for _step in range((count - whole) * PARTS):
                index = taken % STAGES
                accumulator = query_step(
                    accumulator, query, grad, ring.index(index), ring_full.index(index), ring_empty.index(index),
                    taken // STAGES & 1, row_lse, delta, scale, bias_ring.index(index), TILE_K, tile_layout,
                    scores_layout, operand_layout, True, False,
                )  # fmt: skip
                taken += 1
        if CAUSAL:
            for step in range(edge * PARTS):
                index = taken % STAGES
                accumulator = query_step(
                    accumulator, query, grad, ring.index(index), ring_full.index(index), ring_empty.index(index),
                    taken // STAGES & 1, row_lse, delta, scale, first - edge_block * BLOCK_K - step * TILE_K,
                    TILE_K, tile_layout, scores_layout, operand_layout, False, True,
                )  # fmt: skip
                taken += 1
        if HAS_LINEAR:
            mbarrier.wait(prior_full, turn & 1)
            accumulator += staged.load(out_layout).to(gl.float32)
        else:
            tma.store_wait(0)
        staged.store(accumulator.to(dtype))
        fence_async_shared()
        store_tile(out_desc, [batch, head, first, 0], leaving)
        turn += 1
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "bias_rows",
        "num_queries",
        "row_pitch",
        "num_rows",
        "total_tiles",
        "list_width",
        "num_virtual",
    ]
)
def query_kernel(
    q_desc,
    grad_desc,
    k_desc,
    v_desc,
    virtual_k_desc,
    virtual_v_desc,
    saved_desc,
    slope_desc,
    bias_desc,
    out_desc,
    grad_slope_desc,
    lists,
    counts,
    key_bias_desc,
    partial,
    bias_rows,
    lse,
    statistics,
    virtual_statistics,
    shares,
    scale,
    num_queries,
    row_pitch,
    num_rows,
    total_tiles,
    tiles_per_head,
    num_heads,
    list_width,
    num_virtual,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
    HAS_VIRTUAL: gl.constexpr,
    MAKES_STATISTICS: gl.constexpr,
    HAS_MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    GROUP: gl.constexpr,
):
    let_next_start()
    CONSUMERS: gl.constexpr = TILE_Q // 64
    BIASES: gl.constexpr = 1 if HAS_VIRTUAL or HAS_MASK else 0
    causal_mask = (num_queries,) if CAUSAL else ()
    mask = (key_bias_desc, partial, bias_rows) if HAS_MASK else causal_mask
    buffers, barriers = make_buffers(
        q_desc, k_desc, bias_desc, STAGES, CONSUMERS, BIASES, True, HAS_LINEAR, HAS_VIRTUAL
    )
    extents = (num_rows, total_tiles, tiles_per_head, num_heads, list_width, num_rows, num_virtual, 0)
    virtual_descs = (virtual_k_desc, virtual_v_desc)
    descriptors = (
        (q_desc, grad_desc), (k_desc, v_desc), virtual_descs, saved_desc, slope_desc, bias_desc, out_desc
    )  # fmt: skip
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (query_consumer, (
                    buffers, barriers, counts, partial, lse, statistics, virtual_statistics, shares, out_desc,
                    grad_slope_desc, scale, num_queries, row_pitch, extents, 0, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K,
                    HEAD_DIM, PADDED_DIM, HAS_LINEAR, HAS_VIRTUAL, MAKES_STATISTICS, HAS_MASK, CAUSAL,
                )),
                (pair_producer, (
                    descriptors, buffers, barriers, lists, counts, lists, mask, extents, BLOCK_Q, TILE_Q, BLOCK_K,
                    TILE_K, HAS_VIRTUAL, False, False, MAKES_STATISTICS, HAS_LINEAR, HAS_VIRTUAL, HAS_MASK, CAUSAL,
                    GROUP, False,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (query_consumer, (
                    buffers, barriers, counts, partial, lse, statistics, virtual_statistics, shares, out_desc,
                    grad_slope_desc, scale, num_queries, row_pitch, extents, 0, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K,
                    HEAD_DIM, PADDED_DIM, HAS_LINEAR, HAS_VIRTUAL, MAKES_STATISTICS, HAS_MASK, CAUSAL,
                )),
                (query_consumer, (
                    buffers, barriers, counts, partial, lse, statistics, virtual_statistics, shares, out_desc,
                    grad_slope_desc, scale, num_queries, row_pitch, extents, 1, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K,
                    HEAD_DIM, PADDED_DIM, HAS_LINEAR, HAS_VIRTUAL, MAKES_STATISTICS, HAS_MASK, CAUSAL,
                )),
                (pair_producer, (
                    descriptors, buffers, barriers, lists, counts, lists, mask, extents, BLOCK_Q, TILE_Q, BLOCK_K,
                    TILE_K, HAS_VIRTUAL, False, False, MAKES_STATISTICS, HAS_LINEAR, HAS_VIRTUAL, HAS_MASK, CAUSAL,
                    GROUP, False,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def fresh_gradients(q: torch.Tensor, block_q: int) -> QueryGradients:
    """Neither complete nor started, for q (B, H, Lq, D)."""
    batch, heads, tokens, head_dim = q.shape
    dq = q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    rows = ceil_div(tokens, block_q) * block_q
    statistics = torch.empty((batch, heads, 2, rows), dtype=torch.float32, device=q.device)
    return QueryGradients(dq, statistics, complete=False, started=False)


def attention_backward_query(
    upstream: Upstream,
    inputs: KernelInputs,
    lists: BlockLists,
    gradients: QueryGradients,
    options: BackwardOptions,
) -> None:
    """As `Steps.attention_backward_query`. Statistics that are not complete, which is without
    linear branch and bias, are made here from the output and its lse."""
    _backward_query(upstream, inputs, lists, gradients, None, options)


def virtual_backward_query(
    upstream: Upstream, inputs: KernelInputs, lists: BlockLists, virtual: VirtualKeys, options: BackwardOptions
) -> VirtualQueryGradients:
    """As `Steps.virtual_backward_query`: virtual keys come before the critical ones, in one kernel."""
    gradients = fresh_gradients(inputs.q, options.block_q)
    statistics, slopes = _backward_query(upstream, inputs, lists, gradients, virtual, options)
    return VirtualQueryGradients(gradients.dq, gradients.statistics, statistics, slopes)


def _backward_query(
    upstream: Upstream,
    inputs: KernelInputs,
    lists: BlockLists,
    gradients: QueryGradients,
    virtual: VirtualKeys | None,
    options: BackwardOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills ``gradients``; returns the statistics of virtual keys and dS, of shape (0,) without ``virtual``."""
    q, k, v, weights = *inputs[:3], inputs.key_weights
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
    virtual_statistics, slopes = statistics.new_empty(0), q.new_empty(0)
    if virtual is not None:
        virtual_statistics = torch.empty_like(statistics)
        slopes = virtual.slopes.new_empty(batch, heads, tiles_per_head, *virtual.slopes.shape[3:])
    # an absent tensor's place is taken by one that is there; the kernel does not touch it
    query_kernel[(programs,)](
        tile_descriptor(q, 64),
        tile_descriptor(grad_out, 64),
        tile_descriptor(k, tile_k),
        tile_descriptor(v, tile_k),
        tile_descriptor(virtual.keys if virtual is not None else k, tile_k),
        tile_descriptor(virtual.values if virtual is not None else v, tile_k),
        tile_descriptor(upstream.out if makes_statistics else q, 64),
        matrix_descriptor(virtual.slopes if virtual is not None else q, head_dim),
        vectors_descriptor(virtual.bias if virtual is not None else statistics, tile_k),
        tile_descriptor(gradients.dq, 64),
        matrix_descriptor(slopes if virtual is not None else q, head_dim, 64),
        lists.blocks,
        lists.counts,
        # what is None is no parameter of the compiled kernel
        vectors_descriptor(weights.bias, tile_k) if weights is not None else None,
        lists.partial,
        weights.bias.shape[0] if weights is not None else None,
        upstream.lse if makes_statistics else statistics,
        statistics,
        virtual_statistics if virtual is not None else statistics,
        virtual.shares if virtual is not None else statistics,
        options.scale,
        queries,
        statistics.shape[3],
        ceil_div(queries, block_q),
        total,
        tiles_per_head,
        heads,
        lists.blocks.shape[3],
        virtual.keys.shape[2] if virtual is not None else 0,
        BLOCK_Q=block_q,
        TILE_Q=tile_q,
        BLOCK_K=options.block_k,
        TILE_K=tile_k,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        STAGES=(4 if tile_q == 128 else 2) * (128 // padded),
        HAS_LINEAR=gradients.started,
        HAS_VIRTUAL=virtual is not None,
        MAKES_STATISTICS=makes_statistics,
        HAS_MASK=weights is not None,
        CAUSAL=options.causal,
        GROUP=inputs.group,
        num_warps=4,
        maxnreg=168 if tile_q == 128 else 128,
    )
    return virtual_statistics, slopes
