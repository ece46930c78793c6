"""Note on each gate, and in memory, which attention it was found to belong to; tell what is not certain about it."""

from __future__ import annotations

import warnings

from torch import nn

from sla_compile.compat import Frame, compiled_siblings
from sla_compile.compiler.sites import FoundSites
from sla_compile.gate import detach_gate, gate_name, own_gates
from sla_compile.gate_settings import NumberedSite
from sla_compile.memory import remember_site

__all__ = ["bind_gates"]


_Move = tuple[nn.Module, int, str, str | None]
"""Owner and number of a gate, its call site before, and now; None where it is taken out."""


def bind_gates(found: FoundSites, frame: Frame) -> int:
    """Give the gates of what was ``found`` in ``frame`` the call sites of their attentions; how many that changes.

    Gates for further calls of one call site, as there were before, are taken out. What Dynamo has traced shows the
    gates of before, so a frame in which something changes has to be analysed again.
    """
    paths: dict[int, str] = {}
    moved: list[_Move] = []
    doubts: list[str] = []
    for site in found.sites:
        if site.owner is None:
            continue
        paths[id(site.owner)] = site.path or "the compiled module"
        remember_site(site.owner, site.ordinal, NumberedSite(site.call_site, True))
        if (gate := site.gate) is not None and not (gate.call_site and gate.traced):
            moved.append((site.owner, gate.ordinal, gate.call_site, site.call_site))
            gate.take_call_site(site.call_site)
            gate.pattern = site.call.pattern
    for owner, numbering in found.numberings:
        path = paths[id(owner)]
        doubts += [f"{path}: {numbering.doubt}"] if numbering.doubt else []
        for ordinal, place in numbering.spare.items():
            remember_site(owner, ordinal, NumberedSite(place, True))
            if gate_name(ordinal) in own_gates(owner):
                detach_gate(owner, ordinal)
                moved.append((owner, ordinal, "", None))
        for place in dict.fromkeys(numbering.spare.values()):
            names = ", ".join(gate_name(ordinal) for ordinal, of in numbering.spare.items() if of == place)
            doubts.append(
                f"{path}: the calls at {place} have one gate now, where they had one for each; the first is kept, "
                f"{names} taken out"
            )
    if doubts:
        warnings.warn("; ".join(doubts), stacklevel=2)
    _bind_siblings(moved, frame)
    return sum(before != now for _, _, before, now in moved)


def _bind_siblings(moved: list[_Move], frame: Frame) -> None:
    """The same for the gates of modules that share the code of ``frame`` and come from the same file."""
    root = frame.root_module()
    if not moved or root is None:
        return
    names = {id(module): name for name, module in root.named_modules()}
    for sibling in compiled_siblings(root, frame.compiler):
        modules = dict(sibling.named_modules())
        for owner, ordinal, before, now in moved:
            like = modules.get(names[id(owner)]) if id(owner) in names else None
            gate = None if like is None else own_gates(like).get(gate_name(ordinal))
            if like is None or gate is None or gate.traced or gate.call_site != before:
                continue
            if now is None:
                detach_gate(like, ordinal)
            else:
                gate.take_call_site(now)
                gate.pattern = own_gates(owner)[gate_name(ordinal)].pattern
