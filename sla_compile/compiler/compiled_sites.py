"""What was compiled for a model: each compile puts the reports of its sites into memory, by module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from torch import fx, nn

from sla_compile import memory
from sla_compile.compat import Frame, runs_forward_of
from sla_compile.compiler.site_report import (
    GraphBreak,
    SiteReport,
    describe,
    graph_break,
    not_traced,
    not_used,
    prepared_only,
    with_sparsity_of,
)
from sla_compile.compiler.sites import Site
from sla_compile.compiler.unused_gates import UnusedGate
from sla_compile.gate import PREPARED, Gate, gate_name, own_gates
from sla_compile.memory import Accounts
from sla_compile.module_paths import module_paths

__all__ = ["compiled_breaks", "compiled_sites", "remember", "shared_sites"]


def remember(gm: fx.GraphModule, sites: Sequence[Site], unused: Sequence[UnusedGate], frame: Frame) -> None:
    """Keep the reports of ``sites`` and ``unused`` gates of ``gm``, the graph of ``frame``, and its graph break."""
    calls: dict[tuple[int, int], list[Site]] = {}
    for site in sites:
        calls.setdefault((id(site.owner), site.ordinal), []).append(site)
    memory.remember_code_accounts(frame.code, [describe(site) for site in sites if site.owner is None])
    root = frame.root_module()
    paths = {} if root is None else {id(module): path for path, module in module_paths(root)}

    def keep(owner: nn.Module, ordinal: int, gate: Gate | None, reports: Accounts) -> None:
        settings = "" if gate is None else gate.settings
        memory.remember_owner_account(owner, root, ordinal, reports, settings)
        if root is not None and id(owner) in paths:
            memory.remember_class_account(type(root), paths[id(owner)], ordinal, settings, reports)

    for group in calls.values():
        if (owner := group[0].owner) is not None:
            keep(owner, group[0].ordinal, group[0].gate, tuple(describe(site) for site in group))
    for one in unused:
        report = not_used(one.gate, one.owner, one.reason, one.accepted)
        keep(one.owner, one.gate.ordinal, one.gate, (report,))
    found = graph_break(gm)
    if found is not None and root is not None:
        memory.remember_break(root, found)


def compiled_breaks(model: nn.Module) -> list[GraphBreak]:
    """The graph breaks in the forward of ``model`` and of the modules in it."""
    return [found for module in model.modules() for found in memory.breaks_in(module)]


def compiled_sites(model: nn.Module) -> list[SiteReport]:
    """The sites of ``model`` as last compiled, by module path, and its gates that no compile has reached."""
    found = []
    modules = dict(module_paths(model))
    for path, owner in module_paths(model):
        start = _start(path, modules)
        accounts = _accounts(path, owner, start, modules)
        own = own_gates(owner)
        for gate in own.values():
            if gate.ordinal not in accounts:
                accounts[gate.ordinal] = [(prepared_only(gate, owner),)]
        full = path or owner.__dict__.get(PREPARED, (None, ""))[1]
        for code, ownerless in memory.accounts_by_code():
            if runs_forward_of(code, owner):
                found += [_moved(report, full, report.ordinal) for report in ownerless]
        when, compiled = memory.dense_run(owner)
        dense = when > (0 if start is None else memory.last_start(modules[start]))
        for ordinal, history in sorted(accounts.items()):
            gate_now = own.get(gate_name(ordinal))
            for report, current in _reports(history):
                report = _moved(with_sparsity_of(report, gate_now), full, ordinal)
                if dense and gate_now is not None and (report.rewritten or (compiled and not report.compiled)):
                    report = not_traced(report) if compiled else dataclasses.replace(report, ran_dense=True)
                found.append(dataclasses.replace(report, current=current))
    return found


def shared_sites(model: nn.Module) -> set[str]:
    """The paths in ``model`` of owners at which a module of the same class had attention in a graph.

    Such code may serve ``model`` too, with no compile and so no report of its own where there is no gate.
    """
    modules = dict(module_paths(model))
    found = set()
    for path, module in modules.items():
        for (inside, _, _), history in memory.accounts_of_class(type(module)).items():
            owner = f"{path}.{inside}".strip(".")
            if owner in modules and type(modules[owner]).__name__ == history[-1][0].owner:
                found.add(owner)
    return found


def _reports(history: Sequence[Accounts]) -> Iterator[tuple[SiteReport, bool]]:
    """The reports of one attention, the last compiled first and marked as such."""
    for age, accounts in enumerate(reversed(history)):
        for report in accounts:
            yield report, age == 0


def _start(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The path of the module, at ``path`` or around it, at which Dynamo last started on its way there; or None."""
    names = path.split(".") if path else []
    start, when = None, 0
    for outer in (".".join(names[:count]) for count in range(len(names) + 1)):
        if outer in modules and (then := memory.last_start(modules[outer])) > when:
            start, when = outer, then
    return start


def _accounts(
    path: str, owner: nn.Module, start: str | None, modules: Mapping[str, nn.Module]
) -> dict[int, list[Accounts]]:
    """What was compiled for each attention of ``owner``, by ordinal.

    What counts is the frame at which its last call started; one that is shared with another module of that class,
    where this one has no entry of its own, or one of other settings than its gate has now.
    """
    root = None if start is None else modules[start]
    by_frame: dict[int, list[Accounts]] = {}
    elsewhere: dict[int, list[Accounts]] = {}
    settings = {gate.ordinal: gate.settings for gate in own_gates(owner).values()}
    compiled_for = memory.settings_of_owner(owner)
    for (frame, ordinal), history in memory.accounts_of_owner(owner).items():
        started = root is not None and frame is not None and frame() is root
        is_current = compiled_for.get((frame, ordinal), "") == settings.get(ordinal, "")
        (by_frame if started and is_current else elsewhere)[ordinal] = history
    shared: dict[int, list[Accounts]] = {}
    if root is not None and start is not None:
        inside = path.removeprefix(start).lstrip(".")
        for (place, ordinal, text), history in memory.accounts_of_class(type(root)).items():
            if place == inside and text == settings.get(ordinal, "") and history[-1][0].owner == type(owner).__name__:
                shared[ordinal] = history
    return {**elsewhere, **shared, **by_frame}


def _moved(report: SiteReport, path: str, ordinal: int) -> SiteReport:
    """``report`` for an owner at module path ``path``."""
    diff = report.diff
    if report.path and report.path != path:
        diff = tuple(line.replace(f"{report.path}.", f"{path}.".lstrip(".")) for line in diff)
    gate_path = f"{path}.{gate_name(ordinal)}".lstrip(".") if report.gate_path else ""
    return dataclasses.replace(report, path=path, gate_path=gate_path, diff=diff)
