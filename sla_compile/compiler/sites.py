"""Sites: each attention call of a graph with its owner, its settings, its gate and the decision about it.

This is where the passes (which know graphs) meet the modules (which own gates).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import fx, nn

from sla_compile.common.limits import DTYPES, TAYLOR
from sla_compile.compat import Frame, plain_function_name, plain_module_path
from sla_compile.compiler.call_sites import call_site, traced_frames
from sla_compile.compiler.owners import iterates_over_children
from sla_compile.compiler.site_numbers import Numbering, number_calls
from sla_compile.config import SITE_FIELDS, SLAConfig
from sla_compile.gate import PREPARED, Gate, gate_name, own_gates
from sla_compile.gate_attachment import refuse_other_form
from sla_compile.gate_settings import NO_GRIDS, GateSpec, SeenGrids, settings_from_json
from sla_compile.module_paths import module_paths
from sla_compile.passes.decide import Decision, Keep, Requirements, Rewrite, decide
from sla_compile.passes.find_attention import (
    IN_TRANSFORM,
    AttentionCall,
    Marker,
    ModuleCall,
    find_attention,
    find_markers,
)
from sla_compile.passes.token_grids import GivenGrid, Grids
from sla_compile.passes.token_order import Wanted

__all__ = [
    "BROKEN",
    "NOT_REACHED",
    "NOT_WHOLE",
    "FoundSites",
    "Settings",
    "Site",
    "broken",
    "find_sites",
    "owner_call",
    "requirements",
]

BROKEN = "graph break between the owner's start and its attention"
NOT_REACHED = "the traced graph does not reach its gate"
NOT_WHOLE = "its gate is bound outside the region that holds the attention"


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
        named = {name for name in SITE_FIELDS if getattr(wanted, name) != getattr(self.config, name)} | self.explicit
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
    call_site: str
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
            heads=int(decision.shape.heads) * (decision.shards.local_parts if decision.shards else 1),
            head_dim=int(decision.shape.head_dim),
            config=self.config,
            model_config=self.model_config,
            path=self.gate_path,
            ordinal=self.ordinal,
            call_site=self.call_site,
            seen=self.seen,
            pattern=self.call.pattern,
        )


@dataclass(frozen=True)
class FoundSites:
    """What ``find_sites`` found in one graph."""

    sites: list[Site]
    markers: list[Marker]
    """All, to be erased."""
    numberings: list[tuple[nn.Module, Numbering]]
    """Of each owner."""


def requirements(config: SLAConfig) -> Requirements:
    """What the settings of a site ask of its attention."""
    return Requirements(
        config.min_tokens,
        DTYPES,
        per_head=config.gate == "per_head",
        by_head=config.linear == TAYLOR or config.sparse_scale or config.topk_by == "head",
        cross_attention=config.cross_attention,
        always_critical=config.always_critical,
        order=Wanted(config.reorder, config.grid, config.grid_start, (config.block_q, config.block_k)),
    )


def find_sites(
    gm: fx.GraphModule, settings: Settings, frame: Frame, ordinals: Mapping[int, Sequence[int]] | None = None
) -> FoundSites:
    """Every attention call of ``gm`` as a site, decided; and every marker.

    ``ordinals`` is for a graph whose nodes do not say where they were traced: by the ``id`` of an owner, the numbers of
    its calls. Owners that it lacks have theirs counted.

    Raises ValueError where the options of this compile contradict those a gate was prepared with.
    """
    markers = find_markers(gm)
    # the first of those of one gate: an owner's children mark it too, some behind the attention
    marked = {(_identities(owner_call(marker, frame)), marker.ordinal): marker for marker in reversed(markers)}
    paths = _module_paths(frame)
    grids = cache(lambda given: Grids(gm) if given is None else GivenGrid(gm, given))
    root = frame.root_module()
    root = frame.sole_module() if root is None else root
    calls = find_attention(gm)
    owners = [frame.module(call.stack[-1].identity) if call.stack else root for call in calls]
    places = [_call_site(call, frame, root) for call in calls]
    numbers, numberings = _numbers(calls, owners, places, root if frame.resumed else None, ordinals)
    sites = []
    for call, owner, place, ordinal in zip(calls, owners, places, numbers, strict=True):
        local_path = paths.get(id(owner), plain_module_path(call.stack[-1].source) if call.stack else "")
        marker = marked.get((_identities(call.stack), ordinal))
        site = _site(call, owner, local_path, (ordinal, place), marker, settings, grids)
        if owner is None and frame.resumed and isinstance(site.decision, Keep):
            site = replace(site, decision=broken(frame))
        sites.append(site)
    return FoundSites(_of_one_form(sites), markers, numberings)


def broken(frame: Frame) -> Keep:
    """Why the attention of a frame that continues a function after a graph break has no gate."""
    place = f"{plain_function_name(frame.code.co_name)}, from line {frame.code.co_firstlineno} on"
    return Keep(BROKEN, place, "an attention without a break before it")


def _call_site(call: AttentionCall, frame: Frame, root: nn.Module | None) -> str:
    modules = [root, *(frame.module(level.identity) for level in call.stack)]
    return call_site(traced_frames(call.node.stack_trace or ""), [module for module in modules if module is not None])


def _numbers(
    calls: Sequence[AttentionCall],
    owners: Sequence[nn.Module | None],
    places: Sequence[str],
    resumed: nn.Module | None,
    ordinals: Mapping[int, Sequence[int]] | None,
) -> tuple[list[int], list[tuple[nn.Module, Numbering]]]:
    """The number of each call among those of its owner (of those without one, in the graph); and of all of an owner."""
    groups: dict[int, list[int]] = {}
    for index, owner in enumerate(owners):
        groups.setdefault(id(owner), []).append(index)
    numbers = [0] * len(calls)
    numberings = []
    for identity, members in groups.items():
        owner = owners[members[0]]
        listed = [(_identities(calls[index].stack), places[index]) for index in members]
        if owner is None:
            distinct = list(dict.fromkeys(listed))
            found = [distinct.index(call) for call in listed]
        elif ordinals is None:
            numbering = number_calls(owner, listed, owner is resumed)
            numberings.append((owner, numbering))
            found = numbering.ordinals
        elif len(given := ordinals.get(identity, ())) == len(members):
            found = list(given)
        else:
            found = [[call for call, _ in listed[:index]].count(call) for index, (call, _) in enumerate(listed)]
        for index, number in zip(members, found, strict=True):
            numbers[index] = number
    return numbers, numberings


def _of_one_form(sites: Sequence[Site]) -> list[Site]:
    """The sites, but of those that share a gate only such to be rewritten as have its form, or that of the first.

    Raises ValueError where a gate in the graph has the form of none.
    """
    rewritten: dict[tuple[int, int], list[tuple[Site, GateSpec]]] = {}
    for site in sites:
        if isinstance(site.decision, Rewrite):
            spec = site.gate_spec(site.decision)
            _refuse_unequal_heads(site, site.decision, spec)
            rewritten.setdefault((id(site.owner), site.ordinal), []).append((site, spec))
    others: dict[int, str] = {}
    for members in rewritten.values():
        gate = members[0][0].gate
        forms = [spec.form() for _, spec in members]
        form = forms[0] if gate is None or gate.form() not in forms else gate.form()
        if gate is not None and any(site.marker is not None for site, _ in members):
            refuse_other_form(gate, members[forms.index(form)][1])
        for (site, spec), other in zip(members, forms, strict=True):
            if other != form:
                others[id(site)] = f"{spec.heads} heads of {spec.head_dim}"
    reason, accepted = "its call site has a gate of another form", "calls of one form where they share a line"
    return [
        replace(site, decision=Keep(reason, others[id(site)], accepted)) if id(site) in others else site
        for site in sites
    ]


def _refuse_unequal_heads(site: Site, decision: Rewrite, spec: GateSpec) -> None:
    """Raise ValueError where each head has numbers of its own and a rank cannot take the part of its heads."""
    if (shards := decision.shards) is None or not (names := spec.by_head()):
        return
    heads = spec.heads if site.gate is None else site.gate.heads
    unequal = shards.unequal(heads)
    if not unequal and heads != spec.heads and shards.local_parts > 1:
        unequal = f"{heads} heads in the gate, {shards.ranks} ranks with {int(decision.shape.heads)} of them each"
    if unequal:
        raise ValueError(
            f"{site.gate_path}: got {unequal}, and each head has its own {', '.join(names)}; accepted: heads in equal "
            f"parts on all ranks, or settings that heads share (gate='shared', sparse_scale=False, topk_by='site', "
            f"another linear than 'taylor')"
        )


def _site(
    call: AttentionCall,
    owner: nn.Module | None,
    local_path: str,
    numbered: tuple[int, str],
    marker: Marker | None,
    settings: Settings,
    grids: Callable[[tuple[int, ...] | None], Grids | GivenGrid],
) -> Site:
    ordinal, place = numbered
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
    if config.looks_for_grid:
        grid_of = grids(config.grid).of
        found = grid_of(call.query), grid_of(call.key) or grid_of(call.value)  # a value is its key's token
        seen = found if any(found) else seen
    rejected = settings.config.rejects(path) or (None if marker is not None else model_config.rejects(path))
    decision: Decision
    if rejected is not None:
        accepted = "a path that include selects and exclude does not"
        decision = Keep(rejected, path, accepted, by_settings=True)
    elif owner is None:
        decision = Keep("no module owns this attention", "a plain function calls it", "a call in a forward")
    elif iterates_over_children(owner):
        decision = Keep("its module runs over its children", path, "children called by name: a gate is a child too")
    else:
        decision = decide(call, requirements(config), seen)
    if isinstance(decision, Rewrite) and marker is not None and marker.module is not call.module:
        decision = Keep(
            NOT_WHOLE,
            "a part of the owner's forward that is traced by itself, as a checkpoint is",
            "such a part that holds the whole owner",
        )
    if marker is not None:
        _refuse_transformed(path, decision)
    return Site(call, path, owner, ordinal, place, marker, config, model_config, decision, seen)


def _refuse_transformed(path: str, decision: Decision) -> None:
    """Raise ValueError where an attention that has a gate is kept for a transform: nobody would train the gate."""
    if isinstance(decision, Keep) and decision.reason == IN_TRANSFORM:
        raise ValueError(
            f"{path or 'the compiled module'}: it has a gate, but is inside a transform of torch.func "
            f"({decision.value}), where the gate would get no gradient; accepted: torch.autograd.grad in place of the "
            f"transform, or this attention in exclude"
        )


def owner_call(marker: Marker, frame: Frame) -> tuple[ModuleCall, ...]:
    """The stack of the call of the owner whose gate ``marker`` names."""
    stack = marker.stack
    if marker.from_child:
        stack = stack[:-1]
        # A child may have been wrapped since, as LoRA does, and then marks from within the wrapper.
        while stack and not _has_gate(frame.module(stack[-1].identity), marker.ordinal):
            stack = stack[:-1]
    return stack


def _has_gate(module: nn.Module | None, ordinal: int) -> bool:
    return module is not None and gate_name(ordinal) in own_gates(module)


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
