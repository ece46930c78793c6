"""Masks over keys: each way of making one by the topk=1 identity, and the nearest mask that keeps attention dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from sla_compile.kernels import reference
from sla_compile.passes.decide import Keep, Rewrite
from sla_compile.passes.key_masks import constant_along
from sla_compile.reporting.terminal import ReportView, plain_text
from tests.support.capture import HEAD_DIM, HEADS, TOKENS, Caller, Capture, Wrapper, qkv, run
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BATCH = 2
EXACT: dict[str, Any] = {"topk": 1.0, "bottomk": 0.0}


def padding(batch: int = BATCH) -> Tensor:
    """(B, Lk), True where a key takes part: other lengths of text and, in the first, a hole of more than a block."""
    mask = torch.rand(batch, TOKENS) < 0.8
    mask[0, 20:60] = False
    return mask


def additive(batch: int = BATCH) -> Tensor:
    return torch.where(padding(batch), torch.randn(batch, TOKENS, dtype=torch.float64), float("-inf"))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_repeated_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As diffusers' prepare_attention_mask and the view after it."""
    mask = (1 - mask.to(q.dtype)) * -10000.0
    mask = mask.unsqueeze(1).repeat_interleave(HEADS, dim=0)
    return attention(q, k, v, mask.view(BATCH, -1, 1, TOKENS))


def by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Materialised for every query and head, of several parts."""
    whole = mask[:, None, None, :].expand(-1, HEADS, TOKENS, -1)
    every = torch.ones(BATCH, 1, TOKENS, 1, dtype=torch.bool, device=q.device)
    return attention(q, k, v, (whole & every).contiguous().clone())


def by_cat(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask = mask[:, None, :].repeat(1, TOKENS, 1)
    return attention(q, k, v, torch.cat([mask[..., :40], mask[..., 40:]], dim=-1).unsqueeze(1))


def by_transposes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask = mask.unsqueeze(-1).repeat(1, 1, TOKENS).transpose(1, 2)  # (B, Lq, Lk)
    return attention(q, k, v, mask.permute(1, 0, 2).unsqueeze(0).permute(2, 0, 1, 3).logical_not().logical_not())


def by_filling(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    zeros = torch.zeros(BATCH, 1, TOKENS, TOKENS, dtype=q.dtype, device=q.device)
    return attention(q, k, v, zeros.masked_fill(~mask[:, None, None], -1e9))


def written_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A mask of size 1 is the same for all queries, whatever is written to it."""
    mask = mask[:, None, None].clone()
    mask[..., 0] = True
    return attention(q, k, v, mask)


OVER_KEYS: dict[str, Callable[..., Tensor]] = {
    "(B, 1, 1, Lk)": lambda q, k, v, m: attention(q, k, v, m[:, None, None, :]),
    "(1, 1, 1, Lk)": lambda q, k, v, m: attention(q, k, v, m[:1, None, None, :]),
    "(1, 1, Lk)": lambda q, k, v, m: attention(q, k, v, m[:1, None]),
    "(1, Lk)": lambda q, k, v, m: attention(q, k, v, m[:1]),
    "(B, 1, Lq, Lk) by expand": lambda q, k, v, m: attention(q, k, v, m[:, None, None].expand(-1, 1, TOKENS, -1)),
    "(B, H, Lq, Lk) by expand": lambda q, k, v, m: attention(q, k, v, m[:, None, None].expand(-1, HEADS, TOKENS, -1)),
    "(Lq, Lk) by expand": lambda q, k, v, m: attention(q, k, v, m[1].expand(TOKENS, TOKENS)),
    "(B, 1, Lq, Lk) by repeat": lambda q, k, v, m: attention(q, k, v, m[:, None, None].repeat(1, 1, TOKENS, 1)),
    "broadcast_to": lambda q, k, v, m: attention(
        q, k, v, torch.broadcast_to(m[:, None, None], (BATCH, HEADS, TOKENS, TOKENS))
    ),
}  # fmt: skip
OF_BOOL: dict[str, Callable[..., Tensor]] = {
    "heads by repeat_interleave and view": by_repeated_heads,
    "materialised": by_products,
    "cat": by_cat,
    "transposes": by_transposes,
    "masked_fill": by_filling,
    "written in place": written_in_place,
    "where": lambda q, k, v, m: attention(
        q, k, v, torch.where(m[:, None, None].expand(-1, -1, TOKENS, -1), 0.0, -1e9).to(q.dtype)
    ),
    "subtracted": lambda q, k, v, m: attention(
        q, k, v, (m[:, None, None].expand(-1, -1, TOKENS, -1).to(q.dtype) - 1) * 1e9
    ),
}


def assert_masked(call: Callable[..., Tensor], mask: Tensor) -> Capture:
    """Rewritten, equal to dense attention at topk=1 and to the definition below it; gradients too."""
    inputs = [x.requires_grad_() for x in qkv(dtype=torch.float64)]
    expected = call(*inputs, mask)
    capture, output = run(call, *inputs, mask, **EXACT)
    assert [site.decision for site in capture.sites if isinstance(site.decision, Keep)] == []
    assert (capture.rewritten, capture.kept) == (1, 0)
    assert_close("topk=1 is dense attention", output, expected, 1e-12)
    cotangent = torch.randn_like(output)
    pairs = zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (output, expected)), strict=True)
    for name, (actual, wanted) in zip("qkv", pairs, strict=True):
        assert_close(f"gradient of {name}", actual, wanted, 1e-11)
    assert (run(call, *inputs, mask)[1] - expected).norm() > 0.01, "with topk below 1 it is another function"
    return capture


@pytest.mark.parametrize("form", OVER_KEYS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_over_keys_is_rewritten(form: str, kind: str) -> None:
    capture = assert_masked(OVER_KEYS[form], padding() if kind == "bool" else additive())
    decision = capture.sites[0].decision
    assert isinstance(decision, Rewrite)
    assert decision.key_mask is not None
    made = decision.key_mask.meta["example_value"]
    assert made.shape in [(BATCH, TOKENS), (1, TOKENS)]


@pytest.mark.parametrize("form", OF_BOOL)
def test_a_mask_is_followed_through_what_made_it(form: str) -> None:
    assert_masked(OF_BOOL[form], padding())


def test_it_is_the_definition_below_topk_of_one() -> None:
    q, k, v = qkv(dtype=torch.float64)
    mask = padding()
    _, output = run(lambda q, k, v, m: attention(q, k, v, m[:, None, None]), q, k, v, mask)
    options = {name: OPTIONS[name] for name in ("topk", "bottomk", "block_q", "block_k")}
    expected = reference.sparse_linear_attention(q, k, v, key_mask=mask, linear="taylor", **options)
    assert_close("output", output, expected, 1e-12)


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("where", [False, True])
def test_an_item_without_keys_gives_the_mean_where_scores_are_filled(fill: float, where: bool) -> None:
    """Equal scores weigh all values alike, also those of the other items' masked keys."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores, mask = q @ k.mT * 0.25, mask[:, None, None]
        filled = torch.where(mask, scores, fill) if where else scores.masked_fill(~mask, fill)
        return filled.softmax(-1) @ v

    mask = padding()
    mask[1] = False
    assert_masked(call, mask)
    q, k, v = qkv(dtype=torch.float64)
    _, output = run(call, q, k, v, mask, **EXACT, reorder="tiles", grid=(4, 4, 6))
    assert_close("the mean", output[1], v[1].mean(-2, keepdim=True).expand_as(output[1]), 1e-12)


def outer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A query that is padding sees itself alone."""
    return attention(q, k, v, (mask[:, None, None, :] & mask[:, None, :, None]) | torch.eye(TOKENS, dtype=torch.bool))


def outer_of(mask: Tensor) -> Tensor:
    """(Lq, Lk), True on the diagonal."""
    return (mask[0, :, None] & mask[0]) | torch.eye(TOKENS, dtype=torch.bool)


def written_afterwards(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Made as a mask over keys, then changed for some queries through a view."""
    mask = mask[:, None, None].repeat(1, 1, TOKENS, 1)
    mask[:, 0][:, 5] = True
    return attention(q, k, v, mask)


def written_by_an_operator(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask = mask[:, None, None].repeat(1, 1, TOKENS, 1)
    plane = mask[0, 0]
    plane &= torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    mask[..., 0] = True
    return attention(q, k, v, mask)


def written_through_a_piece(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask = mask[:, None, None].repeat(1, 1, TOKENS, 1)
    first, _ = mask.chunk(2, dim=2)
    first |= torch.eye(TOKENS, dtype=torch.bool)[: TOKENS // 2]
    return attention(q, k, v, mask)


def one_head_off(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(H*B) seen as (B, H): next to repeat_interleave, repeat puts other batches' masks on the heads."""
    return attention(q, k, v, mask.repeat(HEADS, 1).view(BATCH, HEADS, 1, TOKENS))


def of_each_frame(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As an autoregressive video model's: the queries of a frame share a mask, those of another have another."""
    frames = torch.stack([mask[0], ~mask[0], mask[1], mask[0] ^ mask[1]])
    mask = frames[None, None, :, None].expand(BATCH, 1, 4, TOKENS // 4, TOKENS)
    return attention(q, k, v, mask.reshape(BATCH, 1, TOKENS, TOKENS))


KEPT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "of each frame's queries": (of_each_frame, "per-query attention mask"),
    "beside axes of one": (
        lambda q, k, v, m: attention(q, k, v, outer_of(m)[None, :, None, :].reshape(1, 1, TOKENS, TOKENS)),
        "per-query attention mask",
    ),
    "outer product and the diagonal": (outer, "per-query attention mask"),
    "causal by hand": (
        lambda q, k, v, m: attention(q, k, v, torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()),
        "per-query attention mask",
    ),
    "written afterwards": (written_afterwards, "per-query attention mask"),
    "written by an operator": (written_by_an_operator, "per-query attention mask"),
    "written through a piece": (written_through_a_piece, "per-query attention mask"),
    "of each head": (
        lambda q, k, v, m: attention(q, k, v, torch.stack([m, ~m], 1)[:, :, None]),
        "per-head attention mask",
    ),
    "heads by repeat": (one_head_off, "per-head attention mask"),
    "heads by a repetition of another count": (
        lambda q, k, v, m: attention(
            q, k, v, torch.cat([m, ~m]).repeat_interleave(1, dim=0).view(BATCH, HEADS, 1, TOKENS)
        ),
        "per-head attention mask",
    ),
    "heads by a repetition that is cut": (
        lambda q, k, v, m: attention(
            q, k, v, torch.cat([m, ~m[:1]]).repeat_interleave(HEADS, dim=0)[1:5].view(BATCH, HEADS, 1, TOKENS)
        ),
        "per-head attention mask",
    ),
    "transposed": (
        lambda q, k, v, m: attention(q, k, v, m.to(q.dtype)[:, None, None].expand(-1, -1, TOKENS, -1).transpose(2, 3)),
        "per-query attention mask",
    ),
    "not over keys": (
        lambda q, k, v, m: attention(q, k, v, m.to(q.dtype)[:, None, :1, None]),
        "attention mask of another shape",
    ),
    "clamped for each query": (
        lambda q, k, v, m: attention(
            q, k, v, m[:, None, None].to(q.dtype).repeat(1, 1, TOKENS, 1).clamp(min=q[:, :1, :, :1])
        ),
        "per-query attention mask",
    ),
    "flattened by repeat_interleave": (
        lambda q, k, v, m: attention(
            q, k, v, m[0, :].view(8, 12).repeat(1, 8).repeat_interleave(12).view(TOKENS, TOKENS)
        ),
        "per-query attention mask",
    ),
}


@pytest.mark.parametrize("form", KEPT)
def test_any_other_mask_stays(form: str) -> None:
    call, reason = KEPT[form]
    q, k, v = qkv(dtype=torch.float64)
    mask = padding()
    capture, output = run(call, q, k, v, mask)
    assert (capture.rewritten, capture.kept) == (0, 1)
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert decision.reason == reason
    assert "tensor (" in decision.value
    assert decision.accepted
    assert torch.equal(output.nan_to_num(), call(q, k, v, mask).nan_to_num())


def test_a_mask_that_is_learned_stays() -> None:
    q, k, v = qkv()
    bias = torch.randn(TOKENS, requires_grad=True)
    capture, _ = run(lambda q, k, v, m: attention(q, k, v, m), q, k, v, bias)
    assert capture.rewritten == 0
    assert "attention mask that needs a gradient" in str(capture.sites[0].decision)
    with torch.no_grad():
        capture, _ = run(lambda q, k, v, m: attention(q, k, v, m), q, k, v, bias)
    assert capture.rewritten == 1, "without gradients it is a mask like another"


def expanded_padding(tokens: int) -> Tensor:
    return (torch.rand(BATCH, 1, 1, tokens) < 0.8).expand(-1, -1, tokens, -1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_expanded_input_is_guarded(dynamic: bool) -> None:
    """The graph for a mask that was the same for all queries must not serve one that is not."""
    capture = Capture(**EXACT)
    compiled = torch.compile(Wrapper(Caller(lambda x, mask: attention(x, 2 * x, x, mask))), backend=capture)
    for tokens in (64, 80, TOKENS) if dynamic else (TOKENS,):
        x, mask = torch.randn(BATCH, HEADS, tokens, HEAD_DIM, dtype=torch.float64), expanded_padding(tokens)
        assert_close("expanded", compiled(x, mask), attention(x, 2 * x, x, mask), 1e-12)
        assert capture.rewritten == 1, capture.sites[0].decision
    assert isinstance(capture.sites[0].decision.shape.tokens, int) is not dynamic  # type: ignore[union-attr]
    other = mask.clone()
    other[:, :, : TOKENS // 2, 70:] = False
    assert_close("of each query", compiled(x, other), attention(x, 2 * x, x, other), 1e-12)
    assert capture.rewritten == 0


@pytest.mark.parametrize("own_symbol", [False, True])
def test_a_mask_of_a_symbolic_length(own_symbol: bool) -> None:
    """Made of the tokens' own size, or an input whose length is a symbol of its own."""

    def call(x: Tensor, mask: Tensor) -> Tensor:
        mask = mask if own_symbol else torch.arange(x.shape[2], device=x.device)[None] < mask.sum(1, keepdim=True)
        return attention(x, 2 * x, x, mask[:, None, None])

    capture = Capture(**EXACT)
    compiled = torch.compile(Wrapper(Caller(call)), backend=capture)
    for tokens in (64, 80, TOKENS):
        x, mask = torch.randn(BATCH, HEADS, tokens, HEAD_DIM, dtype=torch.float64), torch.rand(BATCH, tokens) < 0.8
        assert_close("masked", compiled(x, mask), call(x, mask), 1e-12)
        assert capture.rewritten == 1, capture.sites[0].decision


HAND_WRITTEN: dict[str, Callable[..., Tensor]] = {
    "added": lambda q, k, v, m: ((q @ k.mT) * 0.3 + torch.where(m, 0.0, -1e9)[:, None, None]).softmax(-1) @ v,
    "added before the scale": lambda q, k, v, m: (((q @ k.mT) + m[:, None, None].to(q.dtype)) * 0.3).softmax(-1) @ v,
    "subtracted": lambda q, k, v, m: (q @ k.mT - 1e9 * (1 - m.to(q.dtype))[:, None, None]).softmax(-1) @ v,
    "subtracted before the scale": lambda q, k, v, m: (((q @ k.mT) - m[:, None, None].long()) * 0.3).softmax(-1) @ v,
    "(Lk)": lambda q, k, v, m: ((q @ k.mT) * 0.3 + torch.where(m[0], 0.0, -1e9)).softmax(-1) @ v,
    "a bool added": lambda q, k, v, m: ((q @ k.mT) + m[:, None, None]).softmax(-1) @ v,
    "filled": lambda q, k, v, m: (q @ k.mT).masked_fill(~m[:, None, None], float("-inf")).softmax(-1) @ v,
    "filled in place": lambda q, k, v, m: (q @ k.mT).masked_fill_(~m[:, None, None], float("-inf")).softmax(-1) @ v,
    "where": lambda q, k, v, m: torch.where(m[:, None, None], q @ k.mT, float("-inf")).softmax(-1) @ v,
    "where not": lambda q, k, v, m: torch.where(~m[:, None, None], -1e9, q @ k.mT).softmax(-1) @ v,
    "the method where": lambda q, k, v, m: (q @ k.mT).where(m[:, None, None], -1e9).softmax(-1) @ v,
    "baddbmm": lambda q, k, v, m: torch.baddbmm(
        torch.where(m, 0.0, -1e9).to(q.dtype)[:, None].repeat_interleave(HEADS, 0).expand(-1, TOKENS, -1),
        q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.25,
    ).softmax(-1).bmm(v.flatten(0, 1)).unflatten(0, (BATCH, HEADS)),
}  # fmt: skip


@pytest.mark.parametrize("form", HAND_WRITTEN)
def test_masks_of_hand_written_attention(form: str) -> None:
    assert_masked(HAND_WRITTEN[form], padding())


class Padded(nn.Module):
    """nn.MultiheadAttention with a key padding mask, whose True is forbidden."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HEADS * HEAD_DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize("inference", [True, False])
def test_key_padding_mask_of_multi_head_attention(inference: bool) -> None:
    model = Padded().double()
    x, mask = torch.randn(BATCH, TOKENS, HEADS * HEAD_DIM, dtype=torch.float64), padding()
    model.train(not inference)
    with torch.set_grad_enabled(not inference):
        expected = model(x, ~mask)
        capture = Capture(**EXACT)
        output = torch.compile(model, backend=capture)(x, ~mask)
    assert capture.rewritten == 1
    assert_close("topk=1 is dense attention", output, expected, 1e-12)


def test_the_report_shows_the_mask() -> None:
    model = nn.Sequential(Caller(lambda x: attention(x, x, x, (x[:, :1, :, 0] > -1)[:, :, None])))
    x = torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM)
    report = sla_compile.explain(model, (x,), config=OPTIONS)
    (site,) = report.sites
    assert (site.rewritten, site.reason, site.mask) == (True, "self-attention", f"bool ({BATCH}, 1, 1, {TOKENS})")
    assert f"mask bool ({BATCH}, 1, 1, {TOKENS})" in plain_text(ReportView(report), 250)
    assert any("key_mask" in line or "select" in line for line in site.diff)


def test_constant_along_of_tensors_looks_at_their_values() -> None:
    """An eager call, as calibration sees it, shows no graph."""
    mask = padding()[:, None, None].repeat(1, 1, TOKENS, 1)
    assert constant_along(mask, -2)
    mask[0, 0, 3, 4] = ~mask[0, 0, 3, 4]
    assert not constant_along(mask, -2)
