"""The video DiT of the experiment: rotary positions in three axes, given the first frame (image to video).

Axes: B batch, T frames, N tokens, H heads, D head dimension, C width of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.real_video.data import unshifted
from examples.study.video_dit import VideoDiTConfig, denoised, waves
from sla_compile import SparsityPlan

__all__ = ["CONFIG", "Block", "RotaryVideoDiT", "fast_attention", "rotate", "rotation", "tile_order"]

CONFIG = VideoDiTConfig(patch=(1, 4, 4), heads=6, head_dim=64, layers=8, mlp_ratio=4)


def fast_attention() -> AbstractContextManager[None]:
    """Dense attention by cuDNN where it can: on an H100 faster than what PyTorch takes by itself."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def rotation(grid: Sequence[int], head_dim: int, device: torch.device | str) -> Tensor:
    """Cosines and sines (2, N, D / 2) of the angles of every token of ``grid`` (T', H', W').

    A quarter of the pairs turns with time, the others with height and width, the wavelengths from 2 pi to 200 pi.
    """
    pairs = head_dim // 2
    shares = (pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8)
    axes = torch.meshgrid(*(torch.arange(size, device=device).float() for size in grid), indexing="ij")
    angles = torch.cat(
        [
            axis[..., None] * 100.0 ** (-torch.arange(share, device=device) / max(share, 1))
            for axis, share in zip(axes, shares, strict=True)
        ],
        dim=-1,
    ).flatten(0, 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, N, H, D) turned by ``turn`` (2, N, D / 2), float32."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = turn[:, None, :, None].unbind(0)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def tile_order(grid: Sequence[int], tile: Sequence[int], device: torch.device | str) -> Tensor:
    """The tokens (N) of ``grid`` in the order of its tiles, each tile's together."""
    tokens = torch.arange(math.prod(grid), device=device)
    sizes = [size for whole, part in zip(grid, tile, strict=True) for size in (whole // part, part)]
    return tokens.view(sizes).permute(0, 2, 4, 1, 3, 5).flatten()


class Before(nn.Module):
    """What comes before an attention: x and time -> q, k, v and the five modulations left to use."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.norm_q = nn.RMSNorm(config.head_dim)
        self.norm_k = nn.RMSNorm(config.head_dim)
        self.modulation = nn.Linear(config.width, 6 * config.width)
        nn.init.zeros_(self.modulation.weight)  # adaLN-Zero: a block starts as the identity
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, N, C), time (B, C), turn (2, N, D / 2) -> q, k, v (B, H, N, D) of one dtype, modulation (B, 4, C)."""
        modulation = self.modulation(F.silu(time)).unflatten(-1, (6, -1))
        normed = self.norm(x) * (1 + modulation[:, None, 0]) + modulation[:, None, 1]
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotate(self.norm_q(q), turn).to(v.dtype), rotate(self.norm_k(k), turn).to(v.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), modulation[:, 2:]


class After(nn.Module):
    """What comes after an attention: its projection, and the MLP."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        width = config.width
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width), nn.GELU(), nn.Linear(config.mlp_ratio * width, width)
        )

    def forward(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """x (B, N, C), attended (B, H, N, D), modulation (B, 4, C) -> (B, N, C)."""
        gate1, scale2, shift2, gate2 = modulation[:, :, None].unbind(1)
        x = x + gate1 * self.out(attended.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class Block(nn.Module):
    """Attention and MLP. ``form`` takes the place of dense attention where it is not None."""

    form: nn.Module | None

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.before, self.after = Before(config), After(config)
        self.form = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, N, D) -> the same."""
        return F.scaled_dot_product_attention(q, k, v) if self.form is None else self.form(q, k, v)

    def forward(self, x: Tensor, time: Tensor, turn: Tensor) -> Tensor:
        """x (B, N, C) and time (B, C) -> (B, N, C)."""
        q, k, v, modulation = self.before(x, time, turn)
        return self.after(x, self.attend(q, k, v), modulation)


class RotaryVideoDiT(nn.Module):
    """Predicts the velocity of a noisy video whose first frame is clean.

    tile: tokens stand in tiles of this shape (frames, rows, columns) inside the blocks, in raster order without it.
    plan: how many blocks are critical at the mean time, ``unshifted``, of a batch; without it as many at all times.
    """

    tile: tuple[int, int, int] | None
    plan: SparsityPlan | None

    def __init__(self, config: VideoDiTConfig = CONFIG) -> None:
        super().__init__()
        self.config, self.tile, self.plan = config, None, None
        width = config.width
        self.embed = nn.Conv3d(config.channels + 1, width, kernel_size=config.patch, stride=config.patch)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.channels * math.prod(config.patch))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def compile_blocks(self) -> RotaryVideoDiT:
        """Compile what stands around the attentions; their form can then change without a new compile."""
        for block in self.attentions():
            block.before.compile(dynamic=False)
            block.after.compile(dynamic=False)
        return self

    def attentions(self) -> list[Block]:
        """The blocks."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def enter(self, video: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the first block takes: x (B, N, C) float32, the time's embedding (B, C), the rotation."""
        if self.plan is not None:
            self.plan.set(self, unshifted(time))
        given = torch.zeros_like(video[:, :1])
        given[:, :, 0] = 1
        x = self.embed(torch.cat([video, given], dim=1))
        grid = x.shape[2:]
        x, turn = x.flatten(2).mT.float(), rotation(grid, self.config.head_dim, video.device)
        if self.tile is not None:
            order = tile_order(grid, self.tile, video.device)
            x, turn = x[:, order], turn[:, order]
        return x, self.time(waves(time * 1000, self.config.width)), turn

    def leave(self, x: Tensor, video: Tensor, time: Tensor) -> Tensor:
        """What the last block gives, x (B, N, C), as a velocity (B, 3, T, height, width)."""
        grid = [size // part for size, part in zip(video.shape[2:], self.config.patch, strict=True)]
        if self.tile is not None:
            x = x[:, tile_order(grid, self.tile, video.device).argsort()]
        patches = self.head(self.norm(x)).unflatten(1, grid).unflatten(-1, (-1, *self.config.patch))
        # (B, T', H', W', 3, pt, ph, pw) -> (B, 3, T', pt, H', ph, W', pw)
        return denoised(patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(video.shape), video, time)

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        """video (B, 3, T, height, width), clean in frame 0, and time (B) of the rest -> velocity, as video."""
        x, embedding, turn = self.enter(video, time)
        for block in self.blocks:
            x = block(x, embedding, turn)
        return self.leave(x, video, time)
