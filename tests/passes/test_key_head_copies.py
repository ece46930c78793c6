"""Keys and values that a model copies for each query head: the op gets them as they were, where that is sure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.capture import run
from tests.support.closeness import assert_close

BATCH, HEADS, TOKENS, HEAD_DIM = 2, 6, 48, 16

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def inputs(key_heads: int) -> list[Tensor]:
    shapes = [(BATCH, heads, TOKENS, HEAD_DIM) for heads in (HEADS, key_heads, key_heads)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def merged(x: Tensor) -> Tensor:
    """As transformers' repeat_kv."""
    batch, heads, tokens, dim = x.shape
    each = HEADS // heads
    return x[:, :, None].expand(batch, heads, each, tokens, dim).reshape(batch, heads * each, tokens, dim)


def before_the_transpose(x: Tensor) -> Tensor:
    """As some of diffusers, on (B, N, H, D)."""
    x = x.transpose(1, 2)
    return x.unsqueeze(3).repeat(1, 1, 1, HEADS // x.shape[2], 1).flatten(2, 3).transpose(1, 2)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // x.shape[1], dim=-3)


def tiled(x: Tensor) -> Tensor:
    """Head h has the keys of head h modulo Hk: other groups, but for one head."""
    return x.repeat(1, HEADS // x.shape[1], 1, 1)


def sdpa(copied: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, copied(k), copied(v))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ merged(k).mT).softmax(-1) @ merged(v)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (torch.arange(TOKENS) < TOKENS - 7).expand(BATCH, 1, TOKENS, TOKENS)
    return F.scaled_dot_product_attention(q, merged(k), merged(v), mask)


def written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1.0
    copies = interleaved(k)
    k.mul_(2)
    return F.scaled_dot_product_attention(q, copies, interleaved(v)) + 0 * k.sum()


def values_otherwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, merged(k), tiled(v))


FORMS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int, int]] = {
    # what is called, with how many heads of keys, and how many the op gets
    "expanded and merged": (sdpa(merged), 2, 2),
    "before the transpose": (sdpa(before_the_transpose), 3, 3),
    "interleaved": (sdpa(interleaved), 2, 2),
    "one head": (sdpa(lambda x: x.expand(-1, HEADS, -1, -1)), 1, 1),
    "one head, tiled": (sdpa(tiled), 1, 1),
    "by hand": (by_hand, 2, 2),
    "with a mask": (masked, 2, 2),
    "tiled": (sdpa(tiled), 2, HEADS),
    "written to behind the copy": (written_to, 2, HEADS),
    "values otherwise": (values_otherwise, 2, HEADS),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_op_gets_heads_without_copies(form: str) -> None:
    call, key_heads, given = FORMS[form]
    tensors = inputs(key_heads)
    capture, output = run(call, *tensors, topk=1.0, bottomk=0.0)
    assert (capture.rewritten, capture.kept) == (1, 0)
    assert capture.graph is not None
    target = torch.ops.sla.forward.default
    (op,) = [node for node in capture.graph.graph.nodes if node.target is target]
    assert [node.meta["example_value"].shape[1] for node in op.args[:3]] == [HEADS, given, given]
    cotangent = torch.randn_like(output)
    results = [(y, *torch.autograd.grad(y, tensors, cotangent)) for y in (output, call(*tensors))]
    for name, actual, expected in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, actual, expected, 1e-11)
