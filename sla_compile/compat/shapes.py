"""Symbolic sizes: the value while tracing, and what holds all over a range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["always_holds", "size_hint"]


def size_hint(size: int | torch.SymInt) -> int | None:
    """The value a symbolic size had while it was traced, without a guard; None where it has none."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return None if hint is None else int(hint)


def always_holds(condition: str, ranges: Mapping[Any, Any]) -> bool:
    """Whether ``condition``, a comparison by >= or <, holds all over an exported program's ``range_constraints``.

    Remove when torch tells publicly whether the ranges of an exported program imply something.
    """
    import sympy
    from torch.utils._sympy.value_ranges import bound_sympy

    relation = sympy.sympify(condition, locals={str(symbol): symbol for symbol in ranges})
    if relation in (sympy.true, sympy.false):
        return bool(relation)
    bounds = bound_sympy(relation.lhs - relation.rhs, dict(ranges))
    return bool(bounds.upper < 0 if isinstance(relation, sympy.StrictLessThan) else bounds.lower >= 0)
