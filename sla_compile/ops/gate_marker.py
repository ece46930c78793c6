"""``sla::gate``: says, in a traced graph, which tensors are the gate of which attention.

A prepared module calls it while Dynamo traces, so that Dynamo itself makes the gate's parameters inputs of the graph.
The rewrite takes its arguments and erases it; it never runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


@torch.library.custom_op("sla::gate", mutates_args=())
def _gate_marker(
    weight: Tensor,
    bias: Tensor,
    sparsity: Tensor | None,
    log_scale: Tensor | None,
    ordinal: int,
    settings: str,
    from_child: bool,
) -> None:
    """Marks the owner's attention call number ``ordinal`` in a traced graph; does nothing when it runs."""


@_gate_marker.register_fake
def _(weight: Tensor, bias: Tensor, sparsity: Tensor | None, log_scale: Tensor | None, *_: Any) -> None:
    return None
