"""Topks for each part of the sampler's times: kept beside the gates, and put into them before each call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from examples.wan.draws import even
from sla_compile import SparsityPlan

__all__ = ["Levels"]

_FILE = "levels.json"


@dataclass(frozen=True)
class Levels:
    """A plan whose times are in (0, 1], where the sampler's steps are even: Wan's own before they are shifted."""

    plan: SparsityPlan
    shift: float

    def follow(self, model: nn.Module) -> None:
        """From here on each call of the transformer ``model`` has the topks of its time."""

        def set_level(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.plan.set(module, even(kwargs["timestep"].float() / 1000, self.shift))

        self.plan.move_to(model)
        model.register_forward_pre_hook(set_level, with_kwargs=True)

    def save(self, folder: Path) -> None:
        """Beside what ``sla_compile.save`` writes, which holds the topks of one time."""
        text = json.dumps({"shift": self.shift, "plan": self.plan.to_dict()})
        (folder / _FILE).write_text(text)

    @classmethod
    def of(cls, folder: Path) -> Levels | None:
        """What ``save`` wrote; None where all times have the topks of the gates."""
        if not (folder / _FILE).is_file():
            return None
        kept = json.loads((folder / _FILE).read_text())
        return cls(SparsityPlan.from_json(json.dumps(kept["plan"])), kept["shift"])
