"""What is summed at one attention, by the form of its gate."""

from __future__ import annotations

import torch

from sla_compile.fitting.regression import SiteStatistics
from sla_compile.fitting.shift_search import ShiftStatistics
from sla_compile.gate import Gate

__all__ = ["Statistics", "statistics_of"]

Statistics = SiteStatistics | ShiftStatistics


def statistics_of(gate: Gate, device: torch.device) -> Statistics:
    """Nothing summed yet, for a gate of this form."""
    return SiteStatistics(gate, device) if gate.shift is None else ShiftStatistics(gate, device)
