"""What a step trains on: videos in an order, noise, times and captions, all of them functions of the step alone.

So a run that was killed goes on with nothing but its step: the sampler has no position, and no generator a state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Draw", "Draws", "as_batches", "even", "shifted"]

_ORDER, _TRAINING, _FITTING, _HELD_OUT = "order", "training", "fitting", "held out"
"""Each with random numbers of its own."""


@dataclass(frozen=True)
class Draw:
    """A batch: noisy latents (B, C, T, H, W), times (B) in (0, 1], text (B, L, D) and the data's velocity."""

    noisy: Tensor
    time: Tensor
    text: Tensor
    velocity: Tensor

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """The keyword arguments of a Wan transformer in ``dtype``."""
        return {
            "hidden_states": self.noisy.to(dtype),
            "timestep": 1000 * self.time,
            "encoder_hidden_states": self.text.to(dtype),
            "return_dict": False,
        }


class Draws:
    """Batches of ``videos`` (pairs of latents and text) on ``device``.

    shift: as of Wan's sampler; times are s u / (1 + (s - 1) u) for u even in (0, 1]: 3 at 480p, 5 at 720p.
    empty: the embedding of no caption, which stands for a share ``drop`` of the captions, for guidance.
    levels: equal parts of (0, 1]; the times of a batch are of one of them, all of (0, 1] as likely as ever.
    """

    def __init__(
        self,
        videos: Sequence[tuple[Tensor, Tensor]],
        held_out: Sequence[tuple[Tensor, Tensor]],
        *,
        batch: int,
        device: torch.device,
        shift: float,
        seed: int,
        empty: Tensor | None = None,
        drop: float = 0.0,
        levels: int = 1,
    ) -> None:
        self.videos, self.held_out, self.batch, self.device = videos, held_out, batch, device
        self.shift, self.seed, self.empty, self.drop, self.levels = shift, seed, empty, drop, levels

    def training(self, position: int) -> Draw:
        """Batch number ``position``: every video once before any comes again, in another order each time."""
        first, chosen = position * self.batch, []
        for index in range(first, first + self.batch):
            epoch, place = divmod(index, len(self.videos))
            order = torch.randperm(len(self.videos), generator=self._random(_ORDER, epoch))
            chosen.append(self.videos[int(order[place])])
        random = self._random(_TRAINING, position)
        if self.empty is not None and self.drop:
            without = torch.rand(self.batch, generator=random) < self.drop
            chosen = [(x, self.empty if no else text) for (x, text), no in zip(chosen, without.tolist(), strict=True)]
        uniform = torch.rand(self.batch, generator=random)
        if self.levels > 1:
            level = int(torch.randint(self.levels, (), generator=random))
            uniform = (level + uniform) / self.levels
        return self._noisy(chosen, uniform, random)

    def fitting(self, count: int, rank: int = 0) -> list[Draw]:
        """``count`` batches of one to calibrate on, their times spread evenly; others for each ``rank``."""
        return [
            self._noisy(
                [self.videos[(rank * count + i) % len(self.videos)]],
                torch.tensor([(i + 0.5) / count]),
                self._random(_FITTING, rank * count + i),
            )
            for i in range(count)
        ]

    def fitting_by_level(self, count: int, rank: int = 0) -> dict[float, list[Draw]]:
        """``count`` batches of one for the middle of each level, of the same videos and noise in all levels."""

        def draw(level: int, i: int) -> Draw:
            uniform = 1 - (level + (i + 0.5) / count) / self.levels
            video, random = self.videos[(rank * count + i) % len(self.videos)], self._random(_FITTING, rank * count + i)
            return self._noisy([video], torch.tensor([uniform]), random)

        return {(level + 0.5) / self.levels: [draw(level, i) for i in range(count)] for level in range(self.levels)}

    def measuring(self, count: int) -> list[Draw]:
        """``count`` batches of one of videos held out, the same in every run of a seed."""
        return [
            self._noisy(
                [self.held_out[i % len(self.held_out)]], torch.tensor([(i + 0.5) / count]), self._random(_HELD_OUT, i)
            )
            for i in range(count)
        ]

    def _random(self, kind: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {kind} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def _noisy(self, chosen: Sequence[tuple[Tensor, Tensor]], uniform: Tensor, random: torch.Generator) -> Draw:
        latents = torch.stack([x for x, _ in chosen])
        noise = torch.randn(latents.shape, generator=random)
        time = shifted(1 - uniform, self.shift)  # uniform is in [0, 1)
        share = time.view(-1, 1, 1, 1, 1)
        noisy, velocity = (1 - share) * latents + share * noise, noise - latents
        text = torch.stack([text for _, text in chosen])
        return Draw(*(tensor.to(self.device, non_blocking=True) for tensor in (noisy, time, text, velocity)))


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Wan's times from ones that are even in (0, 1]."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def even(time: Tensor, shift: float) -> Tensor:
    """What ``shifted`` makes ``time`` of."""
    return time / (shift - (shift - 1) * time)


def as_batches(draws: Sequence[Draw], dtype: torch.dtype) -> list[Mapping[str, Any]]:
    """Batches for ``calibrate``, ``allocate`` and ``allocate_by_time``."""
    return [draw.arguments(dtype) for draw in draws]
