"""The steps of a call above ``WIDE`` dimensions: forward, dQ, dK and dV in Gluon, all else in Triton."""

from __future__ import annotations

from ..triton.backward import column_order, few_columns
from ..triton.linear_backward import linear_backward
from ..triton.moments import key_moments
from ..triton.states import key_states
from ..triton.virtual_keys import virtual_backward_key, virtual_backward_query, virtual_forward, virtual_key_gradients
from .forward import attention_forward
from .wide_key import attention_backward_key
from .wide_query import attention_backward_query

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
