"""A small video diffusion transformer in plain PyTorch: nothing in it is written for sla-compile.

Axes: B batch, C channels, T frames, H height, W width, N tokens, D width of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Block", "SelfAttention", "VideoDiT", "VideoDiTConfig", "denoised", "example"]


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of a ``VideoDiT``. A video of (T, H, W) has T * H * W / (product of ``patch``) tokens."""

    channels: int = 3
    patch: tuple[int, int, int] = (1, 2, 2)
    heads: int = 4
    head_dim: int = 32
    layers: int = 4
    mlp_ratio: int = 2

    @property
    def width(self) -> int:
        """D, the size of a token."""
        return self.heads * self.head_dim


def waves(positions: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """Sines and cosines of ``positions`` (...): (..., width), with wavelengths from 2 pi to ``longest``."""
    frequencies = torch.exp(-math.log(longest) * torch.arange(width // 2, device=positions.device) / (width // 2))
    angles = positions[..., None].float() * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width % 2))


class SelfAttention(nn.Module):
    """Multi-head self-attention with normalised queries and keys."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.norm_q = nn.RMSNorm(config.head_dim)
        self.norm_k = nn.RMSNorm(config.head_dim)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2), v.transpose(1, 2)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, N, D of a head) -> the same."""
        return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the time embedding (adaLN-Zero)."""

    def __init__(self, config: VideoDiTConfig, attention: type[SelfAttention] = SelfAttention) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = attention(config)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width), nn.GELU(), nn.Linear(config.mlp_ratio * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)  # adaLN-Zero: a block starts as the identity
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, N, D) and time (B, D) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def denoised(output: Tensor, noisy: Tensor, time: Tensor, variance: float = 0.17) -> Tensor:
    """The velocity that ``output`` (B, C, T, H, W), a network's, stands for, given its input and ``time`` (B).

    The best linear guess from each pixel of ``noisy`` alone, for data of this ``variance``, plus ``output`` in
    units of what that guess misses (the preconditioning of Karras et al., arXiv 2206.00364, in flow matching's
    terms): the network need not learn to copy its input.
    """
    t = time[:, None, None, None, None].float()
    total = (1 - t).square() * variance + t.square()
    return (t - (1 - t) * variance) / total * noisy + (variance / total).sqrt() * output


class VideoDiT(nn.Module):
    """Predicts the velocity of a noisy video: 3-D patches, positions by sines, adaLN-Zero blocks."""

    def __init__(self, config: VideoDiTConfig | None = None, attention: type[SelfAttention] = SelfAttention) -> None:
        super().__init__()
        self.config = config = config or VideoDiTConfig()
        width = config.width
        self.embed = nn.Conv3d(config.channels, width, kernel_size=config.patch, stride=config.patch)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(config, attention) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.channels * math.prod(config.patch))

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        """video (B, C, T, H, W) and time (B), from 0 (data) to 1 (noise) -> velocity (B, C, T, H, W)."""
        x = self.embed(video)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self.positions(grid, x.device).to(x.dtype)
        embedding = self.time(waves(time * 1000, self.config.width).to(x.dtype))
        for block in self.blocks:
            x = block(x, embedding)
        patches = self.head(self.norm(x)).unflatten(1, grid).unflatten(-1, (-1, *self.config.patch))
        # (B, T', H', W', C, pt, ph, pw) -> (B, C, T', pt, H', ph, W', pw)
        return denoised(patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(video.shape), video, time)

    def positions(self, grid: torch.Size, device: torch.device) -> Tensor:
        """(T' * H' * W', D): a third of the width for each axis."""
        share = self.config.width // 3
        shares = (self.config.width - 2 * share, share, share)
        axes = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
        parts = [waves(axis, part, 100.0) for axis, part in zip(axes, shares, strict=True)]
        return torch.cat(parts, dim=-1).flatten(0, 2)


@torch.no_grad()
def example() -> tuple[VideoDiT, tuple[Tensor, Tensor]]:
    """A model and the arguments of a call, for ``python -m sla_compile explain examples.study.video_dit:example``.

    Weights are random, but such that there is something to see: in half of the heads tokens attend to what is like
    them, and attention is the sharper the earlier the block. The video is one of examples/study/videos.py, with noise.
    """
    from examples.study.videos import parameters, render

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VideoDiT()
        for sharpness, block in zip((6.0, 3.0, 1.5, 1.0), cast("list[Block]", list(model.blocks)), strict=True):
            nn.init.normal_(block.modulation.bias, std=0.5)  # no longer the identity
            for part in (block.attn.qkv.weight, block.attn.qkv.bias):
                query, key, _ = part.unflatten(0, (3, model.config.heads, -1))
                key[::2] = query[::2]
            block.attn.norm_q.weight.fill_(sharpness)
        video, time = render(parameters(1, seed=0), (16, 32, 32)), torch.tensor([0.3])
        return model, (0.7 * video + 0.3 * torch.randn_like(video), time)
