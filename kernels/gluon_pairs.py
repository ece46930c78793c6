"""What the two backward kernels in Gluon share: the producer warp, its ring of pairs of tiles, the barriers."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .gluon_primitives import all_threads, load_tile, locate_tile

__all__ = ["make_buffers", "pair_producer", "statistics_descriptor"]


@gluon.jit
def pair_producer(
    descriptors,
    buffers,
    barriers,
    lists,
    counts,
    extents,
    BLOCK: gl.constexpr,
    TILE: gl.constexpr,
    LISTED_BLOCK: gl.constexpr,
    LISTED_TILE: gl.constexpr,
    HAS_MATRIX: gl.constexpr,
    HAS_STATISTICS: gl.constexpr,
):
    """Load a pair of own tiles (and a matrix), then a ring of pairs of tiles (and their rows' statistics) of the
    listed blocks."""
    own_a_desc, own_b_desc, listed_a_desc, listed_b_desc, matrix_desc, statistics_desc = descriptors
    own_a, own_b, ring_a, ring_b, matrix, statistics_ring = buffers
    own_full, own_empty, ring_full, ring_empty, matrix_full, matrix_empty = barriers
    num_lines, total_tiles, tiles_per_head, num_heads, list_width, matrix_rows = extents
    STAGES: gl.constexpr = ring_a.type.shape[0]
    PARTS: gl.constexpr = LISTED_BLOCK // LISTED_TILE

    filled = 0
    turn = 0
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        own_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        block = own_tile * TILE // BLOCK
        batch_head = batch * num_heads + head
        line = batch_head * num_lines + block
        listed = lists + line.to(gl.int64) * list_width
        count = gl.load(counts + line)
        entry = gl.load(listed, mask=count > 0, other=0)

        mbarrier.wait(own_empty, (turn & 1) ^ 1)
        mbarrier.expect(own_full, own_a_desc.block_type.nbytes + own_b_desc.block_type.nbytes)
        load_tile(own_a_desc, [batch, head, own_tile * TILE, 0], own_full, own_a)
        load_tile(own_b_desc, [batch, head, own_tile * TILE, 0], own_full, own_b)
        if HAS_MATRIX:
            mbarrier.wait(matrix_empty, (turn & 1) ^ 1)
            mbarrier.expect(matrix_full, matrix_desc.block_type.nbytes)
            matrix_row = batch_head * matrix_rows + gl.minimum(block, matrix_rows - 1)
            load_tile(matrix_desc, [matrix_row, 0, 0], matrix_full, matrix)
        turn += 1
        for step in range(count):
            first = entry * LISTED_BLOCK
            # read one ahead
            entry = gl.load(listed + gl.minimum(step + 1, count - 1))
            for part in gl.static_range(PARTS):
                start = first + part * LISTED_TILE
                index = filled % STAGES
                mbarrier.wait(ring_empty.index(index), (filled // STAGES & 1) ^ 1)
                full = ring_full.index(index)
                if HAS_STATISTICS:
                    mbarrier.expect(
                        full,
                        listed_a_desc.block_type.nbytes
                        + listed_b_desc.block_type.nbytes
                        + 2 * statistics_desc.block_type.nbytes,
                    )
                    for which in gl.static_range(2):
                        load_tile(
                            statistics_desc,
                            [batch_head * 2 + which, start],
                            full,
                            statistics_ring.index(index * 2 + which),
                        )
                else:
                    mbarrier.expect(full, listed_a_desc.block_type.nbytes + listed_b_desc.block_type.nbytes)
                load_tile(listed_a_desc, [batch, head, start, 0], full, ring_a.index(index))
                load_tile(listed_b_desc, [batch, head, start, 0], full, ring_b.index(index))
                filled += 1


@gluon.jit
def make_barrier_ring(STAGES: gl.constexpr, COUNT: gl.constexpr):
    ring = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ring.index(stage), count=COUNT)
    return ring


@gluon.jit
def make_buffers(own_desc, listed_desc, matrix_desc, statistics_desc, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Shared memory and barriers: two own tiles, a ring of pairs of listed tiles, one matrix."""
    own_a = gl.allocate_shared_memory(own_desc.dtype, own_desc.block_type.shape, own_desc.layout)
    own_b = gl.allocate_shared_memory(own_desc.dtype, own_desc.block_type.shape, own_desc.layout)
    ring_a = gl.allocate_shared_memory(listed_desc.dtype, [STAGES] + listed_desc.block_type.shape, listed_desc.layout)
    ring_b = gl.allocate_shared_memory(listed_desc.dtype, [STAGES] + listed_desc.block_type.shape, listed_desc.layout)
    matrix = gl.allocate_shared_memory(matrix_desc.dtype, matrix_desc.block_type.shape, matrix_desc.layout)
    statistics_ring = gl.allocate_shared_memory(
        gl.float32, [STAGES * 2] + statistics_desc.block_type.shape, statistics_desc.layout
    )
    own_full = make_barrier_ring(1, 1)
    own_empty = make_barrier_ring(1, CONSUMERS)
    ring_full = make_barrier_ring(STAGES, 1)
    ring_empty = make_barrier_ring(STAGES, CONSUMERS)
    matrix_full = make_barrier_ring(1, 1)
    matrix_empty = make_barrier_ring(1, CONSUMERS)
    fence_async_shared()
    all_threads()
    buffers = (own_a, own_b, ring_a, ring_b, matrix, statistics_ring)
    barriers = (
        own_full.index(0),
        own_empty.index(0),
        ring_full,
        ring_empty,
        matrix_full.index(0),
        matrix_empty.index(0),
    )
    return buffers, barriers


def statistics_descriptor(statistics: torch.Tensor, tile: int) -> TensorDescriptor:
    """TMA over (B, H, 2, rows), one line of ``tile`` rows at a time."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    rows = statistics.shape[3]
    return TensorDescriptor(statistics, [statistics.numel() // rows, rows], [rows, 1], [1, tile], layout)
