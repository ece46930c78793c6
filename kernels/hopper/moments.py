"""Moments of key blocks for Hopper, written in Gluon: one pass over K and V at the speed of memory.

The arithmetic is that of ``triton/moments.py``, the pipeline that of ``states.py``, whose producer loads the tiles.
Of each tile a thread adds up some rows of eight columns; threads meet at the end of a block.
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

from ..steps import KernelInputs, KeyMoments
from ..triton.moments import fresh_moments
from ..triton.primitives import LOG2E
from .primitives import (
    all_threads,
    locate_tile,
    matrix_descriptor,
    multiprocessors,
    padded_dim,
    store_tile,
    tile_descriptor,
    view_as,
)
from .states import states_producer

__all__ = ["key_moments"]


@gluon.jit
def sums_of_rows(tile, GROUPS: gl.constexpr):
    """[GROUPS, dims] of a tile in the layout in which a thread has every GROUPS-th row: within threads alone."""
    return gl.sum(tile.reshape([tile.shape[0] // GROUPS, GROUPS, tile.shape[1]]), 0)


@gluon.jit
def add_each(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@gluon.jit
def moments_consumer(
    slope_desc,
    k_ring,
    v_ring,
    slope_buffer,
    full,
    empty,
    sizes,
    means,
    variances,
    mean_keys,
    mean_values,
    mask,
    num_keys,
    num_blocks,
    extents,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    HAS_MASK: gl.constexpr,
):
    total_blocks, blocks_per_head, num_heads = extents
    STAGES: gl.constexpr = k_ring.type.shape[0]
    PARTS: gl.constexpr = BLOCK_K // 64
    dtype: gl.constexpr = k_ring.dtype
    tile_layout: gl.constexpr = k_ring.layout
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    LANES: gl.constexpr = PADDED_DIM // 8
    GROUPS: gl.constexpr = 4 * (32 // LANES)
    read_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    finished = slope_buffer.reshape([PADDED_DIM, PADDED_DIM])
    LN2: gl.constexpr = 0.6931471805599453

    taken = 0
    for block in range(gl.program_id(0), total_blocks, gl.num_programs(0)):
        key_block, batch, head = locate_tile(block, blocks_per_head, num_heads)
        slope = gl.zeros([PADDED_DIM, PADDED_DIM], gl.float32, layout)
        if HAS_MASK:
            key_bias, bias_rows = mask
            bias_block = gl.minimum(batch, bias_rows - 1) * num_blocks + gl.minimum(key_block, num_blocks - 1)
            own_bias = key_bias + bias_block.to(gl.int64) * BLOCK_K
            rows = gl.arange(0, 32, layout=gl.SliceLayout(1, read_layout))
            total = gl.to_tensor(0.0)
        for part in gl.static_range(PARTS):
            index = taken % STAGES
            left = k_ring.index(index).reshape([64, PADDED_DIM])
            right = v_ring.index(index).reshape([64, PADDED_DIM])
            # in place: keys have their weights, and states are bfloat16 beside float16 inputs
            left_after = view_as(k_ring.index(index), gl.bfloat16, [1, 1, 64, PADDED_DIM], tile_layout)
            left_after = left_after.reshape([64, PADDED_DIM])
            right_after = view_as(v_ring.index(index), gl.bfloat16, [1, 1, 64, PADDED_DIM], tile_layout)
            right_after = right_after.reshape([64, PADDED_DIM])
            if HAS_MASK:
                # on their way while the tile is waited for
                bias = (gl.load(own_bias + part * 64 + rows), gl.load(own_bias + part * 64 + 32 + rows))
            mbarrier.wait(full.index(index), taken // STAGES & 1)
            # a few rows at a time, which takes few registers
            for some in gl.static_range(2):
                key = left.slice(some * 32, 32).load(read_layout)
                value = right.slice(some * 32, 32).load(read_layout)
                if HAS_MASK:
                    key_weight = gl.exp2(bias[some] * LOG2E)
                    total += gl.sum(key_weight, 0)
                    weighed = key.to(gl.float32) * key_weight[:, None]
                    some_sums = sums_of_rows(weighed, GROUPS)
                    some_squares = sums_of_rows(weighed * key.to(gl.float32), GROUPS)
                    some_values = sums_of_rows(value.to(gl.float32) * key_weight[:, None], GROUPS)
                    left_after.slice(some * 32, 32).store(weighed.to(gl.bfloat16))
                else:
                    some_sums = sums_of_rows(key.to(gl.float32), GROUPS)
                    some_squares = sums_of_rows(key.to(gl.float32) * key.to(gl.float32), GROUPS)
                    some_values = sums_of_rows(value.to(gl.float32), GROUPS)
                    if dtype != gl.bfloat16:
                        left_after.slice(some * 32, 32).store(key.to(gl.float32).to(gl.bfloat16))
                if dtype != gl.bfloat16:
                    right_after.slice(some * 32, 32).store(value.to(gl.float32).to(gl.bfloat16))
                if part == 0 and some == 0:
                    key_sums = some_sums
                    square_sums = some_squares
                    value_sums = some_values
                else:
                    key_sums += some_sums
                    square_sums += some_squares
                    value_sums += some_values
            fence_async_shared()
            # [dims, keys] x [keys, dims]
            slope = warpgroup_mma(left_after.permute((1, 0)), right_after, slope, is_async=True)
            slope = warpgroup_mma_wait(0, deps=(slope,))
            mbarrier.arrive(empty.index(index), count=1)
            taken += 1
        if HAS_MASK:
            count = gl.where(total > 0.0, total, 1.0)
        else:
            # past the last block, where all sums are zeros, so that C is too
            count = gl.maximum(gl.minimum(num_keys - key_block * BLOCK_K, BLOCK_K), 1).to(gl.float32)
        inverse = 1.0 / count
        # threads meet once for all three
        sums = gl.reduce((key_sums, square_sums, value_sums), 0, add_each)
        mean = sums[0] / count
        mean_square = sums[1] * inverse
        mean_value = sums[2] * inverse
        dim_layout: gl.constexpr = mean.type.layout
        dims = gl.arange(0, PADDED_DIM, layout=dim_layout)
        slot = (batch * num_heads + head).to(gl.int64) * num_blocks + key_block
        line = slot * HEAD_DIM
        stored = (dims < HEAD_DIM) & (key_block < num_blocks)
        gl.store(means + line + dims, mean, mask=stored)
        gl.store(variances + line + dims, gl.maximum(mean_square - mean * mean, 0.0), mask=stored)
        gl.store(mean_keys + line + dims, mean.to(dtype), mask=stored)
        gl.store(mean_values + line + dims, mean_value.to(dtype), mask=stored)
        if HAS_MASK:
            count = total
        size = gl.zeros([PADDED_DIM], gl.float32, dim_layout) + count
        gl.store(sizes + slot + dims, gl.log2(size) * LN2, mask=(dims < 1) & stored)
        # (K - kbar)^T V is K^T V - n kbar vbar^T
        mean_rows = gl.convert_layout(mean, gl.SliceLayout(1, layout))
        value_columns = gl.convert_layout(mean_value, gl.SliceLayout(0, layout))
        slope = slope * inverse - mean_rows[:, None] * value_columns[None, :]
        tma.store_wait(0)
        finished.store(slope.to(gl.bfloat16))
        fence_async_shared()
        store_tile(slope_desc, [block, 0, 0], slope_buffer)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["bias_rows", "num_keys", "num_blocks", "total_blocks", "blocks_per_head"])
def moments_kernel(
    k_desc,
    v_desc,
    slope_desc,
    sizes,
    means,
    variances,
    mean_keys,
    mean_values,
    key_bias,
    bias_rows,
    num_keys,
    num_blocks,
    total_blocks,
    blocks_per_head,
    num_heads,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_MASK: gl.constexpr,
):
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    slope_buffer = gl.allocate_shared_memory(slope_desc.dtype, slope_desc.block_type.shape, slope_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    all_threads()
    extents = (total_blocks, blocks_per_head, num_heads)
    mask = (key_bias, bias_rows) if HAS_MASK else ()
    gl.warp_specialize(
        [
            (moments_consumer, (
                slope_desc, k_ring, v_ring, slope_buffer, full, empty, sizes, means, variances, mean_keys, mean_values,
                mask, num_keys, num_blocks, extents, BLOCK_K, HEAD_DIM, PADDED_DIM, HAS_MASK,
            )),
            (states_producer, (k_desc, v_desc, k_ring, v_ring, full, empty, extents, BLOCK_K)),
        ],
        [1],
        [24],
    )  # fmt: skip


def key_moments(inputs: KernelInputs, options: BackwardOptions) -> KeyMoments:
    """As `Steps.key_moments`."""
    k, v, weights, block_k = inputs.k, inputs.v, inputs.key_weights, options.block_k
    batch, heads, keys, head_dim = k.shape
    moments = fresh_moments(k, block_k)
    # the kernel makes the zeros of what is padded too
    padded_blocks = moments.slopes.shape[2]
    total = padded_blocks * batch * heads
    moments_kernel[(min(total, 2 * multiprocessors(k.device.index)),)](
        tile_descriptor(k, 64),
        tile_descriptor(v, 64),
        matrix_descriptor(moments.slopes, head_dim),
        moments.sizes,
        moments.spans[0],
        moments.spans[1],
        moments.keys,
        moments.values,
        # what is None is no parameter of the compiled kernel
        weights.bias if weights is not None else None,
        weights.bias.shape[0] if weights is not None else None,
        keys,
        moments.sizes.shape[2],
        total,
        padded_blocks,
        heads,
        BLOCK_K=block_k,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        STAGES=2,
        HAS_MASK=weights is not None,
        num_warps=4,
        maxnreg=128,
    )
    return moments
