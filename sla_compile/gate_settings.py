"""What an attention site asks of its gate (``GateSpec``), and the JSON in which markers and gate files say so."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from sla_compile.common.limits import TAYLOR
from sla_compile.config import SITE_FIELDS, SLAConfig
from sla_compile.passes.token_order import Grid

__all__ = [
    "CALLED",
    "NO_GRIDS",
    "GateSpec",
    "NumberedSite",
    "SeenGrids",
    "all_grids",
    "grids_from_json",
    "grids_to_json",
    "settings_from_json",
    "settings_to_json",
]

SeenGrids = tuple[Grid | None, ...]
"""The token grids (T, H, W) that were found in a model for an attention's queries and for its keys; None: none. Two for
each size that the model was prepared with.
"""
NO_GRIDS: SeenGrids = (None, None)

CALLED = "scaled_dot_product_attention"
"""The pattern of an attention that is a call of that function."""


class NumberedSite(NamedTuple):
    """The call site of the attention that has a number among those of its owner, and with it a gate's name."""

    call_site: str
    """As ``compiler.call_sites`` writes it; empty of a gate of before there were call sites."""
    traced: bool
    """Whether this process has traced it; otherwise a file says so, and the source may have changed since."""


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """What one attention site asks of its gate: the shapes of its tensors, its settings, and where it belongs."""

    heads: int
    head_dim: int
    config: SLAConfig
    """Settings of this site."""
    model_config: SLAConfig | None = None
    """Settings that the whole model is prepared with; None: ``config``."""
    path: str = ""
    """Module path of the gate, for example ``"blocks.0.attn1.sla"``."""
    ordinal: int = 0
    """Its number among the attentions of its owner, in the order in which they were met, from 0."""
    call_site: str = ""
    """Where the owner calls the attention, as ``compiler.call_sites`` writes it; empty where that is not known."""
    traced: bool = True
    """Whether this process has traced that call site."""
    seen: SeenGrids = NO_GRIDS
    pattern: str = ""
    """What its attention is written as, as ``AttentionCall.pattern`` says; empty where that is not known."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters and buffers that the gate has with these settings, by name."""
        heads = (self.heads,) if self.config.gate == "per_head" else ()
        shapes: dict[str, tuple[int, ...]] = {}
        if self.config.linear == TAYLOR:
            shapes["shift"] = (self.heads,)
        else:
            shapes["weight"] = (*heads, self.head_dim, self.head_dim)
            shapes["bias"] = (*heads, self.head_dim)
        if self.config.sparse_scale:
            shapes["log_scale"] = (self.heads,)
        if self.config.max_topk is not None:
            shapes["sparsity"] = (self.heads, 2) if self.config.topk_by == "head" else (2,)
        return shapes

    def by_head(self) -> tuple[str, ...]:
        """The names of those whose first axis are the heads."""
        shared = {"weight": 2, "bias": 1, "sparsity": 1}
        return tuple(name for name, shape in self.shapes().items() if len(shape) > shared.get(name, 0))

    def form(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of its parameters."""
        return tuple(shape for name, shape in self.shapes().items() if name != "sparsity")


def settings_to_json(config: SLAConfig, seen: SeenGrids, call_site: str = "") -> str:
    """All that determines how a site is rewritten: its settings, grids and call site, as canonical JSON.

    Dynamo guards on this text. So it holds nothing that differs between like sites (a path), nor what changes without
    a recompilation (with ``max_topk``, topk and bottomk). By the call site, code compiled for one module does not serve
    another of its class whose gates have their names in another order.
    """
    at_run_time = () if config.max_topk is None else ("topk", "bottomk")
    fields: dict[str, Any] = {name: getattr(config, name) for name in SITE_FIELDS if name not in at_run_time}
    if config.looks_for_grid:
        fields["seen"] = grids_to_json(seen)
    if call_site:
        fields["call_site"] = call_site
    return json.dumps(fields, sort_keys=True)


def settings_from_json(text: str) -> tuple[dict[str, Any], SeenGrids]:
    """The reverse of ``settings_to_json``: fields of ``SLAConfig``, and grids."""
    fields = json.loads(text)
    fields.pop("call_site", None)
    return fields, grids_from_json(fields.pop("seen", NO_GRIDS))


def grids_to_json(seen: SeenGrids) -> list[Any]:
    """Each grid as [sizes, start, tokens], or None, for ``json.dumps``."""
    return [grid and dataclasses.astuple(grid) for grid in seen]


def grids_from_json(data: Any) -> SeenGrids:
    """The reverse of ``grids_to_json``, of what ``json.loads`` gives."""
    return tuple(grid and Grid(tuple(grid[0]), *grid[1:]) for grid in data)


def all_grids(before: SeenGrids, found: SeenGrids) -> SeenGrids:
    """Those found ``before``, and those ``found`` now, which take the place of others in as many tokens.

    What was known already changes nothing: compiled graphs are guarded by it.
    """
    pairs = [before[at : at + 2] for at in range(0, len(before), 2)]
    if found in pairs or not any(found):
        return before
    tokens = [grid and grid.tokens for grid in found]
    kept = (pair for pair in pairs if any(pair) and [grid and grid.tokens for grid in pair] != tokens)
    return (*(grid for pair in kept for grid in pair), *found)
