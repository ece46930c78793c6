"""Sparse-Linear Attention on the GPU: the two launchers, each a straight line of kernels with no host sync.

forward:  means and block states -> block scores -> classes and lists -> sums of states -> attention and gate.
backward: states and their sums again -> D^s, dH, dZ, linear dQ -> sums of dH and dZ -> lists -> dQ -> dK, dV -> dW, db.
States are computed again in the backward: keeping them would cost more memory than q, k and v together.
"""

from __future__ import annotations

import torch

from sla_compile.common.blocks import forced_blocks, num_critical, num_negligible

from ..hopper import support as hopper
from .backward import attention_backward_key, attention_backward_query
from .classify import (
    block_scores,
    classify_rows,
    classify_rows_with_options,
    critical_lists,
    longest_first,
)
from .forward import attention_forward
from .linear_backward import gate_backward, linear_backward
from .masks import block_tiers, key_bias
from .states import block_means, key_states, marginal_matrix, sum_of_normalizers, sum_of_states
from .tiles import check_supported, gate_matrix, vector_readable

__all__ = ["backward", "forward"]


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
        masked = logit_bias is not None or causal
        fast = hopper.usable(q, k, v, scale=scale, block_q=block_q, block_k=block_k, masked=masked)
        pooled_q = block_means(q, block_q)
        states = normalizers = None
        if has_linear:
            states, normalizers, pooled_k = _key_states(k, v, block_k, feature_map, logit_bias, fast, pool=True)
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
            matrix = _summed_blocks(block_map, states.dtype, linear, block_q, block_k, causal)
            states, normalizers = sum_of_states(matrix, states), sum_of_normalizers(matrix, normalizers)
        tensors = (q, k, v, gate, bias, lists, states, normalizers)
        if fast:
            results = hopper.attention_forward(*tensors, counts, scale, block_q, block_k, feature_map)
        else:
            results = attention_forward(
                *tensors,
                scale=scale,
                block_q=block_q,
                block_k=block_k,
                feature_map_name=feature_map,
                counts=counts,
                key_bias=logit_bias,
                causal=causal,
            )
        return *results, block_map


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
        masked = logit_bias is not None or causal
        fast = hopper.usable(grad_out, q, k, v, scale=scale, block_q=block_q, block_k=block_k, masked=masked)
        gate = states = normalizers = matrix = None
        if weight is not None and has_linear:
            gate = gate_matrix(weight, q.dtype)
            linear_out = vector_readable(linear_out)
            states, normalizers, _ = _key_states(k, v, block_k, feature_map, logit_bias, fast, pool=False)
            matrix = _summed_blocks(block_map, states.dtype, linear, block_q, block_k, causal)
            states, normalizers = sum_of_states(matrix, states), sum_of_normalizers(matrix, normalizers)
        grad_states: torch.Tensor | None
        grad_normalizers: torch.Tensor | None
        queries = (grad_out, q, gate, bias, out, linear_out, lse, states, normalizers)
        saved = None
        if fast and has_linear:
            dq, statistics, grad_states, grad_normalizers = hopper.linear_backward(
                *queries, scale, block_q, feature_map
            )
        elif fast and bias is None:
            # the dQ kernel makes them from what it loads
            saved, grad_states, grad_normalizers = (out, lse), None, None
            batch, heads, tokens, head_dim = q.shape
            dq = q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
            statistics = lse.new_empty(batch, heads, 2, block_map.shape[2] * block_q)
        else:
            dq, statistics, grad_states, grad_normalizers = linear_backward(
                *queries, scale=scale, block_q=block_q, feature_map=feature_map
            )
        del states, normalizers, queries
        if grad_states is not None and grad_normalizers is not None:
            repeat = grad_states.shape[2] // block_map.shape[2]
            if repeat > 1:
                matrix = _summed_blocks(block_map, grad_states.dtype, linear, block_q, block_k, causal, repeat)
            grad_states = sum_of_states(matrix, grad_states, transpose=True)
            grad_normalizers = sum_of_normalizers(matrix, grad_normalizers, transpose=True)
        rows, columns = (critical_lists(block_map, by_column=by_column) for by_column in (False, True))
        # some keys are popular: rows have about as many critical blocks as each other, columns have not
        order = longest_first(columns[1], block_map.shape[2])
        if fast:
            side = (grad_out, q, k, v, statistics, scale, block_q, block_k)
            hopper.attention_backward_query(*side, *rows, dq, has_linear, saved)
            dk, dv = hopper.attention_backward_key(*side, *columns, order, grad_states, grad_normalizers, feature_map)
        else:
            attention_backward_query(
                grad_out,
                q,
                k,
                v,
                *rows,
                statistics,
                dq,
                scale=scale,
                block_q=block_q,
                block_k=block_k,
                has_linear=has_linear,
                key_bias=logit_bias,
                causal=causal,
            )
            dk, dv = attention_backward_key(
                grad_out,
                q,
                k,
                v,
                *columns,
                order,
                statistics,
                grad_states,
                grad_normalizers,
                scale=scale,
                block_q=block_q,
                block_k=block_k,
                feature_map=feature_map,
                key_bias=logit_bias,
                causal=causal,
            )
        dweight, dbias = gate_backward(grad_out, linear_out, weight, bias, has_linear)
        return dq, dk, dv, dweight, dbias


def _key_states(
    k: torch.Tensor,
    v: torch.Tensor,
    block_k: int,
    feature_map: str,
    logit_bias: torch.Tensor | None,
    fast: bool,
    *,
    pool: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`key_states`, by Gluon where it is ``fast``: there is no bias then."""
    if fast:
        return hopper.key_states(k, v, block_k, feature_map, pool)
    return key_states(k, v, block_k, feature_map, logit_bias, pool=pool)


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
) -> torch.Tensor | None:
    """`marginal_matrix` of the blocks that the linear branch sums; None where that is every block."""
    if linear == "marginal":
        return marginal_matrix(block_map, dtype, repeat)
    return marginal_matrix(block_map, dtype, repeat, (block_q, block_k)) if causal else None
