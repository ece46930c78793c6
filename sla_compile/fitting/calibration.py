"""``calibrate``: gates in closed form, from the attention of a few batches; no training.

The regression behind it is in ``regression``. Here the model is run, the gates are set and the errors reported.
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
from sla_compile.fitting.observer import (
    Arguments,
    GatedCall,
    gated_calls,
    no_gated_call_message,
    peek_first,
    prepared_or_rolled_back,
)
from sla_compile.fitting.regression import SiteStatistics
from sla_compile.gate import gates

__all__ = ["CalibrationReport", "SiteError", "calibrate", "gather", "mean_error", "sites_dict"]


@dataclass(frozen=True)
class SiteError:
    """Relative attention error ||O - dense|| / ||dense|| at one site, over all tokens of the batches."""

    path: str
    """Module path of the gate, for example ``"blocks.0.attn1.sla"``."""
    sparse_only: float
    """With a gate of zero."""
    before: float
    """With the gate as it was."""
    after: float
    """With the gate as it is now."""
    calls: int
    """How often the attention was called."""

    @property
    def closed(self) -> float:
        """The share of the sparse branch's error that the gate removes now."""
        return 1 - self.after / self.sparse_only if self.sparse_only > 0 else 0.0


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
    sites: tuple[SiteError, ...]
    """In the order in which a forward calls them."""
    unreached: tuple[str, ...] = ()
    """Gates whose attention no batch reached; they are as they were."""

    @property
    def title(self) -> str:
        """One line: what was measured on what."""
        order = "layer after layer" if self.sequential else "all layers at once"
        return f"{self.model}: {len(self.sites)} attention(s) calibrated on {self.batches} batch(es), {order}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields, for each site its ``closed`` too, and means over the sites."""
        return {**dataclasses.asdict(self), **sites_dict(self.sites), "unreached": list(self.unreached)}

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> Any:
        from sla_compile.reporting.fit_tables import ErrorsView

        return ErrorsView(self.title, self.sites, self.unreached)

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
) -> CalibrationReport:
    """Set every gate of ``model`` to the least-squares fit of what its sparse branch misses; no training.

    The model runs eagerly and dense, in the mode (train or eval) it is in, and at each attention that has a gate sums
    of products of O^l and dense - O^s are gathered: about 2 D^2 numbers per site (per head for per-head gates), never
    N x N. With ``sparse_scale`` the scales are fitted too, from H (D + 1) D numbers more. All gates change together,
    at the end; an exception before leaves the model, its hooks and its gates as they were. A gate that the fit would
    not improve on these batches stays as it is.

    By default all layers are fitted in one pass, each on the inputs it has in the dense model. With
    ``sequential`` a layer is fitted on what it gets from the layers calibrated before it, at one pass over the
    batches per layer, which are then held in memory. Prefer the default: on the small video model of
    ``examples/`` the two differed by 1% in the output's error, either way, and by a factor of layers in time.

    The fit knows the batches only. Tokens of one video are much alike, so use many batches, more for per-head
    gates. An attention written out by hand, or inside ``nn.MultiheadAttention``, is not seen: it is listed as
    ``unreached``.

    Args:
        model: any module, prepared, compiled, or neither; without gates it is prepared with the first batch.
        batches: an iterable of tuples of positional, or mappings of keyword, arguments of the model, on its
            device.
        config: settings for ``prepare``; by default those the model has been prepared with.
        ridge: penalty of the weight in units of the mean variance of O^l; at least 0. The bias has none.
        max_batches: how many batches to use at most; None: all of them.
        sequential: fit layer after layer.

    Raises:
        TypeError: ``model`` is no module, or a batch is neither a tuple nor a mapping.
        ValueError: no batch, no attention with a gate was reached, numbers that are not finite, or a setting
            is refused.
    """
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge: got {ridge}; accepted: a finite number of at least 0")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: got {max_batches}; accepted: an integer of at least 1, or None")
    model = unwrapped(model)
    first, stream = peek_first(batches, max_batches)
    with prepared_or_rolled_back(model, first, config):
        fit = _fit_sequentially if sequential else _fit_at_once
        count, fits = fit(model, stream, ridge)
        if not fits:
            raise ValueError(no_gated_call_message(model, first))
        sites = tuple(fitted.site_error() for fitted in fits.values())
        with torch.no_grad():
            for fitted in fits.values():
                for parameter, value in zip(fitted.statistics.gate.parameters(), fitted.values, strict=True):
                    parameter.copy_(value)
    unreached = tuple(path for path in gates(model) if path not in fits)
    return CalibrationReport(type(model).__name__, count, sequential, ridge, sites, unreached)


@dataclass(frozen=True)
class _FittedGate:
    """Values for the parameters of one gate, fitted but not yet stored in it."""

    path: str
    statistics: SiteStatistics
    values: tuple[Tensor, ...]
    """One for each of ``gate.parameters()``, in its dtype: fitted, or the old ones if those have a lower error."""

    @classmethod
    def of(cls, path: str, statistics: SiteStatistics, ridge: float) -> _FittedGate:
        """Raises ValueError if the statistics are not finite, or the fit is beyond the range of the gate's dtype."""
        gate = statistics.gate
        old = tuple(parameter.detach() for parameter in gate.parameters())
        if not statistics.is_finite():
            raise ValueError(f"{path}: attention, or a branch of it, is not finite on these batches")
        new = tuple(value.to(own) for value, own in zip(statistics.solve(ridge), old, strict=True))
        if gate.config.linear == "none":  # the op does not read the weight
            new = old[0], *new[1:]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in new):
            raise ValueError(f"{path}: the fitted gate is beyond the range of its dtype, {old[0].dtype}")
        return cls(path, statistics, new if statistics.error(*new) < statistics.error(*old) else old)

    def site_error(self) -> SiteError:
        """The errors with a gate of zero, the gate as it is, and the fitted one."""
        gate, statistics = self.statistics.gate, self.statistics
        return SiteError(
            path=self.path,
            sparse_only=statistics.sparse_only_error(),
            before=statistics.error(*gate.parameters()),
            after=statistics.error(*self.values),
            calls=statistics.calls,
        )


@torch.no_grad()
def gather(model: nn.Module, batches: Iterable[Arguments]) -> tuple[int, dict[str, SiteStatistics]]:
    """How many batches there were; and, by gate path, the statistics of each gated attention in the dense model."""
    sites: dict[str, SiteStatistics] = {}

    def observe(call: GatedCall) -> Tensor:
        if call.path not in sites:
            sites[call.path] = SiteStatistics(call.gate, call.dense.device)
        sites[call.path].add(call)
        return call.dense

    count = 0
    with gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
            count += 1
    return count, sites


def _fit_at_once(model: nn.Module, batches: Iterator[Arguments], ridge: float) -> tuple[int, dict[str, _FittedGate]]:
    count, sites = gather(model, batches)
    return count, {path: _FittedGate.of(path, statistics, ridge) for path, statistics in sites.items()}


@torch.no_grad()
def _fit_sequentially(
    model: nn.Module, batches: Iterator[Arguments], ridge: float
) -> tuple[int, dict[str, _FittedGate]]:
    kept = list(batches)
    fits: dict[str, _FittedGate] = {}
    while found := _first_unfitted(model, kept, fits):
        fits.update({path: _FittedGate.of(path, statistics, ridge) for path, statistics in found.items()})
    return len(kept), fits


def _first_unfitted(
    model: nn.Module, batches: Iterable[Arguments], fits: Mapping[str, _FittedGate]
) -> dict[str, SiteStatistics]:
    """By path, the statistics of the first site not among ``fits``, while those run sparse with their fitted gates."""
    found: dict[str, SiteStatistics] = {}

    def observe(call: GatedCall) -> Tensor:
        if call.path in fits:
            return call.output_with_gate(*fits[call.path].values)
        if not found:
            found[call.path] = SiteStatistics(call.gate, call.dense.device)
        if call.path in found:
            found[call.path].add(call)
        return call.dense

    with gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
    return found
