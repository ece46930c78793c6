"""The modules that a module is a part of, which it does not know: a part that is compiled by itself sees no more."""

from __future__ import annotations

import gc
from collections import defaultdict

from torch import nn

__all__ = ["holders", "whole_models"]


def holders(module: nn.Module) -> list[nn.Module]:
    """Every live module that ``module`` is in, the nearest first. It looks at every object: nothing for each call."""
    parents: dict[int, list[nn.Module]] = defaultdict(list)
    for candidate in gc.get_objects():
        # isinstance would ask a proxy for what it stands for
        children = candidate.__dict__.get("_modules") if issubclass(type(candidate), nn.Module) else None
        if isinstance(children, dict):
            for child in children.values():
                parents[id(child)].append(candidate)
    found = {id(module): module}
    for inner in (order := [module]):
        for parent in parents[id(inner)]:
            if id(parent) not in found:
                found[id(parent)] = parent
                order.append(parent)
    return order[1:]


def whole_models(module: nn.Module) -> list[nn.Module]:
    """Those of ``module`` and its holders that are in no other module."""
    around = [module, *holders(module)]
    inside = {id(child) for outer in around for child in outer._modules.values()}
    return [outer for outer in around if id(outer) not in inside]
