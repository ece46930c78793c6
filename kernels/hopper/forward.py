"""The forward attention kernel for Hopper, written in Gluon: one producer warp, one or two consumer warpgroups.

The arithmetic is that of ``triton/forward.py``. The producer warp walks the critical lists and keeps rings of key
and value tiles filled by TMA; each consumer warpgroup owns 64 queries. While a warpgroup's softmax of one tile
runs, its product P V of the tile before and the next Q K^T are in flight (FlashAttention-3, arXiv 2407.08608,
section 3.2). Programs are persistent: the producer reads ahead over the end of a tile of queries.
"""

from __future__ import annotations

from dataclasses import dataclass

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

from ..steps import BlockLists, KernelInputs, LinearStates, VirtualKeys
from ..triton.overlap import beside, start_beside, wait_for_kernel_before
from ..triton.primitives import LOG2E, bias_pitch
from ..triton.tiles import ceil_div, head_stride
from .primitives import (
    all_threads,
    edge_blocks,
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
    vectors_descriptor,
    view_as,
)

__all__ = ["attention_forward", "virtual_forward"]


@dataclass(frozen=True)
class HopperLaunch:
    """How the kernel is launched, and what a program of it has in shared memory."""

    tile_q: int
    """Queries of one program, 64 for each consumer warpgroup."""
    tile_k: int
    """Keys of a tile, a block or part of one."""
    stages: int
    """Tiles in the ring of keys, and in that of values."""
    matrices_in_rings: bool
    """Whether state and gate come through the rings too; if not, they have a buffer of their own."""
    outputs: int
    """Buffers of each consumer for tiles of output on their way out; 0: they leave from where the queries were."""
    registers: int
    """Registers of a thread."""
    programs: int
    """Programs on one multiprocessor."""


def hopper_launch(block_q: int, block_k: int, padded: int) -> HopperLaunch:
    """Two consumers share the lists of a block of 128 queries; a block of 64 has one, and two programs fit.

    A tile of keys that is smaller than a matrix leaves it a buffer of its own, and less room for outputs. Above 128
    columns a matrix comes through the rings in parts of 64 columns, each as large as a tile of 64 keys.
    """
    if padded > 128:
        consumers = 2 if block_q % 128 == 0 else 1
        return HopperLaunch(
            tile_q=64 * consumers,
            tile_k=64,
            stages=2,
            matrices_in_rings=True,
            outputs=0,
            registers=168 if consumers == 2 else 240,
            programs=1,
        )
    narrow = padded * block_k <= 64 * 128
    in_rings = block_k >= padded
    if block_q % 128 == 0:
        return HopperLaunch(
            tile_q=128,
            tile_k=block_k,
            stages=4 if narrow else 2,
            matrices_in_rings=in_rings,
            outputs=2 if in_rings else 1,
            registers=168,
            programs=1,
        )
    return HopperLaunch(
        tile_q=64,
        tile_k=block_k,
        stages=2 if narrow else 1,
        matrices_in_rings=in_rings,
        outputs=2 if in_rings else 0,
        registers=128,
        programs=2,
    )


@gluon.jit
def first_matrix(buffer, dtype: gl.constexpr, layout: gl.constexpr):
    """The matrix [1, dims, dims] that a tile [1, 1, rows, dims] of a ring begins with."""
    dims: gl.constexpr = buffer.type.shape[3]
    shape: gl.constexpr = [buffer.type.shape[2] // dims, 1, dims, dims]
    return view_as(buffer, dtype, shape, layout).index(0)


@gluon.jit
def columns_of_matrix(buffer, dtype: gl.constexpr):
    """64 columns of a matrix [1, dims, 64] in the place of a tile [1, 1, 64, dims]."""
    shape: gl.constexpr = [1, buffer.type.shape[3], 64]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    return view_as(buffer, dtype, shape, layout)


@gluon.jit
def tiles_in_list(row_list, count, num_keys, PARTS: gl.constexpr, TILE_K: gl.constexpr):
    """Tiles of keys in a list of ``count`` blocks, without those of the last block that begin past the last key."""
    last = gl.load(row_list + count - 1)
    return count * PARTS - gl.maximum((last + 1) * PARTS - gl.cdiv(num_keys, TILE_K), 0)


@gluon.jit
def features_in_place(
    tile, normalizer, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, FEATURE_MAP: gl.constexpr, layout: gl.constexpr
):
    """phi of the rows in ``tile`` [ROWS, dims] in their place, as bfloat16, and phi times the ``normalizer``. 64
    columns at a time, which takes few registers."""
    PADDED_DIM: gl.constexpr = tile.type.shape[1]
    PARTS: gl.constexpr = PADDED_DIM // 64
    shape: gl.constexpr = [ROWS, PADDED_DIM]
    phi_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)
    features = view_as(tile, gl.bfloat16, shape, phi_layout)
    lanes = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    largest = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.zeros([ROWS], gl.float32, row_layout)
    if FEATURE_MAP == "softmax":
        for part in gl.static_range(PARTS):
            x = tile.slice(part * 64, 64, dim=1).load(layout).to(gl.float32)
            if part * 64 + 64 > HEAD_DIM:
                x = gl.where((part * 64 + lanes < HEAD_DIM)[None, :], x, float("-inf"))
            largest = gl.maximum(largest, gl.max(x, 1))
        for part in gl.static_range(PARTS):
            x = tile.slice(part * 64, 64, dim=1).load(layout).to(gl.float32)
            if part * 64 + 64 > HEAD_DIM:
                x = gl.where((part * 64 + lanes < HEAD_DIM)[None, :], x, float("-inf"))
            total += gl.sum(gl.exp2((x - largest[:, None]) * LOG2E), 1)
        total = 1.0 / total
    denominator = gl.zeros([ROWS], gl.float32, row_layout)
    for part in gl.static_range(PARTS):
        x = tile.slice(part * 64, 64, dim=1).load(layout).to(gl.float32)
        dims = part * 64 + lanes
        if FEATURE_MAP == "softmax":
            phi = gl.exp2((x - largest[:, None]) * LOG2E) * total[:, None]
        elif FEATURE_MAP == "elu":
            phi = gl.where(x > 0, x + 1.0, gl.exp2(gl.minimum(x, 0.0) * LOG2E))
        else:
            phi = gl.maximum(x, 0.0)
        if part * 64 + 64 > HEAD_DIM:
            phi = gl.where((dims < HEAD_DIM)[None, :], phi, 0.0)
            weight = gl.load(normalizer + dims, mask=dims < HEAD_DIM, other=0.0)
        else:
            weight = gl.load(normalizer + dims)
        denominator += gl.sum(phi * weight[None, :], 1)
        features.slice(part * 64, 64, dim=1).store(phi.to(gl.bfloat16))
    return features, denominator


@gluon.jit
def forward_producer(
    descriptors,
    buffers,
    barriers,
    lists,
    counts,
    mask,
    extents,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    MATRICES_IN_RINGS: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
    HAS_VIRTUAL: gl.constexpr,
    HAS_COUNTS: gl.constexpr,
    HAS_MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    GROUP: gl.constexpr,
    BESIDE: gl.constexpr,
):
    q_desc, k_desc, v_desc, state_desc, gate_desc, virtual_k_desc, virtual_v_desc = descriptors
    q_buffers, k_ring, v_ring, matrix_buffer, _out_buffers = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, matrix_full, matrix_empty = barriers
    num_rows, total_tiles, tiles_per_head, num_heads, list_width, state_rows, gate_heads, num_virtual = extents
    STAGES: gl.constexpr = k_ring.type.shape[0]
    CONSUMERS: gl.constexpr = TILE_Q // 64
    PARTS: gl.constexpr = BLOCK_K // TILE_K
    PADDED_DIM: gl.constexpr = k_ring.type.shape[4]

    filled = 0
    turn = 0
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        query_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        key_head = head // GROUP
        row = query_tile * TILE_Q // BLOCK_Q
        line = (batch * num_heads + head) * num_rows + row
        row_list = lists + line.to(gl.int64) * list_width
        count = list_width
        if HAS_COUNTS:
            count = gl.load(counts + line)
        if HAS_MASK:
            bias_ring, bias_desc, partial, bias_rows = mask
            bias_row = gl.minimum(batch, bias_rows - 1)
            biased = gl.maximum(gl.load(partial + line), 1)
            # a row without a key takes block 0, which weighs nothing
            block = gl.load(row_list + gl.maximum(count - 1, 0), mask=count > 0, other=0)
            count = gl.maximum(count, 1)
        else:
            if CAUSAL:
                _first, _edge, unseen = edge_blocks(query_tile * TILE_Q, row, mask[0], BLOCK_Q, TILE_Q, TILE_K)
                count -= unseen
            if PARTS > 1:
                count = tiles_in_list(row_list, count, mask[0], PARTS, TILE_K)
            block = gl.load(row_list + (count - 1) // PARTS)

        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(consumer), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(consumer), q_desc.block_type.nbytes)
            at = [batch, head, query_tile * TILE_Q + consumer * 64, 0]
            load_tile(q_desc, at, q_full.index(consumer), q_buffers.index(consumer))
        turn += 1
        for step in range(count):
            start = block * BLOCK_K + (count - 1 - step) % PARTS * TILE_K
            # from the last block to the first, so that partial ones come first; read one ahead
            block = gl.load(row_list + gl.maximum(count - 2 - step, 0) // PARTS)
            index = filled % STAGES
            phase = (filled // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(index), phase)
            if HAS_MASK:
                if step < biased:
                    mbarrier.expect(k_full.index(index), k_desc.block_type.nbytes + bias_desc.block_type.nbytes)
                    load_tile(bias_desc, [bias_row, start], k_full.index(index), bias_ring.index(index))
                else:
                    mbarrier.expect(k_full.index(index), k_desc.block_type.nbytes)
            else:
                mbarrier.expect(k_full.index(index), k_desc.block_type.nbytes)
            load_tile(k_desc, [batch, key_head, start, 0], k_full.index(index), k_ring.index(index))
            mbarrier.wait(v_empty.index(index), phase)
            mbarrier.expect(v_full.index(index), v_desc.block_type.nbytes)
            load_tile(v_desc, [batch, key_head, start, 0], v_full.index(index), v_ring.index(index))
            filled += 1
        if HAS_VIRTUAL:
            for start in range(0, num_virtual, TILE_K):
                index = filled % STAGES
                phase = (filled // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(index), phase)
                mbarrier.expect(k_full.index(index), virtual_k_desc.block_type.nbytes)
                load_tile(virtual_k_desc, [batch, key_head, start, 0], k_full.index(index), k_ring.index(index))
                mbarrier.wait(v_empty.index(index), phase)
                mbarrier.expect(v_full.index(index), virtual_v_desc.block_type.nbytes)
                load_tile(virtual_v_desc, [batch, key_head, start, 0], v_full.index(index), v_ring.index(index))
                filled += 1
            if MATRICES_IN_RINGS:
                index = filled % STAGES
                phase = (filled // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(index), phase)
                mbarrier.expect(k_full.index(index), state_desc.block_type.nbytes)
                slope_dtype: gl.constexpr = state_desc.dtype
                slope_layout: gl.constexpr = state_desc.layout
                slope = first_matrix(k_ring.index(index), slope_dtype, slope_layout)
                load_tile(state_desc, [line, 0, 0], k_full.index(index), slope)
                # nothing for the ring of values, which goes in step
                mbarrier.wait(v_empty.index(index), phase)
                mbarrier.arrive(v_full.index(index), count=1)
                filled += 1
            else:
                mbarrier.wait(matrix_empty, turn & 1)
                mbarrier.expect(matrix_full, state_desc.block_type.nbytes)
                load_tile(state_desc, [line, 0, 0], matrix_full, matrix_buffer)
        if HAS_LINEAR:
            wait_for_kernel_before(BESIDE)
            state_row = (batch * num_heads + head) * state_rows + gl.minimum(row, state_rows - 1)
            gate_row = gl.minimum(head, gate_heads - 1)
            # states are bfloat16 beside float16 inputs
            dtype: gl.constexpr = gate_desc.dtype
            state_dtype: gl.constexpr = state_desc.dtype
            layout: gl.constexpr = gate_desc.layout
            if PADDED_DIM > 128:
                for part in range(gl.cdiv(HEAD_DIM, 64)):
                    index = filled % STAGES
                    phase = (filled // STAGES & 1) ^ 1
                    mbarrier.wait(k_empty.index(index), phase)
                    mbarrier.expect(k_full.index(index), state_desc.block_type.nbytes)
                    state = columns_of_matrix(k_ring.index(index), state_dtype)
                    load_tile(state_desc, [state_row, 0, part * 64], k_full.index(index), state)
                    mbarrier.wait(v_empty.index(index), phase)
                    mbarrier.expect(v_full.index(index), gate_desc.block_type.nbytes)
                    gate = columns_of_matrix(v_ring.index(index), dtype)
                    load_tile(gate_desc, [gate_row, 0, part * 64], v_full.index(index), gate)
                    filled += 1
            elif MATRICES_IN_RINGS:
                index = filled % STAGES
                phase = (filled // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(index), phase)
                mbarrier.expect(k_full.index(index), state_desc.block_type.nbytes)
                state = first_matrix(k_ring.index(index), state_dtype, layout)
                load_tile(state_desc, [state_row, 0, 0], k_full.index(index), state)
                mbarrier.wait(v_empty.index(index), phase)
                mbarrier.expect(v_full.index(index), gate_desc.block_type.nbytes)
                gate = first_matrix(v_ring.index(index), dtype, layout)
                load_tile(gate_desc, [gate_row, 0, 0], v_full.index(index), gate)
                filled += 1
            else:
                # two matrices a tile: the phases are the same every time
                mbarrier.wait(matrix_empty, 1)
                mbarrier.expect(matrix_full, state_desc.block_type.nbytes)
                load_tile(state_desc, [state_row, 0, 0], matrix_full, matrix_buffer)
                mbarrier.wait(matrix_empty, 0)
                mbarrier.expect(matrix_full, gate_desc.block_type.nbytes)
                shape: gl.constexpr = gate_desc.block_type.shape
                load_tile(gate_desc, [gate_row, 0, 0], matrix_full, view_as(matrix_buffer, dtype, shape, layout))


@gluon.jit
def load_bias(buffer, TILE_K: gl.constexpr, layout: gl.constexpr):
    """The bias of a tile's logits in base 2, from shared memory that may then be filled again."""
    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bias = view_as(buffer, gl.float32, [TILE_K], vector_layout).load(layout)
    fence_async_shared()
    return bias * LOG2E


@gluon.jit
def hide_later_keys(scores, ahead, layout: gl.constexpr):
    """-inf where a key comes after its query, of a tile whose first query is ``ahead`` of its first key."""
    rows = gl.arange(0, scores.shape[0], layout=gl.SliceLayout(1, layout))
    keys = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, layout))
    return gl.where((ahead + rows)[:, None] >= keys[None, :], scores, float("-inf"))


@gluon.jit
def forward_step(
    accumulator, operand, running_max, running_sum, critical_sum, query, rings, barriers, taken, scale_log2, added,
    ahead, HAS_ADDED: gl.constexpr, FROM_RING: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The P V of the tile before, whose P is ``operand``, and the softmax of the next, to whose logits in base 2
    ``added`` is added, or the bias in the ring ``added``; ``critical_sum`` is rescaled as the sum is. Causal, the first
    query is ``ahead`` of the next tile's first key, and a row may have had no key so far."""
    k_ring, v_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, matrix_full, matrix_empty = barriers
    STAGES: gl.constexpr = k_ring.type.shape[0]
    TILE_K: gl.constexpr = k_ring.type.shape[3]
    ROWS: gl.constexpr = accumulator.shape[0]
    PADDED_DIM: gl.constexpr = accumulator.shape[1]
    dtype: gl.constexpr = k_ring.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 16])
    out_row_layout: gl.constexpr = gl.SliceLayout(1, accumulator.type.layout)
    weights_layout: gl.constexpr = operand.type.layout
    index = taken % STAGES
    phase = taken // STAGES & 1
    next_index = (taken + 1) % STAGES
    next_phase = (taken + 1) // STAGES & 1
    zero_scores = gl.zeros([ROWS, TILE_K], gl.float32, scores_layout)
    mbarrier.wait(k_full.index(next_index), next_phase)
    key = k_ring.index(next_index).reshape([TILE_K, PADDED_DIM])
    scores = warpgroup_mma(query, key.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(index), phase)
    value = v_ring.index(index).reshape([TILE_K, PADDED_DIM])
    accumulating = warpgroup_mma(operand, value, accumulator, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    if FROM_RING:
        added = load_bias(added.index(next_index), TILE_K, gl.SliceLayout(0, scores_layout))
    mbarrier.arrive(k_empty.index(next_index), count=1)
    shift = running_max
    if HAS_ADDED:
        scores = scores * scale_log2 + added[None, :]
        new_max = gl.maximum(running_max, gl.max(scores, 1))
        weights = gl.exp2(scores - new_max[:, None])
    elif CAUSAL:
        scores = hide_later_keys(scores, ahead, scores_layout)
        new_max = gl.maximum(running_max, gl.max(scores, 1) * scale_log2)
        shift = gl.where(new_max == float("-inf"), 0.0, new_max)
        weights = gl.exp2(scores * scale_log2 - shift[:, None])
    else:
        new_max = gl.maximum(running_max, gl.max(scores, 1) * scale_log2)
        weights = gl.exp2(scores * scale_log2 - new_max[:, None])
    if CAUSAL:
        rescale = gl.exp2(running_max - shift)
    else:
        rescale = gl.exp2(running_max - new_max)
    running_sum = running_sum * rescale + gl.sum(weights, 1)
    critical_sum = critical_sum * rescale
    accumulator, operand = warpgroup_mma_wait(0, deps=(accumulating, operand))
    mbarrier.arrive(v_empty.index(index), count=1)
    accumulator = accumulator * gl.convert_layout(rescale, out_row_layout)[:, None]
    # only now, so that the 16-bit tile before is no longer in registers
    operand = gl.convert_layout(weights.to(dtype), weights_layout)
    return accumulator, operand, new_max, running_sum, critical_sum


@gluon.jit
def forward_consumer(
    buffers,
    barriers,
    lists,
    counts,
    normalizers,
    bias,
    virtual_bias,
    mask,
    out_desc,
    linear_desc,
    lse,
    shares,
    scale_log2,
    stride_bh,
    num_queries,
    num_keys,
    extents,
    CONSUMER: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    MATRICES_IN_RINGS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
    HAS_VIRTUAL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_COUNTS: gl.constexpr,
    HAS_MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    BESIDE: gl.constexpr,
):
    q_buffers, k_ring, v_ring, matrix_buffer, out_buffers = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, matrix_full, matrix_empty = barriers
    num_rows, total_tiles, tiles_per_head, num_heads, list_width, state_rows, gate_heads, num_virtual = extents
    ROWS: gl.constexpr = 64
    STAGES: gl.constexpr = k_ring.type.shape[0]
    dtype: gl.constexpr = k_ring.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    dim_layout: gl.constexpr = gl.SliceLayout(0, out_layout)
    key_lanes = gl.arange(0, TILE_K, layout=gl.SliceLayout(0, scores_layout))
    row_lanes = gl.arange(0, ROWS, layout=out_row_layout)
    dims = gl.arange(0, PADDED_DIM, layout=dim_layout)
    lanes = gl.arange(0, TILE_K, layout=gl.BlockedLayout([1], [32], [4], [0]))
    query = q_buffers.index(CONSUMER).reshape([ROWS, PADDED_DIM])
    rings = (k_ring, v_ring)
    # without buffers of their own, outputs leave from where the queries were
    leaving = q_buffers.index(CONSUMER) if OUTPUTS == 0 else out_buffers.index(CONSUMER * OUTPUTS)
    linear_leaving = q_buffers.index(CONSUMER) if OUTPUTS == 0 else out_buffers.index((CONSUMER + 1) * OUTPUTS - 1)
    # stores that may still be reading when the next is made, which has another buffer
    PENDING: gl.constexpr = 1 if HAS_LINEAR and OUTPUTS == 2 else 0
    matrix_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, PADDED_DIM, PADDED_DIM], dtype)
    PARTS: gl.constexpr = BLOCK_K // TILE_K

    taken = 0
    turn = 0
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        query_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        batch_head = (batch * num_heads + head).to(gl.int64)
        row = query_tile * TILE_Q // BLOCK_Q
        line = batch_head * num_rows + row
        count = list_width
        if HAS_COUNTS:
            count = gl.load(counts + line)
        if HAS_MASK:
            bias_ring, _bias_desc, partial, _bias_rows = mask
            biased = gl.maximum(gl.load(partial + line), 1)
            count = gl.maximum(count, 1)
        elif CAUSAL:
            edge_block, edge, unseen = edge_blocks(query_tile * TILE_Q, row, num_queries, BLOCK_Q, TILE_Q, TILE_K)
            count -= unseen
            # of the block that is last on the diagonal, which comes first
            ahead = query_tile * TILE_Q + CONSUMER * ROWS - (edge_block + edge - 1) * TILE_K
        else:
            row_list = lists + line * list_width
            if PARTS > 1:
                count = tiles_in_list(row_list, count, num_keys, PARTS, TILE_K)
            first_start = gl.load(row_list + (count - 1) // PARTS) * BLOCK_K + (count - 1) % PARTS * TILE_K

        mbarrier.wait(q_full.index(CONSUMER), turn & 1)
        turn += 1
        index = taken % STAGES
        phase = taken // STAGES & 1
        mbarrier.wait(k_full.index(index), phase)
        zero_scores = gl.zeros([ROWS, TILE_K], gl.float32, scores_layout)
        key = k_ring.index(index).reshape([TILE_K, PADDED_DIM])
        scores = warpgroup_mma(query, key.permute((1, 0)), zero_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if HAS_MASK:
            added = load_bias(bias_ring.index(index), TILE_K, gl.SliceLayout(0, scores_layout))
            mbarrier.arrive(k_empty.index(index), count=1)
            scores = scores * scale_log2 + added[None, :]
            running_max = gl.max(scores, 1)
            # a row without a key
            running_max = gl.where(running_max == float("-inf"), 0.0, running_max)
            weights = gl.exp2(scores - running_max[:, None])
        elif CAUSAL:
            mbarrier.arrive(k_empty.index(index), count=1)
            scores = hide_later_keys(scores, ahead, scores_layout)
            running_max = gl.max(scores, 1) * scale_log2
            # a row that has had no key so far
            weights = gl.exp2(scores * scale_log2 - gl.where(running_max == float("-inf"), 0.0, running_max)[:, None])
        else:
            mbarrier.arrive(k_empty.index(index), count=1)
            scores = gl.where((first_start + key_lanes < num_keys)[None, :], scores, float("-inf"))
            running_max = gl.max(scores, 1) * scale_log2
            weights = gl.exp2(scores * scale_log2 - running_max[:, None])
        running_sum = gl.sum(weights, 1)
        operand = gl.convert_layout(weights.to(dtype), weights_layout)
        accumulator = gl.zeros([ROWS, PADDED_DIM], gl.float32, out_layout)

        whole = count - 1
        if HAS_MASK:
            for _step in range(biased - 1):
                accumulator, operand, running_max, running_sum, _sum = forward_step(
                    accumulator, operand, running_max, running_sum, running_sum, query, rings, barriers, taken,
                    scale_log2, bias_ring, 0, True, True, False,
                )  # fmt: skip
                taken += 1
            whole = count - biased
        if CAUSAL:
            for step in range(1, edge):
                accumulator, operand, running_max, running_sum, _sum = forward_step(
                    accumulator, operand, running_max, running_sum, running_sum, query, rings, barriers, taken,
                    scale_log2, running_max, ahead + step * TILE_K, False, False, True,
                )  # fmt: skip
                taken += 1
            whole = count - edge
        for _step in range(whole):
            accumulator, operand, running_max, running_sum, _sum = forward_step(
                accumulator, operand, running_max, running_sum, running_sum, query, rings, barriers, taken, scale_log2,
                running_max, 0, False, False, False,
            )  # fmt: skip
            taken += 1
        # the part of the sum that critical keys have
        critical_sum = running_sum
        if HAS_VIRTUAL:
            row_bias = virtual_bias + line * bias_pitch(num_virtual)
            following = gl.load(row_bias + lanes, mask=lanes < num_virtual, other=float("-inf"))
            for start in range(0, num_virtual, TILE_K):
                added = gl.convert_layout(following * LOG2E, gl.SliceLayout(0, scores_layout))
                # one tile ahead, a number a thread
                columns = start + TILE_K + lanes
                following = gl.load(row_bias + columns, mask=columns < num_virtual, other=float("-inf"))
                accumulator, operand, running_max, running_sum, critical_sum = forward_step(
                    accumulator, operand, running_max, running_sum, critical_sum, query, rings, barriers, taken,
                    scale_log2, added, 0, True, False, False,
                )  # fmt: skip
                taken += 1
        index = taken % STAGES
        phase = taken // STAGES & 1

        if not HAS_LINEAR and not HAS_VIRTUAL and OUTPUTS > 0:
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        mbarrier.wait(v_full.index(index), phase)
        value = v_ring.index(index).reshape([TILE_K, PADDED_DIM])
        accumulator = warpgroup_mma(operand, value, accumulator, is_async=True)
        if HAS_LINEAR and PADDED_DIM <= 128:
            # beside the last product, as far as it needs no other
            wait_for_kernel_before(BESIDE)
            state_row = batch_head * state_rows + gl.minimum(row, state_rows - 1)
            normalizer = load_row(normalizers + state_row * HEAD_DIM, dims, HEAD_DIM, PADDED_DIM)
            if HAS_BIAS:
                shift = load_row(bias + head * stride_bh, dims, HEAD_DIM, PADDED_DIM)
            own = query.load(out_layout).to(gl.float32)
            if OUTPUTS > 0:
                fence_async_shared()
                mbarrier.arrive(q_empty.index(CONSUMER), count=1)
            phi = map_features(own, HEAD_DIM, PADDED_DIM, FEATURE_MAP, out_layout)
            inverse = reciprocal_or_zero(gl.sum(phi * normalizer[None, :], 1))
            phi_operand = gl.convert_layout(phi.to(gl.bfloat16), weights_layout)
        accumulator, operand = warpgroup_mma_wait(0, deps=(accumulator, operand))
        mbarrier.arrive(v_empty.index(index), count=1)
        taken += 1

        first = query_tile * TILE_Q + CONSUMER * ROWS
        inverse_sum = 1.0 / running_sum
        if HAS_MASK:
            inverse_sum = gl.where(running_sum > 0.0, inverse_sum, 0.0)
        accumulator = accumulator * gl.convert_layout(inverse_sum, out_row_layout)[:, None]
        LN2: gl.constexpr = 0.6931471805599453
        row_lse = gl.convert_layout((running_max + gl.log2(running_sum)) * LN2, out_row_layout)
        rows = first + row_lanes
        gl.store(lse + batch_head * num_queries + rows, row_lse, mask=rows < num_queries)

        if HAS_VIRTUAL:
            own = query.load(out_layout).to(gl.float32)
            if OUTPUTS > 0:
                fence_async_shared()
                mbarrier.arrive(q_empty.index(CONSUMER), count=1)
            if HAS_MASK:
                share = gl.where(running_sum > 0.0, 1.0 - critical_sum * inverse_sum, 0.0)
            else:
                share = 1.0 - critical_sum / running_sum
            share = gl.convert_layout(share, out_row_layout)
            gl.store(shares + batch_head * num_queries + rows, share, mask=rows < num_queries)
            factor = share * (scale_log2 * LN2)
            weighed = gl.convert_layout((own * factor[:, None]).to(gl.bfloat16), weights_layout)
            if MATRICES_IN_RINGS:
                index = taken % STAGES
                slope_full, slope_empty, slope_phase = k_full.index(index), k_empty.index(index), taken // STAGES & 1
                slope = first_matrix(k_ring.index(index), gl.bfloat16, matrix_layout)
                mbarrier.wait(v_full.index(index), slope_phase)
                mbarrier.arrive(v_empty.index(index), count=1)
                taken += 1
            else:
                slope_full, slope_empty, slope_phase = matrix_full, matrix_empty, (turn & 1) ^ 1
                slope = matrix_buffer
            mbarrier.wait(slope_full, slope_phase)
            slope = slope.reshape([PADDED_DIM, PADDED_DIM])
            accumulating = warpgroup_mma(weighed, slope, accumulator, is_async=True)
            accumulator = warpgroup_mma_wait(0, deps=(accumulating,))
            mbarrier.arrive(slope_empty, count=1)
        if HAS_LINEAR and PADDED_DIM > 128:
            wait_for_kernel_before(BESIDE)
            state_row = batch_head * state_rows + gl.minimum(row, state_rows - 1)
            normalizer = normalizers + state_row * HEAD_DIM
            phi, denominator = features_in_place(query, normalizer, ROWS, HEAD_DIM, FEATURE_MAP, scores_layout)
            inverse = reciprocal_or_zero(denominator)
            # each thread's fence comes before any warp's product
            fence_async_shared()
            all_threads()
            part_leaving = out_buffers.index(CONSUMER)
            for part in range(gl.cdiv(HEAD_DIM, 64)):
                index = taken % STAGES
                phase = taken // STAGES & 1
                mbarrier.wait(k_full.index(index), phase)
                state = columns_of_matrix(k_ring.index(index), gl.bfloat16).reshape([PADDED_DIM, 64])
                linear = warpgroup_mma(phi, state, zero_scores, use_acc=False, is_async=True)
                linear = warpgroup_mma_wait(0, deps=(linear,))
                mbarrier.arrive(k_empty.index(index), count=1)
                linear = (linear * inverse[:, None]).to(dtype)
                tma.store_wait(0)
                part_leaving.reshape([ROWS, 64]).store(linear)
                fence_async_shared()
                store_tile(linear_desc, [batch, head, first, part * 64], part_leaving)
                linear_operand = gl.convert_layout(linear, weights_layout)
                mbarrier.wait(v_full.index(index), phase)
                gate = columns_of_matrix(v_ring.index(index), dtype).reshape([PADDED_DIM, 64])
                accumulating = warpgroup_mma(linear_operand, gate.permute((1, 0)), accumulator, is_async=True)
                accumulator = warpgroup_mma_wait(0, deps=(accumulating,))
                mbarrier.arrive(v_empty.index(index), count=1)
                taken += 1
        elif HAS_LINEAR:
            if MATRICES_IN_RINGS:
                index = taken % STAGES
                state_full, state_empty, state_phase = k_full.index(index), k_empty.index(index), taken // STAGES & 1
                gate_full, gate_empty, gate_phase = v_full.index(index), v_empty.index(index), state_phase
                state = first_matrix(k_ring.index(index), gl.bfloat16, matrix_layout)
                gate = first_matrix(v_ring.index(index), dtype, matrix_layout)
                taken += 1
            else:
                state_full, state_empty, state_phase = matrix_full, matrix_empty, 0
                gate_full, gate_empty, gate_phase = matrix_full, matrix_empty, 1
                state = matrix_buffer
                gate = view_as(matrix_buffer, dtype, [1, PADDED_DIM, PADDED_DIM], matrix_layout)
            mbarrier.wait(state_full, state_phase)
            state = state.reshape([PADDED_DIM, PADDED_DIM])
            zero = gl.zeros([ROWS, PADDED_DIM], gl.float32, out_layout)
            linear = warpgroup_mma(phi_operand, state, zero, use_acc=False, is_async=True)
            linear = warpgroup_mma_wait(0, deps=(linear,))
            mbarrier.arrive(state_empty, count=1)
            linear = (linear * inverse[:, None]).to(dtype)
            tma.store_wait(PENDING)
            linear_leaving.reshape([ROWS, PADDED_DIM]).store(linear)
            fence_async_shared()
            store_tile(linear_desc, [batch, head, first, 0], linear_leaving)
            mbarrier.wait(gate_full, gate_phase)
            linear_operand = gl.convert_layout(linear, weights_layout)
            gate = gate.reshape([PADDED_DIM, PADDED_DIM])
            accumulating = warpgroup_mma(linear_operand, gate.permute((1, 0)), accumulator, is_async=True)
            accumulator = warpgroup_mma_wait(0, deps=(accumulating,))
            mbarrier.arrive(gate_empty, count=1)
        if HAS_BIAS:
            if not HAS_LINEAR or PADDED_DIM > 128:
                shift = load_row(bias + head * stride_bh, dims, HEAD_DIM, PADDED_DIM)
            accumulator += shift.to(gl.float32)[None, :]
        tma.store_wait(PENDING)
        leaving.reshape([ROWS, PADDED_DIM]).store(accumulator.to(dtype))
        fence_async_shared()
        store_tile(out_desc, [batch, head, first, 0], leaving)
        if OUTPUTS == 0:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "bias_rows",
        "num_queries",
        "num_keys",
        "num_rows",
        "total_tiles",
        "list_width",
        "state_rows",
        "num_virtual",
    ]
)
def attention_forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    state_desc,
    gate_desc,
    virtual_k_desc,
    virtual_v_desc,
    lists,
    counts,
    normalizers,
    bias,
    virtual_bias,
    key_bias_desc,
    partial,
    bias_rows,
    out_desc,
    linear_desc,
    lse,
    shares,
    scale_log2,
    stride_bh,
    num_queries,
    num_keys,
    num_rows,
    total_tiles,
    tiles_per_head,
    num_heads,
    list_width,
    state_rows,
    gate_heads,
    num_virtual,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    MATRICES_IN_RINGS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
    HAS_LINEAR: gl.constexpr,
    HAS_VIRTUAL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_COUNTS: gl.constexpr,
    HAS_MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    GROUP: gl.constexpr,
    BESIDE: gl.constexpr,
):
    """With ``BESIDE`` it runs beside the kernel that sums normalizers: all but the linear branch is done meanwhile."""
    start_beside(BESIDE)
    CONSUMERS: gl.constexpr = TILE_Q // 64
    q_buffers = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    # what is not there is not touched
    HAS_MATRICES: gl.constexpr = (HAS_LINEAR or HAS_VIRTUAL) and not MATRICES_IN_RINGS
    matrix_buffer = q_buffers
    if HAS_MATRICES:
        matrix_buffer = gl.allocate_shared_memory(state_desc.dtype, state_desc.block_type.shape, state_desc.layout)
    out_buffers = q_buffers
    if OUTPUTS > 0:
        shape: gl.constexpr = [CONSUMERS * OUTPUTS] + q_desc.block_type.shape
        out_buffers = gl.allocate_shared_memory(q_desc.dtype, shape, q_desc.layout)
    elif HAS_LINEAR and PADDED_DIM > 128:
        part_shape: gl.constexpr = [CONSUMERS] + linear_desc.block_type.shape
        out_buffers = gl.allocate_shared_memory(linear_desc.dtype, part_shape, linear_desc.layout)
    bias_ring = k_ring
    if HAS_MASK:
        bias_ring = gl.allocate_shared_memory(
            gl.float32, [STAGES] + key_bias_desc.block_type.shape, key_bias_desc.layout
        )
    length = (num_queries,) if CAUSAL else (num_keys,) if BLOCK_K > TILE_K else ()
    mask = (bias_ring, key_bias_desc, partial, bias_rows) if HAS_MASK else length
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # `make_buffers` says why an unused barrier is not made
    matrix_full = q_full.index(0)
    matrix_empty = q_empty.index(0)
    if HAS_MATRICES:
        matrix_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        matrix_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(matrix_full, count=1)
        mbarrier.init(matrix_empty, count=CONSUMERS)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(consumer), count=1)
        mbarrier.init(q_empty.index(consumer), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    all_threads()

    buffers = (q_buffers, k_ring, v_ring, matrix_buffer, out_buffers)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, matrix_full, matrix_empty)
    extents = (num_rows, total_tiles, tiles_per_head, num_heads, list_width, state_rows, gate_heads, num_virtual)
    descriptors = (q_desc, k_desc, v_desc, state_desc, gate_desc, virtual_k_desc, virtual_v_desc)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (forward_consumer, (
                    buffers, barriers, lists, counts, normalizers, bias, virtual_bias, mask, out_desc, linear_desc,
                    lse, shares, scale_log2, stride_bh, num_queries, num_keys, extents, 0, BLOCK_Q, TILE_Q, BLOCK_K,
                    TILE_K, HEAD_DIM, PADDED_DIM, MATRICES_IN_RINGS, OUTPUTS, FEATURE_MAP, HAS_LINEAR, HAS_VIRTUAL,
                    HAS_BIAS, HAS_COUNTS, HAS_MASK, CAUSAL, BESIDE,
                )),
                (forward_producer, (
                    descriptors, buffers, barriers, lists, counts, mask, extents, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K,
                    HEAD_DIM, MATRICES_IN_RINGS, HAS_LINEAR, HAS_VIRTUAL, HAS_COUNTS, HAS_MASK, CAUSAL, GROUP,
                    BESIDE,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (forward_consumer, (
                    buffers, barriers, lists, counts, normalizers, bias, virtual_bias, mask, out_desc, linear_desc,
                    lse, shares, scale_log2, stride_bh, num_queries, num_keys, extents, 0, BLOCK_Q, TILE_Q, BLOCK_K,
                    TILE_K, HEAD_DIM, PADDED_DIM, MATRICES_IN_RINGS, OUTPUTS, FEATURE_MAP, HAS_LINEAR, HAS_VIRTUAL,
                    HAS_BIAS, HAS_COUNTS, HAS_MASK, CAUSAL, BESIDE,
                )),
                (forward_consumer, (
                    buffers, barriers, lists, counts, normalizers, bias, virtual_bias, mask, out_desc, linear_desc,
                    lse, shares, scale_log2, stride_bh, num_queries, num_keys, extents, 1, BLOCK_Q, TILE_Q, BLOCK_K,
                    TILE_K, HEAD_DIM, PADDED_DIM, MATRICES_IN_RINGS, OUTPUTS, FEATURE_MAP, HAS_LINEAR, HAS_VIRTUAL,
                    HAS_BIAS, HAS_COUNTS, HAS_MASK, CAUSAL, BESIDE,
                )),
                (forward_producer, (
                    descriptors, buffers, barriers, lists, counts, mask, extents, BLOCK_Q, TILE_Q, BLOCK_K, TILE_K,
                    HEAD_DIM, MATRICES_IN_RINGS, HAS_LINEAR, HAS_VIRTUAL, HAS_COUNTS, HAS_MASK, CAUSAL, GROUP,
                    BESIDE,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def attention_forward(
    inputs: KernelInputs,
    lists: BlockLists,
    linear: LinearStates | None,
    options: BackwardOptions,
    *,
    runs_beside: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `Steps.attention_forward`; without a mask every count is at least 1."""
    return _forward(inputs, lists, linear, None, options, runs_beside)


def virtual_forward(
    inputs: KernelInputs, lists: BlockLists, virtual: VirtualKeys, options: BackwardOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Steps.virtual_forward`: virtual keys come after the critical ones, in the same loop over tiles of keys."""
    out, _, lse = _forward(inputs, lists, None, virtual, options)
    return out, lse


def _forward(
    inputs: KernelInputs,
    lists: BlockLists,
    linear: LinearStates | None,
    virtual: VirtualKeys | None,
    options: BackwardOptions,
    runs_beside: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, gate, bias, weights = inputs
    block_q, block_k = options.block_q, options.block_k
    batch, heads, queries, head_dim = q.shape
    padded = padded_dim(head_dim)
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    linear_out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2) if linear is not None else q.new_empty(0)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    launch = hopper_launch(block_q, block_k, padded)
    tiles_per_head = ceil_div(queries, launch.tile_q)
    total = tiles_per_head * batch * heads
    programs = min(total, multiprocessors(q.device.index) * launch.programs)
    # a handful of numbers; a stride of its own would cost the kernel registers
    bias = bias.contiguous() if bias is not None else None
    # columns of matrices, and of the linear branch's output, that are handled at a time
    part = 64 if padded > 128 else padded
    states = linear.states if linear is not None else virtual.slopes if virtual is not None else None
    # an absent tensor's place is taken by one that is there; the kernel does not touch it
    attention_forward_kernel[(programs,)](
        tile_descriptor(q, 64),
        tile_descriptor(k, launch.tile_k),
        tile_descriptor(v, launch.tile_k),
        matrix_descriptor(states if states is not None else q, head_dim, columns=part),
        matrix_descriptor(gate if gate is not None else q, head_dim, columns=part),
        tile_descriptor(virtual.keys if virtual is not None else k, launch.tile_k),
        tile_descriptor(virtual.values if virtual is not None else v, launch.tile_k),
        lists.blocks,
        lists.counts if lists.counts is not None else lists.blocks,
        linear.normalizers if linear is not None else lse,
        bias if bias is not None else q,
        virtual.bias if virtual is not None else lse,
        # what is None is no parameter of the compiled kernel
        vectors_descriptor(weights.bias, block_k) if weights is not None else None,
        lists.partial,
        weights.bias.shape[0] if weights is not None else None,
        tile_descriptor(out, 64),
        tile_descriptor(linear_out if linear is not None else out, 64, part),
        lse,
        virtual.shares if virtual is not None else lse,
        options.scale * LOG2E.value,
        head_stride(bias, 1),
        queries,
        k.shape[2],
        ceil_div(queries, block_q),
        total,
        tiles_per_head,
        heads,
        lists.blocks.shape[3],
        linear.states.shape[2] if linear is not None else 1,
        gate.shape[0] if gate is not None and gate.dim() == 3 else 1,
        virtual.keys.shape[2] if virtual is not None else 0,
        BLOCK_Q=block_q,
        TILE_Q=launch.tile_q,
        BLOCK_K=block_k,
        TILE_K=launch.tile_k,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        STAGES=launch.stages,
        MATRICES_IN_RINGS=launch.matrices_in_rings,
        OUTPUTS=launch.outputs,
        FEATURE_MAP=options.feature_map,
        HAS_LINEAR=linear is not None,
        HAS_VIRTUAL=virtual is not None,
        HAS_BIAS=bias is not None,
        HAS_COUNTS=lists.counts is not None,
        HAS_MASK=weights is not None,
        CAUSAL=options.causal,
        GROUP=inputs.group,
        num_warps=4,
        maxnreg=launch.registers,
        # above 128 dimensions that was not tried
        **beside(runs_beside and padded <= 128),
    )
    return out, linear_out, lse
