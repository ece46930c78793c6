"""Attention written out by hand: each spelling by the topk=1 identity, and the nearest graph that must stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sla_compile.passes.decide import Keep, Rewrite
from tests.capture import HEAD_DIM, HEADS, TOKENS, Caller, Capture, Wrapper, qkv, run
from tests.helpers import assert_close

Call = Callable[..., Tensor]
BATCH = 2
SCALE = HEAD_DIM**-0.5


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def head_to_batch(x: Tensor) -> Tensor:
    """(B, N, H*D) to (B*H, N, D), as diffusers' older processors do."""
    x = x.reshape(BATCH, TOKENS, HEADS, HEAD_DIM).permute(0, 2, 1, 3)
    return x.reshape(BATCH * HEADS, TOKENS, HEAD_DIM)


def batch_to_head(x: Tensor) -> Tensor:
    x = x.reshape(BATCH, HEADS, TOKENS, HEAD_DIM)
    return x.permute(0, 2, 1, 3).reshape(BATCH, TOKENS, HEADS * HEAD_DIM)


def tokens(*inputs: Tensor) -> tuple[Tensor, ...]:
    """(B, H, N, D) inputs as (B, N, H*D)."""
    return tuple(x.transpose(1, 2).flatten(2) for x in inputs)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def older_processor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (head_to_batch(x) for x in tokens(q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    weights = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE).softmax(dim=-1).to(q.dtype)
    return batch_to_head(torch.bmm(weights, v))


def merged_by_split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads moved into the batch by a concatenation, which says nothing of their order."""
    q, k, v = (torch.cat(x.unbind(1), dim=0) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) * SCALE).softmax(-1), v)


def timm_unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * SCALE
    attn = q @ k.transpose(-2, -1)
    attn = attn.softmax(dim=-1)
    attn = F.dropout(attn, 0.1, training=False)
    return attn @ v


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.matmul(q.float() * SCALE, k.float().transpose(2, 3)).softmax(-1)
    return torch.matmul(weights.to(v.dtype), v)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = q @ k.mT
    attn *= SCALE
    return attn.softmax(-1) @ v


def merged_with_later_regroup(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores seen by heads between two products that are not."""
    q, k, v = (x.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) for x in (q, k, v))
    weights = torch.bmm(q, k.transpose(1, 2)).view(BATCH, HEADS, TOKENS, TOKENS).mul(SCALE).softmax(-1)
    return torch.bmm(weights.view(BATCH * HEADS, TOKENS, TOKENS), v)


def weights_on_the_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B*H, D, N) as in latent diffusion's autoencoder: v @ softmax(q k^T)^T."""
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    weights = F.softmax(torch.bmm(q.permute(0, 2, 1), k) * SCALE, dim=2)
    return torch.bmm(v, weights.permute(0, 2, 1))


def einsum_token_major(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("b i h d, b j h d -> b h i j", q * SCALE, k).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def einsum_heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bijh", q, k).mul(SCALE).softmax(2)
    return torch.einsum("bijh,bhjd->bhid", weights, v)


REWRITTEN: dict[str, Call] = {
    "operators": lambda q, k, v: ((q @ k.transpose(-2, -1)) * SCALE).softmax(-1) @ v,
    "matmul functions": lambda q, k, v: torch.matmul(torch.softmax(torch.matmul(q, k.mT) * SCALE, dim=-1), v),
    "matmul methods": lambda q, k, v: q.matmul(k.permute(0, 1, 3, 2)).mul(SCALE).softmax(dim=-1).matmul(v),
    "keywords": lambda q, k, v: torch.matmul(
        input=F.softmax(input=torch.mul(torch.matmul(input=q, other=k.mT), SCALE), dim=-1), other=v
    ),
    "key transposed earlier": lambda q, k, v: (q @ k.transpose(1, 2).contiguous().permute(0, 2, 3, 1)).softmax(3) @ v,
    "division": lambda q, k, v: F.softmax(scores(q, k) / HEAD_DIM**0.5, dim=-1) @ v,
    "no scale": lambda q, k, v: scores(q, k).softmax(-1) @ v,
    "scale first": lambda q, k, v: (0.3 * scores(q, k)).softmax(-1) @ v,
    "scale on queries": lambda q, k, v: scores(q * 0.3, k).softmax(-1) @ v,
    "scale on keys": lambda q, k, v: scores(q, k * 0.3).softmax(-1) @ v,
    "scale on transposed keys": lambda q, k, v: (q @ (k.mT / 2)).softmax(-1) @ v,
    "scale on both": lambda q, k, v: scores(q * SCALE**0.5, k * SCALE**0.5).softmax(-1) @ v,
    "scale in three places": lambda q, k, v: (scores(q * 0.5, 2 * k) * 0.25).softmax(-1) @ v,
    "scale in place": in_place,
    "float32 softmax": lambda q, k, v: (
        F.softmax(scores(q, k) * SCALE, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    ),
    "cast to float and back": lambda q, k, v: (scores(q, k) * SCALE).float().softmax(-1).type_as(q) @ v,
    "float32 queries and keys": upcast,
    "dropout of 0": lambda q, k, v: F.dropout((scores(q, k) * SCALE).softmax(-1), 0.0) @ v,
    "torch.dropout in evaluation": lambda q, k, v: torch.dropout((scores(q, k) * SCALE).softmax(-1), 0.5, False) @ v,
    "softmax module": lambda q, k, v: nn.Softmax(dim=-1)(scores(q, k) * SCALE) @ v,
    "timm": timm_unfused,
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(-1), v
    ),
    "einsum with ellipsis": lambda q, k, v: torch.einsum(
        "...ij,...jd->...id", (torch.einsum("...id,...jd->...ij", q, k) * SCALE).softmax(-1), v
    ),
    "einsum of tokens before heads": einsum_token_major,
    "einsum with heads last": einsum_heads_last,
    "einsum, then matmul": lambda q, k, v: (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(-1) @ v,
    "baddbmm on merged heads": older_processor,
    "bmm on heads merged by cat": merged_by_split,
    "bmm with scores by heads": merged_with_later_regroup,
    "weights on the right": weights_on_the_right,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("spelling", REWRITTEN)
def test_every_spelling_is_rewritten(spelling: str, dtype: torch.dtype) -> None:
    call, inputs = REWRITTEN[spelling], qkv(dtype=dtype)
    expected = call(*inputs)
    capture, output = run(call, *inputs, topk=1.0, bottomk=0.0)
    assert [site.decision for site in capture.sites if isinstance(site.decision, Keep)] == []
    assert capture.rewritten == 1
    assert leftovers(capture) == [], "what only the old attention read is gone"
    assert output.dtype == expected.dtype
    rounds = dtype is torch.float32 or "float" in spelling
    assert_close("topk=1 is dense attention", output, expected, 1e-5 if rounds else 1e-12)
    torch._dynamo.reset()
    assert (run(call, *inputs)[1] - expected).norm() > 0.01, "with topk below 1 it is another function"


def leftovers(capture: Capture) -> list[str]:
    """Nodes of products and softmax that are still in the graph."""
    assert capture.graph is not None
    words = ("matmul", "bmm", "einsum", "softmax", "dropout", "empty")
    return [node.name for node in capture.graph.graph.nodes if any(word in node.name for word in words)]
