"""The steps of a call in Gluon: `Steps` for what ``support.usable`` accepts, up to ``WIDE`` dimensions.

To import it is to import Gluon.
"""

from __future__ import annotations

from sla_compile.common.options import BackwardOptions

from ..steps import KernelInputs, LinearStates, QueryGradients, Upstream
from ..triton import linear_backward as triton_linear_backward
from . import linear_backward as hopper_linear_backward
from .backward_key import attention_backward_key, column_order, few_columns, virtual_backward_key
from .backward_query import attention_backward_query, fresh_gradients, virtual_backward_query
from .forward import attention_forward, virtual_forward
from .moments import key_moments
from .states import key_states
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
    if linear is not None:
        return hopper_linear_backward.linear_backward(upstream, inputs, linear, options, runs_beside)
    if inputs.bias is not None:
        return triton_linear_backward.linear_backward(upstream, inputs, linear, options)
    return fresh_gradients(inputs.q, options.block_q), None
