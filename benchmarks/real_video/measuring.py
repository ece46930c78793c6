"""What is measured of a model: held-out loss, samples from the same noise, their distance to the dense model's.

Axes: B batch, T frames, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.real_video.data import Batch, Windows, flow_loss, shifted
from benchmarks.real_video.model import RotaryVideoDiT

__all__ = ["Sampler", "autocast", "feature_distance", "held_out_loss", "psnr", "velocity_error"]

NOISE_SEED = 3_000_000


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def held_out_loss(model: RotaryVideoDiT, batches: Sequence[Batch]) -> list[float]:
    """The mean flow loss, then that of each quarter of the times, from least noise to most."""
    losses = []
    for video, time, velocity in batches:
        with autocast(video.device):
            losses.append(flow_loss(model(video, time), velocity))
    ordered = torch.cat(losses)[torch.cat([time for _, time, _ in batches]).argsort()]
    return [ordered.mean().item(), *(part.mean().item() for part in ordered.chunk(4))]


@torch.no_grad()
def velocity_error(model: RotaryVideoDiT, dense: RotaryVideoDiT, batches: Sequence[Batch]) -> list[float]:
    """|v - v_dense| / |v_dense| over all videos, then in each quarter of the times, from least noise to most."""
    found = []
    for video, time, _ in batches:
        with autocast(video.device):
            mine, wanted = (one(video, time)[:, :, 1:].float() for one in (model, dense))
        found.append(torch.stack([(mine - wanted).square().flatten(1).sum(1), wanted.square().flatten(1).sum(1)]))
    ordered = torch.cat(found, dim=1)[:, torch.cat([time for _, time, _ in batches]).argsort()]
    sums = torch.stack([part.sum(1) for part in (ordered, *ordered.chunk(4, dim=1))])
    return (sums[:, 0] / sums[:, 1]).sqrt().tolist()


class Sampler:
    """Euler's method from the same noise and first frames, those of held-out clips."""

    def __init__(self, windows: Windows, batches: int, steps: int) -> None:
        self.real = [windows.videos(NOISE_SEED + index) for index in range(batches)]
        self.noise = []
        for index, video in enumerate(self.real):
            generator = torch.Generator(video.device).manual_seed(NOISE_SEED + index)
            self.noise.append(torch.randn(video.shape, generator=generator, device=video.device))
        self.times = shifted(torch.linspace(1, 0, steps + 1)).tolist()

    @torch.no_grad()
    def __call__(self, model: RotaryVideoDiT, first: RotaryVideoDiT | None = None, steps: int = 0) -> Tensor:
        """Videos (B, 3, T, S, S), -1 to 1. The first ``steps`` steps are made by ``first``, where it is given."""
        found = []
        for real, noise in zip(self.real, self.noise, strict=True):
            video = noise.clone()
            for number, (now, then) in enumerate(pairwise(self.times)):
                video[:, :, 0] = real[:, :, 0]
                used = first if first is not None and number < steps else model
                with autocast(video.device):
                    velocity = used(video, torch.full((len(video),), now, device=video.device))
                video = video + (then - now) * velocity.float()
            video[:, :, 0] = real[:, :, 0]
            found.append(video.clamp(-1, 1))
        return torch.cat(found)


def psnr(videos: Tensor, wanted: Tensor) -> float:
    """Mean over videos (B, 3, T, S, S) of the peak signal-to-noise ratio in dB, without the given first frame."""
    error = (videos - wanted)[:, :, 1:].square().flatten(1).mean(1).clamp(min=1e-10)
    return (10 * (4 / error).log10()).mean().item()


@torch.no_grad()
def feature_distance(dense: RotaryVideoDiT, videos: Tensor, wanted: Tensor) -> float:
    """|f(videos) - f(wanted)| / |f(wanted)|, f what the first half of the dense model makes of a video at time 0.05."""
    return ((_features(dense, videos) - _features(dense, wanted)).norm() / _features(dense, wanted).norm()).item()


def _features(dense: RotaryVideoDiT, videos: Tensor) -> Tensor:
    found = []
    for video in videos.split(4):
        time = torch.full((len(video),), 0.05, device=video.device)
        with autocast(video.device):
            x, embedding, turn = dense.enter(video, time)
            for block in dense.attentions()[: len(dense.blocks) // 2]:
                x = block(x, embedding, turn)
        found.append(x.float())
    return torch.cat(found)
