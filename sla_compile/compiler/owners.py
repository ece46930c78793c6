"""Whether a module can hold a gate: what its code says."""

from __future__ import annotations

import inspect
import types

from torch import nn

__all__ = ["iterates_over_children"]


def iterates_over_children(module: nn.Module) -> bool:
    """Whether the forward of ``module`` may call each of its children in a loop, of which a gate would be one."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return True
    forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    pending = [getattr(forward, "__code__", None)]
    while pending:
        code = pending.pop()
        if isinstance(code, types.CodeType):
            if {"children", "named_children", "_modules"} & {*code.co_names}:
                return True
            pending += code.co_consts
    return False
