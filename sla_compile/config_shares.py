"""What fields may be together: the shares topk, bottomk and max_topk, and linear and its own; a default bottomk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sla_compile.common.blocks import exact_fraction
from sla_compile.common.limits import TAYLOR

__all__ = ["check_all_read", "check_shares", "check_topk_by", "default_bottomk", "with_bottomk", "without_unread"]

_UNREAD_BY_TAYLOR = {"feature_map": "softmax", "gate": "shared", "sparse_scale": False}
"""Fields of the two branches and the weight between them, by their defaults: ``linear="taylor"`` has one softmax."""


def default_bottomk(topk: float, linear: str) -> float:
    """bottomk where none is said: with ``linear="taylor"`` 0, as a virtual key costs next to nothing.

    Else 0.1, or the rest if that is less, so that topk=1.0 alone is accepted. Any topk is taken, and refused elsewhere.
    """
    if linear == TAYLOR or topk >= 1:
        return 0.0
    return float(1 - exact_fraction(topk)) if topk > 0.9 else 0.1


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


def check_topk_by(name: str, topk_by: str, max_topk: float | None) -> None:
    """Raise ValueError, its text prefixed by ``name``, for a topk of each head that has no bound."""
    if topk_by == "head" and max_topk is None:
        raise ValueError(
            f"{name}: got topk_by='head' without max_topk; accepted: max_topk too, the most that the topk of a head "
            f"may be, several times topk"
        )


def check_all_read(linear: str, said: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for a field of the linear branch that no site reads, as all that may have it are "taylor".

    ``said`` are the top-level fields. Where sites differ in ``linear``, an inherited field is read by some; then only
    an override that names both is refused here.
    """
    if all(changes.get("linear", linear) == linear for changes in overrides.values()):
        _check_read("SLAConfig", linear, said)
        inherited = linear
    else:
        inherited = ""
    for pattern, changes in overrides.items():
        _check_read(f"SLAConfig.overrides[{pattern!r}]", changes.get("linear", inherited), changes)


def without_unread(name: str, linear: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` to the settings of a site, with what the site's ``linear`` does not read back at its default.

    So a site with virtual keys may inherit a feature map. One that ``changes`` name themselves is a ValueError.
    """
    linear = changes.get("linear", linear)
    _check_read(name, linear, changes)
    return {**changes, **_UNREAD_BY_TAYLOR} if linear == TAYLOR else dict(changes)


def _check_read(name: str, linear: str, said: Mapping[str, Any]) -> None:
    if linear != TAYLOR:
        return
    for field, default in _UNREAD_BY_TAYLOR.items():
        if said.get(field, default) != default:
            raise ValueError(
                f"{name}: got {field}={said[field]!r} with linear={linear!r}, the default; accepted: "
                f"{field}={default!r}, or linear='marginal' (the paper's form), 'all' or 'none' beside it: virtual "
                f"keys lie in the softmax of the critical ones, with a number for each head as the gate"
            )
