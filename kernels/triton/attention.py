"""Sparse-Linear Attention on the GPU: both directions, each a straight line of kernels with no host sync.

forward:  means and block states -> block scores -> classes and lists -> sums of states -> attention and gate.
backward: states and their sums again -> D^s, dH, dZ, linear dQ -> sums of dH and dZ -> lists -> dQ -> dK, dV -> dW, db.
The sums of states are kept for the backward where they take no more memory than q; else all states are computed again.
"""

from __future__ import annotations

import torch

from sla_compile.common.kernel_interface import (
    AttentionInputs,
    ForwardResult,
    Gradients,
    has_linear_branch,
    kept_rows,
)
from sla_compile.common.limits import TAYLOR
from sla_compile.common.options import AttentionOptions, BackwardOptions

from ..hopper import support as hopper
from ..steps import BlockLists, KernelInputs, LinearStates, Steps, Upstream
from . import overlap, taylor
from . import steps as triton_steps
from .classify import block_scores, classes, critical_lists
from .linear_backward import gate_backward
from .masks import key_weights
from .states import block_means, empty_matrix, marginal_matrix, state_dtype, sum_over_blocks
from .tiles import check_supported, gate_matrix, vector_readable

__all__ = ["backward", "forward"]


def forward(inputs: AttentionInputs, options: AttentionOptions) -> ForwardResult:
    """Output, and what its backward needs, of one call; q, k and v 16-bit or float32.

    Raises TypeError for a dtype and ValueError for a head dimension, block size, feature map or linear form
    that the kernels do not have.
    """
    q, k, v, weight, bias, key_mask = inputs[:6]
    check_supported(q, options)
    with torch.cuda.device_of(q):
        q, k, v = vector_readable(q), vector_readable(k), vector_readable(v)
        has_linear = has_linear_branch(weight, options)
        gate = gate_matrix(weight, q.dtype) if weight is not None and has_linear else None
        weights = None if key_mask is None else key_weights(key_mask, options.block_k)
        operands = KernelInputs(q, k, v, gate, bias, weights)
        steps = _steps(q, k, v, options=options, has_key_mask=key_mask is not None)
        if options.linear == TAYLOR:
            return taylor.forward(inputs, operands, options, steps)
        may_overlap = steps is not triton_steps and overlap.may_overlap()
        pooled_q = block_means(q, options.block_q, lets_next_start=may_overlap and has_linear)
        linear = matrix = None
        if has_linear:
            linear, pooled_k = steps.key_states(operands, options, pool=True, runs_beside=may_overlap)
        else:
            pooled_k = block_means(k, options.block_k, operands.key_bias)
        scores = block_scores(pooled_q, pooled_k, options.scale)
        if linear is not None and options.linear == "marginal":
            matrix = empty_matrix(scores.shape, linear.states.dtype, q.device)
        block_map, lists = classes(scores, operands, inputs.sparsity, options, matrix)
        del scores  # its memory serves what follows
        if linear is None:
            return ForwardResult(*steps.attention_forward(operands, lists, None, options), block_map)
        if matrix is None:
            matrix = _summed_blocks(block_map, linear.states.dtype, options)
        beside = may_overlap and matrix is not None
        sums = sum_over_blocks(matrix, linear, q.shape[1], lets_next_start=beside)
        # what the kernel beside reads stays; h does not
        normalizers = linear.normalizers
        del linear
        found = steps.attention_forward(operands, lists, sums, options, runs_beside=beside)
        del normalizers, matrix
        return ForwardResult(*found, block_map, *(sums if kept_rows(q, weight, options) else (None, None)))


def backward(
    grad_out: torch.Tensor, inputs: AttentionInputs, result: ForwardResult, options: BackwardOptions
) -> Gradients:
    """Gradients at grad_out of the call that gave ``result``; the same bits every time. Raises as `forward` does."""
    q, k, v, weight, bias, key_mask = inputs[:6]
    out, linear_out, lse, block_map, state_sums, normalizer_sums = result
    check_supported(q, options)
    with torch.cuda.device_of(q):
        grad_out, q, k, v, out = (vector_readable(x) for x in (grad_out, q, k, v, out))
        has_linear = has_linear_branch(weight, options)
        weights = None if key_mask is None else key_weights(key_mask, options.block_k)
        gate = None
        if weight is not None and has_linear:
            gate = gate_matrix(weight, q.dtype)
            linear_out = vector_readable(linear_out)
        operands = KernelInputs(q, k, v, gate, bias, weights)
        upstream = Upstream(grad_out, out, linear_out, lse)
        steps = _steps(grad_out, q, k, v, options=options, has_key_mask=key_mask is not None)
        if options.linear == TAYLOR:
            return taylor.backward(upstream, block_map, inputs.shift, operands, options, steps)
        linear = matrix = lists = None
        # with few blocks kernels run beside each other: what the linear branch begins with beside lists, the gate and
        # dK, dV beside dQ; with many the lists are made when they are read, and take no memory until then
        beside = has_linear and overlap.may_overlap() and steps.few_columns(operands, options)
        if has_linear:
            matrix = _summed_blocks(block_map, state_dtype(q.dtype), options)
        if beside:
            lists = _critical_lists(block_map, operands, options, steps)
        kept = False
        if state_sums is not None and normalizer_sums is not None and state_sums.shape[2] > 0:
            linear, kept = LinearStates(state_sums, normalizer_sums), True
        elif has_linear:
            linear, _ = steps.key_states(operands, options, pool=False, runs_beside=beside)
            linear = sum_over_blocks(matrix, linear, q.shape[1])
        gradients, linear = steps.linear_backward(upstream, operands, linear, options, runs_beside=beside and kept)
        if linear is not None:
            tiles_per_block = linear.states.shape[2] // block_map.shape[2]
            if tiles_per_block > 1:
                matrix = _summed_blocks(block_map, linear.states.dtype, options, tiles_per_block)
            linear = sum_over_blocks(matrix, linear, k.shape[1], transpose=True)
        rows, columns, order = lists or _critical_lists(block_map, operands, options, steps)
        steps.attention_backward_query(upstream, operands, rows, gradients, options)
        gate_gradients = gate_backward(grad_out, linear_out, weight, bias, has_linear, runs_beside=beside)
        dk, dv = steps.attention_backward_key(
            upstream, operands, columns, order, gradients.statistics, linear, options, runs_beside=beside
        )
        dweight, dbias = gate_gradients()
        return Gradients(gradients.dq, dk, dv, dweight, dbias, q.new_empty(0))


def _critical_lists(
    block_map: torch.Tensor, operands: KernelInputs, options: BackwardOptions, steps: Steps
) -> tuple[BlockLists, BlockLists, torch.Tensor]:
    """The critical blocks of rows and of columns, and the order of work on these."""
    rows = critical_lists(block_map, by_column=False, weights=operands.key_weights)
    columns = critical_lists(block_map, by_column=True, group=operands.group)
    return rows, columns, steps.column_order(operands, columns, options)


def _steps(*tensors: torch.Tensor, options: BackwardOptions, has_key_mask: bool) -> Steps:
    """Gluon's steps where they take a call with these ``tensors``, else Triton's."""
    if not hopper.usable(*tensors, options=options, has_key_mask=has_key_mask):
        return triton_steps
    return _wide_gluon() if tensors[0].shape[3] > hopper.WIDE else _gluon()


def _gluon() -> Steps:
    """Gluon's steps, imported when a Hopper GPU first needs them."""
    from ..hopper import steps as hopper_steps

    return hopper_steps


def _wide_gluon() -> Steps:
    """The same for head dimensions above ``WIDE``."""
    from ..hopper import wide_steps

    return wide_steps


def _summed_blocks(
    block_map: torch.Tensor, dtype: torch.dtype, options: BackwardOptions, repeat: int = 1
) -> torch.Tensor | None:
    """`marginal_matrix` of the blocks that the linear branch sums; None where that is every block."""
    if options.linear == "marginal":
        return marginal_matrix(block_map, dtype, repeat)
    return marginal_matrix(block_map, dtype, repeat, (options.block_q, options.block_k)) if options.causal else None
