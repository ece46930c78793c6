"""``calibrate``: gates in closed form, from the attention of a few batches; no training.

At a site, the best gate solves a linear regression: with R = dense output - O^s and X = [O^l, 1] it minimises
||R - X [W^T; b]||^2 over all tokens. Its sums X^T X and X^T R are small, (D + 1) x (D + 1) and (D + 1) x D, and
are gathered in one streaming pass in float64; the error of *any* gate on the same batches follows from them.
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

from sla_compile.config import SLAConfig
from sla_compile.gate import Gate, gates
from sla_compile.interception import Arguments, GatedCall, first_of, gated_calls, nothing_gated, prepared_for
from sla_compile.preparation import unwrapped

__all__ = ["CalibrationReport", "SiteError", "SiteStatistics", "calibrate", "gather", "mean_error"]

_TOKENS_PER_CHUNK = 2048


class SiteStatistics:
    """Sums for the regression at one site, float64, over G groups: 1, or the H heads of a per-head gate.

    ``gram`` (G, D + 1, D + 1) is X^T X, ``cross`` (G, D + 1, D) is X^T R, ``residual`` and ``dense`` the squared
    norms of R and of the dense output.
    """

    def __init__(self, gate: Gate, device: torch.device) -> None:
        self.gate = gate
        self.groups = gate.heads if gate.weight.dim() == 3 else 1
        dim = gate.head_dim
        self.gram = torch.zeros(self.groups, dim + 1, dim + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(self.groups, dim + 1, dim, dtype=torch.float64, device=device)
        self.residual = torch.zeros((), dtype=torch.float64, device=device)
        self.dense = torch.zeros((), dtype=torch.float64, device=device)
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
        self.calls += 1

    def _rows(self, x: Tensor) -> Tensor:
        """x (B, H, n, D) as (G, rows, D) in float64."""
        return x.to(torch.float64).transpose(0, 1).reshape(self.groups, -1, x.shape[3])

    def finite(self) -> bool:
        """Whether every sum is; waits for the device."""
        sums = (self.gram, self.cross, self.residual, self.dense)
        return all(bool(torch.isfinite(total).all()) for total in sums)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The regression's weight and bias, float64, shaped as the gate's.

        Minimises ||R - O^l W^T - b||^2 + ridge * v * ||W||^2, with v the summed squares of O^l about its mean,
        averaged over the D columns. Directions in which O^l does not vary get weight 0.
        """
        dim = self.gate.head_dim
        rows = self.gram[:, dim:, dim:]
        mean_x, mean_r = self.gram[:, dim:, :dim] / rows, self.cross[:, dim:] / rows
        centred = self.gram[:, :dim, :dim] - rows * mean_x.mT @ mean_x
        covariance = self.cross[:, :dim] - rows * mean_x.mT @ mean_r
        values, vectors = torch.linalg.eigh((centred + centred.mT) / 2)
        # The subtraction above leaves rounding of the uncentred sums behind.
        noise = dim * torch.finfo(torch.float64).eps * _trace(self.gram[:, :dim, :dim])
        penalised = values + ridge * _trace(centred).clamp(min=0) / dim
        inverse = torch.where(values > noise, 1 / penalised, torch.zeros_like(values))
        transposed = (vectors * inverse[:, None]) @ (vectors.mT @ covariance)
        bias = mean_r - mean_x @ transposed
        gate = self.gate
        return transposed.mT.reshape(gate.weight.shape), bias.reshape(gate.bias.shape)

    def squared_error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """||O - dense||^2 with this gate, a differentiable 0-d float64 tensor."""
        dim = self.gate.head_dim
        transposed = weight.to(torch.float64).reshape(self.groups, dim, dim).mT
        gate = torch.cat([transposed, bias.to(torch.float64).reshape(self.groups, 1, dim)], dim=1)
        return self.residual - 2 * (gate * self.cross).sum() + (gate * (self.gram @ gate)).sum()

    def relative_loss(self, weight: Tensor, bias: Tensor) -> Tensor:
        """||O - dense||^2 / ||dense||^2 with this gate, a differentiable 0-d float64 tensor."""
        return self.squared_error(weight, bias) / self.dense.clamp(min=torch.finfo(torch.float64).tiny)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """||O - dense|| / ||dense|| with this gate."""
        squared: float = self.relative_loss(weight.detach(), bias.detach()).item()
        return math.sqrt(max(squared, 0.0))

    def sparse_only_error(self) -> float:
        """||O^s - dense|| / ||dense||."""
        return self.error(torch.zeros_like(self.gate.weight), torch.zeros_like(self.gate.bias))


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
        from sla_compile.render_errors import ErrorsView

        return ErrorsView(self.title, self.sites, self.unreached)

    def __str__(self) -> str:
        from sla_compile.render import plain_text

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
    attention that has a gate: (D + 1)^2 numbers per site (per head for per-head gates), never N x N. All gates
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
                fitted.statistics.gate.weight.copy_(fitted.weight)
                fitted.statistics.gate.bias.copy_(fitted.bias)
    unreached = tuple(path for path in gates(model) if path not in fits)
    return CalibrationReport(type(model).__name__, count, sequential, ridge, sites, unreached)


@dataclass(frozen=True)
class _Fit:
    """A site's statistics and the gate chosen from them, in the gate's dtype; the gate itself is as it was."""

    path: str
    statistics: SiteStatistics
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, path: str, statistics: SiteStatistics, ridge: float) -> _Fit:
        gate = statistics.gate
        old = gate.weight.detach(), gate.bias.detach()
        if not statistics.finite():
            raise ValueError(f"{path}: attention, or a branch of it, is not finite on these batches")
        # The op does not read the weight then.
        fitted, bias = statistics.solve(ridge)
        weight = old[0] if gate.config.linear == "none" else fitted.to(old[0])
        new = weight, bias.to(old[1])
        if not all(bool(torch.isfinite(tensor).all()) for tensor in new):
            raise ValueError(f"{path}: the fitted gate is beyond the range of its dtype, {old[0].dtype}")
        return cls(path, statistics, *(new if statistics.error(*new) < statistics.error(*old) else old))

    def site_error(self) -> SiteError:
        """The errors with no gate, the gate as it is, and the fitted one."""
        gate, statistics = self.statistics.gate, self.statistics
        return SiteError(
            path=self.path,
            sparse_only=statistics.sparse_only_error(),
            before=statistics.error(gate.weight, gate.bias),
            after=statistics.error(self.weight, self.bias),
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
            return call.gated(fits[call.path].weight, fits[call.path].bias)
        if not found:
            found[call.path] = SiteStatistics(call.gate, call.dense.device)
        if call.path in found:
            found[call.path].add(call)
        return call.dense

    with gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
    return found
