"""Whether a rank holds only a part of an attention's heads, tokens or batch, as DTensor's parallel plans make it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sla_compile.passes.node_ops import read
from sla_compile.passes.operands import Operand, example

__all__ = ["sharding"]

_MOST_NODES = 400
_ENDS = {"linear", "scaled_dot_product_attention", "softmax"}


def sharding(side: Any) -> str | None:
    """How ``side`` is spread over ranks, from its projection on; None where nothing shows that it is.

    A local tensor counts too where it is the shard of a DTensor, as what ColwiseParallel gives is.
    """
    node = side.source if isinstance(side, Operand) else side
    if not isinstance(node, fx.Node):
        return None
    if _is_distributed(example(node)):
        return _described(example(node))
    seen, pending = {node}, [node]
    while pending and len(seen) <= _MOST_NODES:
        node = pending.pop()
        value = example(node)
        if _is_distributed(value) and _is_in_parts(value):
            return _described(value)
        if read(node).word not in _ENDS:
            behind = set(node.all_input_nodes) - seen
            seen |= behind
            pending += behind
    return None


def _is_distributed(value: Any) -> bool:
    """Whether it is a DTensor, told without the import of torch.distributed.tensor."""
    return isinstance(value, torch.Tensor) and hasattr(value, "placements") and hasattr(value, "device_mesh")


def _is_in_parts(value: Any) -> bool:
    sizes = value.device_mesh.shape
    return any(placement.is_shard() and size > 1 for placement, size in zip(value.placements, sizes, strict=True))


def _described(value: Any) -> str:
    return f"a DTensor, {', '.join(map(str, value.placements))} over {value.device_mesh.size()} rank(s)"
