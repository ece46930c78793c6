"""Attention written out by hand: each spelling by the topk=1 identity, and the nearest graph that must stay."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import sla_compile
from sla_compile.passes.decide import Keep, Rewrite
from sla_compile.passes.operands import build
from tests.support.capture import HEAD_DIM, HEADS, TOKENS, Capture, qkv, run
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS, Attention, random_input, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Call = Callable[..., Tensor]
BATCH = 2
SCALE = HEAD_DIM**-0.5


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


def with_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As functions that give weights too, of which this caller takes none."""
    weights = (scores(q, k) * SCALE).softmax(-1)
    weights.mean(1).sum(-1) * weights.amax(-1)[:, 0]
    return weights @ v


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
    "float32 softmax": lambda q, k, v: F.softmax(scores(q, k) * SCALE, dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "cast to float and back": lambda q, k, v: (scores(q, k) * SCALE).float().softmax(-1).type_as(q) @ v,
    "float32 queries and keys": upcast,
    "dropout of 0": lambda q, k, v: F.dropout((scores(q, k) * SCALE).softmax(-1), 0.0) @ v,
    "torch.dropout in evaluation": lambda q, k, v: torch.dropout((scores(q, k) * SCALE).softmax(-1), 0.5, False) @ v,
    "weights that nobody reads": with_weights,
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
    if dtype is torch.float64:
        assert (run(call, *inputs)[1] - expected).norm() > 0.01, "with topk below 1 it is another function"


def leftovers(capture: Capture) -> list[str]:
    """Nodes of products and softmax that are still in the graph."""
    assert capture.graph is not None
    words = ("matmul", "bmm", "einsum", "softmax", "dropout", "empty")
    return [node.name for node in capture.graph.graph.nodes if any(word in node.name for word in words)]


SCALES: dict[str, float] = {
    "no scale": 1.0,
    "division": 0.25,
    "scale on both": 0.25,
    "scale on transposed keys": 0.5,
    "scale in three places": 0.25,
    "baddbmm on merged heads": 0.25,
    "timm": 0.25,
}


@pytest.mark.parametrize("spelling", SCALES)
def test_the_scale_is_read_wherever_it_is_written(spelling: str) -> None:
    capture, _ = run(REWRITTEN[spelling], *qkv())
    decision = capture.sites[0].decision
    assert isinstance(decision, Rewrite)
    assert decision.scale == pytest.approx(SCALES[spelling])


def test_autocast() -> None:
    inputs = qkv()
    call = REWRITTEN["operators"]
    with torch.autocast("cpu", torch.bfloat16):
        capture, output = run(call, *inputs, topk=1.0, bottomk=0.0)
    assert capture.rewritten == 1
    assert output.dtype == torch.bfloat16
    assert_close("topk=1 is dense attention", output, call(*inputs), 1e-2)


def top_k(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = scores(q, k)
    least = attn.topk(8, dim=-1).values[..., -1:]
    return attn.masked_fill(attn < least, float("-inf")).softmax(-1) @ v


def stable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = scores(q, k)
    return (attn - attn.amax(-1, keepdim=True)).softmax(-1) @ v


def maps(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores(q, k).softmax(-1)
    return weights @ v, weights


def changed_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1.5
    weights = (q @ k.mT).softmax(-1)
    q.add_(1)
    return weights @ v + q


def changed_by(change: Callable[[Tensor], Any]) -> Call:
    """An attention that ``change`` writes to the queries of, between its products."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * 1.5
        weights = (q @ k.mT).softmax(-1)
        change(q)
        return weights @ v + q

    return call


# By an operator's protocol, an option, a schema, an index: whatever writes.
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "-=": lambda q: operator.isub(q, 1),
    "**=": lambda q: operator.ipow(q, 2),
    "//=": lambda q: operator.ifloordiv(q, 2),
    "%=": lambda q: operator.imod(q, 2),
    "@=": lambda q: operator.imatmul(q[..., :HEAD_DIM, :], q.new_ones(HEAD_DIM, HEAD_DIM)),
    "__isub__": lambda q: q.__isub__(1),
    "inplace=True": lambda q: F.relu(q, inplace=True),
    "out=": lambda q: torch.add(q, 1, out=q),
    "an aten op": lambda q: torch.ops.aten.add_.Tensor(q, 1),
    "an index": lambda q: operator.setitem(q, (..., 0), 0.0),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_tensor_between_the_products_leaves_it_dense(change: str) -> None:
    call, inputs = changed_by(CHANGES[change]), qkv(dtype=torch.float64)
    capture, output = run(call, *inputs, topk=1.0, bottomk=0.0)
    assert capture.rewritten == 0
    assert_close("dense", output, call(*inputs), 1e-12)


def scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Correct only if the scale is still written to the queries, and is not applied again."""
    q = q + 0
    weights = (q.mul_(0.3) @ k.mT).softmax(-1)
    return weights @ v + q


def mode_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = (q @ k.mT).softmax(-1)
    return weights @ v


def swapped_back_wrongly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores whose batch and heads change places between the products, by views of the same sizes."""
    q, k, v = (x.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) for x in (q, k, v))
    weights = torch.bmm(q, k.mT).view(HEADS, BATCH, TOKENS, TOKENS).transpose(0, 1)
    return torch.bmm(weights.reshape(BATCH * HEADS, TOKENS, TOKENS).softmax(-1), v)


def into_a_buffer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) for x in (q, k, v))
    buffer = q.new_zeros(2, *q.shape)
    torch.bmm(torch.bmm(q, k.mT).softmax(-1), v, out=buffer[0])
    return buffer


# Graphs next to the pattern that are not listed as attention at all.
UNLISTED: dict[str, Callable[..., Any]] = {
    "softmax over queries": lambda q, k, v: (scores(q, k) * SCALE).softmax(-2) @ v,
    "softmax over heads": lambda q, k, v: (scores(q, k) * SCALE).softmax(1) @ v,
    "einsum with softmax over queries": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(2), v
    ),
    "einsum that sums over queries": lambda q, k, v: torch.einsum(
        "bhij,bhid->bhjd", torch.einsum("bhid,bhjd->bhij", q, k).softmax(3), v
    ),
    "einsum that mixes heads": lambda q, k, v: torch.einsum(
        "bgij,bhjd->bghid", torch.einsum("bgid,bgjd->bgij", q, k).softmax(3), v
    ),
    "between softmax and product": lambda q, k, v: (scores(q, k).softmax(-1) + 0.1) @ v,
    "factor between softmax and product": lambda q, k, v: (scores(q, k).softmax(-1) * 2) @ v,
    "constant added": lambda q, k, v: torch.tanh(scores(q, k)).softmax(-1) @ v,
    "log softmax": lambda q, k, v: scores(q, k).log_softmax(-1) @ v,
    "scores subtracted": lambda q, k, v: (1 - scores(q, k)).softmax(-1) @ v,
    "scores subtracted from a mask": lambda q, k, v: (k[:, :, None, :, 0] - scores(q, k)).softmax(-1) @ v,
    "mask subtracted times a factor": lambda q, k, v: (
        torch.sub(scores(q, k), k[:, :1, None, :, 0], alpha=2).softmax(-1) @ v
    ),
    "no first product": lambda q, k, v: (q @ k.mT + 0).abs().softmax(-1) @ v,
    "weights are the scores": lambda q, k, v: scores(q, k) @ v,
    "a tensor changed in place between": changed_between,
    "a mode changed between": mode_between,
    "batch and heads of the scores swapped": swapped_back_wrongly,
    "written into a buffer": into_a_buffer,
    "rounded scores": lambda q, k, v: scores(q, k).bfloat16().softmax(-1).float() @ v,
}


@pytest.mark.parametrize("form", UNLISTED)
def test_what_is_only_nearly_the_pattern_is_left_alone(form: str) -> None:
    call, inputs = UNLISTED[form], qkv()
    capture, output = run(call, *inputs)
    assert (capture.rewritten, capture.sites) == (0, [])
    assert_same(output, call(*inputs))


def assert_same(output: Any, expected: Any) -> None:
    pairs = zip(output, expected, strict=True) if isinstance(expected, tuple) else [(output, expected)]
    assert all(torch.equal(a, b) for a, b in pairs), "a kept graph is exactly what it was"


KEPT: dict[str, tuple[Callable[..., Any], str, str]] = {
    "returned attention maps": (maps, "the attention probabilities are used elsewhere too", "matmul"),
    "stable by hand": (stable, "the attention scores are used elsewhere too", "amax, sub"),
    "top-k on the scores": (top_k, "the attention scores are used elsewhere too", "lt"),
    "scale per head": (
        lambda q, k, v: (scores(q, k) * q.new_ones(HEADS, 1, 1)).softmax(-1) @ v,
        "scale is not a fixed number",
        "a tensor (2, 1, 1)",
    ),
    "mask added": (
        lambda q, k, v: (scores(q, k) * SCALE + q[0, 0] @ k[0, 0].mT).softmax(-1) @ v,
        "per-query attention mask",
        "a float32 tensor (96, 96)",
    ),
    "mask of one head": (
        lambda q, k, v: (scores(q, k) + k[0, :, None, :, 0]).softmax(-1) @ v,
        "per-head attention mask",
        "a float32 tensor (2, 1, 96)",
    ),
    "masked_fill": (
        lambda q, k, v: scores(q, k).masked_fill(q[0, 0] @ k[0, 0].mT > 0, float("-inf")).softmax(-1) @ v,
        "per-query attention mask",
        "a bool tensor (96, 96)",
    ),
    "a fill that is scaled up to where it leaves weight": (
        lambda q, k, v: (scores(q, k).masked_fill(k[0, 0, :, 0] < 0, -1e4) * 1e-3).softmax(-1) @ v,
        "attention mask",
        "in another layout than the scores",
    ),
    "two masks": (
        lambda q, k, v: (scores(q, k) + q.new_zeros(TOKENS) + q.new_zeros(1)).softmax(-1) @ v,
        "more than one attention mask",
        "new_zeros",
    ),
    "dropout": (
        lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.1) @ v,
        "attention dropout",
        "dropout_p=0.1",
    ),
    "cross-attention": (
        lambda q, k, v: scores(q, k[:, :, :40]).softmax(-1) @ v[:, :, :40],
        "cross-attention",
        "96 queries, 40 keys",
    ),
    "other value width": (
        lambda q, k, v: scores(q, k).softmax(-1) @ v[..., :8],
        "query and value differ in shape",
        "(2, 2, 96, 8)",
    ),
    "broadcast keys": (
        lambda q, k, v: scores(q, k[:, :1]).softmax(-1) @ v,
        "query and key differ in shape",
        "(2, 1, 96, 16)",
    ),
    "windows": (
        lambda q, k, v: scores(*(x.unflatten(2, (3, 32)) for x in (q, k))).softmax(-1) @ v.unflatten(2, (3, 32)),
        "query has 5 dimensions",
        "(2, 2, 3, 32, 16)",
    ),
}


@pytest.mark.parametrize("form", KEPT)
def test_what_cannot_be_rewritten_stays_with_its_reason(form: str) -> None:
    call, reason, value = KEPT[form]
    inputs = qkv()
    capture, output = run(call, *inputs)
    assert capture.rewritten == 0
    assert len(capture.sites) == 1
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert (decision.reason, value in decision.value) == (reason, True), decision
    if form != "dropout":
        assert_same(output, call(*inputs))


def test_an_in_place_scale_of_the_queries_is_not_applied_twice() -> None:
    inputs = qkv(dtype=torch.float64)
    capture, output = run(scaled_in_place, *inputs, topk=1.0, bottomk=0.0)
    assert capture.rewritten == 1
    assert_close("topk=1 is dense attention", output, scaled_in_place(*inputs), 1e-12)


def values_changed_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Between the second product and the view of it by heads."""
    q, k, v = (x.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) * 1 for x in (q, k, v))
    out = torch.bmm(torch.bmm(q, k.mT).mul(SCALE).softmax(-1), v)
    v -= 1
    return out.view(BATCH, HEADS, TOKENS, HEAD_DIM) + v.view(BATCH, HEADS, TOKENS, HEAD_DIM)


def swapped_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) for x in (q, k, v))
    weights = torch.bmm(q, k.mT).view(BATCH, HEADS, TOKENS, TOKENS).transpose(0, 1).transpose(0, 1)
    return torch.bmm(weights.reshape(BATCH * HEADS, TOKENS, TOKENS).softmax(-1), v)


@pytest.mark.parametrize("call", [values_changed_behind, swapped_and_back])
def test_what_is_put_back_or_comes_later_does_not_matter(call: Call) -> None:
    inputs = qkv(dtype=torch.float64)
    capture, output = run(call, *inputs, topk=1.0, bottomk=0.0)
    assert capture.rewritten == 1
    assert_close("topk=1 is dense attention", output, call(*inputs), 1e-12)


class HeadsBefore(nn.Module):
    """Of (B, N, C): the scores, or all of it, have the heads before the batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 3 * HEADS * HEAD_DIM)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        if self.how == "in the scores":
            weights = torch.einsum("bhid,bhjd->hbij", q, k).softmax(-1)
            return torch.einsum("hbij,bhjd->bhid", weights, v)
        if self.how == "in the queries":
            q = q.transpose(0, 1)
            return torch.einsum("hbij,bhjd->bhid", torch.einsum("hbid,bhjd->hbij", q, k).softmax(-1), v)
        return F.scaled_dot_product_attention(*(side.transpose(0, 1) for side in (q, k, v))).transpose(0, 1)


@pytest.mark.parametrize("settings", [{"linear": "marginal", "gate": "per_head"}, {}], ids=["gates", "numbers"])
@pytest.mark.parametrize("how", ["in the scores", "in the queries", "everywhere"])
def test_what_each_head_has_is_of_the_heads(how: str, settings: dict[str, Any]) -> None:
    """Not of the batch, which may be another one in the next call."""
    model, x = nn.Sequential(HeadsBefore(how)).double(), torch.randn(3, TOKENS, 32, dtype=torch.float64)
    capture = Capture(topk=1.0, bottomk=0.0, **settings)
    output = torch.compile(model, backend=capture)(x)
    assert_close("topk=1 is dense attention", output, model(x), 1e-12)
    if how == "in the scores":
        (gate,) = sla_compile.gates(model).values()
        assert next(gate.parameters()).shape == ((HEADS, HEAD_DIM, HEAD_DIM) if settings else (HEADS,))
    else:
        assert isinstance(keep := capture.sites[0].decision, Keep)
        assert keep.reason == "heads are where the batch should be"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_is_split_off_again_is_not_taken_for_heads(batch: int) -> None:
    """Of tokens or of heads that were one axis with it, as in torch's MultiheadAttention of many steps."""

    def of_tokens(x: Tensor) -> Tensor:
        q, k, v = x.flatten(0, 1).unflatten(1, (3, HEADS, HEAD_DIM)).unbind(1)
        q, k, v = (side.view(batch, TOKENS, HEADS, HEAD_DIM).transpose(1, 2) for side in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def of_heads(x: Tensor) -> Tensor:
        q, k, v = x.transpose(0, 1).unflatten(2, (3, HEADS * HEAD_DIM)).unbind(2)
        sides = (side.reshape(TOKENS, batch * HEADS, HEAD_DIM).transpose(0, 1) for side in (q, k, v))
        q, k, v = (side.view(batch, HEADS, TOKENS, HEAD_DIM) for side in sides)
        return F.scaled_dot_product_attention(q, k, v)

    for call in (of_tokens, of_heads):
        torch._dynamo.reset()
        capture, _ = run(call, torch.randn(batch, TOKENS, 3 * HEADS * HEAD_DIM))
        assert capture.rewritten == 1, capture.sites[0].decision


def test_gates_per_head_need_to_know_which_axis_has_the_heads() -> None:
    """Of tensors of nowhere, in one order as inputs and in another as scores."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("hbid,hbjd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,hbjd->bhid", weights, v)

    inputs = qkv(dtype=torch.float64)
    capture, output = run(call, *inputs, linear="marginal", gate="per_head")
    assert isinstance(keep := capture.sites[0].decision, Keep)
    assert keep.reason == "batch and heads are in different orders"
    assert torch.equal(output, call(*inputs))
    torch._dynamo.reset()
    assert run(call, *inputs)[0].rewritten == 1, "one gate for all heads"


def mask_on_merged_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) for x in (q, k, v))
    attn = torch.baddbmm(mask, q, k.mT, beta=0.5, alpha=0.2) * 2
    return (attn.softmax(-1) @ v).view(BATCH, HEADS, TOKENS, HEAD_DIM)


def mask_by_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) for x in (q, k, v))
    attn = torch.bmm(q, k.mT).view(BATCH, HEADS, TOKENS, TOKENS) + mask.view(BATCH, HEADS, TOKENS, TOKENS)
    return torch.bmm(attn.view(BATCH * HEADS, TOKENS, TOKENS).softmax(-1), v).unflatten(0, (BATCH, HEADS))


MASKS: dict[str, Callable[..., Tensor]] = {
    "filled": lambda q, k, v, mask: (scores(q, k) * 0.3).masked_fill(mask[0] > 0.5, -1e9).softmax(-1) @ v,
    "added before the scale": lambda q, k, v, mask: ((scores(q, k) + mask[0]) * 0.3).softmax(-1) @ v,
    "subtracted before the scale": lambda q, k, v, mask: ((scores(q, k) - mask[0]) * 0.3).softmax(-1) @ v,
    "subtracted by a method in place": lambda q, k, v, mask: scores(q, k).mul(0.3).sub_(mask[0]).softmax(-1) @ v,
    "added after the scale": lambda q, k, v, mask: (scores(q, k) * 0.3 + mask[:2]).softmax(-1) @ v,
    "on merged heads": mask_on_merged_heads,
    "by heads between merged products": mask_by_heads,
    "einsum with heads last": lambda q, k, v, mask: torch.einsum(
        "bijh,bhjd->bhid", (torch.einsum("bhid,bhjd->bijh", q, k) + mask[:2].permute(1, 2, 0)[None]).softmax(2), v
    ),
}


@pytest.mark.parametrize("form", MASKS)
def test_masks_are_in_normal_form(form: str) -> None:
    """They are kept dense, but what is said of them is what scaled_dot_product_attention takes."""
    q, k, v = qkv(dtype=torch.float64)
    mask = torch.randn(BATCH * HEADS, TOKENS, TOKENS, dtype=torch.float64)
    capture, output = run(MASKS[form], q, k, v, mask)
    call = capture.sites[0].call
    assert "attention mask" in str(capture.sites[0].decision)
    graph = call.module.graph
    with graph.inserting_before(call.node):
        attn_mask = build(graph, [call.attn_mask])[0]
    graph.output_node().args = ((attn_mask,),)
    inputs = dict(zip(("L_inputs_0_", "L_inputs_1_", "L_inputs_2_", "L_inputs_3_"), (q, k, v, mask), strict=True))
    placeholders = graph.find_nodes(op="placeholder")
    (value,) = fx.Interpreter(call.module).run(*(inputs[str(node.target)] for node in placeholders))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=value, scale=call.scale)
    assert_close("attention with the mask in normal form", output, expected, 1e-12)


class Unfused(Attention):
    """Two attentions in one forward, one written out and one not."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        x = x + (scores(q, k) * 0.3).softmax(-1).matmul(v).transpose(1, 2).flatten(2)
        q, k, v = self.heads(x)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        q, k, v = self.heads(x)
        return self.out((scores(q * 0.2, k)).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


class Fused(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        x = x + F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)
        q, k, v = self.heads(x)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        q, k, v = self.heads(x)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.2).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("wrap", ["plain", "checkpoint", "dynamic"])
def test_gates_by_ordinal_and_gradients(wrap: str) -> None:
    """The same gates, in the same order, and the same gradients as the fused form, which has its own tests."""
    x = random_input().requires_grad_()
    unfused = Unfused().double()
    fused = Fused().double()
    fused.load_state_dict(unfused.state_dict())
    results = []
    for owner in (unfused, fused):
        model = nn.Sequential(owner)
        call = model if wrap != "checkpoint" else lambda x, m=model: checkpoint(m, x, use_reentrant=False)
        options = {**OPTIONS, "inner": "aot_eager"}
        compiled = torch.compile(call, backend="sla", options=options, dynamic=wrap == "dynamic" or None)
        compiled(x)
        assert list(sla_compile.gates(model)) == ["0.sla", "0.sla_1", "0.sla_2"]
        torch.manual_seed(1)
        randomize_gates(model)
        output = compiled(x)
        parameters = dict(model.named_parameters())
        of_all = torch.autograd.grad(output.square().sum(), [x, *parameters.values()])
        results.append((output, dict(zip(["input", *parameters], of_all, strict=True))))
    (output, gradients), (expected, wanted) = results
    assert_close("output", output, expected, 1e-12)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert wanted[name].norm() > 0, name
        assert_close(f"gradient of {name}", gradient, wanted[name], 1e-10)


def test_the_report_names_the_pattern() -> None:
    model = Unfused().double()
    torch.compile(model, backend="sla", options={**OPTIONS, "inner": "eager"})(random_input())
    sites = sla_compile.report(model).to_dict()["sites"]
    assert [site["rewritten"] for site in sites] == [True] * 3
    removed = [[line for line in site["diff"] if line.startswith("- ") and "attention" in line] for site in sites]
    assert not removed[0]
    assert any("scaled_matmul_softmax_matmul" in line and "scale=0.3" in line for line in sites[0]["diff"])
    assert any("scaled_dot_product_attention" in line for line in sites[1]["diff"])
    assert sum(line.startswith("+ ") for line in sites[0]["diff"]) >= 2


def test_diffusers_older_processor() -> None:
    attention = pytest.importorskip("diffusers.models.attention_processor")
    model = attention.Attention(query_dim=32, heads=2, dim_head=16, processor=attention.AttnProcessor())
    model.requires_grad_(False)
    x = torch.randn(2, TOKENS, 32)
    capture = Capture(topk=1.0, bottomk=0.0)
    output = torch.compile(model, backend=capture)(x)
    assert capture.rewritten == 1
    assert capture.sites[0].call.query.meta["example_value"].shape == (2, 2, TOKENS, 16)
    assert leftovers(capture) == []
    assert_close("topk=1 is dense attention", output, model(x), 1e-5)
