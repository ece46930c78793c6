"""Attention of each query block to listed key blocks and to virtual keys, in one softmax; differentiable.

Triton kernels for the experiment alone, simple rather than fast, and the same in plain PyTorch. Axes: B batch,
H heads, N tokens, D head dimension, R query (and as many key) blocks of N / R tokens, M virtual keys, a multiple of
N / R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_video import listed_kernels as kernels

__all__ = ["Routing", "dense_reference", "listed_attention"]


@dataclass(frozen=True)
class Routing:
    """The critical key blocks of each query block, as a map and as lists.

    critical: (B, H, R, R) bool, at least one key block in each row.
    """

    critical: Tensor

    def block(self, tokens: int) -> int:
        """Tokens in a block."""
        return tokens // self.critical.shape[-1]

    def lists(self) -> tuple[Tensor, Tensor]:
        """How many critical key blocks each query block has (B, H, R) int32, and which (B, H, R, R) int32."""
        return _lists(self.critical)

    def transposed(self) -> tuple[Tensor, Tensor]:
        """The same for each key block: the query blocks to which it is critical."""
        return _lists(self.critical.mT)


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    chosen = chosen.contiguous()  # the kernels take no strides
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int()


class _Listed(torch.autograd.Function):
    """(out, share) of q, k, v, virtual keys and values, and the bias of virtual keys."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, bias: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # the kernels take no strides
        keys, values, bias = keys.contiguous(), values.contiguous(), bias.contiguous()
        out, share, lse = kernels.forward(q, k, v, keys, values, bias, *routing.lists(), routing.block(q.shape[2]))
        ctx.save_for_backward(q, k, v, keys, values, bias, out, share, lse)
        ctx.routing = routing
        return out, share

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keys, values, bias, out, share, lse = ctx.saved_tensors
        d_out, d_share = gradients[0].contiguous(), gradients[1].contiguous()
        # the share is one more channel, whose value is 1 for virtual keys and 0 for the others
        delta = (d_out.float() * out.float()).sum(-1) + d_share * share
        routing: Routing = ctx.routing
        saved = (q, k, v, keys, values, bias, d_out, d_share, lse, delta)
        return (*kernels.backward(*saved, routing.lists(), routing.transposed(), routing.block(q.shape[2])), None)


def listed_attention(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, virtual: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, H, N, D) and the share (B, H, N) float32 that virtual keys have in the softmax.

    q, k, v (B, H, N, D); ``virtual`` holds keys and values (B, H, M, D) and bias (B, H, R, M) float32, which is added
    to the logits of a query block, -inf where a virtual key is not to be seen. Logits are divided by sqrt(D).
    """
    if virtual is None:
        nothing = q[:, :, :0]
        virtual = nothing, nothing, q.new_zeros(*routing.critical.shape[:3], 0, dtype=torch.float32)
    keys, values, bias = virtual
    if q.device.type != "cuda" and not kernels.INTERPRETED:
        return dense_reference(q, k, v, routing, (keys, values, bias))
    return _Listed.apply(q, k, v, keys.to(q.dtype), values.to(q.dtype), bias.float(), routing)


def dense_reference(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, virtual: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The same with the whole attention map, on any device and in any precision."""
    keys, values, bias = virtual
    tokens, scale = q.shape[2], q.shape[3] ** -0.5
    block = routing.block(tokens)
    allowed = routing.critical.repeat_interleave(block, 2).repeat_interleave(block, 3)
    logits = torch.cat(
        [
            (q @ k.mT * scale).masked_fill(~allowed, float("-inf")),
            q @ keys.to(q.dtype).mT * scale + bias.repeat_interleave(block, 2).to(q.dtype),
        ],
        dim=-1,
    )
    weights = logits.softmax(-1)
    return weights @ torch.cat([v, values.to(v.dtype)], 2), weights[..., tokens:].sum(-1)
