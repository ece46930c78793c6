"""How the result of a rewritten attention lies in memory: as the dense one where a write or an output shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sla_compile.passes.memory_layout import laid_out_as
from sla_compile.passes.operands import after, build
from tests.support.capture import HEAD_DIM, HEADS, TOKENS, Capture, qkv, run
from tests.support.closeness import assert_close
from tests.support.models import Attention, random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BATCH = 2
EXACT: dict[str, Any] = {"topk": 1.0, "bottomk": 0.0}


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) * 0.25).softmax(-1), v).view(BATCH, HEADS, TOKENS, HEAD_DIM)


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In memory (B, N, H, D), as the op's own result."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "called": F.scaled_dot_product_attention,
    "called, transposed": transposed,
    "by hand": by_hand,
    "merged heads": merged,
}


def through_reshape(o: Tensor, q: Tensor) -> Tensor:
    o.reshape(-1)[:9] = 1
    return o


def through_a_view(o: Tensor, q: Tensor) -> Tensor:
    o.flatten(0, 1)[:, :8] = 0
    return o


def through_contiguous(o: Tensor, q: Tensor) -> Tensor:
    o.contiguous().mul_(2)
    return o


def added_in_place(o: Tensor, q: Tensor) -> Tensor:
    o += q
    return o


def through_something_made_of_it(o: Tensor, q: Tensor) -> Tensor:
    o = o * 2
    o.reshape(-1)[:9] = 1
    return o


def into_its_copy(o: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token it is a copy of a result laid out by heads, and a view of one laid out by tokens."""
    tokens = o.transpose(1, 2).flatten(2)
    tokens += 1
    return tokens, o


def by_strides(o: Tensor, q: Tensor) -> Tensor:
    return torch.as_strided(o, (TOKENS, 3), (1, 2))


SEEN: dict[str, Callable[..., Any]] = {
    "written through a reshape": through_reshape,
    "written through a view": through_a_view,
    "written through contiguous": through_contiguous,
    "added to in place": added_in_place,
    "an option in place": lambda o, q: F.relu(o, inplace=True),
    "what is made of it is written": through_something_made_of_it,
    "its copy is written": into_its_copy,
    "returned": lambda o, q: o,
    "what is made of it is viewed": lambda o, q: (o * 2 + 1).flatten(2).contiguous().view(BATCH, -1),
    "read by strides": by_strides,
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_layout_that_is_seen_is_that_of_dense_attention(attention: str, seen: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return SEEN[seen](ATTENTIONS[attention](q, k, v), q)

    trained = attention in ("by hand", "merged heads")  # the other's backward reads the result
    inputs = qkv(dtype=torch.float64, requires_grad=trained)
    expected = call(*inputs)
    capture, output = run(call, *inputs, **EXACT)
    assert capture.rewritten == 1
    pairs = zip(output, expected, strict=True) if isinstance(expected, tuple) else [(output, expected)]
    for actual, wanted in pairs:
        assert_close("topk=1 is dense attention", actual, wanted, 1e-12)
        assert actual.stride() == wanted.stride()
    if trained:
        results = (sum(x.square().sum() for x in (out if type(out) is tuple else (out,))) for out in (output, expected))
        for actual, wanted in zip(*(torch.autograd.grad(result, inputs) for result in results), strict=True):
            assert_close("gradient", actual, wanted, 1e-10)


def test_a_layout_that_nothing_sees_costs_no_copy() -> None:
    for layout in ("called", "by hand"):

        class Owner(Attention):
            def forward(self, x: Tensor, call: Any = ATTENTIONS[layout]) -> Tensor:
                out = call(*self.heads(x)) * 0.5
                return self.out(out.transpose(1, 2).flatten(2))

        capture, x = Capture(**EXACT), random_input()
        model = nn.Sequential(Owner()).double()
        assert_close("output", torch.compile(model, backend=capture)(x), model(x), 1e-12)
        assert capture.rewritten == 1
        assert capture.graph is not None
        assert not [node for node in capture.graph.graph.nodes if node.target in ("clone", "contiguous")]


def test_a_layout_with_room_between_rows() -> None:
    """As of a head dimension that was padded for its kernel: (B, N, H, 16 of 24) in memory."""
    dense = torch.zeros(2, 5, 3, 24)[..., :16].transpose(1, 2)
    for value in (dense, dense.contiguous(), torch.zeros(4, 5, 6).permute(2, 0, 1), torch.zeros(1, 3, 1, 2)):
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["example_value"] = torch.randn(value.shape)
        (laid_out,) = build(graph, [after(x, *laid_out_as(value))])
        result = laid_out.meta["example_value"]
        assert result.stride() == value.stride()
        assert torch.equal(result, x.meta["example_value"])
        assert result.untyped_storage()._cdata != x.meta["example_value"].untyped_storage()._cdata
