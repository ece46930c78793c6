"""The forms of the attention that are compared, in plain PyTorch beside one kernel, differentiable.

What is common: key blocks are ranked by the product of block means; the first are critical and attended to exactly. The
forms differ in what stands for the others:

- "none": nothing (sparse only).
- "linear": the paper's, W O^l + b beside the sparse branch, O^l the linear attention over marginal blocks.
- "mix": SLA2's, alpha O^s + (1 - alpha) O^l, alpha = sigmoid(c0 + c1 logit(pooled mass of the critical blocks)).
- "virtual": every block is one key in the same softmax (Piecewise Sparse Attention, arXiv 2602.01077): its mean key,
  its mean value, the logarithm of its length added to the logit. With ``variance`` also w = 1/2 sum_c mean(q_c^2)
  var(k_c) / D, at most that logarithm, the mean of q^2 over the query block. With ``slope`` what is of first order in
  K - kbar: share of virtual keys * q S / sqrt(D), S the mean over all blocks ("global", the paper's Hbar) or the mean
  weighted for each query block by the pooled softmax over its virtual keys ("row").

``gated`` adds W O^l + b to any of them, ``scaled`` multiplies what it is added to by exp(log_scale) of the head.
Axes: B batch, H heads, N tokens, D head dimension, R blocks, M virtual keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.real_video.listed_attention import Routing, listed_attention

__all__ = ["Budget", "Form", "FormSpec"]


@dataclass(frozen=True)
class FormSpec:
    """What stands for the blocks that are not critical, and how blocks are ranked."""

    tail: str = "none"
    """"none", "linear", "mix" or "virtual"."""
    slope: str = "none"
    """"none", "global" or "row"."""
    variance: bool = False
    splits: int = 1
    """Virtual keys of a block."""
    gated: bool = False
    scaled: bool = False
    per_head: bool = False
    """W and b for each head."""
    shifted: bool = False
    """A number for each head is added to the logits of virtual keys."""
    route: str = "score"
    """Blocks ranked by: "score"; "mass", score + w; "error", score + log of the spread of logits and values."""
    bottomk: float = 0.1
    """The share of blocks that the linear branch leaves out; "mix" leaves out none."""
    block: int = 64


@dataclass(frozen=True)
class Budget:
    """How many key blocks are critical: ``count`` in each row (or of each head), or what ``mass`` asks for.

    mass: critical are the first ``count`` blocks united with the shortest prefix that has this share of the pooled
    softmax.
    """

    count: int | tuple[int, ...]
    mass: float | None = None


class Form(nn.Module):
    """The attention of one layer; call it with q, k, v (B, H, N, D)."""

    def __init__(self, spec: FormSpec, budget: Budget, heads: int, head_dim: int) -> None:
        super().__init__()
        self.spec, self.budget = spec, budget
        counts = budget.count if isinstance(budget.count, tuple) else (budget.count,) * heads
        self.counts: Tensor
        self.register_buffer("counts", torch.tensor(counts)[:, None, None])
        lead = (heads,) if spec.per_head else ()
        if spec.gated:
            self.weight = nn.Parameter(torch.zeros(*lead, head_dim, head_dim))
            self.bias = nn.Parameter(torch.zeros(*lead, 1, head_dim))
        if spec.scaled:
            self.log_scale = nn.Parameter(torch.zeros(heads, 1, 1))
        if spec.shifted:
            self.shift = nn.Parameter(torch.zeros(heads, 1, 1))
        if spec.tail == "mix":
            self.c0 = nn.Parameter(torch.zeros(heads, 1, 1))
            self.c1 = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, N, D)."""
        base, linear, logit = self.parts(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            return self.merge(base, linear, logit).to(q.dtype)

    def merge(self, base: Tensor, linear: Tensor | None, logit: Tensor) -> Tensor:
        """The output (B, H, N, D) from what ``parts`` gives."""
        if self.spec.tail == "mix" and linear is not None:
            alpha = torch.sigmoid(self.c0 + self.c1 * logit).to(base.dtype)
            return alpha * base + (1 - alpha) * linear
        if self.spec.scaled:
            base = base * self.log_scale.exp().to(base.dtype)
        if self.spec.gated and linear is not None:
            base = base + linear @ self.weight.mT.to(linear.dtype) + self.bias.to(linear.dtype)
        return base

    def parts(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The base (B, H, N, D), O^l like it or None, and the logit (B, H, N, 1) of the pooled critical mass."""
        with torch.autocast(q.device.type, enabled=False):
            return self._parts(q, k, v)

    def _parts(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        spec = self.spec
        pooled_q, pooled_k = (x.float().unflatten(2, (-1, spec.block)).mean(3) for x in (q, k))
        scores = pooled_q @ pooled_k.mT * q.shape[-1] ** -0.5
        critical, rank = self.route(scores, q, k, v)
        routing = Routing(critical)
        if spec.tail == "virtual":
            virtual = self.virtual_keys(q, k, v, critical)
            base, share = listed_attention(q, k, v, routing, virtual)
            if spec.slope != "none":
                base = base + (share[..., None] * self.slope(q, k, v, virtual)).to(base.dtype)
        else:
            base, _ = listed_attention(q, k, v, routing)
        linear = None
        if spec.gated or spec.tail == "mix":
            blocks = scores.shape[-1]
            least = 0 if spec.tail == "mix" else int(spec.bottomk * blocks)
            linear = linear_branch(q, k, v, ~critical & (rank < blocks - least))
        mass = (scores.softmax(-1) * critical).sum(-1, keepdim=True).clamp(1e-4, 1 - 1e-4)
        return base, linear, mass.logit().repeat_interleave(spec.block, 2)

    @torch.no_grad()
    def route(self, scores: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Which blocks are critical, and the rank of every block by scores: both (B, H, R, R)."""
        if self.spec.route != "score":
            spread = log_variance(q, k, self.spec.block, 1)
            if self.spec.route == "error":
                values = v.float().unflatten(2, (-1, self.spec.block)).var(3, correction=0).sum(-1)
                spread = 0.5 * ((2 * spread).log() + values.log()[:, :, None])
            scores = scores + spread
        order = scores.argsort(-1, descending=True)
        rank = order.argsort(-1)
        counts = self.counts
        if self.budget.mass is not None:
            weights = scores.softmax(-1).gather(-1, order)
            counts = ((weights.cumsum(-1) - weights) < self.budget.mass).sum(-1, keepdim=True).clamp(min=counts)
        return rank < counts, rank

    def virtual_keys(self, q: Tensor, k: Tensor, v: Tensor, critical: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, H, M, D) and the bias of their logits (B, H, R, M)."""
        spec = self.spec
        length = spec.block // spec.splits
        keys, values = (x.float().unflatten(2, (-1, length)).mean(3) for x in (k, v))
        bias = torch.full_like(keys[:, :, None, :, 0], math.log(length))
        if spec.variance:
            bias = bias + log_variance(q, k, spec.block, spec.splits).clamp(max=math.log(length))
        if spec.shifted:
            bias = bias + self.shift
        bias = bias.expand(-1, -1, critical.shape[2], -1)
        return keys, values, bias.masked_fill(critical.repeat_interleave(spec.splits, -1), -math.inf)

    def slope(self, q: Tensor, k: Tensor, v: Tensor, virtual: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """q S / sqrt(D) (B, H, N, D)."""
        keys, _, bias = virtual
        length, scale = self.spec.block // self.spec.splits, q.shape[-1] ** -0.5
        off = (k.unflatten(2, (-1, length)) - keys[:, :, :, None].to(k.dtype)).mT
        if self.spec.slope == "global":
            return q @ (off.transpose(2, 3).flatten(3) @ v / k.shape[2]).to(q.dtype) * scale
        states = off @ v.unflatten(2, (-1, length)) / length
        pooled = q.float().unflatten(2, (-1, self.spec.block)).mean(3)
        weights = (pooled @ keys.mT * scale + bias).softmax(-1).to(q.dtype)
        mixed = (weights @ states.flatten(3)).unflatten(-1, states.shape[-2:])
        return (q.unflatten(2, (-1, self.spec.block)) @ mixed).flatten(2, 3) * scale


def log_variance(q: Tensor, k: Tensor, block: int, splits: int) -> Tensor:
    """w (B, H, R, M): what the spread of a virtual key's keys adds to the logarithm of its weight, at second order."""
    squares = q.float().unflatten(2, (-1, block)).square().mean(3)
    variances = k.float().unflatten(2, (-1, block // splits)).var(3, correction=0)
    return squares @ variances.mT / (2 * q.shape[-1])


def linear_branch(q: Tensor, k: Tensor, v: Tensor, summed: Tensor) -> Tensor:
    """O^l (B, H, N, D): linear attention with a softmax feature map over the blocks of ``summed`` (B, H, R, R)."""
    blocks = summed.shape[-1]
    phi_q, phi_k = (x.float().softmax(-1).to(v.dtype).unflatten(2, (blocks, -1)) for x in (q, k))
    states = torch.cat([phi_k.mT @ v.unflatten(2, (blocks, -1)), phi_k.sum(3, keepdim=True).mT], dim=-1)
    mixed = (summed.to(v.dtype) @ states.flatten(3)).unflatten(-1, states.shape[-2:])
    found = phi_q @ mixed
    return (found[..., :-1] / found[..., -1:].clamp(min=1e-6)).flatten(2, 3)
