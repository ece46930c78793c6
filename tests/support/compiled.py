"""Models compiled with small blocks, and how many graphs that took."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.support.models import OPTIONS, randomize_gates

EAGER: dict[str, Any] = {**OPTIONS, "inner": "eager"}


def graphs() -> int:
    return int(counters["stats"].get("unique_graphs", 0))


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sla", options={**EAGER, **options})


def first_call(model: Any, x: torch.Tensor) -> None:
    """A call with a gradient, as later ones have it, then gates that are not zero."""
    model(x.detach().requires_grad_())
    randomize_gates(model)
