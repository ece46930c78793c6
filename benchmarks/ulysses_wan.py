"""A Wan2.1 of plain PyTorch whose ranks exchange tokens for heads (Ulysses) by functional collectives.

Each rank holds N/P of the tokens; inside an attention it holds all N tokens of H/P heads. Axes: B batch, N tokens of
all ranks, P ranks, H heads, D head dimension.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODELS = {
    "1.3B": {"heads": 12, "head_dim": 128, "ffn": 8960, "layers": 30, "text": 512, "text_dim": 4096},
    "14B": {"heads": 40, "head_dim": 128, "ffn": 13824, "layers": 40, "text": 512, "text_dim": 4096},
    "tiny": {"heads": 2, "head_dim": 16, "ffn": 64, "layers": 1, "text": 8, "text_dim": 32},
}
"""Wan2.1's sizes, and one to try the benchmark with."""


def heads_for_tokens(x: Tensor, group: Any) -> Tensor:
    """x (B, N/P, H, D) of this rank's tokens -> (B, H/P, N, D) of all tokens, this rank's heads.

    What is received is read through strides. What is sent is a copy, or what made x, where Inductor fuses the two.
    """
    if group is None:
        return x.transpose(1, 2)
    ranks = dist.get_world_size(group)
    parts = x.unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4).contiguous()  # (P, N/P, B, H/P, D)
    sent = collectives.all_to_all_single_autograd(parts, None, None, group)
    return sent.flatten(0, 1).permute(1, 2, 0, 3)


def projected_heads(x: Tensor, layer: nn.Linear, heads: int, group: Any) -> Tensor:
    """``layer`` of x (B, N/P, C) -> (B, H/P, N, D), projected for each rank apart, where what is sent has to lie."""
    if group is None:
        return layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    ranks = dist.get_world_size(group)
    rows = zip(layer.weight.chunk(ranks), layer.bias.chunk(ranks), strict=True)
    tokens = x.flatten(0, 1)
    parts = torch.cat([F.linear(tokens, weight, bias) for weight, bias in rows])  # (P B N/P, H/P D)
    sent = collectives.all_to_all_single_autograd(parts, None, None, group)
    by_rank = sent.unflatten(0, (ranks, *x.shape[:2])).unflatten(-1, (heads // ranks, -1))
    return by_rank.permute(1, 3, 0, 2, 4).flatten(2, 3)


def tokens_for_heads(x: Tensor, group: Any) -> Tensor:
    """x (B, H/P, N, D) -> (B, N/P, H, D). Nothing is copied to be sent where B is 1 and x in memory (B, N, H/P, D)."""
    if group is None:
        return x.transpose(1, 2)
    ranks = dist.get_world_size(group)
    parts = x.permute(2, 0, 1, 3).contiguous()  # (N, B, H/P, D), the tokens of one rank after those of another
    sent = collectives.all_to_all_single_autograd(parts, None, None, group).unflatten(0, (ranks, -1))
    return sent.permute(2, 1, 0, 3, 4).flatten(2, 3)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, N, H, D) turned by ``turn`` (2, N, D / 2), float32."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = turn[:, None, :, None].unbind(0)
    halves = first * cosine - second * sine, second * cosine + first * sine
    return torch.cat([half.to(x.dtype) for half in halves], dim=-1)  # written to memory before it is packed, if it is


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, group: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)
        self.heads, self.group = heads, group

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        # In this order each may travel while the next is projected: Inductor's passes of OVERLAPS wait that late.
        v = projected_heads(x, self.v, self.heads, self.group)
        k = rotated(self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1)), turns[1])
        k = heads_for_tokens(k, self.group)
        q = rotated(self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1)), turns[0])
        q = heads_for_tokens(q, self.group)
        return self.out(tokens_for_heads(F.scaled_dot_product_attention(q, k, v), self.group).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, text), (self.v, text))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _keep_exchanged(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    kept = op is torch.ops._c10d_functional.wait_tensor.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


keep_exchanged = functools.partial(create_selective_checkpoint_contexts, _keep_exchanged)
"""A ``context_fn`` of `checkpoint` with which the backward does not exchange anew what the forward has exchanged."""


class Block(nn.Module):
    """One block; with gradients, it keeps its input alone, and computes the rest again in the backward."""

    def __init__(self, width: int, heads: int, ffn: int, group: Any, kept: dict[str, Any]) -> None:
        super().__init__()
        self.attn1, self.attn2 = SelfAttention(width, heads, group), CrossAttention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, width))
        self.norm1, self.norm3 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(width)
        self.scale_shift = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.kept = kept

    def forward(self, x: Tensor, text: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        # Inside what is compiled, so that the backward and what it computes again are one graph.
        if torch.is_grad_enabled():
            return checkpoint(self._forward, x, text, turns, use_reentrant=False, **self.kept)
        return self._forward(x, text, turns)

    def _forward(self, x: Tensor, text: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift.unbind(0)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1, turns)
        x = x + self.attn2(self.norm2(x), text)
        return x + gate2 * self.ffn(self.norm3(x) * (1 + scale2) + shift2)


class Wan(nn.Module):
    """The blocks of a Wan2.1 and what is around them; each rank gives and gets its own tokens.

    ``group``: the ranks that exchange, None for one rank alone; ``kept``: further keywords of `checkpoint`.
    """

    def __init__(self, sizes: dict[str, int], group: Any, kept: dict[str, Any]) -> None:
        super().__init__()
        width = sizes["heads"] * sizes["head_dim"]
        self.embed, self.head = nn.Linear(64, width), nn.Linear(width, 64)
        self.text = nn.Linear(sizes["text_dim"], width)
        blocks = (Block(width, sizes["heads"], sizes["ffn"], group, kept) for _ in range(sizes["layers"]))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, text: Tensor, turn: Tensor) -> Tensor:
        """x (B, N/P, 64), text (B, L, C), turn (2, N/P, D / 2) -> (B, N/P, 64)."""
        x, text = self.embed(x), self.text(text)
        # Of queries and keys each its own: Inductor fuses what reads one tensor, and k would wait for q's projection.
        turns = turn, turn.clone()
        for block in self.blocks:
            x = block(x, text, turns)
        return self.head(x)
