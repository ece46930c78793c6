"""A Fréchet distance between sets of videos, on features of a small network trained here for the purpose.

The network sees clean and spoiled videos and predicts the numbers that a video was made from, and how much and in
which way it was spoiled; its features are the layer below those predictions. Distances are comparable only for one
such network, one reference set and one number of videos.

Axes: B batch, C channels, T frames, H height, W width, F features, P parameters of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.study.videos import PARAMETERS, Data, parameters, render

__all__ = ["SPOILERS", "FeatureNet", "Moments", "distance", "moments", "train_features"]

FEATURES = 32
_SEED = 2_000_000


def _blurred(videos: Tensor, amount: Tensor) -> Tensor:
    blurred = F.avg_pool3d(videos, kernel_size=(1, 5, 5), stride=1, padding=(0, 2, 2), count_include_pad=False)
    return torch.lerp(videos, blurred, amount)


def _noisy(videos: Tensor, amount: Tensor) -> Tensor:
    return videos + 0.5 * amount * torch.randn_like(videos)


def _mixed(videos: Tensor, amount: Tensor) -> Tensor:
    """Another video shines through."""
    return torch.lerp(videos, videos.roll(1, 0), amount / 2)


def _torn(videos: Tensor, amount: Tensor) -> Tensor:
    """The last frames are those of another video: half of them at amount 1."""
    frames = videos.shape[2]
    moments = torch.arange(frames, device=videos.device).view(1, 1, frames, 1, 1)
    return torch.where(moments >= frames * (1 - amount / 2), videos.roll(1, 0), videos)


SPOILERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "blur": _blurred,
    "noise": _noisy,
    "mixture": _mixed,
    "tear": _torn,
}
"""Ways to spoil videos (B, C, T, H, W), by an amount from 0 to 1 that broadcasts over them."""


class FeatureNet(nn.Module):
    """Videos (B, 3, T, H, W) -> features (B, F)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, width, kernel_size=(2, 4, 4), stride=(2, 4, 4)),
            nn.GELU(),
            nn.Conv3d(width, width, kernel_size=3, stride=2, padding=1),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv3d(width, width, kernel_size=3, padding=1),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.AdaptiveAvgPool3d(2),
            nn.Flatten(),
            nn.Linear(8 * width, FEATURES),
        )
        self.told = nn.Linear(FEATURES, PARAMETERS + len(SPOILERS))

    def forward(self, videos: Tensor) -> Tensor:
        """videos (B, 3, T, H, W) -> (B, F)."""
        return self.body(videos)


def train_features(data: Data, steps: int, batch: int = 16, lr: float = 2e-3) -> FeatureNet:
    """A ``FeatureNet`` that has learned from ``steps`` batches of videos of the size of ``data``."""
    devices = [torch.cuda.current_device()] if data.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEED)
        net = FeatureNet().to(data.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            numbers = parameters(batch, _SEED + step, data.device)
            # half of the batch stays clean; each way is used on half of the others
            amounts = torch.rand(len(SPOILERS), batch, device=data.device)
            amounts = amounts * (torch.rand_like(amounts) < 0.5) * (torch.arange(batch, device=data.device) % 2)
            spoiled = render(numbers, data.size)
            for spoil, amount in zip(SPOILERS.values(), amounts, strict=True):
                spoiled = spoil(spoiled, amount[:, None, None, None, None])
            told_numbers, told_amounts = net.told(net(spoiled)).split((PARAMETERS, len(SPOILERS)), dim=1)
            # most of the numbers are hard to tell, and would hide how well the amounts are told
            loss = F.mse_loss(told_numbers, numbers) + 4 * F.mse_loss(told_amounts, amounts.mT)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return net.requires_grad_(False).eval()


Moments = tuple[Tensor, Tensor]
"""Mean (F) and covariance (F, F) of features, float64."""


@torch.no_grad()
def moments(net: FeatureNet, batches: Iterable[Tensor]) -> Moments:
    """Mean and covariance of the features of all videos in ``batches``; there must be more videos than features."""
    features = torch.cat([net(videos.float()).double() for videos in batches])
    if len(features) <= FEATURES:
        raise ValueError(f"batches: {len(features)} videos; accepted: more than {FEATURES}, the number of features")
    return features.mean(0), torch.cov(features.T)


def distance(first: Moments, second: Moments) -> float:
    """The Fréchet distance of two normal distributions: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    (mean1, cov1), (mean2, cov2) = first, second
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # (C1 C2)^(1/2) has the trace of (R C2 R)^(1/2), R the root of C1, which is symmetric
    shared = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared)
