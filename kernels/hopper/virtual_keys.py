"""Gradients of virtual keys for Hopper, written in Gluon: one producer warp, two consumer warpgroups of 64 keys each.

The steps are those of ``backward_key.py``, but all queries count, and there are few virtual keys: each program takes a
stretch of the queries, and what the stretches give is added up afterwards, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from sla_compile.common.options import BackwardOptions

from ..steps import KernelInputs, Upstream, VirtualKeys
from ..triton.primitives import bias_pitch
from ..triton.tiles import ceil_div
from .backward_key import key_steps
from .pairs import make_buffers, split_pair
from .primitives import load_tile, multiprocessors, padded_dim, tile_descriptor, vectors_descriptor

__all__ = ["virtual_key_gradients"]


@gluon.jit
def locate_stretch(position, end, extents):
    """(tile of virtual keys, batch, head, first tile of queries, their number, which stretch of its tile of keys)."""
    tiles_per_head, num_heads, query_tiles, share, _total, _num_virtual = extents
    item = position // query_tiles
    first = position % query_tiles
    batch_head = item // tiles_per_head
    return (
        item % tiles_per_head, batch_head // num_heads, batch_head % num_heads, first,
        gl.minimum(query_tiles - first, end - position), position // share - item * query_tiles // share
    )  # fmt: skip


@gluon.jit
def stretch_producer(
    descriptors, buffers, barriers, num_rows, extents, BLOCK_Q: gl.constexpr, TILE_Q: gl.constexpr, GROUP: gl.constexpr
):
    """Load a pair of tiles of virtual keys, then through the ring the tiles of queries of a stretch, each with its
    statistics and its row's bias of these keys."""
    k_desc, v_desc, q_desc, grad_desc, statistics_desc, bias_desc = descriptors
    own_k, own_v, ring, vectors_ring, _turns, _out_buffers = buffers
    STAGES: gl.constexpr = ring.type.shape[0]
    tile_layout: gl.constexpr = q_desc.layout
    own_full, own_empty, ring_full, ring_empty, _prior_full, _prior_empty, _joint = barriers
    _tiles_per_head, num_heads, _query_tiles, share, total, _num_virtual = extents
    filled = 0
    turn = 0
    position = gl.program_id(0) * share
    end = gl.minimum(position + share, total)
    while position < end:
        tile, batch, head, first, steps, _stretch = locate_stretch(position, end, extents)
        mbarrier.wait(own_empty, (turn & 1) ^ 1)
        mbarrier.expect(own_full, 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
        for consumer in gl.static_range(2):
            at = [batch, head // GROUP, tile * 128 + consumer * 64, 0]
            load_tile(k_desc, at, own_full, own_k.index(consumer))
            load_tile(v_desc, at, own_full, own_v.index(consumer))
        turn += 1
        batch_head = batch * num_heads + head
        for step in range(steps):
            first_query = (first + step) * TILE_Q
            index = filled % STAGES
            mbarrier.wait(ring_empty.index(index), (filled // STAGES & 1) ^ 1)
            full = ring_full.index(index)
            mbarrier.expect(
                full, 2 * (q_desc.block_type.nbytes + statistics_desc.block_type.nbytes + bias_desc.block_type.nbytes)
            )
            for which in gl.static_range(2):
                vectors = index * 4 + which
                load_tile(statistics_desc, [batch_head * 2 + which, first_query], full, vectors_ring.index(vectors))
                row = batch_head * num_rows + first_query // BLOCK_Q
                load_tile(bias_desc, [row, tile * 128 + which * 64], full, vectors_ring.index(vectors + 2))
            tile_q, tile_grad = split_pair(ring.index(index), TILE_Q, tile_layout)
            load_tile(q_desc, [batch, head, first_query, 0], full, tile_q)
            load_tile(grad_desc, [batch, head, first_query, 0], full, tile_grad)
            filled += 1
        position += steps


@gluon.jit
def stretch_consumer(
    buffers,
    barriers,
    grad_keys,
    grad_values,
    grad_bias,
    scale,
    extents,
    CONSUMER: gl.constexpr,
    TILE_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
):
    own_k, own_v, ring, statistics_ring, _turns, _out_buffers = buffers
    own_full, own_empty, ring_full, ring_empty, _prior_full, _prior_empty, _joint = barriers
    tiles_per_head, num_heads, query_tiles, share, total, num_virtual = extents
    ROWS: gl.constexpr = 64
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    tile_layout: gl.constexpr = own_k.layout
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
    dims = gl.arange(0, PADDED_DIM, layout=gl.SliceLayout(0, out_layout))
    key = own_k.index(CONSUMER).reshape([ROWS, PADDED_DIM])
    value = own_v.index(CONSUMER).reshape([ROWS, PADDED_DIM])
    line_pitch = bias_pitch(num_virtual)
    taken = 0
    turn = 0
    position = gl.program_id(0) * share
    end = gl.minimum(position + share, total)
    while position < end:
        tile, batch, head, first, steps, stretch = locate_stretch(position, end, extents)
        batch_head = (batch * num_heads + head).to(gl.int64)
        first_key = tile * 128 + CONSUMER * ROWS
        mbarrier.wait(own_full, turn & 1)
        key_accumulator = gl.zeros([ROWS, PADDED_DIM], gl.float32, out_layout)
        value_accumulator = gl.zeros([ROWS, PADDED_DIM], gl.float32, out_layout)
        key_accumulator, value_accumulator, taken = key_steps(
            key_accumulator, value_accumulator, key, value, ring, statistics_ring, ring_full, ring_empty, taken, steps,
            scale, grad_bias + batch_head * query_tiles * line_pitch + first_key, first, line_pitch,
            num_virtual - first_key, grad_bias, CONSUMER, TILE_Q, TILE_Q, 1, tile_layout, True, False, False, 1,
        )  # fmt: skip
        fence_async_shared()
        mbarrier.arrive(own_empty, count=1)
        turn += 1
        line = (stretch * (total // (tiles_per_head * query_tiles)) + batch_head) * num_virtual + first_key
        at = line * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :]
        mask = (first_key + rows < num_virtual)[:, None] & (dims < HEAD_DIM)[None, :]
        gl.store(grad_keys + at, key_accumulator, mask=mask)
        gl.store(grad_values + at, value_accumulator, mask=mask)
        position += steps


@gluon.jit(do_not_specialize=["num_rows", "query_tiles", "share", "total", "num_virtual"])
def virtual_key_kernel(
    k_desc,
    v_desc,
    q_desc,
    grad_desc,
    statistics_desc,
    bias_desc,
    grad_keys,
    grad_values,
    grad_bias,
    scale,
    num_rows,
    tiles_per_head,
    num_heads,
    query_tiles,
    share,
    total,
    num_virtual,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PADDED_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    buffers, barriers = make_buffers(k_desc, q_desc, statistics_desc, STAGES, 2, 4, False, False, False)
    extents = (tiles_per_head, num_heads, query_tiles, share, total, num_virtual)
    descriptors = (k_desc, v_desc, q_desc, grad_desc, statistics_desc, bias_desc)
    gl.warp_specialize(
        [
            (stretch_consumer, (
                buffers, barriers, grad_keys, grad_values, grad_bias, scale, extents, 0, TILE_Q, HEAD_DIM, PADDED_DIM,
            )),
            (stretch_consumer, (
                buffers, barriers, grad_keys, grad_values, grad_bias, scale, extents, 1, TILE_Q, HEAD_DIM, PADDED_DIM,
            )),
            (stretch_producer, (descriptors, buffers, barriers, num_rows, extents, BLOCK_Q, TILE_Q, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles_per_head", "query_tiles", "share", "num_virtual", "per_stretch", "per_kind"])
def stretch_sum_kernel(
    grads, sums, tiles_per_head, query_tiles, share, num_virtual, per_stretch, per_kind,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sums over stretches of the queries and the heads of a group, of some rows of one kind of gradients."""
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    mask = (rows < num_virtual)[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = rows[:, None] * HEAD_DIM + dims[None, :]
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for member in range(GROUP):
        batch_head = tl.program_id(1) * GROUP + member
        begin = (batch_head * tiles_per_head + first // 128) * query_tiles
        stretches = (begin + query_tiles - 1) // share - begin // share + 1
        at = grads + tl.program_id(2) * per_kind + batch_head.to(tl.int64) * num_virtual * HEAD_DIM
        for stretch in range(stretches):
            total += tl.load(at + stretch * per_stretch + offsets, mask=mask, other=0.0)
    line = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + line * num_virtual * HEAD_DIM + offsets, total, mask=mask)


def virtual_key_gradients(
    upstream: Upstream, inputs: KernelInputs, virtual: VirtualKeys, statistics: torch.Tensor, options: BackwardOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `Steps.virtual_key_gradients`."""
    q = inputs.q
    batch, heads, _, head_dim = q.shape
    count, padded, tile_q = virtual.keys.shape[2], padded_dim(head_dim), 64
    tiles = ceil_div(count, 128)
    query_tiles = statistics.shape[3] // tile_q
    programs = multiprocessors(q.device.index)
    total = tiles * batch * heads * query_tiles
    # so many tiles of queries for each program, which is then done when the others are
    share = ceil_div(total, programs)
    stretches = ceil_div(query_tiles - 1, share) + 1
    grads = statistics.new_empty(2, stretches, batch, heads, count, head_dim)
    grad_bias = statistics.new_empty(batch, heads, query_tiles, virtual.bias.shape[3])
    virtual_key_kernel[(ceil_div(total, share),)](
        tile_descriptor(virtual.keys, 64),
        tile_descriptor(virtual.values, 64),
        tile_descriptor(q, tile_q),
        tile_descriptor(upstream.grad_out, tile_q),
        vectors_descriptor(statistics, tile_q),
        vectors_descriptor(virtual.bias, 64),
        grads[0],
        grads[1],
        grad_bias,
        options.scale,
        virtual.bias.shape[2],
        tiles,
        heads,
        query_tiles,
        share,
        total,
        count,
        BLOCK_Q=options.block_q,
        TILE_Q=tile_q,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        STAGES=4 * (128 // padded),
        GROUP=inputs.group,
        num_warps=4,
        maxnreg=168,
    )
    sums = statistics.new_empty(2, batch, heads // inputs.group, count, head_dim)
    rows = 8
    stretch_sum_kernel[(ceil_div(count, rows), batch * heads // inputs.group, 2)](
        grads,
        sums,
        tiles,
        query_tiles,
        share,
        count,
        grads.stride(1),
        grads.stride(0),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        ROWS=rows,
        GROUP=inputs.group,
        num_warps=4,
    )
    return sums[0], sums[1], grad_bias
