"""Block means and block states on the GPU, and their sums over marginal blocks.

For key block j over its tokens: pooled_j = mean K_j; h_j = phi(K_j)^T V_j [D, D]; z_j = phi(K_j)^T 1 [D]. For
query row i: H_i = sum over marginal j of h_j and Z_i likewise, batched matrix products with the 0/1 matrix
(M == 0). Their backward is the product with the transpose. A key mask weighs K_j in the mean, and phi(K_j), by
exp(b_j). States are bfloat16 for both 16-bit input types, because sums over tens of thousands of keys leave float16's
range, and float32 for float32; z and Z are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sla_compile.common.options import BackwardOptions

from ..steps import KernelInputs, LinearStates
from .masks import batch_stride
from .overlap import let_next_start
from .primitives import feature_map, head_pointer, load_key_bias, load_tile, locate_program, store_tile
from .tiles import ceil_div, launch_for, padded_dim, power_of_two, row_pitch, stacked, vector_strides

__all__ = [
    "block_means",
    "empty_matrix",
    "empty_states",
    "key_states",
    "marginal_matrix",
    "state_dtype",
    "sum_of_normalizers",
    "sum_of_states",
    "sum_over_blocks",
]


@triton.jit(do_not_specialize=["stride_bias", "num_tokens", "num_blocks", "num_heads"])
def mean_kernel(
    x,
    bias,
    pooled,
    stride_batch,
    stride_head,
    stride_token,
    stride_bias,
    num_tokens,
    num_blocks,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    LETS_NEXT_START: tl.constexpr,
):
    if LETS_NEXT_START:
        let_next_start()
    block, batch, head = locate_program(num_blocks, num_heads)
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, PADDED_DIM)
    start = block * BLOCK
    base = head_pointer(x, batch, head, stride_batch, stride_head)
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    tile = load_tile(base, start, rows, dims, stride_token, num_tokens, PITCH, PADDED)
    tile = tile.to(tl.float32)
    count = tl.minimum(num_tokens - start, BLOCK).to(tl.float32)
    if HAS_KEY_BIAS:
        key_weight = tl.exp(load_key_bias(bias + batch.to(tl.int64) * stride_bias, start, rows, num_tokens))
        tile *= key_weight[:, None]
        total = tl.sum(key_weight, 0)
        count = tl.where(total > 0, total, 1.0)
    mean = tl.div_rn(tl.sum(tile, 0), tl.zeros([PADDED_DIM], tl.float32) + count)
    tl.store(pooled + tl.program_id(0).to(tl.int64) * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)


@triton.jit
def add_keys(
    key, bias, start, rows, dims, num_tokens, key_sum, normalizer, total, state_type: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, FEATURE_MAP: tl.constexpr, STORE_POOLED: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
):  # fmt: skip
    """phi of a tile of keys, and the sums of keys, of phi and of weights with theirs."""
    phi = feature_map(key, dims, HEAD_DIM, PADDED, FEATURE_MAP)
    if HAS_KEY_BIAS:
        key_weight = tl.exp(load_key_bias(bias, start, rows, num_tokens))
        total += tl.sum(key_weight, 0)
        if STORE_POOLED:
            key_sum += tl.sum(key.to(tl.float32) * key_weight[:, None], 0)
        phi = (phi * key_weight[:, None]).to(state_type)
    else:
        if STORE_POOLED:
            key_sum += tl.sum(key.to(tl.float32), 0)
        phi = tl.where((start + rows < num_tokens)[:, None], phi, 0.0).to(state_type)
    normalizer += tl.sum(phi.to(tl.float32), 0)
    return phi, key_sum, normalizer, total


@triton.jit(do_not_specialize=["stride_bias", "num_tokens", "num_blocks", "num_states", "num_heads"])
def key_state_kernel(
    k,
    v,
    bias,
    pooled,
    states,
    normalizers,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_bias,
    num_tokens,
    num_blocks,
    num_states,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    STORE_POOLED: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
):
    block, batch, head = locate_program(num_blocks, num_heads)
    first_column = tl.program_id(1) * COLUMNS
    slot = tl.program_id(0).to(tl.int64)
    state_type = states.dtype.element_ty
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    rows = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    lanes = tl.arange(0, CHUNK)
    k_base = head_pointer(k, batch, head, stride_kb, stride_kh)
    v_base = head_pointer(v, batch, head, stride_vb, stride_vh)
    bias_base = bias + batch.to(tl.int64) * stride_bias
    state_base = states + ((slot - block) // num_blocks * num_states + block) * HEAD_DIM * PITCH
    origin = tl.zeros([], tl.int32)

    key_sum = tl.zeros([PADDED_DIM], tl.float32)
    normalizer = tl.zeros([PADDED_DIM], tl.float32)
    total = tl.zeros([], tl.float32)
    if COLUMNS == CHUNK:
        state = tl.zeros([PADDED_DIM, CHUNK], tl.float32)
        for part in range(BLOCK_K // TILE_K):
            start = block * BLOCK_K + part * TILE_K
            key = load_tile(k_base, start, rows, dims, stride_kn, num_tokens, PITCH, PADDED)
            value = load_tile(v_base, start, rows, first_column + lanes, stride_vn, num_tokens, PITCH, PADDED)
            phi, key_sum, normalizer, total = add_keys(
                key, bias_base, start, rows, dims, num_tokens, key_sum, normalizer, total, state_type, HEAD_DIM, PADDED,
                FEATURE_MAP, STORE_POOLED, HAS_KEY_BIAS,
            )  # fmt: skip
            # [PADDED_DIM, TILE_K] x [TILE_K, CHUNK]
            state = tl.dot(tl.trans(phi), value.to(state_type), state, input_precision="ieee")
        store_tile(state_base, state, origin, dims, first_column + lanes, PITCH, HEAD_DIM, PITCH, PADDED)
    else:
        tl.static_assert(TILE_K == BLOCK_K, "phi is made once")
        start = block * BLOCK_K
        key = load_tile(k_base, start, rows, dims, stride_kn, num_tokens, PITCH, PADDED)
        phi, key_sum, normalizer, total = add_keys(
            key, bias_base, start, rows, dims, num_tokens, key_sum, normalizer, total, state_type, HEAD_DIM, PADDED,
            FEATURE_MAP, STORE_POOLED, HAS_KEY_BIAS,
        )  # fmt: skip
        for first in tl.range(first_column, first_column + COLUMNS, CHUNK, num_stages=1):
            value = load_tile(v_base, start, rows, first + lanes, stride_vn, num_tokens, PITCH, PADDED)
            state = tl.dot(tl.trans(phi), value.to(state_type), input_precision="ieee")
            store_tile(state_base, state, origin, dims, first + lanes, PITCH, HEAD_DIM, PITCH, PADDED)
    if tl.program_id(1) == 0:
        tl.store(normalizers + slot * HEAD_DIM + dims, normalizer, mask=dims < HEAD_DIM)
        if STORE_POOLED:
            count = tl.minimum(num_tokens - block * BLOCK_K, BLOCK_K).to(tl.float32)
            if HAS_KEY_BIAS:
                count = tl.where(total > 0, total, 1.0)
            mean = tl.div_rn(key_sum, tl.zeros([PADDED_DIM], tl.float32) + count)
            tl.store(pooled + slot * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "width", "repeat"])
def marginal_kernel(
    block_map,
    matrix,
    num_rows,
    num_columns,
    width,
    repeat,
    LANES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALL_BELOW: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // repeat
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    if ALL_BELOW:
        value = tl.where((lanes + 1) * BLOCK_K <= (row % num_rows) * BLOCK_Q, 1.0, 0.0)
    else:
        label = tl.load(block_map + row * num_columns + lanes, mask=lanes < num_columns, other=1)
        value = tl.where(label == 0, 1.0, 0.0)
    tl.store(matrix + program * width + lanes, value.to(matrix.dtype.element_ty), mask=lanes < width)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "vectors"])
def normalizer_sum_kernel(
    matrix,
    normalizers,
    sums,
    num_rows,
    num_blocks,
    vectors,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    LETS_NEXT_START: tl.constexpr,
):
    """With a bfloat16 matrix by exact products of that type: a float32 is the sum of three, and the matrix 0 and 1."""
    if LETS_NEXT_START:
        let_next_start()
    batch_head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dims = tl.program_id(2) * TILE + tl.arange(0, TILE)
    # the 8 shows the compiler that rows of the matrix are whole vectors
    width = vectors * 8
    normalizer_base = normalizers + batch_head * num_blocks * HEAD_DIM
    total = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, num_blocks, STEP):
        blocks = first + tl.arange(0, STEP)
        if TRANSPOSE:
            address = matrix + (batch_head * num_blocks + blocks[None, :]) * width + rows[:, None]
            mask = (rows < width)[:, None] & (blocks < num_blocks)[None, :]
        else:
            address = matrix + (batch_head * num_rows + rows[:, None]) * width + blocks[None, :]
            mask = (rows < num_rows)[:, None] & (blocks < width)[None, :]
        counted = tl.load(address, mask=mask, other=0.0)
        mask = (blocks < num_blocks)[:, None] & (dims < HEAD_DIM)[None, :]
        normalizer = tl.load(normalizer_base + blocks[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        if matrix.dtype.element_ty == tl.float32:
            total = tl.dot(counted, normalizer, total, input_precision="ieee")
        else:
            for _part in tl.static_range(3):
                part = normalizer.to(tl.bfloat16)
                normalizer -= part.to(tl.float32)
                total = tl.dot(counted, part, total)
    base = sums + batch_head * num_rows * HEAD_DIM
    mask = (rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(base + rows[:, None] * HEAD_DIM + dims[None, :], total, mask=mask)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the block states for inputs of ``dtype``."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def block_means(
    x: torch.Tensor, block: int, bias: torch.Tensor | None = None, *, lets_next_start: bool = False
) -> torch.Tensor:
    """Mean over each block's true length: (B, H, N, D), `vector_readable` -> float32 (B, H, T, D).

    A ``bias`` (`key_bias`) weighs the tokens by exp(bias); a block without weight has mean 0. Here as elsewhere
    ``lets_next_start`` says that the next kernel may run `beside` this one.
    """
    batch, heads, tokens, head_dim = x.shape
    blocks = ceil_div(tokens, block)
    pooled = torch.empty((batch, heads, blocks, head_dim), dtype=torch.float32, device=x.device)
    mean_kernel[(blocks * batch * heads,)](
        x,
        bias if bias is not None else pooled,
        pooled,
        *vector_strides(x),
        batch_stride(bias),
        tokens,
        blocks,
        heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK=block,
        HAS_KEY_BIAS=bias is not None,
        LETS_NEXT_START=lets_next_start,
        num_warps=1,
    )
    return pooled


def empty_states(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Room for h of the blocks of ``shape`` (B, Hk, Tn, D), and for zeros up to a multiple of 8 blocks a head."""
    batch, heads, blocks, head_dim = shape
    padded = ceil_div(blocks, 8) * 8
    return torch.empty((batch, heads, padded, head_dim, row_pitch(head_dim)), dtype=dtype, device=device)


def key_states(
    inputs: KernelInputs, options: BackwardOptions, *, pool: bool, runs_beside: bool = False
) -> tuple[LinearStates, torch.Tensor]:
    """As `Steps.key_states`; never beside the kernel before it."""
    k, v, key_bias, block_k = inputs.k, inputs.v, inputs.key_bias, options.block_k
    batch, heads, tokens, head_dim = k.shape
    blocks = ceil_div(tokens, block_k)
    states = empty_states((batch, heads, blocks, head_dim), state_dtype(k.dtype), k.device)
    states[:, :, blocks:].zero_()
    normalizers = torch.empty((batch, heads, blocks, head_dim), dtype=torch.float32, device=k.device)
    pooled = torch.empty(normalizers.shape if pool else (0,), dtype=torch.float32, device=k.device)
    launch = launch_for("states", head_dim, k.dtype, block_k, block_k)
    # phi of a whole block of 128 keys is made once, for all columns
    keeps_phi = launch.tile_k == block_k >= 128
    columns = padded_dim(head_dim) if keeps_phi else launch.chunk
    grid = (blocks * batch * heads, ceil_div(padded_dim(head_dim), columns))
    key_state_kernel[grid](
        k,
        v,
        key_bias if key_bias is not None else normalizers,
        pooled,
        states,
        normalizers,
        *vector_strides(k),
        *vector_strides(v),
        batch_stride(key_bias),
        tokens,
        blocks,
        states.shape[2],
        heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_K=block_k,
        TILE_K=launch.tile_k,
        CHUNK=launch.chunk,
        COLUMNS=columns,
        FEATURE_MAP=options.feature_map,
        STORE_POOLED=pool,
        HAS_KEY_BIAS=key_bias is not None,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return LinearStates(states, normalizers), pooled


def empty_matrix(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(B*H, Tm, Tn) of the ``shape`` (B, H, Tm, Tn), unwritten. Rows are padded in memory to a multiple of 8, with
    zeros that `sum_over_blocks` includes: cuBLAS leaves its fast kernels at an odd row pitch or number of columns."""
    batch, heads, rows, columns = shape
    width = ceil_div(columns, 8) * 8
    return torch.empty((batch * heads, rows, width), dtype=dtype, device=device)[:, :, :columns]


def marginal_matrix(
    block_map: torch.Tensor, dtype: torch.dtype, repeat: int = 1, below: tuple[int, int] | None = None
) -> torch.Tensor:
    """(M == 0) as 0/1, each row ``repeat`` times: (B, H, Tm, Tn) -> (B*H, Tm*repeat, Tn), an `empty_matrix` in
    ``dtype``. With ``below``, (block_q, block_k), 1 at every key block that ends before the row begins instead."""
    batch, heads, rows, columns = block_map.shape
    matrix = empty_matrix((batch, heads, rows * repeat, columns), dtype, block_map.device)
    width = matrix.stride(1)
    lanes = min(1024, max(32, power_of_two(width)))
    grid = (batch * heads * rows * repeat, ceil_div(width, lanes))
    block_q, block_k = below or (1, 1)
    marginal_kernel[grid](
        block_map,
        matrix,
        rows,
        columns,
        width,
        repeat,
        LANES=lanes,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        ALL_BELOW=below is not None,
        num_warps=1,
    )
    return matrix


def sum_over_blocks(
    matrix: torch.Tensor | None,
    linear: LinearStates,
    heads: int,
    *,
    transpose: bool = False,
    lets_next_start: bool = False,
) -> LinearStates:
    """`sum_of_states` and `sum_of_normalizers` of ``linear``: H and Z of all query ``heads`` from h and z, or dh and dz
    of all key ``heads`` from dH and dZ. The normalizers come last: it is their kernel that ``lets_next_start``.

    ``matrix`` is an `empty_matrix` that was filled. States of key blocks, h and what is made of dH, are padded to a
    multiple of 8 blocks, with zeros, and so is dz.
    """
    if matrix is not None:
        matrix = matrix.as_strided((*matrix.shape[:2], matrix.stride(1)), matrix.stride())
    states = sum_of_states(matrix, linear.states, heads, transpose=transpose)
    normalizers = sum_of_normalizers(
        matrix, linear.normalizers, heads, transpose=transpose, lets_next_start=lets_next_start
    )
    return LinearStates(states, normalizers)


def sum_of_states(
    matrix: torch.Tensor | None, states: torch.Tensor, heads: int, *, transpose: bool = False
) -> torch.Tensor:
    """Sum ``states`` (B, Hk, T, *state) over blocks, weighted by a 0/1 ``matrix`` (B*H, rows, T), H ``heads``.

    Returns (B, H, rows, *state). With ``transpose`` states are (B, H, T, *state), the matrix (B*H, T, rows) and
    ``heads`` Hk: (B, Hk, rows, *state), the query heads of a key head added up. Without a matrix every block counts in
    the one row that is returned, (B, heads, 1, *state).
    """
    if matrix is None:
        return _of_every_block(states, heads, states.dtype)
    batch, given = states.shape[:2]
    own_heads, state_shape = max(1, min(given, heads)), states.shape[3:]
    states, matrix = (
        stacked(states, own_heads),
        _of_own_heads(matrix, batch * own_heads, max(given, heads) // own_heads),
    )
    blocks = states.shape[2]
    matrix = matrix.transpose(1, 2) if transpose else matrix
    sums = states.new_empty((batch, own_heads, matrix.shape[1], *state_shape))
    # out= keeps an enclosing autocast from changing the type of the product
    torch.bmm(
        matrix,
        states.view(batch * own_heads, blocks, state_shape.numel()),
        out=sums.view(batch * own_heads, matrix.shape[1], state_shape.numel()),
    )
    return sums.view(batch, heads, own_heads * matrix.shape[1] // max(1, heads), *state_shape)


def _of_own_heads(matrix: torch.Tensor, count: int, group: int) -> torch.Tensor:
    """``matrix`` (B*H, rows, T) as (count, group * rows, T), the rows of a group one head's after the other's."""
    return matrix if group == 1 else matrix.unflatten(0, (count, group)).flatten(1, 2)


def _of_every_block(states: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """`sum_of_states` without a matrix. Query heads get copies of their key head's one sum."""
    sums = stacked(states, min(states.shape[1], heads)).sum(dim=2, keepdim=True, dtype=dtype)
    return sums if sums.shape[1] == heads else sums.repeat_interleave(heads // sums.shape[1], dim=1)


def sum_of_normalizers(
    matrix: torch.Tensor | None,
    normalizers: torch.Tensor,
    heads: int,
    *,
    transpose: bool = False,
    lets_next_start: bool = False,
) -> torch.Tensor:
    """`sum_of_states` of ``normalizers`` (B, Hk or H, T, D), float32, in float32.

    Not ``torch.bmm``: it would want a matrix in float32, and under TF32, allowed by the user for the model's own
    products, round the normalizers.
    """
    if matrix is None:
        return _of_every_block(normalizers, heads, normalizers.dtype)
    batch, given = normalizers.shape[:2]
    own_heads = max(1, min(given, heads))
    normalizers = stacked(normalizers, own_heads)
    matrix = _of_own_heads(matrix, batch * own_heads, max(given, heads) // own_heads)
    blocks, head_dim = normalizers.shape[2:]
    rows = matrix.shape[2 if transpose else 1]
    sums = normalizers.new_empty(batch, own_heads, rows, head_dim)
    tile = 64 if rows > 64 else 32
    normalizer_sum_kernel[(batch * own_heads, ceil_div(rows, tile), ceil_div(head_dim, tile))](
        matrix,
        normalizers,
        sums,
        rows,
        blocks,
        matrix.stride(1) // 8,
        HEAD_DIM=head_dim,
        TILE=tile,
        STEP=64,
        TRANSPOSE=transpose,
        LETS_NEXT_START=lets_next_start,
    )
    return sums.view(batch, heads, own_heads * rows // max(1, heads), head_dim)
