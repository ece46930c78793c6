"""Block arithmetic that passes, ops and kernels share: how many blocks, how many critical, how many negligible.

The ``num_`` functions take Python ints, torch SymInts and sympy integers alike: they only use ``+ - * //`` and
never branch on a value, so a symbolic token count stays symbolic and gains no guard.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

__all__ = [
    "MILLION",
    "exact_fraction",
    "forced_blocks",
    "num_blocks",
    "num_critical",
    "num_negligible",
    "shares_of",
    "to_millionths",
]

MILLION = 10**6
"""topk and bottomk that may change at run time (``sparsity``) are integers in millionths."""


@functools.lru_cache
def exact_fraction(share: float) -> Fraction:
    """``share`` as the decimal the user wrote: 0.29 is 29/100, not the binary float next to it."""
    return Fraction(repr(float(share)))


def to_millionths(share: float) -> int:
    """``share`` as ``sparsity`` holds it."""
    return round(share * MILLION)


def num_blocks(tokens: Any, block: int) -> Any:
    """How many blocks of ``block`` tokens cover ``tokens`` tokens; the last one may be short."""
    return (tokens + block - 1) // block


def num_critical(topk: float, key_blocks: Any) -> Any:
    """Critical blocks in a row of ``key_blocks``: ``max(1, floor(topk * key_blocks))``, topk an exact decimal.

    The floor alone is 0 below ``1 / topk`` blocks, which would leave a row with no key at all.
    """
    share = exact_fraction(topk)
    return _max(1, key_blocks * share.numerator // share.denominator)


def num_negligible(bottomk: float, critical: Any, key_blocks: Any) -> Any:
    """Negligible blocks in a row: ``floor(bottomk * key_blocks)``, at most what the critical ones leave."""
    share = exact_fraction(bottomk)
    return _min(key_blocks - critical, key_blocks * share.numerator // share.denominator)


def shares_of(
    key_blocks: int, topk: float, bottomk: float, sparsity: list[int] | None = None, least: int = 1
) -> tuple[int, int]:
    """Numbers of critical (at least ``least``) and of negligible blocks among ``key_blocks``; together maybe too many.

    Each is the exact floor of its share. ``sparsity``, [topk, bottomk] in millionths, replaces the two shares; its
    topk counts up to ``topk``.
    """
    share, dropped = exact_fraction(topk), exact_fraction(bottomk)
    if sparsity is not None:
        wanted, dropped = (Fraction(max(0, part), MILLION) for part in sparsity)
        share = min(share, wanted)
    critical = max(least, key_blocks * share.numerator // share.denominator)
    return critical, key_blocks * dropped.numerator // dropped.denominator


def forced_blocks(always_critical: Sequence[int], tokens: int, block: int) -> list[tuple[int, int]]:
    """(first, last) of the blocks, last excluded, that hold tokens of the ranges [start, stop, start, stop, ...].

    As in a slice, a negative token counts from the end, and one beyond the end is the end.
    """
    bounds = zip(always_critical[::2], always_critical[1::2], strict=True)
    pairs = (slice(*pair).indices(tokens) for pair in bounds)
    return [(start // block, num_blocks(stop, block)) for start, stop, _ in pairs if start < stop]


def _max(a: Any, b: Any) -> Any:
    if isinstance(b, int):
        return max(a, b)
    return _symbolic("max", a, b)


def _min(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return _symbolic("min", a, b)


def _symbolic(name: str, a: Any, b: Any) -> Any:
    import sympy

    if isinstance(a, sympy.Basic) or isinstance(b, sympy.Basic):
        return {"max": sympy.Max, "min": sympy.Min}[name](a, b)
    import torch  # for a SymInt: sym_max and sym_min record no guard

    functions: dict[str, Any] = {"max": torch.sym_max, "min": torch.sym_min}
    return functions[name](a, b)
