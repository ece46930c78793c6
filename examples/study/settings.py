"""The settings of a fine-tuning experiment, and presets of them for a GPU, a CPU and a quick look."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PRESETS", "Settings"]


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers of a run, apart from its seed and device."""

    model: str = "dit"
    size: tuple[int, int, int] = (32, 64, 64)
    """Frames, height and width of a video."""
    patch: tuple[int, int, int] = (2, 4, 4)
    heads: int = 4
    head_dim: int = 64
    layers: int = 4
    mlp_ratio: int = 2
    batch: int = 8
    """Videos in a batch, of training, of the held-out set and of samples."""
    shift: float = 3.0
    """How far the times of flow matching are moved towards noise; 1 leaves them as they are."""

    block: int = 64
    """Tokens in a block, of queries and of keys."""
    bottomk: float = 0.10
    inner: str = "inductor"
    """What compiles blocks: "inductor" or "eager"."""

    dense_steps: int = 3000
    """Steps of dense training, before the arms part."""
    dense_lr: float = 1e-3
    steps: int = 500
    """Steps of fine-tuning, of each arm."""
    lr: float = 3e-4
    """Learning rate of the weights in the fine-tuning."""
    gate_lr: float = 6e-3
    """Learning rate of the gates in the fine-tuning."""
    loss: str = "flow"
    """Target of the fine-tuning: "flow" (the data's velocity) or "teacher" (the dense checkpoint's)."""
    train: str = "all"
    """What is fine-tuned: "all" or "gates"."""

    held_out: int = 32
    """Batches on which the held-out loss is measured."""
    calibration: int = 16
    """Batches that ``calibrate`` sees."""
    measured: int = 4
    """Held-out batches on which attention errors are measured."""
    feature_steps: int = 600
    """Steps of training the network of the Frechet distance."""
    real: int = 128
    """Batches of real videos that samples are compared with."""
    sampled: int = 16
    """Batches of videos that a trained model samples."""
    sampling_steps: int = 16

    def to_dict(self) -> dict[str, Any]:
        """The fields, in plain JSON types."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Settings:
        """The inverse of ``to_dict``; fields of another version, unknown to this one, are left out."""
        names = {field.name for field in dataclasses.fields(cls)} & given.keys()
        known: dict[str, Any] = {name: given[name] for name in names}
        for name, value in known.items():
            known[name] = tuple(value) if isinstance(value, list) else value
        return cls(**known)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of a video along time, height and width. A Wan transformer's patches are (1, 2, 2)."""
        patch = (1, 2, 2) if self.model == "wan" else self.patch
        frames, height, width = (size // step for size, step in zip(self.size, patch, strict=True))
        return frames, height, width

    @property
    def tokens(self) -> int:
        """Tokens of a video."""
        return math.prod(self.grid)


PRESETS = {
    "gpu": Settings(),
    "cpu": Settings(
        size=(32, 32, 32),
        head_dim=32,
        layers=3,
        batch=2,
        block=16,
        dense_steps=200,
        dense_lr=3e-3,
        steps=60,
        held_out=8,
        calibration=8,
        measured=2,
        feature_steps=150,
        real=64,
        sampled=20,
        sampling_steps=6,
    ),
    "smoke": Settings(
        size=(8, 16, 16),
        heads=2,
        head_dim=16,
        layers=2,
        batch=8,
        block=16,
        inner="eager",
        dense_steps=4,
        dense_lr=3e-3,
        steps=4,
        gate_lr=0.1,
        held_out=1,
        calibration=1,
        measured=1,
        feature_steps=4,
        real=5,
        sampled=5,
        sampling_steps=2,
    ),
}
