"""The shares topk, bottomk and max_topk: what they, and forms of gates, may be together; a default bottomk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sla_compile.common.blocks import exact_fraction
from sla_compile.common.limits import TAYLOR

__all__ = ["check_forms", "check_shares", "default_bottomk", "with_bottomk"]


def default_bottomk(topk: float, linear: str) -> float:
    """bottomk where only ``topk`` is said: 0.1, or the rest if that is less, so that topk=1.0 alone is accepted.

    With ``linear="taylor"`` 0: a virtual key costs next to nothing, so there is nothing to skip.
    """
    return 0.0 if linear == TAYLOR else float(min(exact_fraction(0.1), 1 - exact_fraction(topk)))


def with_bottomk(topk: float, bottomk: float, linear: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` to settings of ``topk``, ``bottomk`` and ``linear``, with the default bottomk of what changed.

    Not where the changes name their bottomk, or the settings have one that is not their default.
    """
    if "bottomk" in changes or bottomk != default_bottomk(topk, linear) or not {"topk", "linear"} & set(changes):
        return dict(changes)
    return {**changes, "bottomk": default_bottomk(changes.get("topk", topk), changes.get("linear", linear))}


def check_shares(name: str, topk: float, bottomk: float, max_topk: float | None) -> None:
    """Raise ValueError, its text prefixed by ``name``, if topk + bottomk is above 1 or topk above ``max_topk``."""
    # Exact decimals: some pairs of binary floats that are written to add up to 1 add up to more.
    if exact_fraction(topk) + exact_fraction(bottomk) > 1:
        raise ValueError(f"{name}: got topk={topk!r}, bottomk={bottomk!r}; accepted: topk + bottomk up to 1")
    if max_topk is not None and topk > max_topk:
        raise ValueError(f"{name}: got topk={topk!r}; accepted: topk up to max_topk={max_topk!r}")


def check_forms(name: str, linear: str, sparse_scale: bool, topk_by: str, max_topk: float | None) -> None:
    """Raise ValueError, its text prefixed by ``name``, for forms of gates that do not go together."""
    if topk_by == "head" and max_topk is None:
        raise ValueError(
            f"{name}: got topk_by='head' without max_topk; accepted: max_topk too, the most that the topk of a head "
            f"may be, several times topk"
        )
    if sparse_scale and linear == TAYLOR:
        raise ValueError(
            f"{name}: got sparse_scale=True with linear={linear!r}; accepted: sparse_scale with another linear: "
            f"virtual keys are normalised together with the critical ones"
        )
