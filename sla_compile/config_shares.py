"""The shares topk, bottomk and max_topk: what they may be together, and the bottomk of who names topk alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sla_compile.common.blocks import exact_fraction

__all__ = ["check_shares", "default_bottomk", "with_bottomk"]


def default_bottomk(topk: float) -> float:
    """bottomk where only ``topk`` is said: 0.1, or the rest if that is less, so that topk=1.0 alone is accepted."""
    return float(min(exact_fraction(0.1), 1 - exact_fraction(topk)))


def with_bottomk(topk: float, bottomk: float, changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` to settings of ``topk`` and ``bottomk``, with the default bottomk of a changed topk.

    Not where the changes name their bottomk, or the settings have one that is not their topk's default.
    """
    follows = "topk" in changes and "bottomk" not in changes and bottomk == default_bottomk(topk)
    return {**changes, "bottomk": default_bottomk(changes["topk"])} if follows else dict(changes)


def check_shares(name: str, topk: float, bottomk: float, max_topk: float | None) -> None:
    """Raise ValueError, its text prefixed by ``name``, if topk + bottomk is above 1 or topk above ``max_topk``."""
    # Exact decimals: some pairs of binary floats that are written to add up to 1 add up to more.
    if exact_fraction(topk) + exact_fraction(bottomk) > 1:
        raise ValueError(f"{name}: got topk={topk!r}, bottomk={bottomk!r}; accepted: topk + bottomk up to 1")
    if max_topk is not None and topk > max_topk:
        raise ValueError(f"{name}: got topk={topk!r}; accepted: topk up to max_topk={max_topk!r}")
