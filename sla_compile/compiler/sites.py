"""Sites: each attention call of a graph with its owner, its settings, its gate and the decision about it.

This is where the passes (which know graphs) meet the modules (which own gates).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import fx, nn

from sla_compile.common.limits import DTYPES
from sla_compile.common.token_orders import RASTER
from sla_compile.compat import Frame, plain_module_path, runs_forward_of
from sla_compile.compiler.owners import iterates_over_children
from sla_compile.compiler.function_transforms import kept_under_transform
from sla_compile.config import SITE_FIELDS, SLAConfig
from sla_compile.gate import PREPARED, Gate, gate_name, own_gates, refuse_other_form
from sla_compile.gate_settings import NO_GRIDS, GateSpec, SeenGrids, settings_from_json
from sla_compile.memory import remember_root_calls, root_calls
from sla_compile.module_paths import module_paths
from sla_compile.passes.decide import Decision, Keep, Requirements, Rewrite, decide
from sla_compile.passes.find_attention import AttentionCall, Marker, find_attention, find_markers
from sla_compile.passes.token_grids import Grids
from sla_compile.passes.token_order import Wanted

__all__ = ["Settings", "Site", "find_sites", "remember_calls", "requirements"]

BROKEN = "graph break between the owner's start and its attention"


@dataclass(frozen=True)
class Settings:
    """What the user asked of one compile: the configuration, and the site fields that were spelled out."""

    config: SLAConfig
    explicit: frozenset[str]

    @classmethod
    def of(cls, options: Mapping[str, Any] | SLAConfig | None, mode: str | None = None) -> Settings:
        """Read ``torch.compile``'s options and mode; raises ValueError where one is refused."""
        config = SLAConfig.from_options(options, mode=mode)
        if isinstance(options, SLAConfig):
            return cls(config, frozenset(SITE_FIELDS))
        return cls(config, frozenset(name.replace("-", "_") for name in options or ()) & {*SITE_FIELDS})

    def conflicts(self, path: str, there: SLAConfig) -> list[str]:
        """Site fields that were spelled out here and differ from what the gate at ``path`` was prepared with."""
        wanted = self.config.for_site(path)
        plain = replace(self.config, overrides={})
        named = {name for name in SITE_FIELDS if getattr(wanted, name) != getattr(plain, name)} | self.explicit
        return [
            f"{name}={getattr(wanted, name)!r} here, {getattr(there, name)!r} in its gate"
            for name in SITE_FIELDS
            if name in named and name != "min_tokens" and getattr(wanted, name) != getattr(there, name)
        ]


@dataclass(frozen=True)
class Site:
    """One attention call of one graph."""

    call: AttentionCall
    path: str
    owner: nn.Module | None
    ordinal: int
    marker: Marker | None
    config: SLAConfig
    model_config: SLAConfig
    decision: Decision
    seen: SeenGrids = NO_GRIDS
    """The grids of its queries and of its keys, found in this graph, or kept by its gate."""

    @property
    def gate(self) -> Gate | None:
        """The gate this attention has, whether or not its marker is in the graph."""
        return None if self.owner is None else own_gates(self.owner).get(gate_name(self.ordinal))

    @property
    def gate_path(self) -> str:
        return f"{self.path}.{gate_name(self.ordinal)}" if self.path else gate_name(self.ordinal)

    def gate_spec(self, decision: Rewrite) -> GateSpec:
        """What this attention, to be rewritten by ``decision``, needs of its gate."""
        return GateSpec(
            heads=int(decision.shape.heads),
            head_dim=int(decision.shape.head_dim),
            config=self.config,
            model_config=self.model_config,
            path=self.gate_path,
            ordinal=self.ordinal,
            seen=self.seen,
            pattern=self.call.pattern,
        )


def requirements(config: SLAConfig) -> Requirements:
    """What the settings of a site ask of its attention."""
    return Requirements(
        config.min_tokens,
        DTYPES,
        per_head=config.gate == "per_head",
        cross_attention=config.cross_attention,
        always_critical=config.always_critical,
        order=Wanted(config.reorder, config.grid, config.grid_start, (config.block_q, config.block_k)),
    )


def find_sites(gm: fx.GraphModule, settings: Settings, frame: Frame) -> tuple[list[Site], list[Marker]]:
    """Every attention call of ``gm`` as a site, decided; and every marker, to be erased.

    Raises ValueError where the options of this compile contradict those a gate was prepared with.
    """
    markers = find_markers(gm)
    marked = {(_identities(marker.owner), marker.ordinal): marker for marker in markers}
    paths = _module_paths(frame)
    counts: Counter[Any] = Counter()
    grids = cache(lambda: Grids(gm))
    sites = []
    root = frame.root_module()
    earlier = _calls_before(frame, root) if frame.resumed and root is not None else 0
    for call in find_attention(gm):
        calling = _identities(call.stack)
        owner = frame.module(call.stack[-1].identity) if call.stack else root
        ordinal = counts[calling] + (earlier if owner is root else 0)
        counts[calling] += 1
        local_path = paths.get(id(owner), plain_module_path(call.stack[-1].source) if call.stack else "")
        site = _site(call, owner, local_path, ordinal, marked.get((calling, ordinal)), settings, grids)
        if owner is None and frame.resumed and isinstance(site.decision, Keep):
            site = replace(site, decision=Keep(BROKEN, frame.code.co_name, "an attention without a break before it"))
        sites.append(site)
    return sites, markers


def remember_calls(sites: list[Site], frame: Frame) -> None:
    """Note how many calls come before those of a frame that resumes this one after a graph break."""
    count = sum(site.owner is frame.root_module() for site in sites if site.owner is not None)
    remember_root_calls(frame.code, count)


def _calls_before(frame: Frame, root: nn.Module) -> int:
    """Attention calls of ``root`` in the part of its forward that ran before the graph break."""
    first = frame.code.co_firstlineno  # of a frame that resumes, the line of the break
    parts = {(code.co_name, code.co_firstlineno): n for code, n in root_calls() if runs_forward_of(code, root)}
    return sum(n for (_, line), n in parts.items() if line < first)


def _site(
    call: AttentionCall,
    owner: nn.Module | None,
    local_path: str,
    ordinal: int,
    marker: Marker | None,
    settings: Settings,
    grids: Callable[[], Grids],
) -> Site:
    prepared = owner.__dict__.get(PREPARED) if owner is not None else None
    model_config, path = prepared if prepared is not None else (settings.config, local_path)
    config = model_config.for_site(path)
    seen: SeenGrids = NO_GRIDS
    gate = own_gates(owner).get(gate_name(ordinal)) if owner is not None else None
    if gate is not None and marker is None:  # of a file, where Dynamo starts at the owner: its children will mark it
        config, seen = gate.config if prepared is None else config, gate.seen
    if marker is not None:
        fields, seen = settings_from_json(marker.settings)
        config = replace(config, overrides={}, **fields)
        if conflicts := settings.conflicts(path, config):
            raise ValueError(
                f"{path or 'the compiled module'}: the options of torch.compile contradict its gate: "
                f"{'; '.join(conflicts)}. Call prepare(model, ..., config=...) to change the gate, or leave "
                f"these options out"
            )
    explicit = settings.explicit
    if marker is not None or gate is not None:  # when to be sparse may differ from compile to compile
        explicit &= {"min_tokens"}
    if explicit:
        here = settings.config.for_site(path)
        config = config.changed({field: getattr(here, field) for field in explicit})
    if config.reorder != RASTER and config.grid is None:
        found = grids().of(call.query), grids().of(call.key)
        seen = found if any(found) else seen
    rejected = settings.config.rejects(path) or (None if marker is not None else model_config.rejects(path))
    decision: Decision
    if rejected is not None:
        decision = Keep(rejected, path, "a path that include selects and exclude does not")
    elif owner is None:
        decision = Keep("no module owns this attention", "a plain function calls it", "a call in a forward")
    elif iterates_over_children(owner):
        decision = Keep("its module runs over its children", path, "children called by name: a gate is a child too")
    else:
        decision = decide(call, requirements(config), seen)
    if isinstance(decision, Rewrite) and marker is not None and marker.module is not call.module:
        decision = Keep(
            "its gate is bound outside the region that holds the attention",
            "a part of the owner's forward that is traced by itself, as a checkpoint is",
            "such a part that holds the whole owner",
        )
    if isinstance(decision, Rewrite):
        decision = kept_under_transform(call, marker, path) or decision
    site = Site(call, path, owner, ordinal, marker, config, model_config, decision, seen)
    if isinstance(decision, Rewrite) and marker is not None and site.gate is not None:
        refuse_other_form(site.gate, site.gate_spec(decision))
    return site


def _identities(stack: tuple[Any, ...]) -> tuple[tuple[int, int, str], ...]:
    """Which call this is: Dynamo counts those of a module under each of its names by itself."""
    return tuple((level.identity, level.call, level.source) for level in stack)


def _module_paths(frame: Frame) -> dict[int, str]:
    """Module paths by id, as the root module of the frame names them (or any module among its locals)."""
    root = frame.root_module()
    roots = [root] if root is not None else [v for v in frame.locals.values() if isinstance(v, nn.Module)]
    paths: dict[int, str] = {}
    for module in roots:
        for path, child in module_paths(module):
            paths.setdefault(id(child), path)
    return paths
