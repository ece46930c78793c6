"""What was compiled for a model: each compile puts the reports of its sites into memory, by module."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx, nn

from sla_compile import memory
from sla_compile.compat import Frame, runs_forward_of
from sla_compile.compiler.site_report import (
    GraphBreak,
    SiteReport,
    describe,
    graph_break,
    prepared_only,
    with_sparsity_of,
)
from sla_compile.compiler.sites import Site
from sla_compile.gate import PREPARED, gate_name, own_gates
from sla_compile.module_paths import module_paths

__all__ = ["compiled_breaks", "compiled_sites", "remember"]


def remember(gm: fx.GraphModule, sites: Sequence[Site], frame: Frame) -> None:
    """Keep the reports of the ``sites`` of ``gm``, the graph of ``frame``, and the graph break that ended it."""
    calls: dict[tuple[int, int], list[Site]] = {}
    for site in sites:
        calls.setdefault((id(site.owner), site.ordinal), []).append(site)
    ownerless = [describe(site) for site in sites if site.owner is None]
    memory.remember_code_accounts(frame.code, ownerless)
    for group in calls.values():
        owner, ordinal, gate = group[0].owner, group[0].ordinal, group[0].gate
        if owner is None:
            continue
        reports = tuple(describe(site) for site in group)
        memory.remember_owner_account(owner, ordinal, reports)
        if gate is not None:
            memory.remember_class_account(type(owner), ordinal, gate.settings, reports)
    root, found = frame.root_module(), graph_break(gm)
    if found is not None and root is not None:
        memory.remember_break(root, found)


def compiled_breaks(model: nn.Module) -> list[GraphBreak]:
    """The graph breaks in the forward of ``model`` and of the modules in it."""
    return [found for module in model.modules() for found in memory.breaks_in(module)]


def compiled_sites(model: nn.Module) -> list[SiteReport]:
    """The sites of ``model`` as last compiled, by module path, and its gates that no compile has reached."""
    found = []
    for path, owner in module_paths(model):
        own = own_gates(owner)
        accounts = memory.accounts_of_owner(owner)
        for gate in own.values():
            if gate.ordinal not in accounts:
                shared = memory.accounts_of_class(type(owner), gate.ordinal, gate.settings)
                accounts[gate.ordinal] = shared if shared is not None else (prepared_only(gate, owner),)
        full = path or owner.__dict__.get(PREPARED, (None, ""))[1]
        for code, ownerless in memory.accounts_by_code():
            if runs_forward_of(code, owner):
                found += [_moved(report, full, report.ordinal) for report in ownerless]
        for ordinal, calls in sorted(accounts.items()):
            gate_now = own.get(gate_name(ordinal))
            found += [_moved(with_sparsity_of(report, gate_now), full, ordinal) for report in calls]
    return found


def _moved(report: SiteReport, path: str, ordinal: int) -> SiteReport:
    """``report`` for an owner at module path ``path``."""
    diff = report.diff
    if report.path and report.path != path:
        diff = tuple(line.replace(f"{report.path}.", f"{path}.".lstrip(".")) for line in diff)
    gate_path = f"{path}.{gate_name(ordinal)}".lstrip(".") if report.gate_path else ""
    return dataclasses.replace(report, path=path, gate_path=gate_path, diff=diff)
