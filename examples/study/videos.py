"""Procedural videos and the batches of flow matching: everything follows from a seed, made on the fly.

A video is textured shapes that cross a drifting, textured ground, hide one another, and bounce off the borders,
under one flickering light. It is made from ``PARAMETERS`` numbers, and every token tells a little about each of
them: a good denoiser has to gather what it knows about texture, motion and light from the whole video.

Axes: B batch, C channels, T frames, H height, W width, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PARAMETERS", "Batch", "Data", "parameters", "render"]

WAVES, SHAPES = 3, 3
_PER_WAVE, _PER_SHAPE, _LIGHT, _GROUND = 7, 15, 3, 3
PARAMETERS = WAVES * _PER_WAVE + SHAPES * _PER_SHAPE + _LIGHT + _GROUND

Batch = tuple[Tensor, Tensor, Tensor]
"""The noisy video (B, C, T, H, W), its time (B), the velocity that flow matching wants (B, C, T, H, W)."""

HELD_OUT_SEED = 1_000_000


def parameters(count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers (count, P) in [0, 1) from which ``render`` makes ``count`` videos. A GPU draws others than a CPU."""
    return torch.rand(count, PARAMETERS, generator=torch.Generator(device).manual_seed(seed), device=device)


def render(numbers: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The videos (B, 3, T, H, W), about -1 to 1, of ``numbers`` (B, P); ``size`` is (T, H, W)."""
    frames, height, width = size
    device = numbers.device
    moments = torch.arange(frames, device=device).view(1, frames, 1, 1)
    rows = torch.arange(height, device=device).view(1, 1, height, 1)
    columns = torch.arange(width, device=device).view(1, 1, 1, width)
    waves, shapes, light, ground = numbers.split((WAVES * _PER_WAVE, SHAPES * _PER_SHAPE, _LIGHT, _GROUND), dim=1)
    video = (ground - 0.5)[:, :, None, None, None].expand(-1, -1, frames, height, width)
    for wave in waves.unflatten(1, (WAVES, _PER_WAVE)).unbind(1):
        video = video + _wave(wave, moments, rows, columns, height)
    for shape in shapes.unflatten(1, (SHAPES, _PER_SHAPE)).unbind(1):
        cover, paint = _shape(shape, moments, rows, columns, (height, width))
        video = video + cover * (paint - video)
    return video * _flicker(light, moments)[:, None]


def _scalars(numbers: Tensor) -> list[Tensor]:
    """The columns of ``numbers`` (B, n), each (B, 1, 1, 1)."""
    return [column[:, None, None, None] for column in numbers.unbind(1)]


def _wave(numbers: Tensor, moments: Tensor, rows: Tensor, columns: Tensor, height: int) -> Tensor:
    """A drifting plane wave in one colour, (B, 3, T, H, W)."""
    length, angle, drift, phase, *_ = _scalars(numbers)
    colour = 0.9 * (numbers[:, 4:7] - 0.5)[:, :, None, None, None]
    frequency = 2 * math.pi / (height * (0.15 + 0.45 * length))
    across = rows * torch.sin(2 * math.pi * angle) + columns * torch.cos(2 * math.pi * angle)
    travel = height * 0.06 * (drift - 0.5) * moments
    return colour * torch.sin(frequency * (across - travel) + 2 * math.pi * phase)[:, None]


def _shape(
    numbers: Tensor, moments: Tensor, rows: Tensor, columns: Tensor, borders: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """A striped disc or square on its way: where it is, (B, 1, T, H, W), and its colours, (B, 3, T, H, W)."""
    radius, kind, y, x, speed_y, speed_x, length, angle, phase, *_ = _scalars(numbers)
    height, width = borders
    down = _bounced(y * height + 0.12 * height * (speed_y - 0.5) * moments, height)
    right = _bounced(x * width + 0.12 * width * (speed_x - 0.5) * moments, width)
    dy, dx = rows - down, columns - right
    distance = torch.where(kind < 0.5, (dy.square() + dx.square()).sqrt(), torch.maximum(dy.abs(), dx.abs()))
    # one pixel of soft edge
    cover = (min(borders) * (0.12 + 0.14 * radius) - distance + 0.5).clamp(0, 1)[:, None]
    across = dy * torch.sin(2 * math.pi * angle) + dx * torch.cos(2 * math.pi * angle)
    stripes = torch.sin(2 * math.pi * (across / (min(borders) * (0.10 + 0.20 * length)) + phase))[:, None]
    colours = 1.6 * (numbers[:, 9:15] - 0.5)[:, :, None, None, None]
    bright, dark = colours.chunk(2, dim=1)
    return cover, (bright + dark) / 2 + stripes * (bright - dark) / 2


def _bounced(path: Tensor, border: int) -> Tensor:
    """``path`` reflected into [0, border]: a triangle wave."""
    return border - (torch.remainder(path, 2 * border) - border).abs()


def _flicker(numbers: Tensor, moments: Tensor) -> Tensor:
    """The light over time, (B, T, 1, 1)."""
    depth, speed, phase = _scalars(numbers)
    return 1 + 0.5 * depth * torch.sin(2 * math.pi * ((0.03 + 0.12 * speed) * moments + phase))


@dataclass(frozen=True)
class Data:
    """Noisy videos; the batch of a seed is always the same on the same kind of device.

    ``shift`` moves the times towards noise, as video models do: a long video has so many tokens that a little
    noise hides nothing.
    """

    size: tuple[int, int, int]
    batch: int
    device: torch.device
    shift: float = 3.0

    def __call__(self, seed: int) -> Batch:
        """A training batch."""
        return self.noisy(*self.draw(seed))

    def draw(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """All that is random in a training batch, drawn on the device: what ``noisy`` takes."""
        generator = torch.Generator(self.device).manual_seed(seed + 500_000_000)
        uniform = torch.rand(self.batch, generator=generator, device=self.device)
        return parameters(self.batch, seed, self.device), uniform, self._normal(generator)

    def held_out(self, batches: int) -> list[Batch]:
        """Batches that training never sees, the same on every device, their times spread evenly."""
        count = batches * self.batch
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        uniform = (torch.randperm(count, generator=generator) + 0.5) / count
        numbers = parameters(count, HELD_OUT_SEED)
        return [
            self.noisy(*(drawn.to(self.device) for drawn in (numbers[rows], uniform[rows], self._normal(generator))))
            for rows in torch.arange(count).split(self.batch)
        ]

    def videos(self, batches: int, seed: int) -> Iterator[Tensor]:
        """Clean videos, a batch at a time, the same on every device."""
        for numbers in parameters(batches * self.batch, HELD_OUT_SEED + 1 + seed).split(self.batch):
            yield render(numbers.to(self.device), self.size)

    def noise(self, batches: int, seed: int) -> Iterator[Tensor]:
        """Where samples begin, a batch at a time, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(batches):
            yield self._normal(generator).to(self.device)

    def _normal(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.batch, 3, *self.size, generator=generator, device=generator.device)

    def noisy(self, numbers: Tensor, uniform: Tensor, noise: Tensor) -> Batch:
        """The batch of ``numbers`` (B, P), of times that follow from ``uniform`` (B), and of ``noise``."""
        video = render(numbers, self.size)
        time = self.shift * uniform / (1 + (self.shift - 1) * uniform)
        t = time[:, None, None, None, None]
        return (1 - t) * video + t * noise, time, noise - video
