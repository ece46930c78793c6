"""What keeps ``calibrate`` from harm: a part of the batches is held back, and gates that hurt there are shrunk.

A fit knows the tokens it was made of, and too few of them leave a gate that is worse elsewhere than none. Held back is
every fourth batch, or the last of fewer; of a single batch the last items of each attention, of a single item its last
query tokens, which are much like the others and show little. The sums over both parts are kept apart:

1. At each site a fit without what is held back is tried whole, halved, quartered and (with a scale) with the scale
   alone, and that with the least attention error on what is held back is kept; or the gate as it was, if better.
2. Less error of single attentions need not be less of the output. So the model's output, its attentions computed as
   they are compiled, is compared with the dense one on up to four of the batches held back (a single one: on all of
   it). If it is worse than before, gates are taken up site by site, in the share that brings it nearest or not at all.
3. The gates that passed are fitted again to all batches, in the same shares, unless the output is then worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sla_compile.fitting.observer import Arguments, GatedCall
from sla_compile.fitting.output_error import OutputError
from sla_compile.fitting.shift_search import ShiftStatistics
from sla_compile.fitting.statistics import Statistics, statistics_of
from sla_compile.gate import Gate
from sla_compile.sharded import whole

__all__ = ["CHECKED_BATCHES", "FACTORS", "FittedSite", "SplitStatistics", "check_output", "split_batches"]

FACTORS = (1.0, 0.5, 0.25, 0.0)
"""Shares of the fitted weight and bias that are tried; a scale is fitted again for each."""
CHECKED_BATCHES = 4
"""How many of the batches held back, the first ones, the model's output is checked on."""

Values = tuple[Tensor, ...]
"""The parameters of a gate in their order there: weight, bias and any log_scale, or shift."""


def split_batches(stream: Iterator[Arguments], share: float) -> Iterator[tuple[Arguments, float]]:
    """Each batch with the share of it that is held back: 0 or 1, or ``share`` for a batch that is the only one.

    Every 1/share-th is held back; of fewer batches the last. One batch is read ahead.
    """
    batch, position = next(stream, None), 0
    while batch is not None:
        following = next(stream, None)
        held = math.floor((position + 1) * share) > math.floor(position * share)
        if share and following is None and position < 1 / share - 1:
            yield batch, 1.0 if position else share
        else:
            yield batch, float(held)
        batch, position = following, position + 1


class SplitStatistics:
    """The sums of one site, apart for the tokens that are ``fitted`` and those ``held`` back."""

    def __init__(self, gate: Gate, device: torch.device) -> None:
        self.fitted: Any = statistics_of(gate, device)
        self.held: Any = statistics_of(gate, device)

    def add(self, call: GatedCall, share: float) -> None:
        """Add ``call``: the last ``share`` of its items, of one item of its query tokens, to those held back."""
        if share in (0.0, 1.0):
            (self.held if share else self.fitted).add(call)
            return
        parts, (items, _, tokens, _) = self.fitted.parts(call), call.dense.shape
        if items > 1:
            cut = min(items - 1, items - math.floor(items * share))
            self.fitted.add_part(call, parts, slice(cut), 0, tokens)
            self.held.add_part(call, parts, slice(cut, None), 0, tokens)
        else:
            cut = tokens - math.floor(tokens * share)
            self.fitted.add_part(call, parts, slice(None), 0, cut)
            self.held.add_part(call, parts, slice(None), cut, tokens)
        self.fitted.calls += 1

    def sum_over_ranks(self) -> None:
        """Make these the sums over the tokens of all ranks that fit together."""
        self.fitted.sum_over_ranks()
        self.held.sum_over_ranks()


@dataclass
class FittedSite:
    """The gate of one site, fitted but not yet stored: twice, without what is held back and with everything."""

    path: str
    gate: Gate
    total: Statistics
    """Over all tokens."""
    old: Values
    trials: Mapping[float, Values]
    """By factor: fitted without the tokens held back."""
    finals: Mapping[float, Values]
    """By factor: fitted to all tokens."""
    factor: float | None
    """The share of the fit that is kept; None: the gate stays as it was."""
    reason: str
    refitted: bool = field(default=True)
    """Whether ``finals`` are to be stored, or ``trials``."""

    @classmethod
    def of(cls, path: str, split: SplitStatistics, ridge: float) -> FittedSite:
        """Fitted, and shrunk where that lowers the error on the tokens held back.

        Raises ValueError if the statistics are not finite, or the fit is beyond the range of the gate's dtype.
        """
        total = split.fitted.plus(split.held)
        gate, old = total.gate, tuple(whole(parameter.detach()) for parameter in total.gate.parameters())
        if not total.is_finite():
            raise ValueError(f"{path}: attention, or a branch of it, is not finite on these batches")
        finals = _shrunk(total, ridge, old)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in finals[1.0]):
            raise ValueError(f"{path}: the fitted gate is beyond the range of its dtype, {old[0].dtype}")
        one_part = split.fitted.is_empty or split.held.is_empty
        trials = finals if one_part else _shrunk(split.fitted, ridge, old)
        site = cls(path, gate, total, old, trials, finals, 1.0, "")
        if one_part:
            if total.error(*finals[1.0]) >= total.error(*old):
                site.leave("the fit is no better on these batches")
            return site
        errors = {factor: _finite(split.held.error(*values)) for factor, values in trials.items()}
        before, best = split.held.error(*old), min(errors, key=errors.__getitem__)
        if errors[best] >= before or total.error(*finals[best]) >= total.error(*old):
            site.leave(f"attention error on what was held back {before:.4f} -> {errors[1.0]:.4f} with the fit")
        elif best < 1:
            change = f"{before:.4f} -> {errors[best]:.4f}, with the whole fit {errors[1.0]:.4f}"
            site.factor, site.reason = best, f"attention error on what was held back {change}"
        return site

    def leave(self, reason: str) -> None:
        """Keep the gate as it was."""
        self.factor, self.reason = None, reason

    @property
    def trial(self) -> Values:
        """The gate at its factor, fitted without what is held back."""
        return self.old if self.factor is None else self.trials[self.factor]

    @property
    def values(self) -> Values:
        """The gate that is to be stored."""
        return self.finals[self.factor] if self.refitted and self.factor is not None else self.trial


def _shrunk(statistics: Statistics, ridge: float, old: Values) -> dict[float, Values]:
    """By factor, the gate between ``old`` (0) and the best one (1); without a scale 0 is ``old`` and left out.

    Of shifts the best alone: between two of them is no error that was measured.
    """
    if isinstance(statistics, ShiftStatistics):
        return {1.0: (statistics.solve().to(old[0]),)}
    weight, bias, *log_scale = statistics.solve(ridge)
    if statistics.gate.config.linear == "none":  # the op does not read the weight
        weight = old[0].double()
    found: dict[float, Values] = {}
    for factor in FACTORS:
        if factor == 1:
            values: Values = (weight, bias, *log_scale)
        elif factor == 0 and not log_scale:
            continue
        else:
            values = old[0] + factor * (weight - old[0]), old[1] + factor * (bias - old[1])
            values += (statistics.best_log_scale(*values),) if log_scale else ()
        found[factor] = tuple(value.to(own) for value, own in zip(values, old, strict=True))
    return found


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf


def check_output(
    model: nn.Module, sites: Sequence[FittedSite], batches: Sequence[Arguments]
) -> tuple[float, float] | None:
    """Shrink, or leave, gates until the output of ``model`` is no further from the dense one on ``batches``.

    Judged are the gates fitted without what is held back. If these pass but the same fitted to everything do not, they
    are what is stored. Returns ||output - dense output|| / ||dense output|| with the gates as they were and as judged;
    None where the dense output has no floating-point tensors, or is not finite.
    """
    error = OutputError(model, batches)
    if not error.is_defined:
        return None

    def loss(values: Callable[[FittedSite], Values]) -> float:
        gate = {site.path: values(site) for site in sites}
        return _finite(error.of(lambda call: call.output_with_gate(*gate[call.path])))

    before = loss(lambda site: site.old)
    after = loss(lambda site: site.trial)
    if after > before:
        after = _keep_what_helps(sites, before, lambda: loss(lambda site: site.trial))
    if loss(lambda site: site.values) > before:
        for site in sites:
            site.refitted = False
    return math.sqrt(before), math.sqrt(after)


def _keep_what_helps(sites: Iterable[FittedSite], before: float, loss: Callable[[], float]) -> float:
    """From all gates as they were, take each site's in turn, whole or shrunk further, if the output is no worse so.

    ``before`` is the loss of the gates as they were, ``loss`` that of the gates as they are. Returns the final loss.
    """
    fitted = [(site, site.factor, site.reason) for site in sites if site.factor is not None]
    for site, _, _ in fitted:
        site.leave("the model's output is further off with it")
    best = before
    for site, wanted, reason in fitted:
        kept: float | None = None
        for factor in (own for own in site.trials if own <= wanted):
            site.factor = factor
            if (found := loss()) < best or (found == best and kept is None):
                best, kept = found, factor
        site.factor = kept
        if kept is not None:
            site.reason = reason if kept == wanted else "the model's output is nearer than with more of it"
    return best
