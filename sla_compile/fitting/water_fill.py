"""How `allocate` spends a budget: the raise that removes most error for its cost first, as long as there is room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from sla_compile.fitting.observer import Topk
from sla_compile.fitting.sensitivity import SiteSensitivity
from sla_compile.gate import owner_path

__all__ = ["water_fill"]

_ROUNDING = 1e-9
"""Relative difference that two sums of the same costs may have, when added in another order."""


def water_fill(levels: Sequence[Sequence[SiteSensitivity]], budget: float, at_run_time: bool) -> list[dict[str, Topk]]:
    """For each of ``levels``, attentions measured under like conditions, a topk by gate path; they share one budget.

    All start at the lowest rung, and the raises that remove most loss per cost are made, up to the cost of ``budget``
    everywhere. Attentions of one module get one topk, unless it is set ``at_run_time``, in the buffer of each gate;
    those of a site with ``by_head`` one for each head. If nothing better is found, all get ``budget``.
    """
    of_levels = [_shared_topks(sites, at_run_time) for sites in levels]
    groups = list(chain.from_iterable(chain.from_iterable(shared.values()) for shared in of_levels))
    _raise_all(groups, budget)
    uniform = sum(group.loss[group.rungs.index(budget)] for group in groups)
    if sum(group.loss[group.rung] for group in groups) > uniform:
        return [{site.path: budget for site in sites} for sites in levels]
    return [_chosen(shared) for shared in of_levels]


def _raise_all(groups: Sequence[_SharedTopk], budget: float) -> None:
    """Put each of ``groups``, all on their lowest rungs, on the rung that it gets."""
    total = sum(group.cost[group.rungs.index(budget)] for group in groups)
    room = total * (1 + _ROUNDING) - sum(group.cost[0] for group in groups)
    while True:
        raises = [(found, group) for group in groups if (found := group.best_raise(room)) is not None]
        if not raises:
            break
        (_, rung), group = max(raises, key=lambda item: item[0][0])
        room -= group.cost[rung] - group.cost[group.rung]
        group.rung = rung
    for group in groups:  # as many blocks as with the budget: at other lengths the budget's share of them
        even = group.rungs.index(budget)
        if group.cost[even] == group.cost[group.rung] and group.loss[even] <= group.loss[group.rung]:
            group.rung = even


def _shared_topks(sites: Sequence[SiteSensitivity], at_run_time: bool) -> dict[str, list[_SharedTopk]]:
    """Those of ``sites``: by gate path one for each head, or by what they share one for all."""
    by_key: dict[str, list[SiteSensitivity]] = {}
    for site in sites:
        if not site.by_head:
            by_key.setdefault(site.path if at_run_time else owner_path(site.path), []).append(site)
    shared = {key: [_SharedTopk.of(members)] for key, members in by_key.items()}
    return shared | {site.path: _SharedTopk.of_heads(site) for site in sites if site.by_head}


def _chosen(shared: dict[str, list[_SharedTopk]]) -> dict[str, Topk]:
    """By gate path, the topk of the rungs that these are on."""
    chosen: dict[str, Topk] = {}
    for groups in shared.values():
        topks = tuple(group.rungs[group.rung] for group in groups)
        for site in groups[0].members:
            chosen[site.path] = topks if site.by_head else topks[0]
    return chosen


@dataclass
class _SharedTopk:
    """Attentions that get one topk: their loss and cost at each rung, and the rung they are on."""

    members: list[SiteSensitivity]
    rungs: tuple[float, ...]
    """Those that all members have, ascending."""
    loss: list[float]
    """For each rung, the members' relative losses, weighted by their effect on the output and summed."""
    cost: list[float]
    """For each rung, pairs of tokens in critical blocks."""
    rung: int = 0
    """Index of the rung they are on."""

    @classmethod
    def of_heads(cls, site: SiteSensitivity) -> list[_SharedTopk]:
        """One for each head of ``site``."""
        weight, heads = 1.0 if site.effect is None else site.effect, site.squared_errors.shape[1]
        losses = [[weight * loss for loss in site.relative_losses(head)] for head in range(heads)]
        return [cls([site], site.rungs, loss, [part / heads for part in site.critical]) for loss in losses]

    @classmethod
    def of(cls, members: list[SiteSensitivity]) -> _SharedTopk:
        shared = set(members[0].rungs).intersection(*(member.rungs for member in members))
        rungs = tuple(sorted(shared))
        places = [[member.rungs.index(rung) for rung in rungs] for member in members]
        weights = [1.0 if member.effect is None else member.effect for member in members]
        losses = [[w * loss for loss in member.relative_losses()] for w, member in zip(weights, members, strict=True)]
        loss = [sum(own[p[i]] for own, p in zip(losses, places, strict=True)) for i in range(len(rungs))]
        cost = [sum(m.critical[p[i]] for m, p in zip(members, places, strict=True)) for i in range(len(rungs))]
        return cls(members, rungs, loss, cost)

    def best_raise(self, room: float) -> tuple[float, int] | None:
        """The raise to a higher rung, of those that cost at most ``room``, that removes most loss per cost.

        Returns that ratio and the index of the rung; None if no raise removes any loss.
        """
        raises: list[tuple[float, int]] = []
        for rung in range(self.rung + 1, len(self.rungs)):
            gain, cost = self.loss[self.rung] - self.loss[rung], self.cost[rung] - self.cost[self.rung]
            if gain > 0 and cost <= room:
                raises.append((gain / cost if cost > 0 else math.inf, rung))
        return max(raises, default=None)
