"""The shifts of virtual keys (``linear="taylor"``) from measured errors: for each head the best of a ladder.

The error is no quadratic in a shift, so nothing is solved: attention is computed at every rung, and for each head a sum
of squares a rung is kept. Same interface as ``regression.SiteStatistics``, so that the same checks keep both from harm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sla_compile.fitting.observer import GatedCall
from sla_compile.fitting.ranks import sum_tensors, total
from sla_compile.gate import Gate

__all__ = ["SHIFTS", "ShiftStatistics"]

SHIFTS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
"""What is tried, each exact in 16 bits; 0 is the expected mass of a block as it is."""


class ShiftStatistics:
    """Squared errors (rungs, H), float64, at each of ``SHIFTS`` and at the gate as it was, the last rung."""

    def __init__(self, gate: Gate, device: torch.device) -> None:
        assert gate.shift is not None
        self.gate = gate
        old = gate.shift.detach().to(device)
        self.rungs = torch.cat([old.new_tensor(SHIFTS)[:, None].expand(-1, gate.heads), old[None]])
        """(rungs, H), in the dtype of the gate."""
        self.squared = torch.zeros(self.rungs.shape, dtype=torch.float64, device=device)
        self.dense_square = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = self.calls = 0

    def add(self, call: GatedCall) -> None:
        """Add every token of ``call``."""
        self.add_part(call, self.parts(call), slice(None), 0, call.dense.shape[2])
        self.calls += 1

    def parts(self, call: GatedCall) -> list[Tensor]:
        """The outputs (B, H, N, D) of ``call`` at every rung."""
        return [call.output_with_gate(shift) for shift in self.rungs]

    @torch.no_grad()
    def add_part(self, call: GatedCall, parts: list[Tensor], items: slice, first: int, end: int) -> None:
        """Add query tokens ``first`` to ``end`` of ``items`` (of B) of ``call``, given its `parts`; count no call."""
        dense = call.dense[items, :, first:end].double()
        for rung, out in zip(self.squared, parts, strict=True):
            rung += (out[items, :, first:end].double() - dense).square().sum((0, 2, 3))
        self.dense_square += dense.square().sum()
        self.tokens += dense.shape[0] * dense.shape[2]

    def plus(self, other: ShiftStatistics) -> ShiftStatistics:
        """The sums over the tokens of both."""
        both = ShiftStatistics(self.gate, self.squared.device)
        both.rungs = self.rungs
        for name in ("squared", "dense_square", "tokens", "calls"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def sum_over_ranks(self) -> None:
        """Make these the sums over the calls of all ranks that fit together."""
        sum_tensors([self.squared, self.dense_square])
        self.tokens, self.calls = int(total(self.tokens)), int(total(self.calls))

    @property
    def is_empty(self) -> bool:
        """Whether no token was added."""
        return self.tokens == 0

    def is_finite(self) -> bool:
        """Whether every sum is finite; waits for the device."""
        return bool(torch.isfinite(self.squared).all() and torch.isfinite(self.dense_square))

    def solve(self) -> Tensor:
        """The best shift (H) of each head."""
        return self.rungs.gather(0, self.squared.argmin(dim=0, keepdim=True))[0]

    def error(self, shift: Tensor) -> float:
        """||O - dense|| / ||dense|| with these shifts, each one of its head's rungs; waits for the device."""
        rung = (self.rungs == shift.detach().to(self.rungs)).int().argmax(dim=0, keepdim=True)
        loss = self.squared.gather(0, rung).sum() / self.dense_square.clamp(min=torch.finfo(torch.float64).tiny)
        return math.sqrt(loss.item())

    def sparse_only_error(self) -> float:
        """The error with shifts of zero, those of an untouched gate."""
        return self.error(torch.zeros_like(self.rungs[0]))
