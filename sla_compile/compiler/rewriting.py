"""Rewrite one graph in place: find its sites, give them gates, put the op where attention stood.

The backend, ``prepare``'s dry run and ``export`` all come through here, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

import sla_compile.ops  # noqa: F401  registers the ops that a rewritten graph calls
from sla_compile.compat import (
    Frame,
    compiled_siblings,
    data_parallel,
    flattened,
    fully_sharded,
    runs_forward_of,
    user_errors,
)
from sla_compile.compiler.call_watch import watch
from sla_compile.compiler.gate_binding import bind_gates
from sla_compile.compiler.late_gates import warn_of_late_gates
from sla_compile.compiler.marking import mark_in_graph
from sla_compile.compiler.patterns import check_patterns
from sla_compile.compiler.sites import NOT_REACHED, Settings, Site, broken, find_sites
from sla_compile.compiler.unused_gates import UnusedGate, unused_gates
from sla_compile.gate import PREPARED, Gate, detach_gate, gate_name, mark_from_children, own_gates
from sla_compile.gate_attachment import attach_gate, gate_dtype, refuse_taken_name
from sla_compile.memory import (
    await_marker,
    forget_awaited,
    is_awaited,
    remember_dense,
    remember_injected,
    remember_unproven,
    take_unproven,
    was_injected,
)
from sla_compile.passes.decide import Keep, Rewrite
from sla_compile.passes.find_attention import Marker
from sla_compile.passes.hoist_gathers import hoist_gathers
from sla_compile.passes.operands import example
from sla_compile.passes.rewrite import erase_markers, replace_attention
from sla_compile.passes.tensor_parallel import HeadShards, is_distributed

__all__ = ["apply_decisions", "refuse_unsynchronised", "rewrite_graph", "take_back_gates"]


def rewrite_graph(
    gm: fx.GraphModule, settings: Settings, frame: Frame | None, *, once: bool = False
) -> tuple[list[Site], list[UnusedGate]]:
    """Rewrite ``gm`` in place; returns its sites with their final decisions, and the gates without an attention.

    Where a site to be rewritten has no gate yet, gates are injected and Dynamo starts this frame over, so this
    function does not return then. ``once`` is for a graph that serves one call alone: where it is sure what the second
    trace would show, there is none, and new gates are attributes of the graph. Outside Dynamo (no frame) nothing owns
    the attention and all is kept.

    Raises:
        ValueError: options contradict a gate, or an owner has something else under a gate's name. No gate has
            been injected then.
    """
    if frame is None:
        return [], []
    with user_errors():
        found = find_sites(gm, settings, frame)
        check_patterns(found.sites, settings.config, frame)
        if (found.sites or found.markers) and frame.join_buckets():
            frame.restart("sla_compile sees the graph before it is cut into DDP's buckets")
        injected = _inject(found.sites, frame, alone=once)
        if once and injected and mark_in_graph(gm, found.sites, frame):
            injected = 0
            found = find_sites(gm, settings, frame)
    bound = bind_gates(found, frame)
    if bound or injected:
        frame.drop_superseded()
        frame.restart(f"sla_compile gave {bound + injected} attention(s) a gate")
    sites = [_settle(site, frame) for site in found.sites]
    unused = unused_gates(gm, sites, found.markers, frame)
    apply_decisions(sites, found.markers, {id(site.call.module): site.call.module for site in sites}.values())
    for site in sites:
        if isinstance(site.decision, Keep) and site.owner is not None:
            remember_dense(site.owner, frame.code)
    if once:
        frame.leave_unguarded()
    return sites, unused


def apply_decisions(sites: Iterable[Site], markers: Iterable[Marker], graphs: Iterable[fx.GraphModule]) -> None:
    """Put the op where each site is to be rewritten, take ``markers`` out, move gathers within ``graphs``."""
    for site in sites:
        if isinstance(site.decision, Rewrite) and site.marker is not None:
            name = site.gate_path.replace(".", "_")  # of the first block, where several share this graph
            replace_attention(site.call, site.decision, site.marker, site.config.compiled_options(), name)
    erase_markers(markers)
    for graph in graphs:
        hoist_gathers(graph)
        graph.recompile()


def _inject(sites: Sequence[Site], frame: Frame, *, alone: bool) -> int:
    """Give every site that needs one its gate, or a marker that this frame can see; how many changed.

    ``alone``: nothing else was compiled with this frame's backend, so that there are no siblings to look for.

    A gate whose marker the restarted frame does not show is taken back by `_settle`: nobody trains one that is unused.
    """
    root = frame.root_module()
    root = frame.sole_module() if root is None else root
    missing = [
        (site, site.owner, site.decision)
        for site in sites
        if isinstance(site.decision, Rewrite) and site.marker is None and site.owner is not None
        if not is_awaited(site.owner, site.ordinal)
    ]
    for site in sites:
        if hasattr(site.gate, "_get_fsdp_state"):
            raise ValueError(
                f"{site.gate_path}: the gate itself is in fully_shard, and as it is never called nothing would gather "
                f"it; accepted: fully_shard of its owner, or of a module around that"
            )
        _refuse_other_parts(site)
    for site, owner, _ in missing:
        refuse_taken_name(owner, site.ordinal, site.gate_path)
        if site.gate is None:
            flat = "FullyShardedDataParallel" if flattened(owner) else None
            sharded = "fully_shard" if fully_sharded(owner) else flat
            refuse_unsynchronised(site.gate_path, "DistributedDataParallel" if data_parallel() else sharded)
    changed: list[Site] = []
    late: dict[str, Gate] = {}
    for site, owner, decision in missing:
        had_gate = site.gate is not None
        if not had_gate:
            late[site.gate_path] = _attach(site, owner, decision, owner if root is None else root, frame)
            await_marker(owner, site.ordinal)
        newly_marked = owner is root and mark_from_children(owner)
        if newly_marked or not had_gate:
            changed.append(site)
    if changed and root is not None:
        if not alone and runs_forward_of(frame.code, root):
            _inject_siblings(changed, root, frame)
        watch(root)
    if late:
        warn_of_late_gates(missing[0][1] if root is None else root, late)
    return len(changed)


def _refuse_other_parts(site: Site) -> None:
    """Raise ValueError where the gate is of DTensors and its attention is not: nothing says whose its gradient is."""
    if site.marker is None or not isinstance(site.decision, Rewrite) or isinstance(site.decision.shards, HeadShards):
        return
    tensors = (site.marker.weight, site.marker.bias, site.marker.log_scale, site.marker.shift)
    placed = [example(node) for node in tensors if node is not None and is_distributed(example(node))]
    if placed:
        raise ValueError(
            f"{site.gate_path}: got a gate of DTensors ({', '.join(map(str, placed[0].placements))}) for an attention "
            f"of local tensors; accepted: a gate outside of the plan, or attention on DTensors"
        )


def refuse_unsynchronised(gate_path: str, wrapper: str | None) -> None:
    """Raise ValueError where a new gate's gradients would stay on this process: ``wrapper`` has not seen it."""
    if wrapper is not None and torch.is_grad_enabled():
        raise ValueError(
            f"{gate_path}: the model is in {wrapper} already, so each process would train a gate made now on "
            f"its own; call sla_compile.prepare(model, ...) first, {wrapper} after it"
        )


def take_back_gates(frame: Frame) -> None:
    """The compile of ``frame`` failed: remove the gates that it made, for siblings too."""
    for root, owner, ordinal in take_unproven(frame.code):
        forget_awaited(owner, ordinal)
        detach_gate(owner, ordinal)
        watch(root)


def _attach(site: Site, owner: nn.Module, decision: Rewrite, root: nn.Module, frame: Frame) -> Gate:
    shape = decision.shape
    dtype = gate_dtype(owner, shape.dtype)
    if gate_name(site.ordinal) not in own_gates(owner):
        remember_unproven(frame.code, root, owner, site.ordinal)
    gate = attach_gate(owner, site.gate_spec(decision), device=shape.device, dtype=dtype)
    remember_injected(gate)
    return gate


def _inject_siblings(sites: Sequence[Site], root: nn.Module, frame: Frame) -> None:
    """The same gates for every module that shares this code and has none: it would fail the guards and recompile.

    What was prepared, loaded or copied with gates, or has other sizes, keeps its gates and settings as they are.
    """
    names = {id(module): name for name, module in root.named_modules()}
    for sibling in compiled_siblings(root, frame.compiler):
        ours = not _has_own_settings(sibling) and _same_sizes(root, sibling)
        for site in sites:
            name = names.get(id(site.owner))
            if name is None or not isinstance(site.decision, Rewrite):
                continue
            try:
                owner = sibling.get_submodule(name)
            except AttributeError:  # a sibling of another structure compiles by itself
                continue
            if ours:
                _attach(site, owner, site.decision, sibling, frame)
            if owner is sibling and own_gates(owner):  # as in ``root``, whose code would not serve it otherwise
                mark_from_children(owner)
        watch(sibling)


def _has_own_settings(module: nn.Module) -> bool:
    """True if anything in ``module`` was prepared, or has a gate that no compile of this process made."""
    return any(
        PREPARED in inner.__dict__ or (isinstance(inner, Gate) and not was_injected(inner))
        for inner in module.modules()
    )


def _same_sizes(left: nn.Module, right: nn.Module) -> bool:
    """True if both have the same parameters, by name and shape, whatever gates they have."""

    def sizes(module: nn.Module) -> dict[str, torch.Size]:
        gates = {id(p) for inner in module.modules() if isinstance(inner, Gate) for p in inner.parameters()}
        return {name: p.shape for name, p in module.named_parameters() if id(p) not in gates}

    return sizes(left) == sizes(right)


def _settle(site: Site, frame: Frame) -> Site:
    """``site`` with the decision that holds now that no gate can be added any more."""
    owner = site.owner
    if owner is None or not isinstance(site.decision, Rewrite):
        return site
    awaited = is_awaited(owner, site.ordinal)
    if awaited:
        forget_awaited(owner, site.ordinal)
    if site.marker is not None:
        return site
    if awaited:
        detach_gate(owner, site.ordinal)
        root = frame.root_module()
        watch(owner if root is None else root)
    if frame.resumed and owner is frame.root_module():
        keep = broken(frame)
    else:
        keep = Keep(NOT_REACHED, type(owner).__name__, "a forward that calls its submodules")
    return replace(site, decision=keep)
