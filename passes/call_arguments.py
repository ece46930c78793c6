"""Arguments of a call of a library by name, and what of its results is read."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx

__all__ = ["HARMLESS", "arguments_of", "is_default", "only_output", "parameters_of"]

# Of the foreign functions, parameters that do not change what is computed.
HARMLESS = {"deterministic", "op", "num_splits", "pack_gqa", "sm_margin"}


def parameters_of(target: Any) -> dict[str, Any] | None:
    """The names of the parameters of a function or op, with their defaults; None where it does not say them."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = target.default
    if isinstance(target, torch._ops.OpOverload):
        return {argument.name: argument.default_value for argument in target._schema.arguments}
    try:
        return {name: parameter.default for name, parameter in inspect.signature(target).parameters.items()}
    except (TypeError, ValueError):
        return None


def arguments_of(target: Any, node: fx.Node) -> dict[str, Any] | None:
    """The arguments of ``node`` by name, defaults filled in; None where ``target`` does not say its parameters."""
    parameters = parameters_of(target)
    if parameters is None:
        return None
    return {**parameters, **dict(zip(parameters, node.args, strict=False)), **node.kwargs}


def only_output(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The first of the results of ``node``, where it alone is used, and the other nodes of the call."""
    users = list(node.users)
    if not users or not all(user.target is operator.getitem for user in users):
        return None
    first = [user for user in users if user.args[1] == 0]
    rest = [user for user in users if user.args[1] != 0]
    return (first[0], (*rest, node)) if len(first) == 1 and not any(user.users for user in rest) else None


def is_default(value: Any, default: Any) -> bool:
    """Whether an argument is the default: a graph has lists for tuples."""
    if isinstance(value, tuple | list) and isinstance(default, tuple | list):
        return tuple(value) == tuple(default)
    return not isinstance(value, fx.Node) and bool(value == default)
