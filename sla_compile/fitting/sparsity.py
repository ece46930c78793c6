"""``set_sparsity``: topk and bottomk of a compiled model, changed with no recompilation; ``anneal``: topk in steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from sla_compile.common.blocks import to_millionths
from sla_compile.compiler.model_copy import waits_for_gates
from sla_compile.config import SLAConfig
from sla_compile.config_shares import check_shares
from sla_compile.gate import Gate, gates, owner_path

__all__ = ["anneal", "select_gates", "set_sparsity"]


def set_sparsity(
    model: nn.Module,
    *,
    topk: float | None = None,
    bottomk: float | None = None,
    sites: str | Iterable[str] | None = None,
) -> None:
    """Set topk and bottomk of the gates of ``model`` in place; the next call uses them, with no recompilation.

    For models prepared, or first compiled, with ``max_topk``. The values are rounded to a millionth and stored in
    buffers of the gates, so they are in ``state_dict()`` and in what ``save`` writes. All heads get the same, also
    where they have a topk of their own (``topk_by="head"``). Where topk + bottomk is above 1, only 1 - topk is
    negligible.

    Args:
        model: a model with gates, compiled or not.
        topk: share of a row's key blocks that is critical, above 0 and up to ``max_topk``; None: unchanged.
        bottomk: share that is negligible, from 0 to 1; None: unchanged.
        sites: glob pattern or patterns of module paths, as in ``overrides`` ("blocks.0.*"), or of gates; None: all.

    Raises:
        ValueError: nothing to set, a value out of range, a pattern that matches no gate, or a gate without
            ``max_topk``. Nothing is changed then.
    """
    if topk is None and bottomk is None:
        raise ValueError("set_sparsity: got neither topk nor bottomk; accepted: one of them, or both")
    if waits_for_gates(model):
        return
    chosen = select_gates(model, sites)
    for path, gate in chosen.items():
        _check_shares(path, gate, topk, bottomk)
    with torch.no_grad():
        for gate in chosen.values():
            for index, value in enumerate((topk, bottomk)):
                if value is not None and gate.sparsity is not None:
                    gate.sparsity[..., index].fill_(to_millionths(value))  # an assignment would wait for the device


def select_gates(model: nn.Module, sites: str | Iterable[str] | None) -> dict[str, Gate]:
    """By path, the gates of which a pattern in ``sites`` matches the owner's path or the gate's own; None: all.

    Raises ValueError if ``model`` has no gates, or a pattern matches none.
    """
    found = gates(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no SLA gates; accepted: a model after sla_compile.prepare")
    patterns = ["*"] if sites is None else [sites] if isinstance(sites, str) else list(sites)
    chosen: dict[str, Gate] = {}
    for pattern in patterns:
        matching = {p: g for p, g in found.items() if any(fnmatchcase(name, pattern) for name in (owner_path(p), p))}
        if not matching:
            known = ", ".join(map(owner_path, list(found)[:3])) + (", ..." if len(found) > 3 else "")
            raise ValueError(f"sites: no gate at {pattern!r}; accepted: patterns of module paths such as {known}")
        chosen.update(matching)
    return chosen


def _check_shares(path: str, gate: Gate, topk: float | None, bottomk: float | None) -> None:
    if gate.sparsity is None:
        raise ValueError(
            f"{path}: its topk and bottomk are constants of the compiled graph; accepted: a model prepared with "
            f"max_topk, the most that topk will be: prepare(model, ..., config={{'max_topk': 1.0}})"
        )
    given: dict[str, Any] = {"topk": topk, "bottomk": bottomk}
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        SLAConfig.check_value(name, value)
    if topk is not None and to_millionths(topk) < 1:
        raise ValueError(f"topk: got {topk!r}; accepted: at least a millionth")
    if topk is not None:
        check_shares(path, topk, bottomk or 0.0, gate.config.max_topk)


def anneal(start: float, stop: float, steps: int) -> Iterator[float]:
    """``steps`` values of topk from ``start`` to ``stop``, in geometric progression.

    ``for batch, topk in zip(batches, anneal(1.0, 0.05, 1000)): set_sparsity(model, topk=topk); ...``
    """
    if not (0 < start <= 1 and 0 < stop <= 1) or steps < 2:
        raise ValueError(f"anneal: got {start}, {stop}, {steps}; accepted: two shares above 0 and up to 1, steps >= 2")
    ratio = stop / start
    return (stop if step == steps - 1 else start * ratio ** (step / (steps - 1)) for step in range(steps))
