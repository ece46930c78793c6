"""What the benchmarks on a dense checkpoint share: its model, and videos to fit on and to hold out.

A checkpoint is the ``pretrained-S.pt`` that examples/finetune.py or benchmarks/quality.py leaves in its folder, beside
the settings.json that it was trained with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sla_compile
from examples.study.arms import build
from examples.study.settings import Settings
from examples.study.videos import Batch, Data

__all__ = ["Batch", "Data", "Study", "load", "parser"]

SEED = 4_000_000
"""Of the videos to fit on: no training gets there."""


def parser(description: str | None, videos: int) -> argparse.ArgumentParser:
    """The arguments that a ``Study`` follows from; ``videos`` is the default."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--checkpoint", type=Path, required=True, help="its settings.json beside it")
    options.add_argument("--videos", type=int, default=videos, help="to fit on; a quarter as many are held out")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return options


def load(checkpoint: Path, device: torch.device) -> tuple[nn.Module, Settings]:
    """The dense model of ``checkpoint``, and the settings that it was trained with."""
    settings = Settings.from_dict(json.loads((checkpoint.parent / "settings.json").read_text()))
    model = build(settings)
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    return model.to(device).eval(), settings


class Study:
    """The dense model of a checkpoint, and its videos: at least ``batches`` batches to fit on, and held-out ones."""

    def __init__(self, options: argparse.Namespace, batches: int) -> None:
        self.name, self.device = options.checkpoint.name, torch.device(options.device)
        self.model, self.settings = load(options.checkpoint, self.device)
        batch = min(self.settings.batch, max(1, options.videos // batches))
        self.data = Data(self.settings.size, batch, self.device, self.settings.shift)
        self.batches = max(1, options.videos // batch)
        self.held_out = self.data.held_out(max(1, options.videos // (4 * batch)))

    def seen(self) -> Iterator[Batch]:
        """The batches to fit on, drawn as they are asked for."""
        return (self.data(SEED + i) for i in range(self.batches))

    @property
    def counts(self) -> str:
        """How many videos there are, for a title."""
        return f"{self.batches * self.data.batch} videos, {len(self.held_out) * self.data.batch} held out"

    def prepare(self, **changes: Any) -> None:
        """Give every attention a gate of the paper's form, or as ``changes`` of ``SLAConfig`` have it."""
        block, bottomk, inner = self.settings.block, self.settings.bottomk, self.settings.inner
        config: dict[str, Any] = {"linear": "marginal", "bottomk": bottomk, "block_q": block, "block_k": block}
        config |= {"inner": inner, "min_tokens": 0, **changes}
        sla_compile.prepare(self.model, self.held_out[0][:2], config=config)
