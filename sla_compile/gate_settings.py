"""What a gate's marker, and a file of gates, say of its site: settings and grids of tokens, as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from sla_compile.common.token_orders import RASTER
from sla_compile.config import SITE_FIELDS, SLAConfig
from sla_compile.passes.token_order import Grid

__all__ = ["UNSEEN", "Seen", "as_seen", "read_settings", "settings_text", "written"]

Seen = tuple[Grid | None, Grid | None]
"""Grids of tokens found in a model, of an attention's queries and of its keys."""
UNSEEN: Seen = (None, None)


def settings_text(config: SLAConfig, seen: Seen) -> str:
    """What shapes a rewritten site, its settings and grids, as the canonical JSON that its marker carries."""
    at_run_time = () if config.max_topk is None else ("topk", "bottomk")
    fields: dict[str, Any] = {name: getattr(config, name) for name in SITE_FIELDS if name not in at_run_time}
    if config.reorder != RASTER and config.grid is None:
        fields["seen"] = written(seen)
    return json.dumps(fields, sort_keys=True)


def read_settings(text: str) -> tuple[dict[str, Any], Seen]:
    """The reverse of ``settings_text``: fields of ``SLAConfig``, and grids."""
    fields = json.loads(text)
    return fields, as_seen(fields.pop("seen", UNSEEN))


def written(seen: Seen) -> list[Any]:
    """Grids as JSON has them."""
    return [grid and dataclasses.astuple(grid) for grid in seen]


def as_seen(data: Any) -> Seen:
    """The reverse of ``written``."""
    queries, keys = (grid and Grid(tuple(grid[0]), *grid[1:]) for grid in data)
    return queries, keys
