"""Whether a tensor's memory is written to after it was made, in place or through a view."""

from __future__ import annotations

import operator

import torch
from torch import fx

from sla_compile.passes.node_ops import disturbs, writes
from sla_compile.passes.operands import example, memory

__all__ = ["overwritten", "overwritten_before", "writes_of_parts"]


def overwritten(node: fx.Node) -> bool:
    """Whether anything writes to the memory of ``node`` later, so that its making does not tell its values."""
    return _by_users(node, memory(example(node)))


def _by_users(node: fx.Node, written: int | None) -> bool:
    return any(_by_user(user, written) for user in node.users)


def _by_user(user: fx.Node, written: int | None) -> bool:
    if written is None:
        return True
    if user.target is operator.setitem and isinstance(into := example(user.args[0]), torch.Tensor):
        return memory(into) in (written, None)
    if _may_write(user):
        return True
    value = example(user)
    views = value if isinstance(value, tuple | list) else (value,)  # chunk and the like give several
    shared = any(isinstance(view, torch.Tensor) and memory(view) in (written, None) for view in views)
    return shared and _by_users(user, written)


def writes_of_parts(node: fx.Node) -> list[fx.Node] | None:
    """Each ``x[part] = value`` into ``node`` itself, in their order; None where else its memory may be written to."""
    value, found = example(node), []
    here = memory(value) if isinstance(value, torch.Tensor) else None
    for user in node.users:
        if user.target is operator.setitem and user.args[0] is node and user.graph is node.graph:
            found.append(user)
        elif _by_user(user, here):
            return None
    return sorted(found)


def _may_write(node: fx.Node) -> bool:
    """An op whose schema writes to nothing does not, even where it counts as impure for its random numbers."""
    harmless = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
    return disturbs(node) and not harmless


def overwritten_before(node: fx.Node, end: fx.Node) -> bool:
    """Whether its memory may be written to, by whatever name, between ``node`` and ``end`` of the same graph."""
    value = example(node)
    place = memory(value) if isinstance(value, torch.Tensor) else None
    if place is None or node.graph is not end.graph:
        return True
    while (node := node.next) is not end:
        if node.op in ("root", "output"):
            return True
        inner = node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator)
        for argument in node.all_input_nodes if inner else writes(node):
            value = example(argument)
            if isinstance(value, torch.Tensor) and memory(value) in (place, None):
                return True
    return False
