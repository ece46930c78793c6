"""The steps of a call in Gluon: `Steps` for what ``support.usable`` accepts. To import it is to import Gluon.

Head dimensions above ``WIDE`` have dQ, dK and dV of their own; what is left of such a call is Triton's.
"""

from __future__ import annotations

import torch

from sla_compile.common.options import BackwardOptions

from ..steps import BlockLists, KernelInputs, LinearStates, QueryGradients, Upstream
from ..triton import backward as triton_backward
from ..triton import linear_backward as triton_linear_backward
from ..triton import states as triton_states
from . import backward_key, backward_query, states, wide_key, wide_query
from . import linear_backward as hopper_linear_backward
from .backward_key import virtual_backward_key
from .backward_query import virtual_backward_query
from .forward import attention_forward, virtual_forward
from .moments import key_moments
from .support import WIDE
from .virtual_keys import virtual_key_gradients

__all__ = [
    "attention_backward_key",
    "attention_backward_query",
    "attention_forward",
    "column_order",
    "few_columns",
    "key_moments",
    "key_states",
    "linear_backward",
    "virtual_backward_key",
    "virtual_backward_query",
    "virtual_forward",
    "virtual_key_gradients",
]


def _is_wide(inputs: KernelInputs) -> bool:
    return inputs.q.shape[3] > WIDE


def key_states(
    inputs: KernelInputs, options: BackwardOptions, *, pool: bool, runs_beside: bool = False
) -> tuple[LinearStates, torch.Tensor]:
    """As `Steps.key_states`."""
    make = triton_states.key_states if _is_wide(inputs) else states.key_states
    return make(inputs, options, pool=pool, runs_beside=runs_beside)


def few_columns(inputs: KernelInputs, options: BackwardOptions) -> bool:
    """As `Steps.few_columns`."""
    return not _is_wide(inputs) and backward_key.few_columns(inputs, options)


def column_order(inputs: KernelInputs, lists: BlockLists, options: BackwardOptions) -> torch.Tensor:
    """As `Steps.column_order`."""
    make = triton_backward.column_order if _is_wide(inputs) else backward_key.column_order
    return make(inputs, lists, options)


def linear_backward(
    upstream: Upstream,
    inputs: KernelInputs,
    linear: LinearStates | None,
    options: BackwardOptions,
    *,
    runs_beside: bool = False,
) -> tuple[QueryGradients, LinearStates | None]:
    """As `Steps.linear_backward`: in Gluon with a linear branch; for the statistics of a gate that is a bias alone, in
    Triton; without a gate the dQ kernel makes the statistics from what it loads."""
    if linear is not None and not _is_wide(inputs):
        return hopper_linear_backward.linear_backward(upstream, inputs, linear, options, runs_beside)
    if inputs.bias is not None or _is_wide(inputs):
        return triton_linear_backward.linear_backward(upstream, inputs, linear, options)
    return backward_query.fresh_gradients(inputs.q, options.block_q), None


def attention_backward_query(
    upstream: Upstream,
    inputs: KernelInputs,
    lists: BlockLists,
    gradients: QueryGradients,
    options: BackwardOptions,
) -> None:
    """As `Steps.attention_backward_query`."""
    make = wide_query.attention_backward_query if _is_wide(inputs) else backward_query.attention_backward_query
    make(upstream, inputs, lists, gradients, options)


def attention_backward_key(
    upstream: Upstream,
    inputs: KernelInputs,
    lists: BlockLists,
    order: torch.Tensor,
    statistics: torch.Tensor,
    linear: LinearStates | None,
    options: BackwardOptions,
    *,
    runs_beside: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Steps.attention_backward_key`."""
    make = wide_key.attention_backward_key if _is_wide(inputs) else backward_key.attention_backward_key
    return make(upstream, inputs, lists, order, statistics, linear, options, runs_beside=runs_beside)
