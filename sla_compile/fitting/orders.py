"""``choose_orders``: the order of a video's tokens with which each attention is nearest to dense, from data.

Which tokens share a block decides how well a block's mean stands for it. One attention looks along time, the next
within a frame, and its heads too: so each order is tried in turn, the error of each attention measured, and at last
each attention, or each of its heads, gets the order with which it had the least.
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

from sla_compile.common.limits import TOPK_OWNERS
from sla_compile.common.token_orders import RASTER
from sla_compile.compat import fully_sharded
from sla_compile.compiler.preparation import prepare, unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.allocation import OUTPUT_BATCHES
from sla_compile.fitting.observer import (
    Arguments,
    GatedCall,
    gated_calls,
    peek_first,
    prepared_or_rolled_back,
)
from sla_compile.fitting.order_errors import Errors, Measured, best_orders, measure
from sla_compile.fitting.output_error import OutputError
from sla_compile.fitting.ranks import over_ranks, total
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
    """As ``SLAConfig.reorder`` has it: with one for each head, they are joined by commas."""
    errors: Mapping[str, float]
    """Of every order that was tried and could be had; and with one for each head, of these."""

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
    by: str = "site",
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
        orders: what to try, values of ``reorder``, each for all heads.
        by: what gets an order of its own: "site", or each "head" of a site. With one for each head an attention is
            nearer to dense, and its queries, keys, values and output take a pass over memory each that an order of
            the whole site mostly does not; a site that cannot have it (grouped heads, a mask) gets one for all.
        config: settings for ``prepare``; by default those the model has been prepared with.
        max_batches: how many batches to use at most; None: all of them.
        group: ranks with batches of their own, all to get the same orders; by default those of DDP.

    Raises:
        TypeError: ``model`` is no module, ``group`` no group, or a batch is neither a tuple nor a mapping.
        ValueError: a refused setting or argument, no batch, a gate that the first does not reach, no attention whose
            tokens are a grid that is known, gates in ``fully_shard``, or numbers that are not finite. The model is then
            as it was.
    """
    _check_orders(orders)
    if by not in TOPK_OWNERS:
        raise ValueError(f"by: got {by!r}; accepted: one of {', '.join(map(repr, TOPK_OWNERS))}")
    model = unwrapped(model)
    first, stream = peek_first(batches, max_batches)
    kept = list(stream)
    _refuse_sharded(model)
    with over_ranks(model, group) as model, prepared_or_rolled_back(model, first, config, again=True):
        before = model_config(model)
        assert before is not None  # a gate has one
        had = {path: gate.config.reorder for path, gate in gates(model).items()}
        with kept_traces(model):
            output = OutputError(model, kept[:OUTPUT_BATCHES])
            was = _error_of(output)
        try:
            found = _try(model, kept, orders, before)
            now = _settle(output, was, before, found, by)
        except BaseException:
            prepare(model, *first, config=before)
            raise
        return _report(model, int(total(len(kept))), tuple(orders), (was, now), found, had)


def _check_orders(orders: Sequence[str]) -> None:
    if isinstance(orders, str) or not orders:
        raise ValueError(f"orders: got {orders!r}; accepted: a sequence of values of reorder, at least one")
    for order in orders:
        if "," in SLAConfig.check_value("reorder", order):
            raise ValueError(f"orders: got {order!r}; accepted: orders for all heads; by='head' finds one for each")


def _report(
    model: nn.Module,
    batches: int,
    orders: tuple[str, ...],
    losses: tuple[float, float],
    found: Mapping[str, Errors],
    had: Mapping[str, str],
) -> OrderReport:
    now = {path: gate.config.reorder for path, gate in gates(model).items()}
    return OrderReport(
        model=type(model).__name__,
        batches=batches,
        orders=orders,
        output_before=math.sqrt(losses[0]),
        output=math.sqrt(losses[1]),
        sites=tuple(SiteOrder(path, had[path], now[path], site.told(now[path])) for path, site in found.items()),
    )


def _refuse_sharded(model: nn.Module) -> None:
    """Raise ValueError where ``model`` cannot be prepared again."""
    for path, gate in gates(model).items():
        if fully_sharded(gate):
            raise ValueError(
                f"{path}: got a gate in fully_shard, which cannot be prepared again; accepted: choose_orders before "
                f"fully_shard"
            )


def _try(model: nn.Module, batches: Sequence[Arguments], orders: Sequence[str], before: SLAConfig) -> dict[str, Errors]:
    """For each gate that was reached its errors with each of ``orders`` that it can have; changes the settings.

    Raises ValueError where no attention can have another order than the model's, and for numbers that are not finite.
    """
    found: dict[str, Errors] = {}
    obstacles: dict[str, Measured] = {}
    others = {
        pattern: {name: value for name, value in fields.items() if name != "reorder"}
        for pattern, fields in before.overrides.items()
    }
    # one trace for all: with an order that is not the model's it notes the grids, which each of them goes by
    noting = next((order for order in orders if order != RASTER), RASTER)
    everywhere = dataclasses.replace(before, reorder=noting, overrides={p: f for p, f in others.items() if f})
    prepare(model, *batches[0], config=everywhere)
    for order in orders:
        for gate in gates(model).values():
            of_order = dataclasses.replace(gate.config, reorder=order)
            gate.apply_settings(dataclasses.replace(gate.spec(), config=of_order))
        for path, measured in measure(model, batches).items():
            missed, dense = measured.finite(path)
            errors = found.setdefault(path, Errors({}, sum(dense)))
            if order == RASTER or measured.placed:
                errors.missed[order] = missed
            else:
                obstacles[path] = measured
    if found and len(obstacles) == len(found):
        path = max(obstacles, key=lambda path: obstacles[path].tokens)
        raise ValueError(
            f"{path}: of {len(obstacles)} attention(s) none can have another order than the model's own; of this one "
            f"{obstacles[path].obstacle}. Those after a graph break were not reached: see explain"
        )
    return found


def _with_orders(before: SLAConfig, chosen: Mapping[str, str]) -> SLAConfig:
    """The settings ``before`` with an override for each module of ``chosen``."""
    overrides = {pattern: dict(fields) for pattern, fields in before.overrides.items()}
    for site, order in chosen.items():
        pattern = glob.escape(site)
        # It goes last and so wins: the other fields it has get the values that were in force.
        kept = {name: getattr(before.for_site(site), name) for name in overrides.pop(pattern, {})}
        overrides[pattern] = {**kept, "reorder": order}
    return dataclasses.replace(before, overrides=overrides)


@torch.no_grad()
def _in_the_models_order(model: nn.Module, first: Arguments) -> set[str]:
    """The modules with an attention that cannot have the order of its settings, on any rank."""
    kept = dict.fromkeys((owner_path(path) for path in gates(model)), False)

    def observe(call: GatedCall) -> Tensor:
        kept[owner_path(call.path)] |= bool(call.decision.order.obstacle)
        return call.dense

    args, kwargs = first
    with kept_traces(model), gated_calls(model, observe):
        model(*args, **kwargs)
    return {site for site, found in kept.items() if total(float(found))}


def _error_of(output: OutputError) -> float:
    """The squared error of the model's output with what its gates are set to."""
    return output.of(lambda call: call.output_with_gate(*call.gate.parameters()))


def _settle(output: OutputError, was: float, before: SLAConfig, found: Mapping[str, Errors], by: str) -> float:
    """Prepare the model with the best of what was ``found``, or as ``before`` where the squared error of its output,
    ``was``, gets no less; that error then.
    """
    model, first = output.model, output.batches[0]
    chosen = best_orders(found, by)
    prepare(model, *first, config=_with_orders(before, chosen))
    of_sites = best_orders(found)
    if by == "head" and chosen != of_sites:
        kept = _in_the_models_order(model, first)
        allowed = {site: of_sites[site] if "," in order and site in kept else order for site, order in chosen.items()}
        if allowed != chosen:
            prepare(model, *first, config=_with_orders(before, allowed))
    now = _error_of(output)
    if not (math.isfinite(was) and math.isfinite(now)):
        raise ValueError(f"{type(model).__name__}: its output is not finite on the first batches")
    if now >= was:
        prepare(model, *first, config=before)
    return min(was, now)
