"""The steps of a call in Triton: `Steps` for any GPU that Triton compiles for."""

from __future__ import annotations

from .backward import attention_backward_key, attention_backward_query, column_order, few_columns
from .forward import attention_forward
from .linear_backward import linear_backward
from .moments import key_moments
from .states import key_states
from .virtual_keys import virtual_backward_key, virtual_backward_query, virtual_forward, virtual_key_gradients

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
