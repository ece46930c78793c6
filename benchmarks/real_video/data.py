"""Windows of real clips and the batches of flow matching; the batch of a seed is the same on the same kind of device.

A third of the videos are one frame under a smooth pan, zoom and turn: how a camera moves is the rest of the data's.
Axes: B batch, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["WHOLE", "Batch", "Windows", "by_time", "noisy", "part_middles", "shifted", "unshifted"]

Batch = tuple[Tensor, Tensor, Tensor]
"""The video (B, 3, T, S, S) noisy but for frame 0, its time (B), the velocity that flow matching wants (as video)."""

WHOLE = slice(None)
"""All videos of a batch."""


def shifted(uniform: Tensor, shift: float = 3.0) -> Tensor:
    """Times of flow matching, from 0 (data) to 1 (noise), moved towards noise as video models do."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def unshifted(time: Tensor, shift: float = 3.0) -> Tensor:
    """The reverse of ``shifted``: in this unit the steps of a sampler are even."""
    return time / (shift - (shift - 1) * time)


def part_middles(parts: int) -> tuple[float, ...]:
    """The middle, ``unshifted``, of each of so many parts of the times with equally many steps of a sampler."""
    return tuple((part + 0.5) / parts for part in range(parts))


def by_time(batches: Sequence[Batch]) -> list[Batch]:
    """The same videos in batches of like times, from least noise to most."""
    order = torch.cat([time for _, time, _ in batches]).argsort()
    parts = [torch.cat(part)[order].split(len(batches[0][1])) for part in zip(*batches, strict=True)]
    return list(zip(*parts, strict=True))


def noisy(video: Tensor, time: Tensor, noise: Tensor) -> Batch:
    """The batch of clean ``video`` (B, 3, T, S, S), ``time`` (B) and ``noise`` like video."""
    t = time[:, None, None, None, None]
    mixed = (1 - t) * video + t * noise
    mixed[:, :, 0] = video[:, :, 0]
    return mixed, time, noise - video


def flow_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """The squared error (B) of the frames that are not given."""
    return (predicted.float() - velocity)[:, :, 1:].square().flatten(1).mean(1)


@dataclass(frozen=True)
class Windows:
    """Square windows of ``clips``, each (T, 3, H, W) uint8 on one device.

    size: (T, S) of a video; oversample: pixels drawn for each pixel and axis, averaged.
    """

    clips: Sequence[Tensor]
    size: tuple[int, int]
    batch: int
    oversample: int = 2
    moving: float = 1 / 3

    @property
    def device(self) -> torch.device:
        """Where the clips are."""
        return self.clips[0].device

    def resized(self, size: tuple[int, int], batch: int, oversample: int) -> Windows:
        """The same clips in windows of another size."""
        return replace(self, size=size, batch=batch, oversample=oversample)

    def videos(self, seed: int, part: slice = WHOLE) -> Tensor:
        """Clean videos (B, 3, T, S, S), -1 to 1; of all those of the seed, those of ``part``."""
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.rand(12, generator=generator).tolist() for _ in range(self.batch)]
        return torch.stack([self._window(draw) for draw in draws[part]])

    def __call__(self, seed: int, part: slice = WHOLE) -> Batch:
        """A training batch; of all its videos, those of ``part``."""
        frames, side = self.size
        generator = torch.Generator(self.device).manual_seed(seed + 500_000_000)
        uniform = torch.rand(self.batch, generator=generator, device=self.device)
        noise = torch.randn((self.batch, 3, frames, side, side), generator=generator, device=self.device)
        return noisy(self.videos(seed, part), shifted(uniform[part]), noise[part])

    def held_out(self, batches: int, seed: int = 1_000_000) -> list[Batch]:
        """Batches for measuring: times spread evenly."""
        count = batches * self.batch
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        times = shifted((order + 0.5) / count).to(self.device)
        found = []
        for number, time in enumerate(times.split(self.batch)):
            video = self.videos(seed + number)
            generator = torch.Generator(self.device).manual_seed(seed + number)
            found.append(noisy(video, time, torch.randn(video.shape, generator=generator, device=self.device)))
        return found

    def of_parts(self, parts: int, batches: int, seed: int) -> list[list[Batch]]:
        """For each part of the times as many batches: the same videos and noise, times spread evenly in it."""
        found: list[list[Batch]] = [[] for _ in range(parts)]
        for number in range(batches):
            video = self.videos(seed + number)
            generator = torch.Generator(self.device).manual_seed(seed + number)
            noise = torch.randn(video.shape, generator=generator, device=self.device)
            within = (torch.arange(number, batches * self.batch, batches) + 0.5) / (batches * self.batch)
            for part, own in enumerate(found):
                own.append(noisy(video, shifted((part + within) / parts).to(self.device), noise))
        return found

    def _window(self, draw: Sequence[float]) -> Tensor:
        """One video (3, T, S, S), from 12 numbers, each 0 to 1."""
        frames, side = self.size
        clip = self.clips[int(draw[0] * len(self.clips))]
        length, _, height, width = clip.shape
        stride = 2 if draw[1] < 0.4 and length > 2 * frames else 1
        start = int(draw[2] * (length - stride * (frames - 1)))
        moves = draw[3] < self.moving
        shown = clip[start : start + 1] if moves else clip[start : start + stride * (frames - 1) + 1 : stride]
        shown = shown.float().div_(127.5).sub_(1).expand(frames, -1, -1, -1)
        theta = _camera(draw[4:], frames, height, width, moves).to(self.device)
        grid = F.affine_grid(theta, [frames, 3, side * self.oversample, side * self.oversample], align_corners=False)
        drawn = F.grid_sample(shown, grid, padding_mode="reflection", align_corners=False)
        return F.avg_pool2d(drawn, self.oversample).transpose(0, 1)


def _camera(draw: Sequence[float], frames: int, height: int, width: int, moves: bool) -> Tensor:
    """What each frame shows of its picture, affine maps (T, 2, 3); the same in all frames unless it ``moves``."""
    zoom, turn, pan_x, pan_y, size, at_x, at_y, flip = draw
    along = torch.linspace(-1, 1, frames) * float(moves)
    side = min(height, width) * (0.55 + 0.4 * size)
    radius = side / 2 * torch.exp(0.4 * (zoom - 0.5) * along)
    angle = 0.3 * (turn - 0.5) * along
    centre_x = side / 2 + at_x * (width - side) + 0.5 * (pan_x - 0.5) * side * along
    centre_y = side / 2 + at_y * (height - side) + 0.5 * (pan_y - 0.5) * side * along
    mirror = -1.0 if flip < 0.5 else 1.0
    rows_x = torch.stack([angle.cos() * radius * mirror, -angle.sin() * radius, centre_x - width / 2], -1) * 2 / width
    rows_y = torch.stack([angle.sin() * radius * mirror, angle.cos() * radius, centre_y - height / 2], -1) * 2 / height
    return torch.stack([rows_x, rows_y], 1)
