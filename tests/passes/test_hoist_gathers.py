"""Gathers move out of the way of an attention, or stay where something else reads the same tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.capture import HEAD_DIM, Capture
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS, WIDTH, Attention, Block, Model, randomize_gates
from tests.support.token_grids import (
    EXACT,
    TILES,
    TOKENS,
    by_hand,
    kernels_of,
    placement,
    sdpa,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Rotary(Block):
    """A norm, projections, a rotary embedding that is written half by half, and a residual sum."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.rand(1, TOKENS, 1, HEAD_DIM // 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (side.unflatten(-1, (2, -1)) for side in self.attention.qkv(y).chunk(3, dim=-1))
        q, k = (self.rotated(side).type_as(v).transpose(1, 2) for side in (q, k))
        return x + self.attention(q, k, v.transpose(1, 2)).type_as(q)

    def rotated(self, side: Tensor) -> Tensor:
        one, other = side.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(side)
        out[..., 0::2] = one * self.angles.cos() - other * self.angles.sin()
        out[..., 1::2] = one * self.angles.sin() + other * self.angles.cos()
        return out


class Inner(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["plain", "rotary"])
def test_gathers_move_out_of_the_way_and_cost_no_loop(kind: str) -> None:
    model = Model(1)
    if kind == "rotary":
        model.blocks[0] = Rotary()
        model.blocks[0].attention = Inner()
    tiles, raster = kernels_of(model, "tiles"), kernels_of(model, "raster")
    assert len(tiles) == len(raster)
    assert any("norm" in name and "reorder" in name for name in tiles)  # before the projections
    assert "reorder" in tiles[-1]  # after the last one, in the residual sum
    assert "add" in tiles[-1]


class Leaking(Attention):
    """Something else reads the values, in the model's order: gathers stay at the attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        out = sdpa(q, k, v)
        return self.out((out + v.flip(2)).transpose(1, 2).flatten(2))


class Random(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.dropout(self.heads(x), 0.5)
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


class Normed(Attention):
    """A norm over tokens and channels has a weight for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(TOKENS, self.qkv.out_features))

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, tuple(self.weight.shape), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.normed(self.qkv(x)).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


class RMSNormed(Normed):
    def normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, tuple(self.weight.shape), self.weight)


class GroupNormed(Normed):
    """Groups of tokens, which it takes for channels."""

    def normed(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2)


class Overwritten(Attention):
    """Some tokens are set to zero, which are others in another order."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q = q * 1
        q[:, :, :8] = 0
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


class ChangedBetween(Attention):
    """The tensor that is projected is another one when keys and values are."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        q, _, _ = self.heads(x)
        x -= torch.arange(TOKENS, dtype=x.dtype)[:, None] / TOKENS
        _, k, v = self.heads(x)
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


class WritingAside(Attention):
    """What the queries are multiplied by is written by them first, and read again."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scale = torch.ones(TOKENS, 1, dtype=x.dtype)
        scale *= q[0, 0, :, :1]
        return self.out(sdpa(q * scale, k, v).transpose(1, 2).flatten(2)) + scale


def by_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


class AnotherWay(Attention):
    """One of the three does not come through a linear projection, so its tokens would stay where they were."""

    def __init__(self, way: str, side: int) -> None:
        super().__init__()
        self.way, self.side = way, side
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        sides = [*self.heads(x)]
        if self.way == "conv1x1":
            made = F.conv1d(x.mT, self.weight[..., None]).mT
        elif self.way == "matmul":
            made = x @ self.weight
        elif self.way == "einsum":
            made = torch.einsum("bnc,cd->bnd", x, self.weight)
        else:
            made = x
        sides[self.side] = by_heads(made)
        return self.out(sdpa(*sides).transpose(1, 2).flatten(2))


class ValuesOverwritten(Attention):
    """The first tokens of the values are a constant, before they are by heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, WIDTH)).permute(2, 0, 1, 3)
        v = v * 1
        v[:, :20] = 0
        return self.out(sdpa(by_heads(q), by_heads(k), by_heads(v)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("way", "side"), [("conv1x1", 2), ("matmul", 1), ("einsum", 0), ("none", 2)])
def test_gathers_stay_where_one_side_comes_another_way(way: str, side: int) -> None:
    assert_gathers_stay(AnotherWay(way, side))


@pytest.mark.parametrize(
    "kind",
    [ValuesOverwritten, Leaking, Random, Normed, RMSNormed, GroupNormed, Overwritten, ChangedBetween, WritingAside],
)
def test_gathers_stay_where_something_else_reads_the_same_tokens(kind: type[Attention]) -> None:
    assert_gathers_stay(kind())


def assert_gathers_stay(owner: nn.Module) -> None:
    model, x = nn.Sequential(owner).double(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    capture = Capture(**TILES, **EXACT)
    torch.manual_seed(1)
    output = torch.compile(model, backend=capture)(x)
    assert capture.graph is not None
    (forward,) = (n for n in capture.graph.graph.nodes if n.target is torch.ops.sla.forward.default)
    assert [n.target for n in forward.args[:3]] == [torch.ops.sla.reorder.default] * 3
    torch.manual_seed(1)
    assert_close("output", output, model(x), 1e-11)


def test_moved_gathers_follow_the_definition_with_every_gradient() -> None:
    model, x = Model(2).double(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, **TILES, "inner": "aot_eager"})
    compiled(x)
    randomize_gates(model)

    def defined(x: Tensor) -> Tensor:
        for block in model.blocks:
            q, k, v = block.attention.heads(block.norm(x))
            gate = block.attention.sla
            y = by_hand(q, k, v, placement(), placement(), linear=gate.config.linear, shift=gate.shift)
            x = x + block.attention.out(y.transpose(1, 2).flatten(2))
        return x

    named = {"input": x, **dict(model.named_parameters())}
    results = []
    for function in (compiled, defined):
        output = function(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), list(named.values()))))
    for name, actual, expected in zip(("output", *named), *results, strict=True):
        assert_close(name, actual, expected, 1e-10)
