"""``choose_orders``: the order of a video's tokens with which each attention is nearest to dense, from data.

Which tokens share a block decides how well a block's mean stands for it. One attention looks along time, the next
within a frame: so the model is prepared with each order in turn, the error of each attention measured, and at last
each gets the order with which it had the least.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sla_compile.common.token_orders import RASTER
from sla_compile.compat import fully_sharded
from sla_compile.compiler.preparation import prepare, unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.allocation import OUTPUT_BATCHES
from sla_compile.fitting.observer import (
    Arguments,
    GatedCall,
    gated_calls,
    no_gated_call_message,
    peek_first,
    prepared_or_rolled_back,
)
from sla_compile.fitting.output_error import OutputError
from sla_compile.fitting.ranks import every_site, over_ranks, sum_tensors, total
from sla_compile.fitting.traced_calls import kept_traces
from sla_compile.gate import gates, model_config, owner_path

__all__ = ["ORDERS", "OrderReport", "SiteOrder", "choose_orders"]

ORDERS = (RASTER, "tiles:1", "tiles:2", "tiles:4", "tiles:8", "tiles:16")
"""What is tried: the model's own order, and tiles from flat ones to long ones."""


@dataclass(frozen=True)
class SiteOrder:
    """The order that one attention was given; errors are ||O - dense|| / ||dense|| over all tokens of the batches."""

    path: str
    """Module path of the gate."""
    order_before: str
    order: str
    errors: Mapping[str, float]
    """Of every order that was tried and could be had."""

    @property
    def error(self) -> float | None:
        """That with its order; None where that was not tried."""
        return self.errors.get(self.order)

    @property
    def before(self) -> float | None:
        """That with the order it had; None where that was not tried."""
        return self.errors.get(self.order_before)


@dataclass(frozen=True, repr=False)
class OrderReport:
    """Which order each attention was given, and its error with each; prints as a table, ``to_dict`` for tools."""

    model: str
    """Class of the model."""
    batches: int
    orders: tuple[str, ...]
    """What was tried."""
    output_before: float
    """||output - dense output|| / ||dense output|| on the first four batches, all attention as it was."""
    output: float
    """The same with the orders that were chosen."""
    sites: tuple[SiteOrder, ...]
    """In the order in which a forward calls them."""

    @property
    def overrides(self) -> dict[str, dict[str, str]]:
        """The orders of ``sites`` as ``SLAConfig.overrides``, with which another process prepares the model."""
        return {glob.escape(owner_path(site.path)): {"reorder": site.order} for site in self.sites}

    @property
    def title(self) -> str:
        """One line: how many attentions, and the error of the output before and after."""
        now = f" -> {self.output:.4f}" if self.output < self.output_before else ", no nearer with others: all stay"
        return (
            f"{self.model}: {len(self.sites)} attention(s), {len(self.orders)} order(s), {self.batches} batch(es): "
            f"output error {self.output_before:.4f}{now}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields and ``overrides``."""
        fields = {**dataclasses.asdict(self), "overrides": self.overrides}
        return json.loads(json.dumps(fields))  # type: ignore[no-any-return]

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> Any:
        from sla_compile.reporting.fit_tables import OrderView

        return OrderView(self.title, self.sites, self.orders)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import plain_text

        return plain_text(self.__rich__(), width=100)

    def __repr__(self) -> str:
        return f"<OrderReport of {self.model}: output error {self.output_before:.3g} -> {self.output:.3g}>"


def choose_orders(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    orders: Sequence[str] = ORDERS,
    config: SLAConfig | Mapping[str, Any] | None = None,
    max_batches: int | None = None,
    group: Any = None,
) -> OrderReport:
    """Give each attention of ``model`` the token order with which its output is nearest to dense; no training.

    The model runs eagerly and dense, in the mode (train or eval) it is in, once over the batches for each of
    ``orders``: its attentions' outputs with the gates as they are, and with the topk they have, are compared with the
    dense ones. The model is then prepared again with ``reorder`` in an override for each module, which replaces those
    it had; gates keep their values. Where the model's output was no nearer to dense on the first four batches, all
    orders stay as they were. Do this before `allocate` and `calibrate`, which fit what depends on the order, and
    before training.

    Args:
        model: any module, prepared, compiled, or neither; without gates it is prepared with the first batch.
        batches: an iterable of tuples of positional, or mappings of keyword, arguments of the model; or one such batch.
            All are held in memory.
        orders: what to try, values of ``reorder``.
        config: settings for ``prepare``; by default those the model has been prepared with.
        max_batches: how many batches to use at most; None: all of them.
        group: ranks with batches of their own, all to get the same orders; by default those of DDP.

    Raises:
        TypeError: ``model`` is no module, ``group`` no group, or a batch is neither a tuple nor a mapping.
        ValueError: a refused setting, no batch, a gate that the first does not reach, no attention whose tokens are a
            grid that is known, gates in ``fully_shard``, or numbers that are not finite. The model is then as it was.
    """
    _check_orders(orders)
    model = unwrapped(model)
    first, stream = peek_first(batches, max_batches)
    kept = list(stream)
    with over_ranks(model, group) as model, prepared_or_rolled_back(model, first, config):
        _refuse_sharded(model)
        _refuse_unreached(model, first)
        before = model_config(model)
        assert before is not None  # a gate has one
        had = {path: gate.config.reorder for path, gate in gates(model).items()}
        try:
            found = _try(model, kept, orders, before)
            chosen = _best(found)
            losses = _settle(model, kept, before, chosen)
        except BaseException:
            prepare(model, *first, config=before)
            raise
        return _report(model, int(total(len(kept))), tuple(orders), losses, found, had)


def _check_orders(orders: Sequence[str]) -> None:
    if isinstance(orders, str) or not orders:
        raise ValueError(f"orders: got {orders!r}; accepted: a sequence of values of reorder, at least one")
    for order in orders:
        SLAConfig.check_value("reorder", order)


def _report(
    model: nn.Module,
    batches: int,
    orders: tuple[str, ...],
    losses: tuple[float, float],
    found: Mapping[str, Mapping[str, float]],
    had: Mapping[str, str],
) -> OrderReport:
    now = gates(model)
    return OrderReport(
        model=type(model).__name__,
        batches=batches,
        orders=orders,
        output_before=math.sqrt(losses[0]),
        output=math.sqrt(losses[1]),
        sites=tuple(SiteOrder(path, had[path], now[path].config.reorder, errors) for path, errors in found.items()),
    )


def _refuse_sharded(model: nn.Module) -> None:
    """Raise ValueError where ``model`` cannot be prepared again."""
    for path, gate in gates(model).items():
        if fully_sharded(gate):
            raise ValueError(
                f"{path}: got a gate in fully_shard, which cannot be prepared again; accepted: choose_orders before "
                f"fully_shard"
            )


def _refuse_unreached(model: nn.Module, first: Arguments) -> None:
    """Raise ValueError where ``first``, which the model is prepared with again, would leave out a gate."""
    reached: set[str] = set()

    def observe(call: GatedCall) -> Tensor:
        reached.add(call.path)
        return call.dense

    args, kwargs = first
    with torch.no_grad(), kept_traces(model), gated_calls(model, observe):
        model(*args, **kwargs)
    if not total(len(reached)):
        raise ValueError(no_gated_call_message(model, first))
    missed = [path for path in gates(model) if path not in reached]
    if total(len(missed)):
        raise ValueError(
            f"{missed[0] if missed else 'another rank'}: its attention is not reached by the first batch, which the "
            f"model is prepared with for each order; accepted: a first batch that reaches every attention with a gate"
        )


def _try(
    model: nn.Module, batches: Sequence[Arguments], orders: Sequence[str], before: SLAConfig
) -> dict[str, dict[str, float]]:
    """For each gate that was reached its error with each of ``orders`` that it can have; changes the settings.

    Raises ValueError where no attention can have another order than the model's, and for numbers that are not finite.
    """
    found: dict[str, dict[str, float]] = {}
    obstacles: dict[str, _Measured] = {}
    others = {
        pattern: {name: value for name, value in fields.items() if name != "reorder"}
        for pattern, fields in before.overrides.items()
    }
    for order in orders:
        first = batches[0]
        everywhere = dataclasses.replace(before, reorder=order, overrides={p: f for p, f in others.items() if f})
        prepare(model, *first, config=everywhere)
        for path, measured in _measured(model, batches).items():
            errors = found.setdefault(path, {})
            if order == RASTER or measured.placed:
                errors[order] = measured.error(path)
            else:
                obstacles[path] = measured
    if found and len(obstacles) == len(found):
        path = max(obstacles, key=lambda path: obstacles[path].tokens)
        raise ValueError(
            f"{path}: of {len(obstacles)} attention(s) none can have another order than the model's own; of this one "
            f"{obstacles[path].obstacle}. Those after a graph break were not reached: see explain"
        )
    return found


class _Measured:
    """Squared errors of one attention, and whether its tokens stood in another order than the model's."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.placed = False
        self.obstacle, self.tokens = "", 0

    def add(self, call: GatedCall) -> None:
        out = call.output_with_gate(*call.gate.parameters())
        self.sums[0] += (out.double() - call.dense.double()).square().sum()
        self.sums[1] += call.dense.double().square().sum()
        order = call.decision.order
        self.placed |= order.queries is not None or order.keys is not None
        self.obstacle, self.tokens = order.obstacle, call.query.shape[2]

    def error(self, path: str) -> float:
        missed, dense = self.sums.tolist()
        if not math.isfinite(missed + dense):
            raise ValueError(f"{path}: attention, dense or sparse, is not finite on these batches")
        return math.sqrt(missed / max(dense, torch.finfo(torch.float64).tiny))


@torch.no_grad()
def _measured(model: nn.Module, batches: Sequence[Arguments]) -> dict[str, _Measured]:
    found: dict[str, _Measured] = {}

    def observe(call: GatedCall) -> Tensor:
        found.setdefault(call.path, _Measured(call.dense.device)).add(call)
        return call.dense

    with kept_traces(model), gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
    device = next(model.parameters()).device
    sites = every_site(model, found, lambda path: _Measured(device))
    sum_tensors([site.sums for site in sites.values()])
    for site in sites.values():
        site.placed = total(float(site.placed)) > 0
    return sites


def _best(found: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """By module path, the order with the least squared error of all attentions of that module together.

    One that cannot have an order keeps the model's with it.
    """
    of_owner: dict[str, list[Mapping[str, float]]] = {}
    for path, errors in found.items():
        of_owner.setdefault(owner_path(path), []).append(errors)
    chosen = {}
    for site, together in of_owner.items():
        sums = {
            order: sum(errors.get(order, errors.get(RASTER, 0.0)) ** 2 for errors in together)
            for errors in together
            for order in errors
        }
        if sums:
            chosen[site] = min(sums, key=sums.__getitem__)
    return chosen


def _settle(
    model: nn.Module, batches: Sequence[Arguments], before: SLAConfig, chosen: Mapping[str, str]
) -> tuple[float, float]:
    """Prepare ``model`` with what was ``chosen``, or as it was; the squared errors of the output before and now."""
    overrides = {pattern: dict(fields) for pattern, fields in before.overrides.items()}
    for site, order in chosen.items():
        pattern = glob.escape(site)
        # It goes last and so wins: the other fields it has get the values that were in force.
        kept = {name: getattr(before.for_site(site), name) for name in overrides.pop(pattern, {})}
        overrides[pattern] = {**kept, "reorder": order}
    losses = []
    for config in (before, dataclasses.replace(before, overrides=overrides)):
        prepare(model, *batches[0], config=config)
        with kept_traces(model):
            output = OutputError(model, batches[:OUTPUT_BATCHES])
            losses.append(output.of(lambda call: call.output_with_gate(*call.gate.parameters())))
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"{type(model).__name__}: its output is not finite on the first batches")
    if losses[1] >= losses[0]:
        prepare(model, *batches[0], config=before)
        return losses[0], losses[0]
    return losses[0], losses[1]
