"""The regression that gives a gate in closed form: its sums over tokens, the best gate, and the error of any gate.

At a site, the best gate solves a linear regression: with R = dense output - O^s and X = [O^l, 1] it minimises
||R - X [W^T; b]||^2 over all tokens. Its sums X^T X, (D + 1, D + 1), and X^T R, (D + 1, D), are small and are gathered
in one streaming pass in float64. The error of *any* gate on the same batches follows from them.

Where the gate also scales O^s, by s_h in each head h, the regression is of R - (s_h - 1) O^s. The best W and b are
linear in the numbers s_h - 1. Eliminating W and b leaves a system of H equations for these; it needs the sums X^T O^s
of each head too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_compile.fitting.observer import GatedCall
from sla_compile.fitting.ranks import sum_tensors, total
from sla_compile.gate import Gate

__all__ = ["MIN_SCALE", "TOKENS_PER_CHUNK", "SiteStatistics"]

TOKENS_PER_CHUNK = 2048
"""Tokens that are converted to float64 at once."""
MIN_SCALE = 0.01
"""Lower bound of exp(log_scale): the compiled op divides W and b by it."""
_SUMS = ("gram", "cross", "residual_square", "dense_square", "sparse_cross", "sparse_square", "sparse_residual")
_ROUNDING = 1e-10
"""Relative to the sums that a system of scales is made of: eigenvalues below are rounding, and count as zero."""


class SiteStatistics:
    """Sums for the regression at one site, float64, in G groups: 1, or the H heads of a per-head gate.

    - ``gram`` (G, D + 1, D + 1): X^T X
    - ``cross`` (G, D + 1, D): X^T R
    - ``residual_square``, ``dense_square``: ||R||^2 and ||dense output||^2

    For a gate with ``log_scale`` also, of each head (without it, of no head):

    - ``sparse_cross`` (H, D + 1, D): X^T O^s
    - ``sparse_square`` (H): ||O^s||^2
    - ``sparse_residual`` (H): <O^s, R>
    """

    def __init__(self, gate: Gate, device: torch.device) -> None:
        self.gate = gate
        self.groups = gate.heads if gate.weight.dim() == 3 else 1
        dim = gate.head_dim
        self.gram = torch.zeros(self.groups, dim + 1, dim + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(self.groups, dim + 1, dim, dtype=torch.float64, device=device)
        self.residual_square = torch.zeros((), dtype=torch.float64, device=device)
        self.dense_square = torch.zeros((), dtype=torch.float64, device=device)
        heads = 0 if gate.log_scale is None else gate.heads
        self.sparse_cross = self.cross.new_zeros(heads, dim + 1, dim)
        self.sparse_square, self.sparse_residual = self.cross.new_zeros(2, heads)
        self.calls = 0

    def add(self, call: GatedCall) -> None:
        """Add every token of ``call`` that has a key, a chunk at a time."""
        self.add_part(call, self.parts(call), slice(None), 0, call.dense.shape[2])
        self.calls += 1

    def parts(self, call: GatedCall) -> tuple[Tensor, Tensor | None]:
        """What `add_part` reads of ``call``: its branches."""
        return call.branches()

    @torch.no_grad()
    def add_part(
        self, call: GatedCall, branches: tuple[Tensor, Tensor | None], items: slice, first: int, end: int
    ) -> None:
        """Add query tokens ``first`` to ``end`` of ``items`` (of B) of ``call``, given its branches; count no call."""
        sparse, linear = branches
        for start in range(first, end, TOKENS_PER_CHUNK):
            rows = slice(start, min(start + TOKENS_PER_CHUNK, end))
            dense, o_s = self._rows(call.dense[items, :, rows]), self._rows(sparse[items, :, rows])
            o_l = torch.zeros_like(o_s) if linear is None else self._rows(linear[items, :, rows])
            x, r = F.pad(o_l, (0, 1), value=1.0), dense - o_s
            if call.masked_queries is not None:  # the gate does not change what they give
                masked = self._rows(call.masked_queries.expand_as(sparse[..., :1])[items, :, rows]).bool()
                x, r, o_s = (part.masked_fill(masked, 0) for part in (x, r, o_s))
            self.gram += x.mT @ x
            self.cross += x.mT @ r
            self.residual_square += r.square().sum()
            self.dense_square += dense.square().sum()
            if self.gate.log_scale is not None:
                x, r, o_s = (part.reshape(self.gate.heads, -1, part.shape[-1]) for part in (x, r, o_s))
                self.sparse_cross += x.mT @ o_s
                self.sparse_square += o_s.square().sum((1, 2))
                self.sparse_residual += (o_s * r).sum((1, 2))

    def sum_over_ranks(self) -> None:
        """Make these the sums over the tokens of all ranks that fit together."""
        sum_tensors(getattr(self, name) for name in _SUMS)
        self.calls = int(total(self.calls))

    def plus(self, other: SiteStatistics) -> SiteStatistics:
        """The sums over the tokens of both."""
        total = SiteStatistics(self.gate, self.gram.device)
        for name in _SUMS:
            setattr(total, name, getattr(self, name) + getattr(other, name))
        total.calls = self.calls + other.calls
        return total

    @property
    def is_empty(self) -> bool:
        """Whether no token was added; waits for the device."""
        return not bool(self.gram[0, -1, -1])

    def _rows(self, x: Tensor) -> Tensor:
        """x (B, H, n, D) as (G, rows, D) in float64."""
        return x.to(torch.float64).transpose(0, 1).reshape(self.groups, -1, x.shape[3])

    def is_finite(self) -> bool:
        """Whether every sum is finite; waits for the device."""
        return all(bool(torch.isfinite(getattr(self, name)).all()) for name in _SUMS)

    def solve(self, ridge: float) -> tuple[Tensor, ...]:
        """The best weight and bias, and log_scale if the gate has one: float64, in the shapes of the gate's.

        They minimise ||R - O^l W^T - b||^2 + ridge * v * ||W||^2, where v is the sum over tokens of the squares of O^l
        about its mean, averaged over its D columns. Directions in which O^l does not vary get weight 0; an O^s that W
        and b could produce as well keeps a scale of 1.
        """
        gate, dim = self.gate, self.gate.head_dim
        best, log_scale = self._regress(self.cross, ridge), []
        if gate.log_scale is not None:
            # With the scale of a head 1 higher, the best [W^T; b] is lower by this.
            per_scale = self._regress(self.sparse_cross, ridge)
            explained = torch.einsum("kij,hij->hk", per_scale, self.sparse_cross)
            if self.groups > 1:  # each head has its own W and b
                explained = explained.diagonal().diag()
            right = self.sparse_residual - (best * self.sparse_cross).sum((1, 2))
            above_one = _minimise_bounded(
                MIN_SCALE - 1, self.sparse_square.diag() - explained, right, self.sparse_square
            )
            change = above_one[:, None, None] * per_scale
            best = best - (change if self.groups > 1 else change.sum(0, keepdim=True))
            log_scale = [above_one.log1p()]
        weight, bias = best[:, :dim].mT, best[:, dim]
        return weight.reshape(gate.weight.shape), bias.reshape(gate.bias.shape), *log_scale

    def best_log_scale(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The best log_scale (H), float64, for a gate with this weight and bias; 0 for heads whose O^s is 0."""
        right = self.sparse_residual - (self._stacked(weight, bias) * self.sparse_cross).sum((1, 2))
        above_one = torch.where(self.sparse_square > 0, right / self.sparse_square, torch.zeros_like(right))
        return above_one.clamp(min=MIN_SCALE - 1).log1p()

    def _stacked(self, weight: Tensor, bias: Tensor) -> Tensor:
        """[W^T; b] (G, D + 1, D) in float64."""
        dim = self.gate.head_dim
        transposed = weight.to(torch.float64).reshape(self.groups, dim, dim).mT
        return torch.cat([transposed, bias.to(torch.float64).reshape(self.groups, 1, dim)], dim=1)

    def _regress(self, cross: Tensor, ridge: float) -> Tensor:
        """[W^T; b] (G or H, D + 1, D) of the ridge regression of some Y on X, from ``cross`` = X^T Y; linear in it."""
        dim = self.gate.head_dim
        rows = self.gram[:, dim:, dim:]
        mean_x, mean_y = self.gram[:, dim:, :dim] / rows, cross[:, dim:] / rows
        centred = self.gram[:, :dim, :dim] - rows * mean_x.mT @ mean_x
        covariance = cross[:, :dim] - rows * mean_x.mT @ mean_y
        values, vectors = torch.linalg.eigh((centred + centred.mT) / 2)
        # The subtraction above leaves rounding of the uncentred sums behind.
        noise = dim * torch.finfo(torch.float64).eps * _trace(self.gram[:, :dim, :dim])
        penalised = values + ridge * _trace(centred).clamp(min=0) / dim
        inverse = torch.where(values > noise, 1 / penalised, torch.zeros_like(values))
        transposed = (vectors * inverse[:, None]) @ (vectors.mT @ covariance)
        return torch.cat([transposed, mean_y - mean_x @ transposed], dim=1)

    def squared_error(self, weight: Tensor, bias: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """||O - dense||^2 with this gate: 0-d float64, differentiable."""
        gate = self._stacked(weight, bias)
        squared: Tensor = self.residual_square - 2 * (gate * self.cross).sum() + (gate * (self.gram @ gate)).sum()
        if log_scale is None:
            return squared
        above_one = log_scale.to(torch.float64).expm1()
        by_head: Tensor = (
            above_one * self.sparse_square - 2 * self.sparse_residual + 2 * (gate * self.sparse_cross).sum((1, 2))
        )
        return squared + (above_one * by_head).sum()

    def relative_loss(self, weight: Tensor, bias: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """||O - dense||^2 / ||dense||^2 with this gate: 0-d float64, differentiable."""
        return self.squared_error(weight, bias, log_scale) / self.dense_square.clamp(
            min=torch.finfo(torch.float64).tiny
        )

    def error(self, *gate: Tensor) -> float:
        """||O - dense|| / ||dense|| with the gate's tensors: weight, bias and any log_scale."""
        squared: float = self.relative_loss(*(tensor.detach() for tensor in gate)).item()
        return math.sqrt(max(squared, 0.0))

    def sparse_only_error(self) -> float:
        """||O^s - dense|| / ||dense||: the error with a gate of zero."""
        weight, bias = (self.cross.new_zeros(tuple(part.shape)) for part in (self.gate.weight, self.gate.bias))
        return self.error(weight, bias)


def _minimise_bounded(minimum: float, matrix: Tensor, right: Tensor, sizes: Tensor) -> Tensor:
    """The x (H) that minimises x^T matrix x / 2 - x^T right; entries that come out below ``minimum`` are set to it.

    ``sizes`` (H) are the sums that ``matrix`` (H, H) is a difference of: directions in which it is 0, up to their
    rounding, get 0.
    """
    x, free = torch.zeros_like(right), torch.ones_like(right, dtype=torch.bool)
    noise = _ROUNDING * float(sizes.max())
    while free.any():
        rest = right[free] - matrix[free][:, ~free] @ x[~free]
        x[free] = torch.linalg.pinv(matrix[free][:, free], atol=noise, rtol=0.0, hermitian=True) @ rest
        if not (below := free & (x < minimum)).any():
            break
        x[below], free = minimum, free & ~below
    return x


def _trace(matrices: Tensor) -> Tensor:
    """Traces of matrices (G, n, n), as (G, 1)."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
