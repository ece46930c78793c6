"""The linear branch's backward for Hopper, written in Gluon: statistics, dQ, dH and dZ of 128 queries at a time.

The arithmetic is that of ``triton/linear_backward.py``. A producer warp loads by TMA; each of two
warpgroups owns 64 queries. What dH is made of goes back to shared memory, where queries and gradients lay: in blocks
of 128 or more it sums over all 128 queries, and each warpgroup makes half of its rows; of two blocks of 64, each
warpgroup has one, with a state of its own.
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

from ..steps import KernelInputs, LinearStates, QueryGradients, Upstream
from ..triton.overlap import beside, end_beside, start_beside
from ..triton.primitives import LOG2E
from ..triton.tiles import ceil_div, head_stride
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
    reciprocal_or_zero,
    store_tile,
    tile_descriptor,
    view_as,
)

__all__ = ["linear_backward"]


@gluon.jit
def linear_producer(descriptors, buffers, barriers, extents, BLOCK_Q: gl.constexpr):
    """Load a tile of outputs, its gradients and queries, the states of its block or two blocks, and a head's gate.

    Outputs are done with first, so those of the next tile come while this one is still worked on.
    """
    q_desc, grad_desc, out_desc, linear_desc, state_desc, gate_desc = descriptors
    q_buffer, grad_buffer, out_buffer, linear_buffer, state_buffer, gate_buffer = buffers[:6]
    outputs_full, outputs_empty, grad_full, full, empty, _joint = barriers
    total_tiles, tiles_per_head, num_heads, state_rows, gate_heads, _slots = extents
    tile_bytes: gl.constexpr = q_desc.block_type.nbytes
    STATES: gl.constexpr = state_buffer.type.shape[0]
    turn = 0
    held_gate = -1
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        query_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        batch_head = batch * num_heads + head
        at = [batch, head, query_tile * 128, 0]
        mbarrier.wait(outputs_empty, (turn & 1) ^ 1)
        mbarrier.expect(outputs_full, 2 * tile_bytes)
        load_tile(out_desc, at, outputs_full, out_buffer)
        load_tile(linear_desc, at, outputs_full, linear_buffer)
        mbarrier.wait(empty, (turn & 1) ^ 1)
        gate_head = gl.minimum(head, gate_heads - 1)
        if gate_head == held_gate:
            mbarrier.expect(grad_full, tile_bytes)
        else:
            mbarrier.expect(grad_full, tile_bytes + gate_desc.block_type.nbytes)
            load_tile(gate_desc, [gate_head, 0, 0], grad_full, gate_buffer)
        held_gate = gate_head
        load_tile(grad_desc, at, grad_full, grad_buffer)
        mbarrier.expect(full, tile_bytes + STATES * state_desc.block_type.nbytes)
        load_tile(q_desc, at, full, q_buffer)
        for which in gl.static_range(STATES):
            block = (query_tile * 128 + which * 64) // BLOCK_Q
            state_row = batch_head * state_rows + gl.minimum(block, state_rows - 1)
            load_tile(state_desc, [state_row, 0, 0], full, state_buffer.index(which))
        turn += 1


@gluon.jit
def linear_consumer(
    buffers,
    barriers,
    lse,
    bias,
    normalizers,
    grad_q_desc,
    statistics,
    grad_state_desc,
    grad_normalizers,
    scale,
    stride_bh,
    num_queries,
    row_pitch,
    extents,
    CONSUMER: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    q_buffer, grad_buffer, out_buffer, linear_buffer, state_buffer, gate_buffer, sums, leaving_buffers = buffers
    outputs_full, outputs_empty, grad_full, full, empty, joint = barriers
    total_tiles, tiles_per_head, num_heads, state_rows, _gate_heads, slots = extents
    ROWS: gl.constexpr = 64
    STATES: gl.constexpr = state_buffer.type.shape[0]
    # with 64 dimensions both make all of dH, the same bits
    HALF: gl.constexpr = CONSUMER * 64 % PADDED_DIM
    dtype: gl.constexpr = q_buffer.dtype
    state_dtype: gl.constexpr = state_buffer.dtype
    tile_layout: gl.constexpr = q_buffer.layout
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    dim_layout: gl.constexpr = gl.SliceLayout(0, layout)
    lane_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    HALF_DIM: gl.constexpr = PADDED_DIM // 2
    row_lanes = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    lanes = gl.arange(0, HALF_DIM, layout=lane_layout)
    dims = gl.arange(0, PADDED_DIM, layout=dim_layout)
    query = q_buffer.reshape([128, PADDED_DIM]).slice(CONSUMER * ROWS, ROWS)
    grad = grad_buffer.reshape([128, PADDED_DIM]).slice(CONSUMER * ROWS, ROWS)
    output = out_buffer.reshape([128, PADDED_DIM]).slice(CONSUMER * ROWS, ROWS)
    linear = linear_buffer.reshape([128, PADDED_DIM]).slice(CONSUMER * ROWS, ROWS)
    gate = gate_buffer.reshape([PADDED_DIM, PADDED_DIM])
    state = state_buffer.index(CONSUMER % STATES).reshape([PADDED_DIM, PADDED_DIM])
    # what dH is made of lies where queries and gradients lay, in the type of the states
    shares = view_as(q_buffer, state_dtype, [1, 1, 128, PADDED_DIM], tile_layout).reshape([128, PADDED_DIM])
    grads = view_as(grad_buffer, state_dtype, [1, 1, 128, PADDED_DIM], tile_layout).reshape([128, PADDED_DIM])
    own_grads = grads.slice(CONSUMER * ROWS, ROWS)
    # dQ and then dH leave from here: a state of its own is done with by then
    FIRST_ROW: gl.constexpr = 0 if STATES == 2 else HALF
    STATE_ROWS: gl.constexpr = PADDED_DIM if STATES == 2 else ROWS
    leaving = leaving_buffers.index(CONSUMER)
    state_layout: gl.constexpr = grad_state_desc.layout
    state_shape: gl.constexpr = [1, STATE_ROWS, PADDED_DIM]
    state_leaving = view_as(leaving, state_dtype, state_shape, state_layout)
    query_shape: gl.constexpr = [STATE_ROWS // ROWS, 1, 1, ROWS, PADDED_DIM]
    query_leaving = view_as(leaving, dtype, query_shape, tile_layout).index(0)

    turn = 0
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        query_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        batch_head = (batch * num_heads + head).to(gl.int64)
        first = query_tile * 128 + CONSUMER * ROWS
        rows = first + row_lanes
        block = first // BLOCK_Q
        state_row = batch_head * state_rows + gl.minimum(block, state_rows - 1)

        mbarrier.wait(grad_full, turn & 1)
        zero = gl.zeros([ROWS, PADDED_DIM], gl.float32, layout)
        # [queries, out] x [out, in]
        grad_linear = warpgroup_mma(grad, gate, zero, use_acc=False, is_async=True)
        grad_rows = grad.load(layout).to(gl.float32)
        mbarrier.wait(outputs_full, turn & 1)
        delta = gl.sum(grad_rows * output.load(layout).to(gl.float32), 1)
        if HAS_BIAS:
            shift = load_row(bias + head * stride_bh, dims, HEAD_DIM, PADDED_DIM).to(gl.float32)
            delta -= gl.sum(grad_rows * shift[None, :], 1)
        grad_linear = warpgroup_mma_wait(0, deps=(grad_linear,))
        linear_delta = gl.sum(grad_linear * linear.load(layout).to(gl.float32), 1)
        delta -= linear_delta
        own_grads.store(grad_linear.to(state_dtype))
        fence_async_shared()
        mbarrier.arrive(outputs_empty, count=1)
        mbarrier.wait(full, turn & 1)
        # [queries, in] x [in, dims]
        grad_phi = warpgroup_mma(own_grads, state.permute((1, 0)), zero, use_acc=False, is_async=True)

        row_lse = gl.load(lse + batch_head * num_queries + rows, mask=rows < num_queries, other=float("inf"))
        # a query without a key: every score is -inf
        row_lse = gl.where(row_lse == float("-inf"), 0.0, row_lse * LOG2E)
        row_statistics = statistics + batch_head * 2 * row_pitch + rows
        gl.store(row_statistics, row_lse, mask=rows < row_pitch)
        scaled = gl.where(rows < num_queries, delta * scale, 0.0)
        gl.store(row_statistics + row_pitch, scaled, mask=rows < row_pitch)

        own = query.load(layout).to(gl.float32)
        phi = map_features(own, HEAD_DIM, PADDED_DIM, FEATURE_MAP, layout)
        normalizer = load_row(normalizers + state_row * HEAD_DIM, dims, HEAD_DIM, PADDED_DIM)
        inverse = reciprocal_or_zero(gl.sum(phi * normalizer[None, :], 1))
        grad_phi = warpgroup_mma_wait(0, deps=(grad_phi,))
        grad_phi = (grad_phi - linear_delta[:, None] * normalizer[None, :]) * inverse[:, None]
        grad_query = feature_map_backward(own, phi, grad_phi, FEATURE_MAP)
        tma.store_wait(0)
        query_leaving.reshape([ROWS, PADDED_DIM]).store(grad_query.to(dtype))
        fence_async_shared()
        store_tile(grad_q_desc, [batch, head, first, 0], query_leaving)

        share = phi * inverse[:, None]
        own_shares = shares.slice(CONSUMER * ROWS, ROWS)
        own_shares.store(share.to(state_dtype))
        # half of the dimensions at a time: that halves what a sum over warps takes of shared memory
        halves = (share * linear_delta[:, None]).reshape([ROWS, 2, HALF_DIM]).permute((0, 2, 1))
        first_half, second_half = gl.split(halves)
        first_half = gl.convert_layout(-gl.sum(first_half, 0), lane_layout)
        second_half = gl.convert_layout(-gl.sum(second_half, 0), lane_layout)
        if STATES == 2:
            fence_async_shared()
            # [dims, queries] x [queries, in]
            whole = gl.zeros([PADDED_DIM, PADDED_DIM], gl.float32, layout)
            grad_state = warpgroup_mma(own_shares.permute((1, 0)), own_grads, whole, use_acc=False, is_async=True)
            slot = batch_head * slots + block
            there = block < slots
        else:
            if CONSUMER == 1:
                sums.slice(0, HALF_DIM).store(first_half)
                sums.slice(HALF_DIM, HALF_DIM).store(second_half)
            fence_async_shared()
            mbarrier.arrive(joint, count=1)
            mbarrier.wait(joint, turn & 1)
            if CONSUMER == 0:
                first_half += sums.slice(0, HALF_DIM).load(lane_layout)
                second_half += sums.slice(HALF_DIM, HALF_DIM).load(lane_layout)
            slot = batch_head * slots + query_tile
            there = slot >= 0  # every tile of a block of 128 or more is
            # [dims, queries] x [queries, in]
            left = shares.slice(HALF, 64, dim=1).permute((1, 0))
            grad_state = warpgroup_mma(left, grads, zero, use_acc=False, is_async=True)
        if STATES == 2 or CONSUMER == 0:
            line = grad_normalizers + slot * HEAD_DIM
            gl.store(line + lanes, first_half, mask=(lanes < HEAD_DIM) & there)
            gl.store(line + HALF_DIM + lanes, second_half, mask=(HALF_DIM + lanes < HEAD_DIM) & there)
        tma.store_wait(0)
        grad_state = warpgroup_mma_wait(0, deps=(grad_state,))
        state_leaving.reshape([STATE_ROWS, PADDED_DIM]).store(grad_state.to(state_dtype))
        fence_async_shared()
        if there:
            store_tile(grad_state_desc, [slot.to(gl.int32), FIRST_ROW, 0], state_leaving)
        if STATES == 2:
            tma.store_wait(0)
        mbarrier.arrive(empty, count=1)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "row_pitch", "total_tiles", "tiles_per_head", "state_rows", "slots"])
def linear_kernel(
    q_desc,
    grad_desc,
    out_desc,
    linear_desc,
    state_desc,
    gate_desc,
    grad_q_desc,
    grad_state_desc,
    lse,
    bias,
    normalizers,
    statistics,
    grad_normalizers,
    scale,
    stride_bh,
    num_queries,
    row_pitch,
    total_tiles,
    tiles_per_head,
    num_heads,
    state_rows,
    gate_heads,
    slots,
    BLOCK_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BESIDE: gl.constexpr,
):
    start_beside(BESIDE)
    STATES: gl.constexpr = 2 if BLOCK_Q == 64 else 1
    q_buffer = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    grad_buffer = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    out_buffer = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    linear_buffer = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    state_buffer = gl.allocate_shared_memory(
        state_desc.dtype, [STATES] + state_desc.block_type.shape, state_desc.layout
    )
    gate_buffer = gl.allocate_shared_memory(gate_desc.dtype, gate_desc.block_type.shape, gate_desc.layout)
    outputs_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    outputs_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    grad_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(outputs_full, count=1)
    mbarrier.init(outputs_empty, count=2)
    mbarrier.init(grad_full, count=1)
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=2)
    if STATES == 2:
        # two states leave no room for what two blocks have no use for
        sums = full
        joint = full
        leaving_buffers = state_buffer
    else:
        sums = gl.allocate_shared_memory(gl.float32, [PADDED_DIM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        joint = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(joint, count=2)
        leaving_buffers = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, PADDED_DIM], q_desc.layout)
    fence_async_shared()
    all_threads()
    buffers = (q_buffer, grad_buffer, out_buffer, linear_buffer, state_buffer, gate_buffer, sums, leaving_buffers)
    barriers = (outputs_full, outputs_empty, grad_full, full, empty, joint)
    extents = (total_tiles, tiles_per_head, num_heads, state_rows, gate_heads, slots)
    descriptors = (q_desc, grad_desc, out_desc, linear_desc, state_desc, gate_desc)
    gl.warp_specialize(
        [
            (linear_consumer, (
                buffers, barriers, lse, bias, normalizers, grad_q_desc, statistics, grad_state_desc, grad_normalizers,
                scale, stride_bh, num_queries, row_pitch, extents, 0, BLOCK_Q, HEAD_DIM, PADDED_DIM, FEATURE_MAP,
                HAS_BIAS,
            )),
            (linear_consumer, (
                buffers, barriers, lse, bias, normalizers, grad_q_desc, statistics, grad_state_desc, grad_normalizers,
                scale, stride_bh, num_queries, row_pitch, extents, 1, BLOCK_Q, HEAD_DIM, PADDED_DIM, FEATURE_MAP,
                HAS_BIAS,
            )),
            (linear_producer, (descriptors, buffers, barriers, extents, BLOCK_Q)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
    end_beside(BESIDE)


def linear_backward(
    upstream: Upstream,
    inputs: KernelInputs,
    linear: LinearStates,
    options: BackwardOptions,
    runs_beside: bool = False,
) -> tuple[QueryGradients, LinearStates]:
    """As `Steps.linear_backward` with a linear branch."""
    grad_out, out, linear_out, lse = upstream
    q, _, _, gate, bias, _ = inputs
    assert gate is not None, "a linear branch has a gate"
    block_q = options.block_q
    batch, heads, queries, head_dim = q.shape
    rows = ceil_div(queries, block_q)
    tiles_per_head = ceil_div(rows * block_q, 128)
    slots = rows * max(1, block_q // 128)
    total = tiles_per_head * batch * heads
    dq = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    statistics = torch.empty((batch, heads, 2, rows * block_q), dtype=torch.float32, device=q.device)
    grad_states = linear.states.new_empty(batch, heads, slots, *linear.states.shape[3:])
    grads = LinearStates(grad_states, statistics.new_empty(batch, heads, slots, head_dim))
    if bias is not None and not bias.is_contiguous():
        # a handful of numbers; a stride of its own would cost the kernel registers, which now follows the copy's
        bias, runs_beside = bias.contiguous(), False
    linear_kernel[(min(total, multiprocessors(q.device.index)),)](
        tile_descriptor(q, 128),
        tile_descriptor(grad_out, 128),
        tile_descriptor(out, 128),
        tile_descriptor(linear_out, 128),
        matrix_descriptor(linear.states, head_dim),
        matrix_descriptor(gate, head_dim),
        tile_descriptor(dq, 64),
        matrix_descriptor(grads.states, head_dim, None if block_q == 64 else 64),
        lse,
        bias if bias is not None else q,
        linear.normalizers,
        statistics,
        grads.normalizers,
        options.scale,
        head_stride(bias, 1),
        queries,
        statistics.shape[3],
        total,
        tiles_per_head,
        heads,
        linear.states.shape[2],
        gate.shape[0] if gate.dim() == 3 else 1,
        slots,
        BLOCK_Q=block_q,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        FEATURE_MAP=options.feature_map,
        HAS_BIAS=bias is not None,
        num_warps=4,
        maxnreg=168,
        **beside(runs_beside),
    )
    return QueryGradients(dq, statistics, complete=True, started=True), grads
