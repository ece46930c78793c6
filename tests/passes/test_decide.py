"""What is decided of an attention, each with the nearest call that is decided otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from sla_compile import UnmatchedPatternWarning
from sla_compile.passes.decide import Keep, Rewrite
from tests.support.capture import HEAD_DIM, HEADS, Caller, Capture, Wrapper, qkv, run

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


KEPT: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "dropout": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.1),
        "attention dropout",
        "dropout_p=0.1",
    ),
    "cross-attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :40], v[:, :, :40]),
        "cross-attention",
        "96 queries, 40 keys",
    ),
    "one key fewer": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:]),
        "cross-attention",
        "96 queries, 95 keys",
    ),
    "broadcast heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v),
        "query and key differ in shape",
        "(2, 2, 96, 16), (2, 1, 96, 16)",
    ),
    "other value width": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :8]),
        "query and value differ in shape",
        "(2, 2, 96, 16), (2, 2, 96, 8)",
    ),
    "three dimensions": (
        lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
        "query has 3 dimensions",
        "(2, 96, 16)",
    ),
    "narrow heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q[..., :8], k[..., :8], v[..., :8]),
        "head dimension out of range",
        "8",
    ),
}


@pytest.mark.parametrize("form", KEPT)
def test_what_cannot_be_rewritten_stays_with_its_reason(form: str) -> None:
    call, reason, value = KEPT[form]
    inputs = qkv()
    capture, output = run(call, *inputs)
    assert (capture.rewritten, capture.kept) == (0, 1)
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert (decision.reason, value in decision.value) == (reason, True), decision
    assert decision.accepted
    if "dropout" not in form:
        assert torch.equal(output, call(*inputs)), "a kept call is exactly what it was"


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def test_short_sequences_stay_dense() -> None:
    call = sdpa
    assert run(call, *qkv(95), min_tokens=96)[0].rewritten == 0
    capture, _ = run(call, *qkv(95), min_tokens=96)
    assert str(capture.sites[0].decision) == "short sequence: 95 tokens (accepted: at least min_tokens=96)"
    assert run(call, *qkv(96), min_tokens=96)[0].rewritten == 1


def test_how_many_tokens_are_enough_by_default_depends_on_the_device() -> None:
    kept, _ = run(sdpa, *qkv(767), min_tokens=None)
    reason = "short sequence: 767 tokens (accepted: at least min_tokens=768, the default on cpu)"
    assert str(kept.sites[0].decision) == reason
    assert run(sdpa, *qkv(768), min_tokens=None)[0].rewritten == 1
    # What is on meta is prepared for another device, which is not known yet.
    for tokens in (6143, 6144):
        capture, _ = run(sdpa, *qkv(tokens, device="meta"), min_tokens=None)
        assert isinstance(capture.sites[0].decision, Keep) == (tokens < 6144)


def test_attention_of_a_plain_function_stays_dense() -> None:
    capture = Capture()
    torch.compile(sdpa, backend=capture)(*qkv())
    assert (capture.rewritten, capture.kept) == (0, 1)
    assert isinstance(capture.sites[0].decision, Keep)
    assert capture.sites[0].decision.reason == "no module owns this attention"


def test_include_and_exclude() -> None:
    call = sdpa
    capture, _ = run(call, *qkv(), exclude=["inner"])
    assert capture.rewritten == 0
    assert "exclude pattern 'inner'" in str(capture.sites[0].decision)
    with pytest.warns(UnmatchedPatternWarning, match=r"include pattern 'other\.\*' matches no attention"):
        assert run(call, *qkv(), include=["other.*"])[0].rewritten == 0
    assert run(call, *qkv(), include=["inn*"])[0].rewritten == 1


def test_lengths_equal_by_chance_are_not_self_attention() -> None:
    """Two symbolic lengths that are equal in this call only: proven from the ShapeEnv, not by a guard."""
    capture = Capture()
    model = Wrapper(Caller(lambda x, y: F.scaled_dot_product_attention(x, y, y)))
    x, y = qkv()[:2]
    for tensor in (x, y):
        torch._dynamo.mark_dynamic(tensor, 2)
    with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        torch.compile(model, backend=capture)(x, y)
    assert (capture.rewritten, capture.kept) == (0, 1)
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert (decision.reason, decision.accepted) == (
        "cross-attention",
        "as many queries as keys, provably, or cross_attention=True",
    )


def test_symbolic_length_adds_only_the_guard_of_min_tokens() -> None:
    counters.clear()
    capture = Capture(min_tokens=50)
    model = Wrapper(Caller(lambda x: F.scaled_dot_product_attention(x, 2 * x, x)))
    compiled = torch.compile(model, backend=capture)
    for tokens in (96, 50, 200, 129):
        x = torch.randn(2, HEADS, tokens, HEAD_DIM)
        torch._dynamo.mark_dynamic(x, 2)
        compiled(x)
        assert capture.rewritten == 1
    assert counters["stats"]["unique_graphs"] == 1
    decision = capture.sites[0].decision
    assert isinstance(decision, Rewrite)
    assert decision.condition is not None
    assert decision.condition.endswith(">= 50")
    compiled(torch.randn(2, HEADS, 49, HEAD_DIM))
    assert (capture.rewritten, capture.kept) == (0, 1)


def test_symbolic_head_dimension_stays_dense() -> None:
    capture = Capture()
    torch.compile(Wrapper(Caller(sdpa)), backend=capture, dynamic=True)(*qkv())
    assert capture.rewritten == 0
    assert "heads and head dimension must be fixed" in str(capture.sites[0].decision)


@pytest.mark.parametrize(("min_tokens", "tokens"), [(50, 96), (0, 96), (200, 96)])
def test_a_count_of_tokens_that_only_a_run_gives_is_not_asked_for(min_tokens: int, tokens: int) -> None:
    def call(x: Tensor) -> Tensor:
        kept = x[:, :, x[0, 0, :, 0].nonzero()[:, 0]]
        torch._check(kept.shape[2] > 1)
        return F.scaled_dot_product_attention(kept, 2 * kept, kept)

    x = torch.randn(2, HEADS, tokens, HEAD_DIM)
    capture = Capture(min_tokens=min_tokens, topk=1.0, bottomk=0.0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        output = torch.compile(Wrapper(Caller(call)), backend=capture, fullgraph=True)(x)
    torch.testing.assert_close(output, call(x))
    decision = capture.sites[0].decision
    if min_tokens == 0:
        assert isinstance(decision, Rewrite)
    else:
        reason = "short sequence" if min_tokens > tokens else "the number of tokens is known only at run time"
        assert isinstance(decision, Keep)
        assert (decision.reason, capture.rewritten) == (reason, 0)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_transform_of_torch_func_keeps_it_dense(by_hand: bool) -> None:
    def call(x: Tensor) -> Tensor:
        if by_hand:
            return (x @ x.mT).masked_fill(x[:, :1, None, :, 0] > 0, -1e9).softmax(-1) @ x
        return F.scaled_dot_product_attention(x, x, x)

    model, x = Wrapper(Caller(call)), qkv()[0]

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: model(y).square().sum())(x)

    capture = Capture()
    torch.testing.assert_close(torch.compile(gradient, backend=capture)(x), gradient(x))
    (site,) = capture.sites
    assert str(site.decision).startswith("inside a transform of torch.func: grad"), site.decision
