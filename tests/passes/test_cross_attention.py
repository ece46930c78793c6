"""Queries and keys of equal length: of one tensor, or of two, which is cross-attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from tests.support.capture import HEAD_DIM, TOKENS, Wrapper
from tests.support.models import OPTIONS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BATCH, HEADS = 2, 6
sdpa = F.scaled_dot_product_attention


class TwoStreams(nn.Module):
    """Attention of one stream of tokens to another of the same length, or to what is its own after all."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        width = HEADS * HEAD_DIM
        self.q, self.k, self.down, self.up = (nn.Linear(width, width) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        given, x, y = y, x + self.down(x), self.up(y)  # as after a block, and after an embedding
        first, second = self.norms
        sides = {
            "other": lambda: (first(x), y),
            "other, normalised": lambda: (first(x) * (1 + self.scale), second(y)),
            "other, of a block before": lambda: (first(x + self.down(y)), y),
            "own": lambda: (x, x),
            "own, normalised apart": lambda: (first(x), second(x) * (1 + self.scale)),
            "own, with a position": lambda: (x + y, x),
            "given in part": lambda: (x, y),
            "joint": lambda: (torch.cat([x, y], 1), torch.cat([y, x], 1)),
        }
        a, b = sides[self.kind]()
        q, k = (layer(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer, z in ((self.q, a), (self.k, b)))
        if self.kind == "own":  # a low-rank adapter beside the projection
            k = k + self.down(self.up(b)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        if self.kind == "given in part":  # by another graph, which may have made it of the queries' tensor
            k = k + given.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return sdpa(q, k, k).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", ["other", "other, normalised", "other, of a block before"])
def test_as_many_keys_of_another_tensor_are_cross_attention(kind: str) -> None:
    inputs = [torch.randn(BATCH, TOKENS, HEADS * HEAD_DIM) for _ in range(2)]
    (site,) = sla_compile.explain(TwoStreams(kind), inputs, config=OPTIONS).sites
    assert (site.rewritten, site.reason) == (False, "cross-attention")
    assert site.value == "96 queries, as many keys of other tokens"
    (site,) = sla_compile.explain(TwoStreams(kind), inputs, config={**OPTIONS, "cross_attention": True}).sites
    assert (site.rewritten, site.reason) == (True, "cross-attention")


@pytest.mark.parametrize("kind", ["own", "own, normalised apart", "own, with a position", "joint", "given in part"])
def test_keys_of_the_queries_own_tensor_are_self_attention(kind: str) -> None:
    inputs = [torch.randn(BATCH, TOKENS, HEADS * HEAD_DIM) for _ in range(2)]
    (site,) = sla_compile.explain(TwoStreams(kind), inputs, config=OPTIONS).sites
    assert (site.rewritten, site.reason) == (True, "self-attention")


class TwoFrames(nn.Module):
    """Two frames in one batch, each of which sees the other one, itself, or the second one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        width = HEADS * HEAD_DIM
        self.q, self.k, self.up = (nn.Linear(width, width) for _ in range(3))

    def arranged(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2) if self.kind != "other, by slices" else (x[:BATCH], x[-BATCH:])
        if self.kind.startswith("other"):
            return torch.cat([second, first])
        return torch.cat([first, second]) if self.kind == "own" else second.repeat(2, 1, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        frames = torch.cat([x, y]) + 1
        frames = frames + self.up(frames)
        if self.kind == "other, at once":
            frames, seen = torch.cat([x, y]), torch.cat([y, x])
        elif self.kind == "other, behind the projection":
            seen = frames
        else:
            seen = self.arranged(frames)
        q, k = (layer(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer, z in ((self.q, frames), (self.k, seen)))
        k = self.arranged(k) if self.kind == "other, behind the projection" else k
        return sdpa(q, k, k).transpose(1, 2).flatten(2)


FRAMES = ["other", "other, by slices", "other, at once", "other, behind the projection", "own", "second"]


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_of_one_batch_that_see_each_other_are_cross_attention(kind: str) -> None:
    inputs = [torch.randn(BATCH, TOKENS, HEADS * HEAD_DIM) for _ in range(2)]
    (site,) = sla_compile.explain(TwoFrames(kind), inputs, config=OPTIONS).sites
    others = kind.startswith("other")
    assert (site.rewritten, site.reason) == (not others, "cross-attention" if others else "self-attention")


class Windows(nn.Module):
    """Two pictures in one batch, cut into shifted windows, each of which sees the other one's or its own."""

    def __init__(self, kind: str, cut_first: bool) -> None:
        super().__init__()
        self.kind, self.cut_first = kind, cut_first
        self.q, self.k = (nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM) for _ in range(2))

    def cut(self, x: Tensor) -> Tensor:
        x = x.roll((-2, -2), (1, 2)).unflatten(2, (2, 8)).unflatten(1, (2, 8))
        return x.transpose(2, 3).reshape(-1, 64, HEADS * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        seen = {
            "swapped": lambda: torch.cat(x.chunk(2)[::-1]),
            "rolled": lambda: x.roll(1, 0),
            "flipped": lambda: x.flip(0),
            "own": lambda: x,
            "own, mirrored": lambda: x.flip(1, 2),
        }[self.kind]()
        if self.cut_first:
            q, k = self.q(self.cut(x)), self.k(self.cut(seen))
        else:
            q, k = self.cut(self.q(x)), self.cut(self.k(seen))
        q, k = (z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in (q, k))
        return sdpa(q, k, k).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("cut_first", [True, False])
@pytest.mark.parametrize("kind", ["swapped", "rolled", "flipped", "own", "own, mirrored"])
def test_windows_of_pictures_that_see_each_other_are_cross_attention(kind: str, cut_first: bool) -> None:
    pictures = torch.randn(2, 16, 16, HEADS * HEAD_DIM)
    (site,) = sla_compile.explain(Windows(kind, cut_first), (pictures,), config=OPTIONS).sites
    others = not kind.startswith("own")
    assert (site.rewritten, site.reason) == (not others, "cross-attention" if others else "self-attention")


REVERSED = {
    "other": lambda x: x.flip(0),
    "other, in a list": lambda x: torch.flip(x, [0]),
    "other, by keyword": lambda x: torch.flip(x, dims=(-3,)),
    "other, of aten": lambda x: torch.ops.aten.flip.default(x, [0]),
    "other, tokens too": lambda x: x.flip((0, 1)),
    "other, first axis": torch.flipud,
    "other, in a list of places": lambda x: x[[*range(len(x))][::-1]],
    "other, and a slice": lambda x: x[[*range(len(x))][::-1], :],
    "other, by a tensor": lambda x: x[torch.arange(len(x) - 1, -1, -1)],
    "other, from behind": lambda x: x[torch.arange(-1, -1 - len(x), -1)],
    "other, the first one": lambda x: x[[0] * len(x)],
    "other, selected": lambda x: x.index_select(0, torch.arange(len(x) - 1, -1, -1)),
    "other, indexed by aten": lambda x: torch.ops.aten.index.Tensor(x, [torch.arange(len(x) - 1, -1, -1)]),
    "other, halves": lambda x: x.unflatten(0, (2, -1)).flip(0).flatten(0, 1),
    "own": lambda x: x.flip(1),
    "own, from the end": lambda x: x.flip(-2),
    "own, twice": lambda x: (x.flip(0) + 1).flip(0),
    "own, all places": lambda x: x[[*range(len(x))]],
    "own, places twice": lambda x: x[[*range(len(x))][::-1]][torch.arange(len(x) - 1, -1, -1)],
    "own, tokens selected": lambda x: x.index_select(1, torch.arange(TOKENS - 1, -1, -1)),
    "own, tokens by place": lambda x: x[:, torch.arange(TOKENS - 1, -1, -1)],
    "own, both": lambda x: x,
}


class Reversed(nn.Module):
    """Samples of a batch that see each other's tokens, or their own in another order."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v = (nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        x = x.flip(0) if self.kind == "own, both" else x
        seen = REVERSED[self.kind](x)
        q, k, v = (
            layer(z).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, z in ((self.q, x), (self.k, seen), (self.v, seen))
        )
        return sdpa(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("batch", [2, 3, 4])
@pytest.mark.parametrize("kind", REVERSED)
def test_a_batch_in_reverse_is_cross_attention(kind: str, batch: int) -> None:
    """Unless it is its tokens that are: of any number of samples most see another one."""
    if kind == "other, halves" and batch % 2:
        return
    model, x = Reversed(kind), torch.randn(batch, TOKENS, HEADS * HEAD_DIM)
    (site,) = sla_compile.explain(model, (x,), config=OPTIONS).sites
    others = kind.startswith("other")
    assert (site.rewritten, site.reason) == (not others, "cross-attention" if others else "self-attention")
    (site,) = sla_compile.explain(model, (x,), config={**OPTIONS, "cross_attention": True}).sites
    assert (site.rewritten, site.reason) == (True, "cross-attention" if others else "self-attention")


class ByKeywords(nn.Module):
    """Projections that are called with nothing but keywords, and halves of one instead of two."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = (
            nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM),
            nn.Linear(HEADS * HEAD_DIM, 2 * HEADS * HEAD_DIM),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = F.linear(input=x + 1, weight=self.q.weight)
        k, v = F.linear(weight=self.kv.weight, input=y + 1).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for z in (q, k, v))
        return sdpa(q, k, v).transpose(1, 2).flatten(2)


def test_projections_by_keywords_and_halves_of_a_projection() -> None:
    x, y = (torch.randn(BATCH, TOKENS, HEADS * HEAD_DIM) for _ in range(2))
    for inputs, kind in (((x, y), "other tokens"), ((x, x), "self-attention")):
        (site,) = sla_compile.explain(Wrapper(ByKeywords()), inputs, config=OPTIONS).sites
        assert site.rewritten == (kind == "self-attention")
        assert kind in (site.value if not site.rewritten else site.reason)


@torch.library.custom_op("sla_tests::unknown", mutates_args=())
def unknown(x: Tensor, condition: Tensor) -> Tensor:
    """What no pass knows: an op of each projection's own, as a fused modulation."""
    return x * condition[:, None]


@unknown.register_fake
def _(x: Tensor, condition: Tensor) -> Tensor:
    return torch.empty_like(x)


class PerProjection(nn.Module):
    """Each projection has an operation of its own before it, and both the same condition, matrix and rotary table."""

    rotation: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        width = HEADS * HEAD_DIM
        self.q, self.k, self.embed = (nn.Linear(width, width) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(width, 8) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(8, width) for _ in range(2))
        self.norm, self.position = nn.LayerNorm(width), nn.Parameter(torch.randn(1, TOKENS, width))
        self.register_buffer("rotation", torch.linalg.qr(torch.randn(width, width))[0])
        self.plain = self.rotation.clone()

    def before(self, x: Tensor, condition: Tensor, which: int) -> Tensor:
        if self.kind == "clamp":
            return x.clamp(-3, 3 + which)
        if self.kind == "fake quantiser":
            return torch.fake_quantize_per_tensor_affine(x, 0.1 + which, 0, -128, 127)
        if self.kind == "rotation":
            return x @ self.rotation
        if self.kind == "rotation, a plain tensor":
            return x @ self.plain
        if self.kind == "custom op":
            return unknown(x, condition)
        if self.kind == "low rank":
            return self.up[which](self.down[which](x))
        if self.kind == "two sums":
            return (x + torch.randn_like(x)) + torch.randn_like(x)
        if self.kind == "written into":
            made = torch.empty_like(x)
            made[:] = x
            return made
        return x + self.position  # "position"

    def forward(self, x: Tensor, y: Tensor, condition: Tensor, table: Tensor) -> Tensor:
        x, y = (self.norm(z) * (1 + condition[:, None]) for z in (x + 1, self.embed(y) if x is not y else x + 1))
        inputs = self.before(x, condition, 0), self.before(y, condition, 1)
        q, k = (
            layer(z).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, z in zip((self.q, self.k), inputs, strict=True)
        )
        q, k = q * table, k * table
        return sdpa(q, k, k).transpose(1, 2).flatten(2)


KINDS = ["clamp", "fake quantiser", "rotation", "rotation, a plain tensor", "custom op", "low rank", "two sums"]


@pytest.mark.parametrize("kind", [*KINDS, "written into", "position"])
def test_an_operation_of_each_projection_hides_no_origin_and_makes_none(kind: str) -> None:
    x, y = (torch.randn(BATCH, TOKENS, HEADS * HEAD_DIM) for _ in range(2))
    shared = torch.randn(BATCH, HEADS * HEAD_DIM), torch.randn(1, 1, TOKENS, HEAD_DIM)
    for table in (torch.ones(1), shared[1]):
        (site,) = sla_compile.explain(PerProjection(kind), (x, x, shared[0], table), config=OPTIONS).sites
        assert (site.rewritten, site.reason) == (True, "self-attention")
    (site,) = sla_compile.explain(PerProjection(kind), (x, y, *shared), config=OPTIONS).sites
    assert (site.rewritten, site.reason) == (False, "cross-attention"), "the condition has no tokens"


@pytest.mark.parametrize("kind", ["position", "rotation"])
def test_a_table_of_the_streams_shape_is_no_common_origin(kind: str) -> None:
    x, y = (torch.randn(1, TOKENS, HEADS * HEAD_DIM) for _ in range(2))
    shared = torch.randn(1, HEADS * HEAD_DIM), torch.randn(1, 1, TOKENS, HEAD_DIM)
    (site,) = sla_compile.explain(PerProjection(kind), (x, y, *shared), config=OPTIONS).sites
    assert (site.rewritten, site.reason) == (False, "cross-attention")
