"""What the two backward kernels in Gluon share: the producer warp, its ring of pairs of tiles, the barriers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .primitives import all_threads, edge_blocks, load_tile, locate_tile, view_as

__all__ = [
    "make_buffers",
    "matrix_of",
    "pair_producer",
    "produce_pair",
    "read_turn",
    "split_pair",
]


@gluon.jit
def produce_matrix(desc, row, ring, ring_full, ring_empty, filled):
    """The next stage of the ring: one matrix."""
    STAGES: gl.constexpr = ring.type.shape[0]
    dtype: gl.constexpr = desc.dtype
    layout: gl.constexpr = desc.layout
    index = filled % STAGES
    mbarrier.wait(ring_empty.index(index), (filled // STAGES & 1) ^ 1)
    mbarrier.expect(ring_full.index(index), desc.block_type.nbytes)
    load_tile(desc, [row, 0, 0], ring_full.index(index), matrix_of(ring.index(index), dtype, layout))


@gluon.jit
def produce_pair(
    a_desc, b_desc, vectors_desc, batch, head, first_vector, start, ring, vectors_ring, ring_full, ring_empty, filled,
    VECTORS: gl.constexpr,
):  # fmt: skip
    """The next stage of the ring: a pair of tiles, and of some rows of vectors what belongs to their tokens."""
    STAGES: gl.constexpr = ring.type.shape[0]
    TILE: gl.constexpr = a_desc.block_type.shape[2]
    layout: gl.constexpr = a_desc.layout
    index = filled % STAGES
    mbarrier.wait(ring_empty.index(index), (filled // STAGES & 1) ^ 1)
    full = ring_full.index(index)
    if VECTORS > 0:
        mbarrier.expect(
            full, a_desc.block_type.nbytes + b_desc.block_type.nbytes + VECTORS * vectors_desc.block_type.nbytes
        )
        for which in gl.static_range(VECTORS):
            load_tile(vectors_desc, [first_vector + which, start], full, vectors_ring.index(index * VECTORS + which))
    else:
        mbarrier.expect(full, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
    tile_a, tile_b = split_pair(ring.index(index), TILE, layout)
    load_tile(a_desc, [batch, head, start, 0], full, tile_a)
    load_tile(b_desc, [batch, head, start, 0], full, tile_b)


@gluon.jit
def pair_producer(
    descriptors,
    buffers,
    barriers,
    lists,
    counts,
    order,
    mask,
    extents,
    BLOCK: gl.constexpr,
    TILE: gl.constexpr,
    LISTED_BLOCK: gl.constexpr,
    LISTED_TILE: gl.constexpr,
    HAS_MATRIX: gl.constexpr,
    HAS_STATISTICS: gl.constexpr,
    HAS_ORDER: gl.constexpr,
    HAS_SAVED: gl.constexpr,
    HAS_PRIOR: gl.constexpr,
    HAS_VIRTUAL: gl.constexpr,
    HAS_MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_PARTS: gl.constexpr,
):
    """Load a pair of own tiles, then through the ring (own tiles of saved outputs, a matrix, pairs of tiles of virtual
    keys with their bias, and) pairs of tiles (and their rows' statistics) of the listed blocks; last, where there is
    one, what the output is to be added to. With a ``mask``, tiles of blocks that are ``partial``, the last of each
    list, come with their keys' bias. ``CAUSAL`` leaves out key blocks of a row's list that its tile does not see. GROUP
    query heads share a key head: own tiles of queries have the keys of one, listed tiles of queries, which are those
    with statistics, are of all, as `BlockLists.blocks` says.

    With ``order``, of `longest_first`, programs take the next tile in it whenever they are done with one, and the
    consumers learn from ``turns`` which that is, -1 at the end, and how many blocks it has; without, each has its own.
    With ``HAS_PARTS`` it is that of `cut_columns`: a tile may be several programs', of which the first has the matrix.
    """
    own_descs, listed_descs, virtual_descs, saved_desc, matrix_desc, vectors_desc, prior_desc = descriptors
    own_a_desc, own_b_desc = own_descs
    listed_a_desc, listed_b_desc = listed_descs
    virtual_a_desc, virtual_b_desc = virtual_descs
    own_a, own_b, ring, vectors_ring, turns, out_buffers = buffers
    own_full, own_empty, ring_full, ring_empty, prior_full, prior_empty, _joint = barriers
    num_lines, total_tiles, tiles_per_head, num_heads, list_width, matrix_rows, num_virtual, slots = extents
    STAGES: gl.constexpr = ring.type.shape[0]
    PARTS: gl.constexpr = LISTED_BLOCK // LISTED_TILE
    CONSUMERS: gl.constexpr = TILE // 64
    VECTORS: gl.constexpr = 2 if HAS_STATISTICS else 0
    turn_layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tile_layout: gl.constexpr = listed_a_desc.layout

    filled = 0
    turn = 0
    position = gl.program_id(0)
    last_position = total_tiles
    taken_so_far = order
    own_part = 0
    if HAS_PARTS:
        last_position = gl.load(order + 1)
        of_columns = order + 2 + total_tiles + slots
    elif HAS_ORDER:
        taken_so_far = order + total_tiles
    if HAS_ORDER:
        position = gl.atomic_add(taken_so_far, 1)
    while position < last_position:
        tile = position
        if HAS_PARTS:
            entry_of_order = gl.load(order + 2 + position)
            tile = entry_of_order % total_tiles
            own_part = entry_of_order // total_tiles
            parts = gl.load(of_columns + tile)
            first_sum = gl.load(of_columns + total_tiles + tile)
        elif HAS_ORDER:
            tile = gl.load(order + position)
        own_tile, batch, head = locate_tile(tile, tiles_per_head, num_heads)
        block = own_tile * TILE // BLOCK
        batch_head = batch * num_heads + head
        line = batch_head * num_lines + block
        listed = lists + line.to(gl.int64) * list_width
        count = gl.load(counts + line)
        if CAUSAL:
            _first, _edge, unseen = edge_blocks(own_tile * TILE, block, mask[0], BLOCK, TILE, LISTED_BLOCK)
            count -= unseen
        if HAS_PARTS:
            first_entry = own_part * count // parts
            listed += first_entry
            count = (own_part + 1) * count // parts - first_entry
        entry = gl.load(listed, mask=count > 0, other=0)

        mbarrier.wait(own_empty, (turn & 1) ^ 1)
        if HAS_ORDER:
            turns.index(0).store(gl.full([1], tile, gl.int32, turn_layout))
            turns.index(1).store(gl.full([1], count, gl.int32, turn_layout))
            if HAS_PARTS:
                turns.index(2).store(gl.full([1], own_part, gl.int32, turn_layout))
                turns.index(3).store(gl.full([1], parts, gl.int32, turn_layout))
                turns.index(4).store(gl.full([1], first_sum, gl.int32, turn_layout))
            all_threads()
        mbarrier.expect(own_full, CONSUMERS * (own_a_desc.block_type.nbytes + own_b_desc.block_type.nbytes))
        for consumer in gl.static_range(CONSUMERS):
            at = [batch, head, own_tile * TILE + consumer * 64, 0]
            load_tile(own_a_desc, at, own_full, own_a.index(consumer))
            load_tile(own_b_desc, at, own_full, own_b.index(consumer))
        if HAS_SAVED:
            index = filled % STAGES
            mbarrier.wait(ring_empty.index(index), (filled // STAGES & 1) ^ 1)
            mbarrier.expect(ring_full.index(index), CONSUMERS * saved_desc.block_type.nbytes)
            saved = split_pair(ring.index(index), 64, tile_layout)
            for consumer in gl.static_range(CONSUMERS):
                at = [batch, head, own_tile * TILE + consumer * 64, 0]
                load_tile(saved_desc, at, ring_full.index(index), saved[consumer])
            filled += 1
        matrix_row = batch_head * matrix_rows + gl.minimum(block, matrix_rows - 1)
        if HAS_MATRIX and own_part == 0:
            produce_matrix(matrix_desc, matrix_row, ring, ring_full, ring_empty, filled)
            filled += 1
        turn += 1
        if HAS_VIRTUAL:
            for start in range(0, num_virtual, LISTED_TILE):
                produce_pair(
                    virtual_a_desc, virtual_b_desc, vectors_desc, batch, head // GROUP, line, start, ring, vectors_ring,
                    ring_full, ring_empty, filled, 1,
                )  # fmt: skip
                filled += 1
        whole = count
        if HAS_MASK:
            bias_desc, partial, bias_rows = mask
            bias_row = gl.minimum(batch, bias_rows - 1)
            whole = count - gl.load(partial + line)
        for step in range(whole):
            listed_head = head // GROUP
            vector = batch_head * 2
            first = entry * LISTED_BLOCK
            if HAS_STATISTICS and GROUP > 1:
                listed_head = head * GROUP + entry % GROUP
                vector = (batch_head * GROUP + entry % GROUP) * 2
                first = entry // GROUP * LISTED_BLOCK
            # read one ahead
            entry = gl.load(listed + gl.minimum(step + 1, count - 1))
            for part in gl.static_range(PARTS):
                produce_pair(
                    listed_a_desc, listed_b_desc, vectors_desc, batch, listed_head, vector, first + part * LISTED_TILE,
                    ring, vectors_ring, ring_full, ring_empty, filled, VECTORS,
                )  # fmt: skip
                filled += 1
        if HAS_MASK:
            for step in range(whole, count):
                first = entry * LISTED_BLOCK
                entry = gl.load(listed + gl.minimum(step + 1, count - 1))
                for part in gl.static_range(PARTS):
                    produce_pair(
                        listed_a_desc, listed_b_desc, bias_desc, batch, head // GROUP, bias_row,
                        first + part * LISTED_TILE, ring, vectors_ring, ring_full, ring_empty, filled, 1,
                    )  # fmt: skip
                    filled += 1
        if HAS_PRIOR:
            mbarrier.wait(prior_empty, (turn & 1) ^ 1)
            mbarrier.expect(prior_full, CONSUMERS * prior_desc.block_type.nbytes)
            for consumer in gl.static_range(CONSUMERS):
                at = [batch, head, own_tile * TILE + consumer * 64, 0]
                load_tile(prior_desc, at, prior_full, out_buffers.index(consumer))
        if HAS_ORDER:
            position = gl.atomic_add(taken_so_far, 1)
        else:
            position += gl.num_programs(0)
    if HAS_ORDER:
        mbarrier.wait(own_empty, (turn & 1) ^ 1)
        turns.index(0).store(gl.full([1], -1, gl.int32, turn_layout))
        all_threads()
        mbarrier.arrive(own_full, count=1)


@gluon.jit
def read_turn(turns, INDEX: gl.constexpr):
    """What the producer wrote: the tile (0), its number of listed blocks (1), and with parts which it is of how many
    (2, 3), and the first of their sums (4)."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(turns.index(INDEX).load(layout), 0)


@gluon.jit
def split_pair(unit, TILE: gl.constexpr, layout: gl.constexpr):
    """The two tiles [1, 1, TILE, dims] of one stage of the ring."""
    dtype: gl.constexpr = unit.dtype
    shape: gl.constexpr = [2, 1, 1, TILE, unit.type.shape[2]]
    pair = view_as(unit, dtype, shape, layout)
    return pair.index(0), pair.index(1)


@gluon.jit
def matrix_of(unit, dtype: gl.constexpr, layout: gl.constexpr):
    """The matrix [1, dims, dims] that one stage of the ring begins with: a stage has room for one or two."""
    dims: gl.constexpr = unit.type.shape[2]
    shape: gl.constexpr = [unit.type.shape[1] // dims, 1, dims, dims]
    return view_as(unit, dtype, shape, layout).index(0)


@gluon.jit
def make_barrier_ring(STAGES: gl.constexpr, COUNT: gl.constexpr):
    ring = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ring.index(stage), count=COUNT)
    return ring


@gluon.jit
def make_buffers(
    own_desc,
    listed_desc,
    vectors_desc,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    VECTORS: gl.constexpr,
    HAS_OUTPUTS: gl.constexpr,
    HAS_PRIOR: gl.constexpr,
    HAS_JOINT: gl.constexpr,
    TURNS: gl.constexpr = 2,
):
    """Shared memory and barriers: two own tiles for each consumer, a ring whose stages hold a pair of listed tiles or a
    matrix, beside each stage so many vectors, and where wanted a tile of output for each consumer.

    Another barrier stands for one that is not wanted: the compiler would put other things where an unused one lies,
    and a GPU that processes share in turns writes what it keeps of barriers over them.
    """
    own_shape: gl.constexpr = [CONSUMERS] + own_desc.block_type.shape
    own_a = gl.allocate_shared_memory(own_desc.dtype, own_shape, own_desc.layout)
    own_b = gl.allocate_shared_memory(own_desc.dtype, own_shape, own_desc.layout)
    tile: gl.constexpr = listed_desc.block_type.shape[2]
    dims: gl.constexpr = listed_desc.block_type.shape[3]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 2 * tile, dims], listed_desc.dtype)
    ring = gl.allocate_shared_memory(listed_desc.dtype, [STAGES, 1, 2 * tile, dims], layout)
    # what is not there is not touched
    vectors_ring = ring
    if VECTORS > 0:
        vectors_ring = gl.allocate_shared_memory(
            gl.float32, [STAGES * VECTORS] + vectors_desc.block_type.shape, vectors_desc.layout
        )
    out_buffers = own_a
    if HAS_OUTPUTS:
        out_buffers = gl.allocate_shared_memory(own_desc.dtype, own_shape, own_desc.layout)
    turns = gl.allocate_shared_memory(gl.int32, [TURNS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    own_full = make_barrier_ring(1, 1)
    own_empty = make_barrier_ring(1, CONSUMERS)
    ring_full = make_barrier_ring(STAGES, 1)
    ring_empty = make_barrier_ring(STAGES, CONSUMERS)
    prior_full = own_full
    prior_empty = own_empty
    if HAS_PRIOR:
        prior_full = make_barrier_ring(1, 1)
        prior_empty = make_barrier_ring(1, CONSUMERS)
    joint = own_empty
    if HAS_JOINT:
        joint = make_barrier_ring(1, CONSUMERS)
    fence_async_shared()
    all_threads()
    buffers = (own_a, own_b, ring, vectors_ring, turns, out_buffers)
    prior = (prior_full.index(0), prior_empty.index(0))
    barriers = (own_full.index(0), own_empty.index(0), ring_full, ring_empty, prior[0], prior[1], joint.index(0))
    return buffers, barriers
