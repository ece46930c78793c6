"""``calibrate``: gates in closed form, from the attention of a few batches; no training.

The regression behind it is in ``regression``, what keeps it from harm in ``held_back``. Here the model is run, the
gates are set and the errors reported.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sla_compile.compiler.preparation import unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.held_back import CHECKED_BATCHES, FittedSite, SplitStatistics, check_output, split_batches
from sla_compile.fitting.observer import (
    Arguments,
    GatedCall,
    gated_calls,
    no_gated_call_message,
    peek_first,
    prepared_or_rolled_back,
)
from sla_compile.fitting.ranks import every_site, from_first_rank, over_ranks, total
from sla_compile.fitting.statistics import statistics_of
from sla_compile.fitting.traced_calls import kept_traces
from sla_compile.gate import gates
from sla_compile.sharded import fill, reshard

__all__ = ["CalibratedSite", "CalibrationReport", "SiteError", "calibrate", "gather", "mean_error", "sites_dict"]


@dataclass(frozen=True)
class SiteError:
    """Relative attention error ||O - dense|| / ||dense|| at one site, over all tokens of the batches."""

    path: str
    """Module path of the gate, for example ``"blocks.0.attn1.sla"``."""
    sparse_only: float
    """With a gate of zero: the sparse branch alone, but for ``linear="taylor"``, which has virtual keys then too."""
    before: float
    """With the gate as it was."""
    after: float
    """With the gate as it is now."""
    calls: int
    """How often the attention was called."""

    @property
    def closed(self) -> float:
        """The share of the error with a gate of zero that the gate removes now."""
        return 1 - self.after / self.sparse_only if self.sparse_only > 0 else 0.0


@dataclass(frozen=True)
class CalibratedSite(SiteError):
    """The errors at one site, and how much of its fit was kept."""

    factor: float | None
    """Share of the fitted weight and bias that was kept; 0: of a scale alone; None: the gate is as it was."""
    reason: str
    """Why not the whole fit; empty where it is."""


def mean_error(sites: Iterable[SiteError], name: str) -> float:
    """Mean over ``sites`` of ``sparse_only``, ``before``, ``after`` or ``closed``."""
    values: list[float] = [getattr(site, name) for site in sites]
    return sum(values) / len(values)


@dataclass(frozen=True, repr=False)
class CalibrationReport:
    """What calibration did to each site's attention error; prints as a table, ``to_dict`` for tools."""

    model: str
    """Class of the model."""
    batches: int
    sequential: bool
    ridge: float
    sites: tuple[CalibratedSite, ...]
    """In the order in which a forward calls them."""
    unreached: tuple[str, ...] = ()
    """Gates whose attention no batch reached; they are as they were."""
    held_back: float = 0.0
    """How many batches were held back; below 1: that share of the items, or tokens, of the only one; 0: none."""
    output_before: float | None = None
    """||output - dense output|| / ||dense output|| before, on up to four batches held back; None: not measured."""
    output_after: float | None = None
    """The same with the shares kept of gates that were fitted without what is held back: never more."""

    @property
    def title(self) -> str:
        """One line: what was measured on what."""
        order = "layer after layer" if self.sequential else "all layers at once"
        line = f"{self.model}: {len(self.sites)} attention(s) calibrated on {self.batches} batch(es), {order}"
        if not self.held_back:
            return f"{line}, nothing held back"
        part = f"{self.held_back:.0f} batch(es)" if self.held_back >= 1 else f"{100 * self.held_back:.3g}% of the batch"
        if self.output_before is None or self.output_after is None:
            return f"{line}, {part} held back"
        return f"{line}, output error {self.output_before:.4f} -> {self.output_after:.4f} with {part} held back"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields, for each site its ``closed`` too, and means over the sites."""
        return {**dataclasses.asdict(self), **sites_dict(self.sites), "unreached": list(self.unreached)}

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> Any:
        from sla_compile.reporting.fit_tables import CalibrationView

        return CalibrationView(self.title, self.sites, self.unreached)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import plain_text

        return plain_text(self.__rich__(), width=100)

    def __repr__(self) -> str:
        before, after = mean_error(self.sites, "before"), mean_error(self.sites, "after")
        return f"<CalibrationReport of {self.model}: mean attention error {before:.3g} -> {after:.3g}>"


def sites_dict(sites: Iterable[SiteError]) -> dict[str, Any]:
    """The entries ``sites`` and ``mean`` of a report's dictionary."""
    sites = list(sites)
    return {
        "sites": [{**dataclasses.asdict(site), "closed": site.closed} for site in sites],
        "mean": {name: mean_error(sites, name) for name in ("sparse_only", "before", "after", "closed")},
    }


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    config: SLAConfig | Mapping[str, Any] | None = None,
    ridge: float = 1e-2,
    max_batches: int | None = None,
    sequential: bool = False,
    held_back: float = 0.25,
    group: Any = None,
) -> CalibrationReport:
    """Set every gate of ``model`` to what brings its attention nearest to dense; no training.

    The model runs eagerly and dense, in the mode (train or eval) it is in, and at each attention that has a gate sums
    of products of O^l and dense - O^s are gathered: about 2 D^2 numbers per site (per head for per-head gates), never
    N x N. With ``linear="taylor"`` attention is computed at nine shifts instead, and each head gets the best. With
    ``sparse_scale`` the scales are fitted too, from H (D + 1) D numbers more. All gates change together, at the end; an
    exception before leaves the model, its hooks and its gates as they were.

    A part of the batches is held back: every fourth, the last of fewer, or the last quarter of a single one. On it each
    gate is shrunk, or left as it was, until neither its attention nor the model's output is worse than before (see
    ``fitting.held_back``). This costs twice the sums, four forwards on up to four batches, and up to four more for each
    attention if the output was worse. Inputs unlike all batches may still be worse: use many, more for per-head gates.

    By default all layers are fitted in one pass, each on the inputs it has in the dense model. With
    ``sequential`` a layer is fitted on what it gets from the layers calibrated before it, at one pass over the
    batches per layer, which are then held in memory. Prefer the default: on the small video model of
    ``examples/`` the two differed by 1% in the output's error, either way, and by a factor of layers in time.

    Args:
        model: any module, prepared, compiled, or neither; without gates it is prepared with the first batch.
        batches: an iterable of tuples of positional, or mappings of keyword, arguments of the model; or one such batch.
        config: settings for ``prepare``, with a first batch that reaches all gates; None: those it was prepared with.
        ridge: penalty of the weight in units of the mean variance of O^l; at least 0. The bias has none.
        max_batches: how many batches to use at most; None: all of them.
        sequential: fit layer after layer.
        held_back: share of the batches to judge the gates on; 0: none, gates are stored as fitted to all batches.
        group: ranks with batches of their own, all to get the same gates; by default those of DDP or FSDP2.

    Raises:
        TypeError: ``model`` is no module, ``group`` no group, or a batch is neither a tuple nor a mapping.
        ValueError: no batch, no attention with a gate was reached, a number not finite, or a refused setting.
    """
    _check_arguments(ridge, held_back)
    model = unwrapped(model)
    first, stream = peek_first(batches, max_batches)
    with over_ranks(model, group) as model, prepared_or_rolled_back(model, first, config), kept_traces(model):
        split = _HeldBack(stream, held_back)
        fits = (_fit_sequentially if sequential else _fit_at_once)(model, split, ridge)
        if not fits:
            raise ValueError(no_gated_call_message(model, first))
        output = check_output(model, fits, split.checked) if total(len(split.checked)) else None
        sites = tuple(_site(fitted) for fitted in fits)
        split.sum_over_ranks()
        reshard(model)  # what the check of the output gathered would be thrown away
        for fitted in fits:
            for parameter, value in zip(fitted.gate.parameters(), fitted.values, strict=True):
                fill(parameter, from_first_rank(value))
    return _report(model, split, sequential, ridge, sites, output or (None, None))


def _check_arguments(ridge: float, held_back: float) -> None:
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge: got {ridge}; accepted: a finite number of at least 0")
    if not 0 <= held_back < 1:
        raise ValueError(f"held_back: got {held_back}; accepted: a share of at least 0 and below 1")


def _report(
    model: nn.Module,
    split: _HeldBack,
    sequential: bool,
    ridge: float,
    sites: tuple[CalibratedSite, ...],
    output: tuple[float | None, float | None],
) -> CalibrationReport:
    """``output``: errors of the model's output before and after."""
    reached = {site.path for site in sites}
    unreached = tuple(path for path in gates(model) if path not in reached)
    return CalibrationReport(
        type(model).__name__, split.count, sequential, ridge, sites, unreached, split.held, *output
    )


@torch.no_grad()
def gather(model: nn.Module, batches: Iterable[Arguments]) -> tuple[int, dict[str, Any]]:
    """How many batches there were; and, by gate path, the `Statistics` of each gated attention in the dense model."""
    sites: dict[str, Any] = {}

    def observe(call: GatedCall) -> Tensor:
        if call.path not in sites:
            sites[call.path] = statistics_of(call.gate, call.dense.device)
        sites[call.path].add(call)
        return call.dense

    count = 0
    with gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
            count += 1
    reshard(model)
    sites = every_site(model, sites, lambda path: statistics_of(gates(model)[path], _device(model)))
    for statistics in sites.values():
        statistics.sum_over_ranks()
    return count, sites


@torch.no_grad()
def _fit_at_once(model: nn.Module, batches: _HeldBack, ridge: float) -> list[FittedSite]:
    found: dict[str, SplitStatistics] = {}

    def observe(call: GatedCall) -> Tensor:
        if call.path not in found:
            found[call.path] = SplitStatistics(call.gate, call.dense.device)
        found[call.path].add(call, batches.share)
        return call.dense

    with gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
    return [FittedSite.of(path, split, ridge) for path, split in _of_all_ranks(model, found).items()]


@torch.no_grad()
def _fit_sequentially(model: nn.Module, batches: _HeldBack, ridge: float) -> list[FittedSite]:
    kept = [(batch, batches.share) for batch in batches]
    fits: dict[str, FittedSite] = {}
    while found := _first_unfitted(model, kept, fits):
        fits.update({path: FittedSite.of(path, split, ridge) for path, split in found.items()})
    return list(fits.values())


def _first_unfitted(
    model: nn.Module, batches: Iterable[tuple[Arguments, float]], fits: Mapping[str, FittedSite]
) -> dict[str, SplitStatistics]:
    """By path, the statistics of the first site not among ``fits``, while those run sparse with their fitted gates."""
    found: dict[str, SplitStatistics] = {}
    share = 0.0

    def observe(call: GatedCall) -> Tensor:
        if call.path in fits:
            return call.output_with_gate(*fits[call.path].values)
        if not found:
            found[call.path] = SplitStatistics(call.gate, call.dense.device)
        if call.path in found:
            found[call.path].add(call, share)
        return call.dense

    with gated_calls(model, observe):
        for (args, kwargs), share in batches:  # noqa: B007  read by observe
            model(*args, **kwargs)
    return _of_all_ranks(model, found)


def _of_all_ranks(model: nn.Module, found: Mapping[str, SplitStatistics]) -> dict[str, SplitStatistics]:
    reshard(model)
    sites = every_site(model, found, lambda path: SplitStatistics(gates(model)[path], _device(model)))
    for split in sites.values():
        split.sum_over_ranks()
    return sites


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class _HeldBack:
    """The batches, once; with the share of each that is held back, and the first that are, for the output's check."""

    def __init__(self, stream: Iterator[Arguments], share: float) -> None:
        self.stream = split_batches(stream, share)
        self.count, self.held = 0, 0.0
        self.share = 0.0
        """Of the current batch."""
        self.checked: list[Arguments] = []

    def __iter__(self) -> Iterator[Arguments]:
        for batch, share in self.stream:
            self.share = share
            if share and len(self.checked) < CHECKED_BATCHES:
                self.checked.append(batch)
            yield batch
            self.count, self.held = self.count + 1, self.held + share

    def sum_over_ranks(self) -> None:
        """Count the batches of all ranks that fit together; a share of a rank's only batch stays one."""
        self.count = int(total(self.count))
        self.held = self.held if 0 < self.held < 1 else total(self.held)


def _site(fitted: FittedSite) -> CalibratedSite:
    """The errors over all tokens with a gate of zero, the gate as it is, and the fitted one."""
    total = fitted.total
    return CalibratedSite(
        path=fitted.path,
        sparse_only=total.sparse_only_error(),
        before=total.error(*fitted.old),
        after=total.error(*fitted.values),
        calls=total.calls,
        factor=fitted.factor,
        reason=fitted.reason,
    )
