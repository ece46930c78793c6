"""Which number, and so which gate, each attention of an owner has: by its call site, not by how often it is called.

An attention keeps the number under which it was first met. Only a gate that this process has not traced, because it is
of a file or a pickle, may be at another call site than it says: the source may have changed, or the gate may be of
before there were call sites. Such gates are bound by the order of the calls, as all were then.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile

from torch import nn

from sla_compile.compiler.call_sites import LEVEL
from sla_compile.gate import own_gates
from sla_compile.gate_settings import NumberedSite
from sla_compile.memory import remembered_sites

__all__ = ["Numbering", "known_sites", "number_calls", "spare_numbers"]


@dataclass(frozen=True)
class Numbering:
    """The numbers of an owner's attention calls, and what that changes for its gates."""

    ordinals: list[int]
    """One for each call."""
    spare: dict[int, str] = field(default_factory=dict)
    """By number, the call site of each gate from before there were call sites that is for a further call of it."""
    doubt: str = ""
    """Why an attention may have got the gate of another."""


def known_sites(owner: nn.Module) -> dict[int, NumberedSite]:
    """The attentions of ``owner`` by number: those with a gate, as it says, and those that a compile has met."""
    gated = {gate.ordinal: NumberedSite(gate.call_site, gate.traced) for gate in own_gates(owner).values()}
    met = {ordinal: site for ordinal, site in remembered_sites(owner).items() if ordinal not in gated}
    return dict(sorted({**met, **gated}.items()))


def spare_numbers(owner: nn.Module) -> list[int]:
    """The numbers of calls that had gates of their own and now share that of another, a lower one."""
    first: dict[str, int] = {}
    sites = {ordinal: site.call_site for ordinal, site in known_sites(owner).items() if site.call_site}
    return [ordinal for ordinal, site in sites.items() if first.setdefault(site, ordinal) != ordinal]


def number_calls(owner: nn.Module, calls: Sequence[tuple[Hashable, str]], resumed: bool = False) -> Numbering:
    """Number the attention calls of ``owner`` in one graph.

    Args:
        calls: of each, in the order of the graph, which call of the owner it is in, and its call site.
        resumed: whether the graph is of the rest of the owner's forward, after a graph break.
    """
    known = known_sites(owner)
    given: dict[str, int] = {}
    for ordinal, (place, _) in known.items():
        given.setdefault(place, ordinal)
    wanted = list(dict.fromkeys(site for _, site in calls))
    numbers = {site: given[site] for site in wanted if site in given}
    for alike in (_by_line, _by_innermost):
        for site in wanted:
            left = [place for place, ordinal in given.items() if place and ordinal not in numbers.values()]
            if site not in numbers and (found := alike(site, left)) is not None:
                numbers[site] = given[found]
    exact = set(numbers.values())
    spare = _by_count(numbers, calls, known, resumed)
    doubt = _by_order(numbers, wanted, known, exact)
    free = (ordinal for ordinal in count() if ordinal not in known and ordinal not in numbers.values())
    for site in wanted:
        if site not in numbers:
            numbers[site] = next(free)
    return Numbering([numbers[site] for _, site in calls], spare, doubt)


def _by_line(site: str, known: Sequence[str]) -> str | None:
    """The one of the ``known`` call sites that is ``site``, where only one of the two has columns.

    A run has them from Python 3.11 on, a trace of torch 2.11 has none.
    """
    alike = [place for place in known if _COLUMN.sub("", place) == _COLUMN.sub("", site)]
    return alike[0] if len(alike) == 1 and bool(_COLUMN.search(site)) != bool(_COLUMN.search(alike[0])) else None


_COLUMN = re.compile(r":\d+")


def _by_innermost(site: str, known: Sequence[str]) -> str | None:
    """The one of the ``known`` call sites that has most of the inner part of ``site``, whose stack starts elsewhere.

    It does where a forward is put on the module, as hooks do, or where Dynamo starts within what the forward calls. Of
    call sites that start at one function, the whole stack counts.
    """
    levels = site.split(LEVEL)
    shared: dict[str, int] = {}
    for place in known:
        theirs = place.split(LEVEL)
        if _function(theirs[0]) != _function(levels[0]):
            pairs = zip(reversed(levels), reversed(theirs), strict=False)
            shared[place] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    most = max(shared.values(), default=0)
    alike = [place for place, count in shared.items() if count == most]
    return alike[0] if most and len(alike) == 1 else None


def _function(level: str) -> str:
    return level.partition("+")[0]


def _by_count(
    numbers: dict[str, int], calls: Iterable[tuple[Hashable, str]], known: dict[int, NumberedSite], resumed: bool
) -> dict[int, str]:
    """Bind gates without a call site as they were made: one for each call, counted over the owner's forward."""
    old = {ordinal for ordinal, site in known.items() if not site.call_site}
    if not old:
        return {}
    before = max((ordinal for ordinal in known if ordinal not in old), default=-1) + 1 if resumed else 0
    spare = {}
    counted: dict[Hashable, int] = {}
    for call, site in calls:
        ordinal = counted.get(call, before)
        counted[call] = ordinal + 1
        if ordinal in old and numbers.setdefault(site, ordinal) != ordinal:
            spare[ordinal] = site
    return spare


def _by_order(numbers: dict[str, int], wanted: list[str], known: dict[int, NumberedSite], exact: set[int]) -> str:
    """Bind gates whose call site a file says, and is none of this source any more; what is not certain about it."""
    new = [site for site in wanted if site not in numbers]
    taken = set(numbers.values())
    moved = [
        ordinal
        for ordinal, site in known.items()
        if site.call_site and not site.traced and ordinal not in taken and site.call_site not in numbers
    ]
    numbers.update(zip(new, moved, strict=False))
    if not new or not moved or (len(new) == len(moved) and not exact):
        return ""
    bound = ", ".join(f"{site} (was {known[ordinal].call_site})" for site, ordinal in zip(new, moved, strict=False))
    return f"gates of call sites that this source does not have are bound by their order: {bound}"
