"""The backward of the linear branch and of the gate, as seen from the queries.

With dO^l = dO W, den = phi(Q) Z, D^l = rowsum(dO^l * O^l), all gradients 0 where den is 0:
    dphi(Q) = (dO^l H^T - D^l Z^T) / den;  dH = (phi(Q)/den)^T dO^l;  dZ = -(phi(Q)/den)^T D^l;
    dW = dO^T O^l;  db = sum of dO.
D^s, which the sparse branch needs, needs no O^s: D^s = rowsum(dO * O) - D^l - dO b.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from sla_compile.common.options import BackwardOptions

from ..steps import KernelInputs, LinearStates, QueryGradients, Upstream
from .overlap import beside, end_beside, start_beside
from .primitives import (
    LOG2E,
    feature_map,
    feature_map_backward,
    head_pointer,
    load_tile,
    locate_program,
    reciprocal_or_zero,
    store_tile,
    token_major_pointer,
)
from .tiles import ceil_div, head_stride, launch_for, padded_dim, vector_strides

__all__ = ["gate_backward", "linear_backward"]

# most programs of the gate's gradient and least tiles of each: a program leaves a part, to be added up afterwards
_GATE_PROGRAMS = 256
_GATE_TILES = 16


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "num_heads", "state_rows"])
def linear_backward_kernel(
    grad_out,
    q,
    out,
    linear_out,
    lse,
    weight,
    bias,
    states,
    normalizers,
    grad_q,
    statistics,
    grad_states,
    grad_normalizers,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_wh,
    stride_bh,
    stride_bd,
    scale,
    num_tokens,
    num_tiles,
    num_heads,
    state_rows,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    CHUNK: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Statistics of one tile of queries, and the linear branch's dQ, dH and dZ: one (D, D) state a tile."""
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    tile, batch, head = locate_program(num_tiles, num_heads)
    batch_head = batch.to(tl.int64) * num_heads + head
    first_query = tile * TILE_Q
    block_row = first_query // BLOCK_Q
    origin = tl.zeros([], tl.int32)

    rows = tl.arange(0, TILE_Q)
    dims = tl.arange(0, PADDED_DIM)
    row_mask = first_query + rows < num_tokens
    grad_base = head_pointer(grad_out, batch, head, stride_gb, stride_gh)
    out_base = head_pointer(out, batch, head, stride_ob, stride_oh)
    grad = load_tile(grad_base, first_query, rows, dims, stride_gn, num_tokens, PITCH, PADDED)
    output = load_tile(out_base, first_query, rows, dims, stride_on, num_tokens, PITCH, PADDED)

    row_delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
    if HAS_BIAS:
        bias_base = bias + head.to(tl.int64) * stride_bh
        shift = tl.load(bias_base + dims * stride_bd, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        row_delta -= tl.sum(grad.to(tl.float32) * shift[None, :], 1)

    if HAS_LINEAR:
        q_base = head_pointer(q, batch, head, stride_qb, stride_qh)
        query = load_tile(q_base, first_query, rows, dims, stride_qn, num_tokens, PITCH, PADDED)
        state_index = batch_head * state_rows + tl.minimum(block_row, state_rows - 1)
        state_base = states + state_index * HEAD_DIM * PITCH
        slot = tl.program_id(0).to(tl.int64)
        grad_state_base = grad_states + slot * HEAD_DIM * PITCH
        weight_base = weight + head.to(tl.int64) * stride_wh * 8
        linear_base = head_pointer(linear_out, batch, head, stride_lb, stride_lh)
        state_type = states.dtype.element_ty

        phi = feature_map(query, dims, HEAD_DIM, PADDED, FEATURE_MAP)
        normalizer = tl.load(normalizers + state_index * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        inverse = reciprocal_or_zero(tl.sum(phi * normalizer[None, :], 1))
        share = tl.trans((phi * inverse[:, None]).to(state_type))
        linear_delta = tl.zeros([TILE_Q], tl.float32)
        grad_phi = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
        for first in tl.range(0, PADDED_DIM, CHUNK, num_stages=1):
            columns = first + tl.arange(0, CHUNK)
            gate = load_tile(weight_base, origin, dims, columns, PITCH // 8, HEAD_DIM, PITCH, PADDED)
            # [TILE_Q, PADDED_DIM] x [PADDED_DIM, CHUNK]
            grad_linear = tl.dot(grad, gate, input_precision="ieee")
            linear = load_tile(linear_base, first_query, rows, columns, stride_ln, num_tokens, PITCH, PADDED)
            linear_delta += tl.sum(grad_linear * linear.to(tl.float32), 1)
            grad_linear = grad_linear.to(state_type)
            state = load_tile(state_base, origin, dims, columns, PITCH // 8, HEAD_DIM, PITCH, PADDED)
            # [TILE_Q, CHUNK] x [CHUNK, PADDED_DIM]
            grad_phi = tl.dot(grad_linear, tl.trans(state), grad_phi, input_precision="ieee")
            # [PADDED_DIM, TILE_Q] x [TILE_Q, CHUNK]
            grad_state = tl.dot(share, grad_linear, input_precision="ieee")
            store_tile(grad_state_base, grad_state, origin, dims, columns, PITCH, HEAD_DIM, PITCH, PADDED)
        if PADDED_DIM > 128:
            # made again: kept in registers they would not fit beside grad_phi
            query = load_tile(q_base, first_query, rows, dims, stride_qn, num_tokens, PITCH, PADDED)
            phi = feature_map(query, dims, HEAD_DIM, PADDED, FEATURE_MAP)
        grad_normalizer = -tl.sum(phi * (inverse * linear_delta)[:, None], 0)
        tl.store(grad_normalizers + slot * HEAD_DIM + dims, grad_normalizer, mask=dims < HEAD_DIM)
        grad_phi = (grad_phi - linear_delta[:, None] * normalizer[None, :]) * inverse[:, None]
        grad_query = feature_map_backward(query, phi, grad_phi, FEATURE_MAP)
        row_delta -= linear_delta
        grad_q_base = token_major_pointer(grad_q, batch, head, num_tokens, num_heads, HEAD_DIM)
        out_row = num_heads * HEAD_DIM
        store_tile(grad_q_base, grad_query, first_query, rows, dims, out_row, num_tokens, HEAD_DIM, PADDED)

    row_lse = tl.load(lse + batch_head * num_tokens + first_query + rows, mask=row_mask, other=float("inf"))
    # a query without a key: every score is -inf
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse * LOG2E)
    row_statistics = statistics + batch_head * 2 * num_tiles * TILE_Q + first_query + rows
    tl.store(row_statistics, row_lse)
    tl.store(row_statistics + num_tiles * TILE_Q, tl.where(row_mask, row_delta * scale, 0.0))


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "num_heads", "tiles_per_split"])
def gate_gradient_kernel(
    grad_out,
    linear_out,
    grad_weight,
    grad_bias,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_lb,
    stride_lh,
    stride_ln,
    num_tokens,
    num_splits,
    num_heads,
    tiles_per_split,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """dO^T O^l and the sum of dO over one stretch of tokens of one head, in float32.

    Beside the matrix product that sum is one too: of a tile that is read in registers besides, Triton 3.6's pipeline
    keeps a buffer too few, and the next tile overwrites it while the product still reads.
    """
    start_beside(BESIDE)
    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    PITCH: tl.constexpr = (HEAD_DIM + 7) // 8 * 8
    split, batch, head = locate_program(num_splits, num_heads)
    slot = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    grad_base = head_pointer(grad_out, batch, head, stride_gb, stride_gh)
    linear_base = head_pointer(linear_out, batch, head, stride_lb, stride_lh)
    dtype = grad_out.dtype.element_ty
    BY_PRODUCT: tl.constexpr = HAS_LINEAR and dtype != tl.float32
    weight_sum = tl.zeros([PADDED_DIM, CHUNK], tl.float32)
    bias_sum = tl.zeros([PADDED_DIM], tl.float32)
    bias_columns = tl.zeros([PADDED_DIM, 16], tl.float32)
    ones = tl.full([TILE, 16], 1.0, dtype)
    for step in range(tiles_per_split):
        start = (split * tiles_per_split + step) * TILE
        grad = load_tile(grad_base, start, rows, dims, stride_gn, num_tokens, PITCH, PADDED)
        if BY_PRODUCT:
            bias_columns = tl.dot(tl.trans(grad), ones, bias_columns)
        else:
            bias_sum += tl.sum(grad.to(tl.float32), 0)
        if HAS_LINEAR:
            linear = load_tile(linear_base, start, rows, columns, stride_ln, num_tokens, PITCH, PADDED)
            # [PADDED_DIM, TILE] x [TILE, CHUNK]
            weight_sum = tl.dot(tl.trans(grad), linear, weight_sum, input_precision="ieee")
    if BY_PRODUCT:
        # all columns are alike
        bias_sum = tl.max(bias_columns, 1)
    if HAS_LINEAR:
        base = grad_weight + slot * HEAD_DIM * HEAD_DIM
        origin = tl.zeros([], tl.int32)
        store_tile(base, weight_sum, origin, dims, columns, HEAD_DIM, HEAD_DIM, HEAD_DIM, PADDED)
    if tl.program_id(1) == 0:
        tl.store(grad_bias + slot * HEAD_DIM + dims, bias_sum, mask=dims < HEAD_DIM)
    end_beside(BESIDE)


@triton.jit
def sum_parts(parts, result, program, num_parts, num_splits, heads, SIZE: tl.constexpr, STEP: tl.constexpr):
    """64 columns of ``result`` (heads, SIZE), by its tiles' number: the sum of ``parts`` (B, heads, splits, SIZE)."""
    TILE: tl.constexpr = 64
    tiles = tl.cdiv(SIZE, TILE)
    head = program // tiles
    columns = program % tiles * TILE + tl.arange(0, TILE)
    rows = tl.arange(0, STEP)
    total = tl.zeros([STEP, TILE], tl.float32)
    for first in range(0, num_parts // heads, STEP):
        row = first + rows
        slot = (row // num_splits * heads + head) * num_splits + row % num_splits
        mask = (row < num_parts // heads)[:, None] & (columns < SIZE)[None, :]
        total += tl.load(parts + slot.to(tl.int64)[:, None] * SIZE + columns[None, :], mask=mask, other=0.0)
    address = result + head.to(tl.int64) * SIZE + columns
    tl.store(address, tl.sum(total, 0).to(result.dtype.element_ty), mask=columns < SIZE)


@triton.jit(do_not_specialize=["num_parts", "num_splits", "weight_heads", "bias_heads", "weight_programs"])
def gate_sum_kernel(
    weight_parts,
    bias_parts,
    grad_weight,
    grad_bias,
    num_parts,
    num_splits,
    weight_heads,
    bias_heads,
    weight_programs,
    HEAD_DIM: tl.constexpr,
    STEP: tl.constexpr,
):
    """The gradients of a gate from their parts; one that all heads share has one head, and every part is its own."""
    program = tl.program_id(0)
    if program < weight_programs:
        sum_parts(weight_parts, grad_weight, program, num_parts, num_splits, weight_heads, HEAD_DIM * HEAD_DIM, STEP)
    else:
        program -= weight_programs
        sum_parts(bias_parts, grad_bias, program, num_parts, num_splits, bias_heads, HEAD_DIM, STEP)


def linear_backward(
    upstream: Upstream,
    inputs: KernelInputs,
    linear: LinearStates | None,
    options: BackwardOptions,
    *,
    runs_beside: bool = False,
) -> tuple[QueryGradients, LinearStates | None]:
    """As `Steps.linear_backward`; never beside the kernel before it."""
    grad_out, out, linear_out, lse = upstream
    q, _, _, gate, bias, _ = inputs
    block_q = options.block_q
    batch, heads, tokens, head_dim = q.shape
    launch = launch_for("linear_backward", head_dim, q.dtype, block_q, block_q)
    tiles = ceil_div(tokens, block_q) * (block_q // launch.tile_q)
    dq = q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    statistics = torch.empty((batch, heads, 2, tiles * launch.tile_q), dtype=torch.float32, device=q.device)
    grads = None
    if linear is not None:
        grad_states = linear.states.new_empty(batch, heads, tiles, *linear.states.shape[3:])
        grads = LinearStates(grad_states, statistics.new_empty(batch, heads, tiles, head_dim))
    saved_linear = linear_out if linear is not None else out
    # an absent tensor's place is taken by one that is there; the kernel does not touch it
    linear_backward_kernel[(tiles * batch * heads,)](
        grad_out,
        q,
        out,
        saved_linear,
        lse,
        gate if gate is not None else q,
        bias if bias is not None else q,
        linear.states if linear is not None else q,
        linear.normalizers if linear is not None else statistics,
        dq,
        statistics,
        grads.states if grads is not None else q,
        grads.normalizers if grads is not None else statistics,
        *vector_strides(grad_out),
        *vector_strides(q),
        *vector_strides(out),
        *vector_strides(saved_linear),
        head_stride(gate, 2) // 8,
        head_stride(bias, 1),
        bias.stride(-1) if bias is not None else 0,
        options.scale,
        tokens,
        tiles,
        heads,
        linear.states.shape[2] if linear is not None else 1,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_Q=block_q,
        TILE_Q=launch.tile_q,
        CHUNK=launch.chunk,
        FEATURE_MAP=options.feature_map,
        HAS_LINEAR=linear is not None,
        HAS_BIAS=bias is not None,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return QueryGradients(dq, statistics, complete=True, started=linear is not None), grads


def gate_backward(
    grad_out: torch.Tensor,
    linear_out: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    has_linear: bool,
    *,
    runs_beside: bool = False,
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """dW = dO^T O^l and db = sum of dO, by float32 sums over stretches of tokens, then over the stretches.

    The first are launched here, with ``runs_beside`` beside the kernel before them, the others by the function that is
    returned, which gives dW and db, and until then holds what these read.
    """
    batch, heads, tokens, head_dim = grad_out.shape
    if weight is None:
        dweight = grad_out.new_empty(0)
    else:
        dweight = weight.new_empty(weight.shape) if has_linear else weight.new_zeros(weight.shape)
    dbias = bias.new_empty(bias.shape) if bias is not None else grad_out.new_empty(0)
    if not has_linear and bias is None:
        return lambda: (dweight, dbias)
    launch = launch_for("gate", head_dim, grad_out.dtype, 64, 64)
    tiles = ceil_div(tokens, launch.tile_q)
    tiles_per_split = max(_GATE_TILES, ceil_div(tiles, max(1, _GATE_PROGRAMS // max(1, batch * heads))))
    splits = ceil_div(tiles, tiles_per_split)
    bias_parts = torch.empty((batch, heads, splits, head_dim), dtype=torch.float32, device=grad_out.device)
    weight_parts = bias_parts.new_empty((*bias_parts.shape, head_dim) if has_linear else (0,))
    chunks = ceil_div(padded_dim(head_dim), launch.chunk) if has_linear else 1
    saved_linear = linear_out if has_linear else grad_out
    gate_gradient_kernel[(splits * batch * heads, chunks)](
        grad_out,
        saved_linear,
        weight_parts,
        bias_parts,
        *vector_strides(grad_out),
        *vector_strides(saved_linear),
        tokens,
        splits,
        heads,
        tiles_per_split,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        TILE=launch.tile_q,
        CHUNK=launch.chunk,
        HAS_LINEAR=has_linear,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **beside(runs_beside),
    )

    def sums() -> tuple[torch.Tensor, torch.Tensor]:
        weight_heads = heads if dweight.dim() == 3 else 1
        bias_heads = heads if dbias.dim() == 2 else 1
        weight_programs = weight_heads * ceil_div(head_dim * head_dim, 64) if has_linear else 0
        bias_programs = bias_heads * ceil_div(head_dim, 64) if bias is not None else 0
        gate_sum_kernel[(weight_programs + bias_programs,)](
            weight_parts,
            bias_parts,
            dweight,
            dbias,
            batch * heads * splits,
            splits,
            weight_heads,
            bias_heads,
            weight_programs,
            HEAD_DIM=head_dim,
            STEP=32,
        )
        return dweight, dbias

    return sums
