"""``sla::gate``: says, in a traced graph, which tensors are the gate of which attention.

A prepared module calls it while Dynamo traces, so that Dynamo itself makes the gate's parameters inputs of the graph.
The rewrite takes its arguments and erases it; it never runs. In a graph for another backend it stays and does nothing,
also under a transform of ``torch.func``, for which an op of ``torch.library.custom_op`` would need rules.
"""

from __future__ import annotations

from typing import Any

import torch

__all__: list[str] = []

torch.library.define(
    "sla::gate",
    "(Tensor? weight, Tensor? bias, Tensor? sparsity, Tensor? log_scale, Tensor? shift, SymInt ordinal, str settings, "
    "bool from_child) -> ()",
)


@torch.library.impl("sla::gate", "CompositeImplicitAutograd")
def _gate_marker(*_: Any) -> None:
    """Marks the owner's attention number ``ordinal`` in a traced graph; does nothing when it runs."""
