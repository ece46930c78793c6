"""``SparsityPlan``: topks for each diffusion time, and the call that puts those of a time into the gates."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sla_compile.common.blocks import to_millionths
from sla_compile.compiler.model_copy import waits_for_gates
from sla_compile.compiler.preparation import unwrapped
from sla_compile.fitting.observer import Topk
from sla_compile.gate import Gate, gates

__all__ = ["PlanLevel", "SparsityPlan"]


@dataclass(frozen=True)
class PlanLevel:
    """The topks of one diffusion time."""

    time: float
    topks: Mapping[str, Topk]
    """By gate path: of the attention, or with ``topk_by="head"`` of each of its heads."""
    mean_topk: float
    """Weighted by each attention's work."""
    critical: float | None = None
    """Share of all pairs of blocks that is critical: rows have whole blocks, so it is below ``mean_topk``."""
    output_uniform: float | None = None
    """||output - dense output|| / ||dense output|| at this time with the budget as topk everywhere."""
    output: float | None = None
    """The same with ``topks``."""


@dataclass(frozen=True, repr=False)
class SparsityPlan:
    """Topks for each of several diffusion times, as `allocate_by_time` fits them; prints as a table.

    ``to_json`` and ``from_json`` keep it: a gate file holds the topks in force, not a plan.
    """

    budget: float
    """Together the levels, each of which stands for as many steps, have at most the critical blocks of this topk."""
    levels: tuple[PlanLevel, ...]
    """Ascending in time."""
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, compare=False)
    """By device: the times (L) in float32, and the topks of all heads (L, sum of H) in millionths."""

    @property
    def mean_topk(self) -> float:
        """Mean over the levels of their ``mean_topk``."""
        return sum(level.mean_topk for level in self.levels) / len(self.levels)

    def at(self, time: float) -> PlanLevel:
        """The level nearest to ``time``, of two as near the lower one; ValueError if it is not finite."""
        if not math.isfinite(time):
            raise ValueError(f"time: got {time}; accepted: a finite number, in the units of the plan's times")
        return min(self.levels, key=lambda level: abs(level.time - time))

    def set(self, model: nn.Module, time: float | Tensor) -> None:
        """Put the topks of the level nearest to ``time`` into the gates of ``model``; no compile follows.

        The next call of ``model`` uses them, until the next ``set``. Nothing waits for the device, after the first
        call. In a hook that is compiled with the model, a plan of ``from_json`` needs a ``move_to(model)`` before.

        Args:
            model: a model with the gates that the plan was made for, compiled or not.
            time: in the units of the plan's times; of a tensor, on any device, the mean counts.

        Raises:
            ValueError: ``model`` lacks a gate of the plan, one has another number of heads or no ``max_topk``, or
                ``time`` is a number that is not finite. Nothing is changed then.
        """
        model = unwrapped(model)
        if waits_for_gates(model):
            return
        found = self._buffers(model)
        sizes = [len(buffer) for buffer in found]
        with torch.no_grad():
            if not isinstance(time, Tensor):
                position = self.levels.index(self.at(float(time)))
            for device in dict.fromkeys(buffer.device for buffer in found):
                times, table = self._on(device)
                if isinstance(time, Tensor):
                    mean = time.detach().to(times, non_blocking=True).mean()
                    row = table.index_select(0, (times - mean).abs().argmin().view(1))[0]
                else:
                    row = table[position]
                for buffer, topks in zip(found, torch.split(row, sizes), strict=True):
                    if buffer.device == device:
                        buffer.copy_(topks)

    def move_to(self, model: nn.Module) -> None:
        """Make what `set` copies from, on the devices of ``model``, so that no compiled hook sees it made."""
        for device in {buffer.device for buffer in self._buffers(unwrapped(model))}:
            self._on(device)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the budget and the levels."""
        return {"budget": self.budget, "levels": [dataclasses.asdict(level) for level in self.levels]}

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> SparsityPlan:
        """The plan that ``to_json`` wrote; ValueError if ``text`` is none."""
        try:
            plain = json.loads(text)
            levels = [PlanLevel(**{**level, "topks": _topks(level["topks"])}) for level in plain["levels"]]
            return cls(plain["budget"], tuple(levels))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"SparsityPlan.from_json: {error!r}; accepted: what to_json wrote") from error

    def __rich__(self) -> Any:
        from sla_compile.reporting.fit_tables import PlanView

        return PlanView(self)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import plain_text

        return plain_text(self.__rich__(), width=100)

    def __repr__(self) -> str:
        shares = ", ".join(f"{level.mean_topk:.3g} at {level.time:g}" for level in self.levels)
        return f"<SparsityPlan: topk {shares}>"

    def _buffers(self, model: nn.Module) -> list[Tensor]:
        """Where the topks of each gate of the plan are kept, (H) or (1), in the plan's order."""
        found = gates(model)
        return [_topk_buffer(path, found.get(path), topk) for path, topk in self.levels[0].topks.items()]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            rows = [
                [to_millionths(own) for topk in level.topks.values() for own in _of_heads(topk)]
                for level in self.levels
            ]
            times = [level.time for level in self.levels]
            with torch.inference_mode(False):
                self._tables[device] = torch.tensor(times, device=device), torch.tensor(rows, device=device)
        return self._tables[device]


def _of_heads(topk: Topk) -> tuple[float, ...]:
    return topk if isinstance(topk, tuple) else (topk,)


def _topks(plain: Mapping[str, Any]) -> dict[str, Topk]:
    return {path: tuple(topk) if isinstance(topk, list) else float(topk) for path, topk in plain.items()}


def _topk_buffer(path: str, gate: Gate | None, topk: Topk) -> Tensor:
    if gate is None:
        raise ValueError(f"{path}: the plan has topks for it, and the model has no such gate; accepted: its own model")
    if gate.sparsity is None:
        raise ValueError(
            f"{path}: its topk is a constant of the compiled graph; accepted: a model prepared with max_topk, as the "
            f"plan's was"
        )
    buffer = gate.sparsity.view(-1, 2)[:, 0]
    if len(buffer) != len(_of_heads(topk)):
        raise ValueError(
            f"{path}: the plan has {len(_of_heads(topk))} topk(s), the gate {len(buffer)}; accepted: the same "
            f"topk_by and heads"
        )
    return buffer
