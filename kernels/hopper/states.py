"""Block states and key means for Hopper, written in Gluon: one pass over K and V at the speed of memory.

The arithmetic is that of ``triton/states.py``. A producer warp loads tiles of 64 keys by TMA; the
warpgroup puts phi(K) where K lay, as the left operand of h = phi(K)^T V, and a finished state leaves by TMA too, so
that reading, arithmetic and writing of neighbouring blocks overlap. Two programs share a multiprocessor.
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

from ..steps import KernelInputs, LinearStates
from ..triton.overlap import beside, end_beside, start_beside
from ..triton.primitives import LOG2E
from ..triton.states import empty_states
from ..triton.tiles import ceil_div
from .primitives import (
    all_threads,
    load_tile,
    locate_tile,
    map_features,
    matrix_descriptor,
    multiprocessors,
    padded_dim,
    store_tile,
    tile_descriptor,
    view_as,
)

__all__ = ["key_states"]


@gluon.jit
def states_producer(k_desc, v_desc, k_ring, v_ring, full, empty, extents, BLOCK_K: gl.constexpr):
    total_blocks, blocks_per_head, num_heads = extents
    STAGES: gl.constexpr = k_ring.type.shape[0]
    filled = 0
    for block in range(gl.program_id(0), total_blocks, gl.num_programs(0)):
        key_block, batch, head = locate_tile(block, blocks_per_head, num_heads)
        for part in gl.static_range(BLOCK_K // 64):
            index = filled % STAGES
            at = [batch, head, key_block * BLOCK_K + part * 64, 0]
            mbarrier.wait(empty.index(index), (filled // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(index), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            load_tile(k_desc, at, full.index(index), k_ring.index(index))
            load_tile(v_desc, at, full.index(index), v_ring.index(index))
            filled += 1


@gluon.jit
def states_consumer(
    state_desc,
    k_ring,
    v_ring,
    state_buffer,
    full,
    empty,
    normalizers,
    pooled,
    mask,
    num_keys,
    num_blocks,
    extents,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    FEATURE_MAP: gl.constexpr,
    STORE_POOLED: gl.constexpr,
    HAS_MASK: gl.constexpr,
):
    total_blocks, blocks_per_head, num_heads = extents
    STAGES: gl.constexpr = k_ring.type.shape[0]
    dtype: gl.constexpr = k_ring.dtype
    state_dtype: gl.constexpr = state_desc.dtype
    tile_layout: gl.constexpr = k_ring.layout
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    # one thread a dimension: sums of a block wait for its end in a register each
    dim_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, PADDED_DIM, layout=dim_layout)
    finished = state_buffer.reshape([PADDED_DIM, PADDED_DIM])

    taken = 0
    for block in range(gl.program_id(0), total_blocks, gl.num_programs(0)):
        key_block, batch, head = locate_tile(block, blocks_per_head, num_heads)
        state = gl.zeros([PADDED_DIM, PADDED_DIM], gl.float32, layout)
        normalizer = gl.zeros([PADDED_DIM], gl.float32, dim_layout)
        key_sum = gl.zeros([PADDED_DIM], gl.float32, dim_layout)
        if HAS_MASK:
            key_bias, bias_rows = mask
            bias_block = gl.minimum(batch, bias_rows - 1) * num_blocks + gl.minimum(key_block, num_blocks - 1)
            own_bias = key_bias + bias_block.to(gl.int64) * BLOCK_K
            total = gl.to_tensor(0.0)
        for part in gl.static_range(BLOCK_K // 64):
            index = taken % STAGES
            if HAS_MASK:
                # on its way while the tile is waited for
                bias = gl.load(own_bias + part * 64 + rows)
            mbarrier.wait(full.index(index), taken // STAGES & 1)
            key = k_ring.index(index).reshape([64, PADDED_DIM]).load(layout).to(gl.float32)
            if HAS_MASK:
                key_weight = gl.exp2(bias * LOG2E)
            if STORE_POOLED:
                weighed = key
                if HAS_MASK:
                    total += gl.sum(key_weight, 0)
                    weighed = key * key_weight[:, None]
                key_sum += gl.convert_layout(gl.sum(weighed, 0), dim_layout)
            phi = map_features(key, HEAD_DIM, PADDED_DIM, FEATURE_MAP, layout)
            if HAS_MASK:
                phi = (phi * key_weight[:, None]).to(state_dtype)
            else:
                inside = key_block * BLOCK_K + part * 64 + rows < num_keys
                phi = gl.where(inside[:, None], phi, 0.0).to(state_dtype)
            normalizer += gl.convert_layout(gl.sum(phi.to(gl.float32), 0), dim_layout)
            left = view_as(k_ring.index(index), state_dtype, [1, 1, 64, PADDED_DIM], tile_layout)
            left = left.reshape([64, PADDED_DIM])
            left.store(phi)
            value = v_ring.index(index).reshape([64, PADDED_DIM])
            if state_dtype != dtype:
                # in place, because a product takes two of one type
                converted = value.load(layout).to(state_dtype)
                value = view_as(v_ring.index(index), state_dtype, [1, 1, 64, PADDED_DIM], tile_layout)
                value = value.reshape([64, PADDED_DIM])
                value.store(converted)
            fence_async_shared()
            # [dims, keys] x [keys, dims]
            state = warpgroup_mma(left.permute((1, 0)), value, state, is_async=True)
            state = warpgroup_mma_wait(0, deps=(state,))
            mbarrier.arrive(empty.index(index), count=1)
            taken += 1
        tma.store_wait(0)
        finished.store(state.to(state_dtype))
        fence_async_shared()
        store_tile(state_desc, [block, 0, 0], state_buffer)
        line = ((batch * num_heads + head).to(gl.int64) * num_blocks + key_block) * HEAD_DIM
        # a state past the last block is made of nothing but zeros, and there is no normalizer for it
        stored = (dims < HEAD_DIM) & (key_block < num_blocks)
        gl.store(normalizers + line + dims, normalizer, mask=stored)
        if STORE_POOLED:
            count = gl.minimum(num_keys - key_block * BLOCK_K, BLOCK_K).to(gl.float32)
            if HAS_MASK:
                count = gl.where(total > 0.0, total, 1.0)
            gl.store(pooled + line + dims, key_sum / count, mask=stored)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["bias_rows", "num_keys", "num_blocks", "total_blocks", "blocks_per_head"])
def states_kernel(
    k_desc,
    v_desc,
    state_desc,
    normalizers,
    pooled,
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
    FEATURE_MAP: gl.constexpr,
    STORE_POOLED: gl.constexpr,
    HAS_MASK: gl.constexpr,
    BESIDE: gl.constexpr,
):
    start_beside(BESIDE)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    state_buffer = gl.allocate_shared_memory(state_desc.dtype, state_desc.block_type.shape, state_desc.layout)
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
            (states_consumer, (
                state_desc, k_ring, v_ring, state_buffer, full, empty, normalizers, pooled, mask, num_keys,
                num_blocks, extents,
                BLOCK_K, HEAD_DIM, PADDED_DIM, FEATURE_MAP, STORE_POOLED, HAS_MASK,
            )),
            (states_producer, (k_desc, v_desc, k_ring, v_ring, full, empty, extents, BLOCK_K)),
        ],
        [1],
        [24],
    )  # fmt: skip
    end_beside(BESIDE)


def key_states(
    inputs: KernelInputs, options: BackwardOptions, *, pool: bool, runs_beside: bool = False
) -> tuple[LinearStates, torch.Tensor]:
    """As `Steps.key_states`."""
    k, v, weights, block_k = inputs.k, inputs.v, inputs.key_weights, options.block_k
    batch, heads, keys, head_dim = k.shape
    blocks = ceil_div(keys, block_k)
    shape = (batch, heads, blocks, head_dim)
    states = empty_states(shape, torch.bfloat16, k.device)
    normalizers = torch.empty(shape, dtype=torch.float32, device=k.device)
    pooled = torch.empty(shape if pool else (0,), dtype=torch.float32, device=k.device)
    # the kernel makes the zeros of what is padded too
    padded_blocks = states.shape[2]
    total = padded_blocks * batch * heads
    states_kernel[(min(total, 2 * multiprocessors(k.device.index)),)](
        tile_descriptor(k, 64),
        tile_descriptor(v, 64),
        matrix_descriptor(states, head_dim),
        normalizers,
        pooled,
        # what is None is no parameter of the compiled kernel
        weights.bias if weights is not None else None,
        weights.bias.shape[0] if weights is not None else None,
        keys,
        blocks,
        total,
        padded_blocks,
        heads,
        BLOCK_K=block_k,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        STAGES=2,
        FEATURE_MAP=options.feature_map,
        STORE_POOLED=pool,
        HAS_MASK=weights is not None,
        num_warps=4,
        maxnreg=128,
        **beside(runs_beside),
    )
    return LinearStates(states, normalizers), pooled
