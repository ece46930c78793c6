"""A prepared copy of a model to try things on: it shares every tensor with the model, which stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sla_compile.compiler.model_copy import traceable_copy
from sla_compile.compiler.preparation import prepare, unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.observer import Arguments, no_gated_call_message, peek_first
from sla_compile.fitting.shift_search import ShiftStatistics
from sla_compile.fitting.statistics import Statistics
from sla_compile.gate import gates, model_config

__all__ = ["best_gate", "dense_copy", "read_batches", "trial_copy"]

_RIDGE = 1e-2
"""That of ``calibrate``."""


def read_batches(batches: Iterable[Any], max_batches: int | None) -> list[Arguments]:
    """The first ``max_batches`` of ``batches`` (None: all); ValueError where there is none."""
    return list(peek_first(batches, max_batches)[1])


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` without gates that shares every tensor with it. Raises as `traceable_copy`."""
    return traceable_copy(unwrapped(model))


def trial_copy(model: nn.Module, example: Arguments, config: SLAConfig | Mapping[str, Any] | None) -> nn.Module:
    """A copy of ``model`` with gates for ``config`` (None: the settings of its gates, or the defaults).

    Gates that ``model`` has give their values to those of the copy that have the same path and shapes. Every other
    tensor is the model's own.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a setting is refused, a part cannot be copied, or no attention would be rewritten.
    """
    model = unwrapped(model)
    copied = dense_copy(model)
    settings = config if config is not None else model_config(model)
    with torch.random.fork_rng(sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})):
        prepare(copied, *example, config=settings)
    made, own = gates(copied), gates(model)
    if not made:
        raise ValueError(no_gated_call_message(model, example, settings))
    with torch.no_grad():
        for path, gate in made.items():
            if path in own:
                for name, values in own[path].named_parameters():
                    there = dict(gate.named_parameters()).get(name)
                    if there is not None and there.shape == values.shape:
                        there.copy_(values)
                # an explicit config says the sparsity itself
                sparsity = own[path].sparsity
                if config is None and gate.sparsity is not None and sparsity is not None:
                    gate.sparsity.copy_(sparsity)
    return copied


def best_gate(statistics: Statistics) -> tuple[Tensor, ...]:
    """Values of the gate's parameters, in their order, fitted to what was summed."""
    if isinstance(statistics, ShiftStatistics):
        return (statistics.solve(),)
    return statistics.solve(_RIDGE)
