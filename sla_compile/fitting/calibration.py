"""``calibrate``: gates in closed form, from the attention of a few batches; no training.

At a site, the best gate solves a linear regression: with R = dense output - O^s and X = [O^l, 1] it minimises
||R - X [W^T; b]||^2 over all tokens. Its sums X^T X and X^T R are small, (D + 1) x (D + 1) and (D + 1) x D, and
are gathered in one streaming pass in float64; the error of *any* gate on the same batches follows from them.

Where the gate also scales O^s, by s_h in each head h, R - (s_h - 1) O^s stands for R. The best W and b are linear in
the s_h - 1, so with those eliminated the H numbers solve a system of their own; it needs X^T O^s of each head too.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sla_compile.compiler.preparation import unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.observer import Arguments, GatedCall, first_of, gated_calls, nothing_gated, prepared_for
from sla_compile.gate import Gate, gates

__all__ = ["CalibrationReport", "SiteError", "SiteStatistics", "calibrate", "gather", "mean_error"]

_TOKENS_PER_CHUNK = 2048
LEAST_SCALE = 0.01
"""Of a sparse branch: W and b are divided by it."""


class SiteStatistics:
    """Sums for the regression at one site, float64, over G groups: 1, or the H heads of a per-head gate.

    ``gram`` (G, D + 1, D + 1) is X^T X, ``cross`` (G, D + 1, D) is X^T R, ``residual`` and ``dense`` the squared
    norms of R and of the dense output. For a gate with a scale there are also, of each head, ``mixed``
    (H, D + 1, D), X^T O^s, ``sparse`` (H), the squared norm of O^s, and ``missed`` (H), its product with R.
    """

    def __init__(self, gate: Gate, device: torch.device) -> None:
        self.gate = gate
        self.groups = gate.heads if gate.weight.dim() == 3 else 1
        dim = gate.head_dim
        self.gram = torch.zeros(self.groups, dim + 1, dim + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(self.groups, dim + 1, dim, dtype=torch.float64, device=device)
        self.residual = torch.zeros((), dtype=torch.float64, device=device)
        self.dense = torch.zeros((), dtype=torch.float64, device=device)
        heads = 0 if gate.log_scale is None else gate.heads
        self.mixed = self.cross.new_zeros(heads, dim + 1, dim)
        self.sparse, self.missed = self.cross.new_zeros(2, heads)
        self.calls = 0

    @torch.no_grad()
    def add(self, call: GatedCall) -> None:
        """Add every token of ``call``, a chunk at a time."""
        sparse, linear = call.branches()
        for start in range(0, sparse.shape[2], _TOKENS_PER_CHUNK):
            rows = slice(start, start + _TOKENS_PER_CHUNK)
            dense, o_s = self._rows(call.dense[:, :, rows]), self._rows(sparse[:, :, rows])
            o_l = torch.zeros_like(o_s) if linear is None else self._rows(linear[:, :, rows])
            x, r = F.pad(o_l, (0, 1), value=1.0), dense - o_s
            self.gram += x.mT @ x
            self.cross += x.mT @ r
            self.residual += r.square().sum()
            self.dense += dense.square().sum()
            if self.gate.log_scale is not None:
                x, r, o_s = (part.reshape(self.gate.heads, -1, part.shape[-1]) for part in (x, r, o_s))
                self.mixed += x.mT @ o_s
                self.sparse += o_s.square().sum((1, 2))
                self.missed += (o_s * r).sum((1, 2))
        self.calls += 1

    def _rows(self, x: Tensor) -> Tensor:
        """x (B, H, n, D) as (G, rows, D) in float64."""
        return x.to(torch.float64).transpose(0, 1).reshape(self.groups, -1, x.shape[3])

    def finite(self) -> bool:
        """Whether every sum is; waits for the device."""
        sums = (self.gram, self.cross, self.residual, self.dense, self.mixed, self.sparse, self.missed)
        return all(bool(torch.isfinite(total).all()) for total in sums)

    def solve(self, ridge: float) -> tuple[Tensor, ...]:
        """The regression's weight and bias, and log_scale where the gate has one, float64, shaped as the gate's.

        Minimises ||R - O^l W^T - b||^2 + ridge * v * ||W||^2, with v the summed squares of O^l about its mean,
        averaged over the D columns. Directions in which O^l does not vary get weight 0, and an O^s that W and b can
        give as well a scale of 1.
        """
        gate, dim = self.gate, self.gate.head_dim
        best, scale = self._regressed(self.cross, ridge), []
        if gate.log_scale is not None:
            lost = self._regressed(self.mixed, ridge)  # what W and b lose as the scale of each head grows by 1
            alike = torch.einsum("kij,hij->hk", lost, self.mixed)
            if self.groups > 1:  # each head loses of its own W and b
                alike = alike.diagonal().diag()
            wanted = self.missed - (best * self.mixed).sum((1, 2))
            more = _solved_above(LEAST_SCALE - 1, self.sparse.diag() - alike, wanted, self.sparse)
            loss = more[:, None, None] * lost
            best, scale = best - (loss if self.groups > 1 else loss.sum(0, keepdim=True)), [more.log1p()]
        weight, bias = best[:, :dim].mT, best[:, dim]
        return weight.reshape(gate.weight.shape), bias.reshape(gate.bias.shape), *scale

    def _regressed(self, cross: Tensor, ridge: float) -> Tensor:
        """[W^T; b] (G, D + 1, D) of the regression of what has ``cross`` as its sums X^T R; linear in those."""
        dim = self.gate.head_dim
        rows = self.gram[:, dim:, dim:]
        mean_x, mean_r = self.gram[:, dim:, :dim] / rows, cross[:, dim:] / rows
        centred = self.gram[:, :dim, :dim] - rows * mean_x.mT @ mean_x
        covariance = cross[:, :dim] - rows * mean_x.mT @ mean_r
        values, vectors = torch.linalg.eigh((centred + centred.mT) / 2)
        # The subtraction above leaves rounding of the uncentred sums behind.
        noise = dim * torch.finfo(torch.float64).eps * _trace(self.gram[:, :dim, :dim])
        penalised = values + ridge * _trace(centred).clamp(min=0) / dim
        inverse = torch.where(values > noise, 1 / penalised, torch.zeros_like(values))
        transposed = (vectors * inverse[:, None]) @ (vectors.mT @ covariance)
        return torch.cat([transposed, mean_r - mean_x @ transposed], dim=1)

    def squared_error(self, weight: Tensor, bias: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """||O - dense||^2 with this gate, a differentiable 0-d float64 tensor."""
        dim = self.gate.head_dim
        transposed = weight.to(torch.float64).reshape(self.groups, dim, dim).mT
        gate = torch.cat([transposed, bias.to(torch.float64).reshape(self.groups, 1, dim)], dim=1)
        squared: Tensor = self.residual - 2 * (gate * self.cross).sum() + (gate * (self.gram @ gate)).sum()
        if log_scale is None:
            return squared
        more = log_scale.to(torch.float64).expm1()
        by_scale: Tensor = more * self.sparse - 2 * self.missed + 2 * (gate * self.mixed).sum((1, 2))
        return squared + (more * by_scale).sum()

    def relative_loss(self, weight: Tensor, bias: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """||O - dense||^2 / ||dense||^2 with this gate, a differentiable 0-d float64 tensor."""
        return self.squared_error(weight, bias, log_scale) / self.dense.clamp(min=torch.finfo(torch.float64).tiny)

    def error(self, *gate: Tensor) -> float:
        """||O - dense|| / ||dense|| with this gate: weight, bias and any log_scale."""
        squared: float = self.relative_loss(*(tensor.detach() for tensor in gate)).item()
        return math.sqrt(max(squared, 0.0))

    def sparse_only_error(self) -> float:
        """||O^s - dense|| / ||dense||."""
        return self.error(torch.zeros_like(self.gate.weight), torch.zeros_like(self.gate.bias))


def _solved_above(least: float, normal: Tensor, wanted: Tensor, size: Tensor) -> Tensor:
    """The x (H) that minimises x^T normal x / 2 - x^T wanted, those that come out below ``least`` held there.

    Directions in which ``normal`` is 0, up to rounding of sums of ``size``, get 0.
    """
    x, free = torch.zeros_like(wanted), torch.ones_like(wanted, dtype=torch.bool)
    noise = 1e-10 * float(size.max())
    while free.any():
        rest = wanted[free] - normal[free][:, ~free] @ x[~free]
        x[free] = torch.linalg.pinv(normal[free][:, free], atol=noise, rtol=0.0, hermitian=True) @ rest
        if not (below := free & (x < least)).any():
            break
        x[below], free = least, free & ~below
    return x


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)


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
    calls: int
    """How often the attention was called."""

    @property
    def closed(self) -> float:
        """The share of the sparse branch's error that the gate takes away now."""
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

    The model runs eagerly and dense, in the mode (train or eval) it is in, and sums (O^l, dense - O^s) at each
    attention that has a gate: (D + 1)^2 numbers per site (per head for per-head gates), never N x N. With
    ``sparse_scale`` they are fitted together with the scales, from H (D + 1) D numbers more. All gates
    change at the end, together; an exception before leaves the model, its hooks and its gates as they were. A
    gate that the fit would not improve on these batches stays.

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
    first, stream = first_of(batches, max_batches)
    with prepared_for(model, first, config):
        fit = _sequentially if sequential else _at_once
        count, fits = fit(model, stream, ridge)
        if not fits:
            raise ValueError(nothing_gated(model, first))
        sites = tuple(fitted.site_error() for fitted in fits.values())
        with torch.no_grad():
            for fitted in fits.values():
                for parameter, value in zip(fitted.statistics.gate.parameters(), fitted.values, strict=True):
                    parameter.copy_(value)
    unreached = tuple(path for path in gates(model) if path not in fits)
    return CalibrationReport(type(model).__name__, count, sequential, ridge, sites, unreached)


@dataclass(frozen=True)
class _Fit:
    """A site's statistics and the gate chosen from them, in the gate's dtype; the gate itself is as it was."""

    path: str
    statistics: SiteStatistics
    values: tuple[Tensor, ...]
    """Of its parameters, in their order."""

    @classmethod
    def of(cls, path: str, statistics: SiteStatistics, ridge: float) -> _Fit:
        gate = statistics.gate
        old = tuple(parameter.detach() for parameter in gate.parameters())
        if not statistics.finite():
            raise ValueError(f"{path}: attention, or a branch of it, is not finite on these batches")
        new = tuple(value.to(own) for value, own in zip(statistics.solve(ridge), old, strict=True))
        if gate.config.linear == "none":  # the op does not read the weight then
            new = old[0], *new[1:]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in new):
            raise ValueError(f"{path}: the fitted gate is beyond the range of its dtype, {old[0].dtype}")
        return cls(path, statistics, new if statistics.error(*new) < statistics.error(*old) else old)

    def site_error(self) -> SiteError:
        """The errors with no gate, the gate as it is, and the fitted one."""
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
    """How many batches there were, and the statistics of each gated attention on the dense model's inputs."""
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


def _at_once(model: nn.Module, batches: Iterator[Arguments], ridge: float) -> tuple[int, dict[str, _Fit]]:
    count, sites = gather(model, batches)
    return count, {path: _Fit.of(path, statistics, ridge) for path, statistics in sites.items()}


@torch.no_grad()
def _sequentially(model: nn.Module, batches: Iterator[Arguments], ridge: float) -> tuple[int, dict[str, _Fit]]:
    held = list(batches)
    fits: dict[str, _Fit] = {}
    while found := _first_unfitted(model, held, fits):
        fits.update({path: _Fit.of(path, statistics, ridge) for path, statistics in found.items()})
    return len(held), fits


def _first_unfitted(
    model: nn.Module, batches: Iterable[Arguments], fits: Mapping[str, _Fit]
) -> dict[str, SiteStatistics]:
    """Statistics of the first site that is not among ``fits``, while those run with their fitted gates."""
    found: dict[str, SiteStatistics] = {}

    def observe(call: GatedCall) -> Tensor:
        if call.path in fits:
            return call.gated(*fits[call.path].values)
        if not found:
            found[call.path] = SiteStatistics(call.gate, call.dense.device)
        if call.path in found:
            found[call.path].add(call)
        return call.dense

    with gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
    return found
