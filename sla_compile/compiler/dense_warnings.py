"""Tell, once a site, that attention runs dense though the settings select it; and, once a model, of zero gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from sla_compile import memory
from sla_compile.compat import Frame, model_under_way
from sla_compile.compiler.site_report import SiteReport
from sla_compile.compiler.sites import BROKEN, NOT_REACHED, NOT_WHOLE, Site
from sla_compile.compiler.unused_gates import UnusedGate
from sla_compile.gate import PREPARED, Gate, gate_name, own_gates, owner_path
from sla_compile.module_paths import module_paths
from sla_compile.passes.decide import Keep, Rewrite
from sla_compile.user_warnings import DenseAttentionWarning, UntrainedGatesWarning, warn_user

__all__ = ["note_dense_run", "warn_of_dense", "warn_of_outside", "warn_of_untrained", "warn_of_untrained_sites"]

UNBOUND = frozenset({BROKEN, NOT_REACHED, NOT_WHOLE})
"""Reasons that have nothing to do with the form of an attention or with settings."""

_DENSE, _UNTRAINED, _ZERO = "dense", "looked for zero gates", "zero gates"


def warn_of_dense(sites: Sequence[Site], unused: Sequence[UnusedGate]) -> None:
    """Of one compile: attention that has a gate, or could have one, and stays dense for no reason in the settings."""
    for site in sites:
        keep = site.decision
        if isinstance(keep, Keep) and not keep.by_settings and (site.gate is not None or keep.reason in UNBOUND):
            _warn_of(site.owner, site.path, site.gate, str(keep))
    for one in unused:
        _warn_of(one.owner, "", one.gate, f"{one.reason} (accepted: {one.accepted})")


def note_dense_run(owner: nn.Module) -> None:
    """Of one run: ``owner``, at which Dynamo started or which it could not trace, ended its call without the op.

    That is remembered for the report and told once, unless a setting says so.
    """
    known = list(_accounts(owner))
    on_gpu = any(gate.device.type == "cuda" for gate in own_gates(owner).values())
    if any(report.by_settings or (report.rewritten and on_gpu) for report in known):
        return  # short at this size; or a CUDA graph, which replays the op without calling it
    memory.remember_dense_run(owner, compiled=True)
    if not memory.was_told(owner, _DENSE):
        kept = [report for report in known if not report.rewritten]
        reason = f"{kept[-1].reason}: {kept[-1].value}" if kept else "no graph of this call holds its attention"
        _warn_of(owner, "", next(iter(own_gates(owner).values())), reason)


def warn_of_outside(modules: Mapping[str, nn.Module], cause: str) -> None:
    """Of ``modules``, by path, whose attention no graph holds for ``cause``; told once for each."""
    new = {path: module for path, module in modules.items() if not memory.was_told(module, _DENSE)}
    for module in new.values():
        memory.remember_told(module, _DENSE)
    if new:
        path, module = next(iter(new.items()))
        more = f", nor that of {len(new) - 1} more, which sla_compile.report lists" if len(new) > 1 else ""
        warn_user(
            f"{_path(module, path) or 'the compiled module'}: its attention runs dense if it is called: no graph holds "
            f"it{more}{cause}",
            DenseAttentionWarning,
        )


def _accounts(owner: nn.Module) -> Iterator[SiteReport]:
    """What was compiled for ``owner``, or for another of its class where Dynamo starts at it."""
    for history in memory.accounts_of_owner(owner).values():
        yield from (report for accounts in history for report in accounts)
    settings = {gate.settings for gate in own_gates(owner).values()}
    for (path, _, text), history in memory.accounts_of_class(type(owner)).items():
        if not path and text in settings:
            yield from (report for accounts in history for report in accounts)


def _warn_of(owner: nn.Module | None, path: str, gate: Gate | None, reason: str) -> None:
    if owner is not None:
        if memory.was_told(owner, _DENSE):
            return
        memory.remember_told(owner, _DENSE)
        path = _path(owner, path)
    unused = f", its gate {gate_name(gate.ordinal)!r} is not used" if gate is not None else ""
    warn_user(
        f"{path or 'the compiled module'}: its attention runs dense{unused}: {reason}",
        DenseAttentionWarning,
    )


def _path(owner: nn.Module, known: str) -> str:
    """The module path of ``owner`` in the model as far as it is known: prepared, or the model that calls it now."""
    if PREPARED in owner.__dict__:
        return str(owner.__dict__[PREPARED][1])
    model = model_under_way(owner)
    return next((path for path, module in module_paths(model) if module is owner), known)


def warn_of_untrained_sites(sites: Sequence[Site], frame: Frame | None) -> None:
    """Of one compile: rewritten attention whose gates are all zero."""
    found = {}
    for site in sites:
        if isinstance(site.decision, Rewrite) and site.gate is not None and site.owner is not None:
            found[id(site.gate)] = (site.owner, site.gate)
    if found:
        root = frame.root_module() if frame is not None else None
        _warn_of_zero(list(found.values()), root if root is not None else next(iter(found.values()))[0])


def warn_of_untrained(module: nn.Module) -> None:
    """Of one run of ``module``, in which the op ran: for code that was compiled for another model of its class."""
    if not memory.was_told(module, _UNTRAINED):
        memory.remember_told(module, _UNTRAINED)
        owned = [(owner, gate) for owner in module.modules() for gate in own_gates(owner).values()]
        _warn_of_zero(owned, module)


def _warn_of_zero(owned: Sequence[tuple[nn.Module, Gate]], module: nn.Module) -> None:
    model = model_under_way(module)
    if memory.was_told(model, _ZERO):  # asked first: reading the gates' values waits for the device
        return
    untrained = [(owner, gate) for owner, gate in owned if gate.silent()]
    if untrained:
        memory.remember_told(model, _ZERO)
        owner = untrained[0][0]
        first = _path(owner, owner_path(untrained[0][1].path))
        warn_user(
            f"{len(untrained)} attention(s) are now sparse with gates that are still zero (first: "
            f"{first or 'the compiled module'!r}): fine-tune the model or load trained gates",
            UntrainedGatesWarning,
        )
