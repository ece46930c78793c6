"""The error of each attention with a token order, over the batches, and which order is the best by it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sla_compile.common.token_orders import RASTER, joined_order
from sla_compile.fitting.observer import Arguments, GatedCall, gated_calls
from sla_compile.fitting.ranks import every_site, sum_tensors, total
from sla_compile.fitting.traced_calls import kept_traces
from sla_compile.gate import gates, owner_path

__all__ = ["Errors", "Measured", "best_orders", "measure"]


@dataclass(frozen=True)
class Errors:
    """Of one attention."""

    missed: dict[str, list[float]]
    """||O - dense||^2 of each head, by order."""
    dense: float
    """||dense||^2 of all heads."""

    def of(self, order: str) -> float:
        """The relative error with an order for all heads, or with one for each."""
        each = order.split(",")
        parts = self.missed[order] if len(each) == 1 else [self.missed[kind][h] for h, kind in enumerate(each)]
        return math.sqrt(sum(parts) / max(self.dense, torch.finfo(torch.float64).tiny))

    def told(self, chosen: str) -> dict[str, float]:
        """By order, those tried and the one ``chosen`` of them."""
        by_head = [chosen] if "," in chosen and {*chosen.split(",")} <= {*self.missed} else []
        return {order: self.of(order) for order in [*self.missed, *by_head]}


class Measured:
    """Squared errors of one attention, and whether its tokens stood in another order than the model's."""

    def __init__(self, heads: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, heads, dtype=torch.float64, device=device)
        self.placed = False
        self.obstacle, self.tokens = "", 0

    def add(self, call: GatedCall) -> None:
        out = call.output_with_gate(*call.gate.parameters())
        self.sums[0] += (out.double() - call.dense.double()).square().sum((0, 2, 3))
        self.sums[1] += call.dense.double().square().sum((0, 2, 3))
        order = call.decision.order
        self.placed |= order.queries is not None or order.keys is not None
        self.obstacle, self.tokens = order.obstacle, call.query.shape[2]

    def finite(self, path: str) -> tuple[list[float], list[float]]:
        """Of each head ||O - dense||^2 and ||dense||^2; ValueError where they are not finite."""
        missed, dense = self.sums.tolist()
        if not math.isfinite(sum(missed) + sum(dense)):
            raise ValueError(f"{path}: attention, dense or sparse, is not finite on these batches")
        return missed, dense


@torch.no_grad()
def measure(model: nn.Module, batches: Sequence[Arguments]) -> dict[str, Measured]:
    """By gate path, each attention that the batches reach, with the order and the gate that it has; over all ranks."""
    found: dict[str, Measured] = {}

    def observe(call: GatedCall) -> Tensor:
        found.setdefault(call.path, Measured(call.gate.heads, call.dense.device)).add(call)
        return call.dense

    with kept_traces(model), gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
    device, every = next(model.parameters()).device, gates(model)
    sites = every_site(model, found, lambda path: Measured(every[path].heads, device))
    sum_tensors([site.sums for site in sites.values()])
    for site in sites.values():
        site.placed = total(float(site.placed)) > 0
    return sites


def best_orders(found: Mapping[str, Errors], by: str = "site") -> dict[str, str]:
    """By module path, the order with the least squared error of all attentions of that module together, relative to
    dense; or of each head the one with the least of that head.

    An attention that cannot have an order keeps the model's with it.
    """
    of_owner: dict[str, list[Errors]] = {}
    for path, errors in found.items():
        of_owner.setdefault(owner_path(path), []).append(errors)
    return {site: order for site, together in of_owner.items() if (order := _best_of(together, by))}


def _best_of(together: Sequence[Errors], by: str) -> str:
    """The order, or that of each head, for the attentions of one module; "" where none of them was measured."""
    tried = {order: None for errors in together for order in errors.missed}
    relative = [
        {order: [part / (errors.dense or 1.0) for part in parts] for order, parts in errors.missed.items()}
        for errors in together
    ]

    def least(of_heads: Callable[[Sequence[float]], float]) -> str:
        sums = {
            order: sum(
                of_heads(parts[kind]) for parts in relative if (kind := order if order in parts else RASTER) in parts
            )
            for order in tried
        }
        return min(sums, key=sums.__getitem__, default="")

    heads = {len(parts) for errors in together for parts in errors.missed.values()}
    if by == "site" or len(heads) != 1:
        return least(sum)
    return joined_order([least(operator.itemgetter(head)) for head in range(heads.pop())])
