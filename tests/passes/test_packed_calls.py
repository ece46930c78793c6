"""Calls on packed samples, whose lengths the graph makes of constants or a run alone knows; and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from sla_compile.passes.decide import Keep, Rewrite
from sla_compile.passes.segments import Segment
from tests.support.capture import HEAD_DIM, HEADS, TOKENS, run
from tests.support.closeness import assert_close
from tests.support.token_grids import EXACT

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

THIRDS = tuple(Segment(first, first + 32, first, first + 32) for first in range(0, TOKENS, 32))


def each_by_itself(q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int], **told: Any) -> Tensor:
    """Dense attention of packed samples (T, H, D)."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    bounds = zip(pairwise(queries), pairwise(keys), strict=True)
    each = [F.scaled_dot_product_attention(q[:, a:b], k[:, c:d], v[:, c:d], **told) for (a, b), (c, d) in bounds]
    return torch.cat(each, dim=1).transpose(0, 1).contiguous()


@pytest.fixture
def varlen() -> Iterator[Callable[..., Tensor]]:
    """flash-attn's function as far as a graph shows it: one call."""
    library = torch.library.Library("flash_attn", "FRAGMENT")
    library.define(
        "flash_attn_varlen_func(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
        " int max_seqlen_q, int max_seqlen_k, float dropout_p=0.0, float? softmax_scale=None, bool causal=False,"
        " int[] window_size=[-1, -1]) -> Tensor"
    )

    def dense(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, *_: Any, **options: Any) -> Tensor:
        return each_by_itself(q, k, v, queries.tolist(), keys.tolist(), scale=options.get("softmax_scale"))

    library.impl("flash_attn_varlen_func", dense, "CPU")
    library.impl("flash_attn_varlen_func", lambda q, *_, **__: torch.empty_like(q), "Meta")
    yield torch.ops.flash_attn.flash_attn_varlen_func
    library._destroy()


def written() -> Tensor:
    """As diffusers counts them."""
    places = torch.zeros(4, dtype=torch.int32)
    places[1:] = torch.cumsum(torch.full((3,), 32, dtype=torch.int32), dim=0, dtype=torch.int32)
    return places


def packed(tokens: int = TOKENS, heads: int = HEADS) -> Tensor:
    return torch.randn(tokens, heads, HEAD_DIM)


def lengths(*each: int) -> Tensor:
    """As models count: the sum of the lengths so far."""
    given = torch.tensor(each, dtype=torch.int32)
    return torch.cat([given.new_zeros([1]), given]).cumsum(0, dtype=torch.int32)


PLACES: dict[str, tuple[Callable[[], Tensor], tuple[Segment, ...]]] = {
    "equal, by arange": (lambda: torch.arange(0, 4 * 32, step=32, dtype=torch.int32), THIRDS),
    "equal, written": (written, THIRDS),
    "equal, summed": (lambda: lengths(*[32] * 3), THIRDS),
    "uneven": (lambda: lengths(40, 17, 39), (Segment(0, 40, 0, 40), Segment(40, 57, 40, 57), Segment(57, 96, 57, 96))),
    "one of them empty": (lambda: lengths(40, 0, 56), (Segment(0, 40, 0, 40), Segment(40, 96, 40, 96))),
    "one": (lambda: lengths(96), ()),
}


@pytest.mark.parametrize("form", PLACES)
def test_each_sample_is_an_attention_of_its_own(form: str, varlen: Callable[..., Tensor]) -> None:
    places, found = PLACES[form]
    inputs = packed(), packed(heads=1), packed(heads=1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu = places()
        return varlen(q, k, v, cu, cu, 96, 96, softmax_scale=0.3)

    capture, output = run(call, *inputs, **EXACT)
    (site,) = capture.sites
    assert isinstance(site.decision, Rewrite), site.decision
    assert site.decision.segments == found
    assert capture.rewritten == (len(found) if form.startswith(("uneven", "one of")) else 1)
    q, k, v = inputs
    cu = places().tolist()
    wanted = each_by_itself(q, k.expand(-1, HEADS, -1), v.expand(-1, HEADS, -1), cu, cu, scale=0.3)
    assert_close("topk=1", output, wanted, 1e-11)


def test_the_function_of_torch() -> None:
    inputs = packed(), packed(), packed()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        cu = torch.arange(0, 97, 32, dtype=torch.int32)
        return varlen_attn(q, k, v, cu, None, 32, 32)

    capture, output = run(call, *inputs, **EXACT)
    assert capture.rewritten == 1
    assert_close("topk=1", output, each_by_itself(*inputs, [0, 32, 64, 96], [0, 32, 64, 96]), 1e-11)


KEPT: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any], str]] = {
    "an input": (lambda cu: cu, {}, "packed samples: cu_seqlens that a run alone knows"),
    "fewer tokens": (lambda cu: lengths(40, 50), {}, "packed samples: cu_seqlens [0, 40, 90] of 96 queries"),
    "back and forth": (lambda cu: lengths(50, -10, 56), {}, "packed samples: cu_seqlens [0, 50, 40, 96]"),
    "causal": (lambda cu: lengths(40, 56), {"causal": True}, "packed samples: causal attention of each"),
    "a window": (
        lambda cu: lengths(40, 56),
        {"window_size": [4, 4]},
        "an option of flash_attn_varlen_func: window_size=[4, 4]",
    ),
    "dropout": (lambda cu: lengths(40, 56), {"dropout_p": 0.1}, "attention dropout: dropout_p=0.1"),
}


@pytest.mark.parametrize("why", KEPT)
def test_what_is_not_known_or_not_whole_stays(why: str, varlen: Callable[..., Tensor]) -> None:
    places, options, reason = KEPT[why]

    def call(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        cu = places(given)
        return varlen(q, k, v, cu, cu, 96, 96, **options)

    capture, _ = run(call, packed(), packed(), packed(), lengths(32, 64))
    assert capture.rewritten == 0
    (site,) = capture.sites
    assert isinstance(site.decision, Keep)
    assert str(site.decision).startswith(reason)


def test_flex_attention_is_listed_and_stays() -> None:
    q, k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM) for _ in range(3))
    mask = create_block_mask(lambda b, h, q, k: q // 24 >= k // 24, None, None, TOKENS, TOKENS, device="cpu")
    capture, output = run(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), q, k, v)
    (site,) = capture.sites
    assert isinstance(site.decision, Keep)
    assert site.decision.reason == "FlexAttention"
    frames = torch.arange(TOKENS) // 24
    assert_close("output", output, F.scaled_dot_product_attention(q, k, v, frames[:, None] >= frames), 1e-11)
