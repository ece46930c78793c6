"""Whether queries and keys of equal length are projections of different tensors, as in cross-attention.

They are taken for self-attention unless the graph shows otherwise: projections of tensors that share nothing, not
even what they were normalised, modulated or summed from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sla_compile.passes.node_ops import VIEWS, read
from sla_compile.passes.operands import Operand, example
from sla_compile.passes.view_axes import same_size

__all__ = ["of_different_tensors"]

_MOST_NODES = 400
_PROJECTIONS = {"linear", "conv1d", "conv2d", "conv3d"}
_ATTENTION = {"scaled_dot_product_attention", "softmax"}
_OF_ONE = VIEWS | {"layer_norm", "rms_norm", "group_norm", "dropout", "to", "contiguous", "clone", "detach"}
_OF_SEVERAL = {"add", "sub", "mul", "div", "addcmul"}


def of_different_tensors(query: Any, key: Any) -> bool:
    """Whether the graph shows that ``query`` and ``key`` were projected from tensors without a common part."""
    queries, keys = _projected(query), _projected(key)
    if not queries or not keys:
        return False
    return not {part for node in queries for part in _parts(node)} & {part for node in keys for part in _parts(node)}


def _projected(side: Any) -> set[fx.Node] | None:
    """The inputs of the projections that ``side`` was made by; None where something else is behind it."""
    node = side.source if isinstance(side, Operand) else side
    if not isinstance(node, fx.Node):
        return None
    found: set[fx.Node] = set()
    seen, pending = {node}, [node]
    while pending:
        node = pending.pop()
        op = read(node)
        if op.word in _PROJECTIONS and isinstance(op.input, fx.Node):
            found.add(op.input)
            continue
        if op.word in _ATTENTION or len(seen) > _MOST_NODES or (node.op == "placeholder" and _is_activation(node)):
            return None
        inputs = [op.input] if op.word in VIEWS else node.all_input_nodes
        behind = {other for other in inputs if isinstance(example(other), torch.Tensor)} - seen
        seen |= behind
        pending += behind
    return found


def _is_activation(node: fx.Node) -> bool:
    value = example(node)
    parameter = isinstance(value, torch.nn.Parameter) or "_parameters_" in node.name or "_buffers_" in node.name
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and not parameter


def _parts(node: fx.Node) -> set[fx.Node]:
    """``node``, what it was normalised or modulated from, and the terms of the first sum behind that."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending and len(found) < _MOST_NODES:
        node = pending.pop()
        found.add(node)
        op = read(node)
        if op.word == "cat":
            pending += [part for part in op.arguments.get("tensors", ()) if isinstance(part, fx.Node)]
        elif op.word in _OF_ONE and isinstance(op.input, fx.Node):
            pending.append(op.input)
        elif op.word in _OF_SEVERAL:
            whole = [other for other in node.all_input_nodes if _same_shape(other, node)]
            if len(whole) == 1:
                pending += whole
            found |= set(whole)
    return found


def _same_shape(left: fx.Node, right: fx.Node) -> bool:
    one, other = example(left), example(right)
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.dim() != other.dim():
        return False
    return all(same_size(a, b) for a, b in zip(one.shape, other.shape, strict=True))
