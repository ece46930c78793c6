"""Whether queries and keys of equal length are projections of different tensors, as in cross-attention.

They are taken for self-attention unless the graph shows otherwise: projections of tensors that share no origin on which
both depend token by token. Operations that are not known here are walked through. What is not such an origin: a
parameter, a buffer or what is computed from those alone, a tensor without an axis of tokens, and what only came in
through a projection or an attention that was added, as the output of a cross-attention is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.passes.node_ops import VIEWS, NodeOp, read, writes
from sla_compile.passes.operands import Operand, example
from sla_compile.passes.view_axes import same_size

__all__ = ["of_different_tensors"]

_MOST_NODES = 400
_PROJECTIONS = {"linear", "conv1d", "conv2d", "conv3d"}
_ATTENTION = {"scaled_dot_product_attention", "softmax"}
_OF_ONE = VIEWS | {"layer_norm", "rms_norm", "group_norm", "dropout", "to", "contiguous", "clone", "detach"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "addmm", "mm", "einsum"}


def of_different_tensors(query: Any, key: Any) -> bool:
    """Whether the graph shows that ``query`` and ``key`` were projected from tensors without a common origin."""
    queries, keys = _projected(query), _projected(key)
    if not queries or not keys or queries & keys:
        return False
    tokens = example(query).shape[2]
    left: set[fx.Node] = set()
    right: set[fx.Node] = set()
    for one, other in zip_longest(_origins(queries), _origins(keys)):
        for node, mine, others in ((one, left, right), (other, right, left)):
            if node is None:
                continue
            mine.add(node)
            if node in others and _may_hold(node, tokens) and not _is_constant(node):
                return False
    return True


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
        behind = set(_behind(node)) - seen
        seen |= behind
        pending += behind
    return found


def _is_activation(node: fx.Node) -> bool:
    return isinstance(example(node), torch.Tensor) and _has_batch(node) and not _is_parameter(node)


def _origins(starts: set[fx.Node]) -> Iterator[fx.Node]:
    """``starts`` and what they depend on token by token, the nearest first.

    Projections are passed until a sum is: what is added to a stream of tokens through one, as the output of an
    attention or of an adapter, does not make it the stream that it came from.
    """
    passed: dict[fx.Node, bool] = {}  # by node, whether there was a way to it without a sum
    pending = [(node, True) for node in starts]
    for node, alone in pending:
        if passed.get(node, False) or (node in passed and not alone):
            continue
        passed[node] = alone
        yield node
        op = read(node)
        if op.word in _ATTENTION or (op.word in _PROJECTIONS and not alone) or _mixes_tokens(op, node):
            continue
        behind = [op.input] if op.word in _PROJECTIONS else _behind(node)
        alone = alone and (op.word == "cat" or len(behind) == 1)
        pending += [(other, alone) for other in behind if isinstance(other, fx.Node)]


def _behind(node: fx.Node) -> list[fx.Node]:
    """The inputs of ``node`` that its tokens may be of.

    Those of its own shape where there are any: the others were broadcast, as a modulation is, or are weights and
    tables.
    """
    op = read(node)
    written = [other for user in node.users if node in writes(user) for other in user.all_input_nodes if other != node]
    if op.word in _OF_ONE and isinstance(op.input, fx.Node):
        return [op.input, *filter(_is_data, written)]
    inputs = [other for other in (*node.all_input_nodes, *written) if _is_data(other)]
    whole = [other for other in inputs if _same_shape(other, node)]
    return inputs if op.word == "cat" or written else whole or inputs


def _is_data(node: fx.Node) -> bool:
    """Whether it may stand for tensors; several, as those of ``chunk``, or one that was not traced."""
    value = example(node)
    return value is None or isinstance(value, torch.Tensor | tuple | list)


def _mixes_tokens(op: NodeOp, node: fx.Node) -> bool:
    """A product of two activations, as the last one of an attention written out; not one with a matrix."""
    factors = [other for other in node.all_input_nodes if _is_data(other) and not _is_constant(other)]
    return op.word in _PRODUCTS and sum(_has_batch(other) for other in factors) > 1


def _has_batch(node: fx.Node) -> bool:
    value = example(node)
    return not isinstance(value, torch.Tensor) or value.dim() >= 3


def _may_hold(node: fx.Node, tokens: int | torch.SymInt) -> bool:
    """Whether a tensor may have an axis of ``tokens``; False for a vector of conditions."""
    value = example(node)
    if not isinstance(value, torch.Tensor):
        return True
    axes = range(value.dim())
    if any(statically_known_true(math.prod(value.shape[i : j + 1]) == tokens) for i in axes for j in axes[i:]):
        return True
    return not statically_known_true(math.prod(value.shape[:-1]) < tokens)


def _is_constant(node: fx.Node) -> bool:
    """Whether ``node`` is computed from parameters and buffers alone, or from nothing."""
    seen, pending = {node}, [node]
    while pending:
        node = pending.pop()
        if node.op == "placeholder" and isinstance(example(node), torch.Tensor) and not _is_parameter(node):
            return False
        behind = {other for other in node.all_input_nodes if _is_data(other)} - seen
        seen |= behind
        pending += behind
    return True


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(example(node), torch.nn.Parameter) or "_parameters_" in node.name or "_buffers_" in node.name


def _same_shape(left: fx.Node, right: fx.Node) -> bool:
    one, other = example(left), example(right)
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.dim() != other.dim():
        return False
    return all(same_size(a, b) for a, b in zip(one.shape, other.shape, strict=True))
