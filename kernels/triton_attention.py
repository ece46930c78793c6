"""Sparse-Linear Attention on the GPU: the two launchers, each a straight line of kernels with no host sync.

forward:  means and block states -> block scores -> classes and lists -> sums of states -> attention and gate.
backward: states and their sums again -> dQ, D^s, dH, dZ -> sums of dH and dZ -> dK, dV -> dW, db.
States are computed again in the backward: keeping them would cost more memory than q, k and v together.
"""

from __future__ import annotations

import torch
import triton

from sla_compile.blocks import forced_blocks, num_critical, num_negligible

from .triton_backward import (
    attention_backward_key_kernel,
    attention_backward_query_kernel,
    gate_gradient_kernel,
)
from .triton_classify import block_scores, classify_rows, classify_rows_with_options, critical_lists
from .triton_forward import attention_forward
from .triton_masks import batch_stride, block_tiers, key_bias
from .triton_states import block_means, key_states, marginal_matrices, sum_of_states
from .triton_tiles import (
    check_supported,
    gate_matrix,
    head_stride,
    launch_for,
    padded_dim,
    vector_readable,
    vector_strides,
)

__all__ = ["backward", "forward"]

_GATE_TILES_PER_SPLIT = 16


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None = None,
    sparsity: torch.Tensor | None = None,
    *,
    scale: float,
    topk: float,
    bottomk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
    causal: bool = False,
    always_critical: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """O = O^s + O^l weight^T + bias of q (B, H, Lq, D), k, v (B, H, Lk, D), 16-bit or float32, any strides.

    weight (D, D) or (H, D, D) and bias (D) or (H, D) in any floating dtype, or None; the options are those of
    ``sla::forward``. Returns out and linear_out (B, H, Lq, D), in memory (B, Lq, H, D), linear_out of shape (0,)
    without a linear branch; lse (B, H, Lq) float32, -inf for a query without a key; block_map (B, H, Tm, Tn) int8.

    Raises TypeError for a dtype and ValueError for a head dimension, block size, feature map or linear form
    that the kernels do not have.
    """
    check_supported(q, block_q, block_k, feature_map, linear)
    with torch.cuda.device_of(q):
        q, k, v = vector_readable(q), vector_readable(k), vector_readable(v)
        has_linear = weight is not None and linear != "none"
        gate = gate_matrix(weight, q.dtype) if weight is not None and has_linear else None
        logit_bias = None if key_mask is None else key_bias(key_mask)
        pooled_q = block_means(q, block_q)
        states = normalizers = None
        if has_linear:
            states, normalizers, pooled_k = key_states(k, v, block_k, feature_map, logit_bias, pool=True)
        else:
            pooled_k = block_means(k, block_k, logit_bias)
        block_map, lists, counts = _classes(
            block_scores(pooled_q, pooled_k, scale),
            logit_bias,
            sparsity,
            (q.shape[2], k.shape[2]),
            topk=topk,
            bottomk=bottomk,
            block_q=block_q,
            block_k=block_k,
            causal=causal,
            always_critical=always_critical,
        )
        if states is not None and normalizers is not None:
            matrices = _summed_blocks(block_map, states.dtype, linear, block_q, block_k, causal)
            states, normalizers = _sum_over_keys(states, normalizers, matrices)
        out, linear_out, lse = attention_forward(
            q,
            k,
            v,
            gate,
            bias,
            lists,
            states,
            normalizers,
            scale=scale,
            block_q=block_q,
            block_k=block_k,
            feature_map_name=feature_map,
            counts=counts,
            key_bias=logit_bias,
            causal=causal,
        )
        return out, linear_out, lse, block_map


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    linear_out: torch.Tensor,
    lse: torch.Tensor,
    block_map: torch.Tensor,
    *,
    scale: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward` at grad_out (B, H, Lq, D), any strides, from its inputs and outputs.

    Returns dq, dk, dv (B, H, L, D), in memory (B, L, H, D), and dweight and dbias in the shape and dtype of
    weight and bias, of shape (0,) where those are None. The same bits every time. Raises as `forward` does.
    """
    check_supported(q, block_q, block_k, feature_map, linear)
    with torch.cuda.device_of(q):
        grad_out, q, k, v, out = (vector_readable(x) for x in (grad_out, q, k, v, out))
        has_linear = weight is not None and linear != "none"
        logit_bias = None if key_mask is None else key_bias(key_mask)
        gate = states = normalizers = matrices = None
        if weight is not None and has_linear:
            gate = gate_matrix(weight, q.dtype)
            linear_out = vector_readable(linear_out)
            states, normalizers, _ = key_states(k, v, block_k, feature_map, logit_bias, pool=False)
            matrices = _summed_blocks(block_map, states.dtype, linear, block_q, block_k, causal)
            states, normalizers = _sum_over_keys(states, normalizers, matrices)
        dq, delta, grad_states, grad_normalizers = _query_side(
            grad_out,
            q,
            k,
            v,
            gate,
            bias,
            out,
            linear_out,
            lse,
            states,
            normalizers,
            block_map,
            logit_bias,
            scale=scale,
            block_q=block_q,
            block_k=block_k,
            feature_map=feature_map,
            causal=causal,
        )
        del states, normalizers
        if grad_states is not None and grad_normalizers is not None:
            repeat = grad_states.shape[2] // block_map.shape[2]
            if repeat > 1:
                matrices = _summed_blocks(block_map, grad_states.dtype, linear, block_q, block_k, causal, repeat)
            grad_states, grad_normalizers = _sum_over_queries(grad_states, grad_normalizers, matrices)
        dk, dv = _key_side(
            grad_out,
            q,
            k,
            v,
            lse,
            delta,
            grad_states,
            grad_normalizers,
            block_map,
            logit_bias,
            scale=scale,
            block_q=block_q,
            block_k=block_k,
            feature_map=feature_map,
            causal=causal,
        )
        dweight, dbias = _gate_side(grad_out, linear_out, weight, bias, has_linear)
        return dq, dk, dv, dweight, dbias


def _classes(
    scores: torch.Tensor,
    logit_bias: torch.Tensor | None,
    sparsity: torch.Tensor | None,
    tokens: tuple[int, int],
    *,
    topk: float,
    bottomk: float,
    block_q: int,
    block_k: int,
    causal: bool,
    always_critical: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Block map, lists and, where rows may have unequal numbers of critical blocks, counts."""
    tiers = block_tiers(logit_bias, always_critical, tokens[1], block_k, scores.device)
    if tiers is None and sparsity is None and not causal:
        critical = num_critical(topk, scores.shape[3])
        return *classify_rows(scores, critical, num_negligible(bottomk, critical, scores.shape[3])), None
    return classify_rows_with_options(
        scores,
        topk=topk,
        bottomk=bottomk,
        sparsity=sparsity,
        tiers=tiers,
        queries=tokens[0],
        block_q=block_q,
        block_k=block_k,
        causal=causal,
        always_critical=sum(last - first for first, last in forced_blocks(always_critical, tokens[1], block_k)),
    )


def _summed_blocks(
    block_map: torch.Tensor,
    dtype: torch.dtype,
    linear: str,
    block_q: int,
    block_k: int,
    causal: bool,
    repeat: int = 1,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`marginal_matrices` of the blocks that the linear branch sums; None where that is every block."""
    if linear == "marginal":
        return marginal_matrices(block_map, dtype, repeat)
    return marginal_matrices(block_map, dtype, repeat, (block_q, block_k)) if causal else None


def _sum_over_keys(
    states: torch.Tensor, normalizers: torch.Tensor, matrices: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """H (B, H, Tm, D, D) and Z (B, H, Tm, D) from h and z; without matrices the one row that all share."""
    matrix, single = matrices or (None, None)
    return sum_of_states(matrix, states), sum_of_states(single, normalizers)


def _sum_over_queries(
    grad_states: torch.Tensor,
    grad_normalizers: torch.Tensor,
    matrices: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dh (B, H, Tn, D, D) and dz (B, H, Tn, D) from dH and dZ of each query tile; or one row for all."""
    matrix, single = matrices or (None, None)
    return (
        sum_of_states(matrix, grad_states, transpose=True),
        sum_of_states(single, grad_normalizers, transpose=True),
    )


def _query_side(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    linear_out: torch.Tensor,
    lse: torch.Tensor,
    states: torch.Tensor | None,
    normalizers: torch.Tensor | None,
    block_map: torch.Tensor,
    logit_bias: torch.Tensor | None,
    *,
    scale: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dq, D^s (B, H, Lq) float32, and of each query tile dH (B, H, tiles, D, D) and dZ (B, H, tiles, D)."""
    batch, heads, tokens, head_dim = q.shape
    launch = launch_for("backward_query", head_dim, q.dtype, block_q, block_k)
    tiles = block_map.shape[2] * (block_q // launch.tile_q)
    lists, counts = critical_lists(block_map, by_column=False)
    dq = q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    delta = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    grad_states = grad_normalizers = None
    if states is not None:
        grad_states = states.new_empty(batch, heads, tiles, *states.shape[3:])
        grad_normalizers = delta.new_empty(batch, heads, tiles, head_dim)
    saved_linear = linear_out if states is not None else out
    # an absent tensor's place is taken by one that is there; the kernel does not touch it
    attention_backward_query_kernel[(tiles * batch * heads,)](
        grad_out,
        q,
        k,
        v,
        out,
        saved_linear,
        lse,
        weight if weight is not None else q,
        bias if bias is not None else q,
        states if states is not None else q,
        normalizers if normalizers is not None else delta,
        lists,
        counts,
        logit_bias if logit_bias is not None else delta,
        dq,
        delta,
        grad_states if grad_states is not None else q,
        grad_normalizers if grad_normalizers is not None else delta,
        *vector_strides(grad_out),
        *vector_strides(q),
        *vector_strides(k),
        *vector_strides(v),
        *vector_strides(out),
        *vector_strides(saved_linear),
        head_stride(weight, 2) // 8,
        head_stride(bias, 1),
        bias.stride(-1) if bias is not None else 0,
        batch_stride(logit_bias),
        scale,
        tokens,
        k.shape[2],
        tiles,
        heads,
        lists.shape[3],
        states.shape[2] if states is not None else 1,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_Q=launch.tile_q,
        TILE_K=launch.tile_k,
        CHUNK=launch.chunk,
        FEATURE_MAP=feature_map,
        HAS_LINEAR=states is not None,
        HAS_BIAS=bias is not None,
        HAS_KEY_BIAS=logit_bias is not None,
        CAUSAL=causal,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return dq, delta, grad_states, grad_normalizers


def _key_side(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_states: torch.Tensor | None,
    grad_normalizers: torch.Tensor | None,
    block_map: torch.Tensor,
    logit_bias: torch.Tensor | None,
    *,
    scale: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv (B, H, Lk, D) from D^s and, with a linear branch, dh and dz."""
    batch, heads, tokens, head_dim = q.shape
    launch = launch_for("backward_key", head_dim, q.dtype, block_q, block_k)
    tiles = triton.cdiv(k.shape[2], launch.tile_k)
    lists, counts = critical_lists(block_map, by_column=True)
    dk, dv = (q.new_empty(batch, k.shape[2], heads, head_dim).transpose(1, 2) for _ in range(2))
    attention_backward_key_kernel[(tiles * batch * heads,)](
        grad_out,
        q,
        k,
        v,
        lse,
        delta,
        grad_states if grad_states is not None else q,
        grad_normalizers if grad_normalizers is not None else delta,
        lists,
        counts,
        logit_bias if logit_bias is not None else delta,
        dk,
        dv,
        *vector_strides(grad_out),
        *vector_strides(q),
        *vector_strides(k),
        *vector_strides(v),
        batch_stride(logit_bias),
        scale,
        tokens,
        k.shape[2],
        tiles,
        heads,
        lists.shape[3],
        grad_states.shape[2] if grad_states is not None else 1,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_Q=launch.tile_q,
        TILE_K=launch.tile_k,
        CHUNK=launch.chunk,
        FEATURE_MAP=feature_map,
        HAS_LINEAR=grad_states is not None,
        HAS_KEY_BIAS=logit_bias is not None,
        CAUSAL=causal,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return dk, dv


def _gate_side(
    grad_out: torch.Tensor,
    linear_out: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    has_linear: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dW = dO^T O^l and db = sum of dO, by float32 sums over stretches of tokens, then over the stretches."""
    batch, heads, tokens, head_dim = grad_out.shape
    dweight = weight.new_zeros(weight.shape) if weight is not None else grad_out.new_empty(0)
    dbias = grad_out.new_empty(0)
    if not has_linear and bias is None:
        return dweight, dbias
    launch = launch_for("gate", head_dim, grad_out.dtype, 64, 64)
    splits = triton.cdiv(tokens, launch.tile_q * _GATE_TILES_PER_SPLIT)
    bias_parts = torch.empty((batch, heads, splits, head_dim), dtype=torch.float32, device=grad_out.device)
    weight_parts = bias_parts.new_empty((*bias_parts.shape, head_dim) if has_linear else (0,))
    chunks = triton.cdiv(padded_dim(head_dim), launch.chunk) if has_linear else 1
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
        _GATE_TILES_PER_SPLIT,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        TILE=launch.tile_q,
        CHUNK=launch.chunk,
        HAS_LINEAR=has_linear,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    if weight is not None and has_linear:
        dweight = _sum_parts(weight_parts, weight, per_head=weight.dim() == 3)
    if bias is not None:
        dbias = _sum_parts(bias_parts, bias, per_head=bias.dim() == 2)
    return dweight, dbias


def _sum_parts(parts: torch.Tensor, like: torch.Tensor, *, per_head: bool) -> torch.Tensor:
    """Float32 parts (B, H, splits, ...) summed over batch, splits and shared heads, as ``like``."""
    return parts.sum((0, 2) if per_head else (0, 1, 2), dtype=torch.float32).to(like.dtype)
