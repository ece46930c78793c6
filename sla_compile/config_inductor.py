"""Inductor's own options: which names there are, and their values checked; Inductor is imported on first use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sla_compile.config_values import FrozenMapping, nearest_hint, short, value_error

__all__ = ["frozen_inductor", "inductor_name"]


def inductor_name(key: Any) -> str | None:
    """The Inductor option that ``key`` names ("-" read as "_"), or None."""
    from torch._inductor import list_options

    name = key.replace("-", "_") if isinstance(key, str) else None
    return name if name in list_options() else None


def frozen_inductor(options: Mapping[str, Any]) -> FrozenMapping:
    """``options`` sorted by name, their names and types checked as ``torch.compile`` does for Inductor."""
    if not options:
        return FrozenMapping({})
    from torch._inductor import config, list_options

    checked: dict[str, Any] = {}
    for key, value in options.items():
        name = inductor_name(key)
        shown = f"Inductor option {short(key)}"
        if name is None:
            hint = nearest_hint(key, tuple(list_options()), always=True)
            raise value_error(f"unknown {shown}", value, "torch._inductor.list_options()", hint)
        if name in checked:
            raise value_error(shown, value, f"{name!r} once")
        if type(value) is list and type(getattr(config, name)) is tuple:
            value = tuple(value)  # JSON has no tuples
        _check_inductor_value(shown, value, config.get_type(name))  # type: ignore[attr-defined]
        checked[name] = value
    return FrozenMapping(dict(sorted(checked.items())))


def _check_inductor_value(shown: str, value: Any, accepted: Any) -> None:
    try:
        fits = isinstance(value, accepted)
    except TypeError:  # a generic such as list[str] takes no isinstance; torch leaves it unchecked too
        fits = True
    if not fits:
        raise value_error(shown, value, getattr(accepted, "__name__", str(accepted)))
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise value_error(shown, value, "a value that JSON can hold, so that it can be saved") from error
