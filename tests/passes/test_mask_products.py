"""Products of a mask of keys and one of queries: in every spelling, all queries compared, and the nearest that stay."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sla_compile
from sla_compile.kernels import reference
from sla_compile.passes.decide import Keep, Rewrite
from sla_compile.passes.mask_products import factors
from tests.passes.test_key_masks import BATCH, EXACT, assert_masked, attention, padding
from tests.support.capture import HEAD_DIM, HEADS, TOKENS, Caller, Capture, Wrapper, qkv, run
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def keys(mask: Tensor) -> Tensor:
    return mask[:, None, None, :]


def queries(mask: Tensor) -> Tensor:
    return mask[:, None, :, None]


def hunyuan_video_15(mask: Tensor) -> Tensor:
    mask = F.pad(mask[:, TOKENS // 2 :], (TOKENS // 2, 0), value=True).bool()
    over_keys = mask.view(BATCH, 1, 1, TOKENS).repeat(1, 1, TOKENS, 1)
    return (over_keys & over_keys.transpose(2, 3)).bool()


def of_numbers(mask: Tensor) -> Tensor:
    numbers = mask.float()
    return (keys(numbers) * queries(numbers)).bool()


PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "Chroma's": lambda m: keys(m) * queries(m),
    "HunyuanVideo 1.5's": hunyuan_video_15,
    "bitwise_and": lambda m: torch.bitwise_and(keys(m), queries(m)),
    "logical_and": lambda m: keys(m.long()).logical_and(queries(m)),
    "logical_and of any numbers": lambda m: keys(m * 2.5).logical_and(queries(m * 16)),
    "of numbers": of_numbers,
    "compared with 0": lambda m: keys(m.int()) * queries(m) > 0,
    "compared with 1": lambda m: torch.minimum(keys(m.to(torch.uint8)), queries(m.to(torch.uint8))) == 1,
    "not zero, negated": lambda m: ~((keys(m.half()) * queries(m.half())) < 0.5),
    "neither is padding": lambda m: ~(keys(~m) | queries(~m)),
    "sum of paddings": lambda m: (keys(~m).int() + queries(~m).int()).logical_not(),
    "other masks": lambda m: keys(m) & queries(m.flip(-1)) & keys(m.flip(0)) & queries(m.roll(9, 1)),
    "expanded to heads": lambda m: (m[:, None] * m[:, :, None]).unsqueeze(1).expand(-1, HEADS, -1, -1),
    "viewed": lambda m: (m[:, None] & m[:, :, None]).view(BATCH, 1, TOKENS, TOKENS),
    "repeated": lambda m: (m[:, None] & m[:, :, None])[:, None].repeat(1, HEADS, 1, 1).clone(),
    "heads by repeat_interleave": lambda m: (
        (m[:, None] & m[:, :, None]).repeat_interleave(HEADS, dim=0).unflatten(0, (-1, HEADS))
    ),
    "transposed": lambda m: (keys(m) & queries(m.flip(-1))).transpose(-1, -2),
    "cut out": lambda m: (F.pad(m, (3, 5))[:, None] & F.pad(m, (3, 5))[:, :, None])[:, None, 3:-5, 3:-5],
    "(Lq, Lk)": lambda m: m[0] & m[0, :, None],
    "queries alone": lambda m: queries(m).expand(-1, -1, -1, TOKENS),
    "queries alone, to be broadcast": queries,
    "whole items": lambda m: m[:, None, :1, None],
}


def at_both(mask: Tensor) -> Tensor:
    mask[1, 0] = False
    return mask


@pytest.mark.parametrize("form", PRODUCTS)
def test_a_product_is_rewritten(form: str) -> None:
    """At topk=1 every query is right, those without a key too: scaled_dot_product_attention gives them 0."""
    q, k, v = qkv(dtype=torch.float64)
    mask = at_both(padding())

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention(q, k, v, PRODUCTS[form](mask))

    capture, output = run(call, q, k, v, mask, **EXACT)
    assert_close("topk=1 is dense attention", output, call(q, k, v, mask), 1e-12)
    decision = capture.sites[0].decision
    assert isinstance(decision, Rewrite), decision
    assert decision.query_mask is not None
    assert (decision.key_mask is None) == (form in ("queries alone", "queries alone, to be broadcast", "whole items"))


@pytest.mark.parametrize("form", ["Chroma's", "queries alone"])
def test_its_gradients_are_those_of_dense_attention(form: str) -> None:
    assert_masked(lambda q, k, v, m: attention(q, k, v, PRODUCTS[form](m)), at_both(padding()))


FILLED: dict[str, Callable[..., Tensor]] = {
    "masked_fill": lambda s, p: s.masked_fill(~p, -1e9),
    "equal to 0": lambda s, p: s.masked_fill(p.int() == 0, -1e9),
    "where": lambda s, p: torch.where(p, s, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("form", FILLED)
@pytest.mark.parametrize("alone", [False, True])
def test_scores_that_are_filled_by_hand(form: str, alone: bool) -> None:
    """A query all of whose scores are the same finite number gives the mean of all values; an item without keys too."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        whole = queries(mask) if alone else keys(mask) & queries(mask.flip(-1))
        return FILLED[form](q @ k.mT * 0.25, whole.expand(-1, -1, TOKENS, TOKENS)).softmax(-1) @ v

    mask = padding()
    mask[1] = False
    assert_masked(call, mask)


@pytest.mark.parametrize("dynamic", [False, True])
def test_grouped_heads_another_order_and_symbolic_lengths(dynamic: bool) -> None:
    def call(x: Tensor, mask: Tensor) -> Tensor:
        key, value = 2 * x[:, :2], x[:, 2:]
        return F.scaled_dot_product_attention(x, key, value, attn_mask=keys(mask) * queries(mask), enable_gqa=True)

    options = {} if dynamic else {"reorder": "tiles", "grid": (4, 4, 6)}
    capture = Capture(**EXACT, **options)
    compiled = torch.compile(Wrapper(Caller(call)), backend=capture, dynamic=None if dynamic else False)
    for tokens in (64, 80, TOKENS) if dynamic else (TOKENS,):
        x = torch.randn(BATCH, 4, tokens, HEAD_DIM, dtype=torch.float64)
        mask = torch.rand(BATCH, tokens) < 0.7
        assert_close("masked", compiled(x, mask), call(x, mask), 1e-12)
        assert capture.rewritten == 1, capture.sites[0].decision


def test_the_blocks_of_the_other_queries_are_theirs() -> None:
    """It is the definition for queries that are 0 where they are masked: their block's mean is that of the others."""
    q, k, v = qkv(dtype=torch.float64)
    mask = padding()
    _, output = run(lambda q, k, v, m: attention(q, k, v, keys(m) * queries(m)), q, k, v, mask)
    options = {name: OPTIONS[name] for name in ("topk", "bottomk", "block_q", "block_k")}
    told: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "key_mask": mask, **options}
    zeroed = q.masked_fill(~mask[:, None, :, None], 0)
    expected = reference.sparse_linear_attention(zeroed, k, v, key_mask=mask, linear="taylor", **options)
    assert_close("output", output, expected.masked_fill(~mask[:, None, :, None], 0), 1e-12)
    block = slice(0, OPTIONS["block_q"])
    alone = q[:1, :, block][:, :, mask[0, block]]
    told["key_mask"] = mask[:1]
    chosen = reference.classify(zeroed[:1, :, block], k[:1], **told)
    assert torch.equal(chosen, reference.classify(alone, k[:1], **told))


@pytest.mark.parametrize("fill", [float("nan"), 1e6])
def test_what_stands_in_a_masked_query_changes_nothing(fill: float) -> None:
    q, k, v = qkv(dtype=torch.float64)
    mask = padding()
    other = q.masked_fill(~queries(mask), fill).requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return attention(q, k, v, keys(m) & queries(m))

    _, output = run(call, q, k, v, mask)
    _, changed = run(call, other, k, v, mask)
    assert torch.equal(output, changed)
    (gradient,) = torch.autograd.grad(changed.square().sum(), other)
    assert not gradient.masked_select(~queries(mask)).any(), "dense attention gives these 0 too"
    assert gradient.isfinite().all()


class Trained(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return attention(x, 2 * x, x, keys(mask) * queries(mask))


def test_a_trained_gate_gives_masked_queries_nothing() -> None:
    model, mask = Wrapper(Trained()), padding()
    x = torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM)
    sla_compile.prepare(model, (x, mask), config=OPTIONS)
    with torch.no_grad():
        for parameter in sla_compile.gate_parameters(model):
            parameter.normal_()
    output = torch.compile(model, backend="sla", options={"inner": "eager"})(x, mask)
    assert (output != 0).all(-1).eq(mask[:, None]).all()


def test_calibration_leaves_masked_queries_out() -> None:
    """They would pull the bias to 0: with three times as many of them the fit is the same."""
    fits = []
    for padded in (16, 48):
        torch.manual_seed(0)
        x = torch.randn(BATCH, HEADS, 112, HEAD_DIM) + torch.linspace(-1, 1, HEAD_DIM)
        x = F.pad(x, (0, 0, 0, padded))
        mask = torch.arange(112 + padded).expand(BATCH, -1) < 112
        model = Wrapper(Trained())
        sla_compile.calibrate(
            model, [(x, mask)], config={**OPTIONS, "linear": "marginal", "topk": 0.25, "bottomk": 0.0}
        )
        (gate,) = sla_compile.gates(model).values()
        fits.append(torch.cat([gate.weight.flatten(), gate.bias]).detach())
    assert_close("gate", fits[0], fits[1], 1e-4)


def changed_in_between(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The mask that the product was made of is another by the time of the attention."""
    base = mask.clone()
    whole = base[:, None, None] & base[:, None, :, None]
    base[:, 40:] = False
    return attention(q, k, v, whole)


def changed_afterwards(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As token refiners do, so that no query is without a key."""
    whole = keys(mask) & queries(mask)
    whole[..., 0] = True
    return attention(q, k, v, whole)


def pairs(q: Tensor, mask: Tensor) -> Tensor:
    return (q[:, :1] @ q[:, :1].mT > 0) | queries(~mask)


KEPT: dict[str, Callable[..., Tensor]] = {
    "changed in between": changed_in_between,
    "changed afterwards": changed_afterwards,
    "16 * 16 in eight bits": lambda q, k, v, m: attention(
        q, k, v, (keys(m.to(torch.int8) * 16) * queries(m.to(torch.int8) * 16 + 1)).bool()
    ),
    "2 & 1": lambda q, k, v, m: attention(q, k, v, (keys(m.int() * 2) & queries(m.int() + 2)).bool()),
    "either": lambda q, k, v, m: attention(q, k, v, keys(m) | queries(m)),
    "not both": lambda q, k, v, m: attention(q, k, v, ~(keys(m) & queries(m))),
    "with one of pairs": lambda q, k, v, m: attention(q, k, v, keys(m) & pairs(q, m)),
    "of packed samples": lambda q, k, v, m: attention(q, k, v, keys(m.cumsum(-1)) == queries(m.cumsum(-1))),
    "of each head's queries": lambda q, k, v, m: attention(
        q, k, v, keys(m) & torch.stack([m, ~m], 1)[..., None].expand(-1, -1, -1, TOKENS)
    ),
    "added": lambda q, k, v, m: attention(q, k, v, (keys(m) & queries(m)).to(q.dtype)),
    "of numbers, added": lambda q, k, v, m: attention(q, k, v, keys(m.to(q.dtype)) * queries(m.to(q.dtype))),
}


@pytest.mark.parametrize("form", KEPT)
def test_what_is_not_provably_one_stays(form: str) -> None:
    q, k, v = qkv(dtype=torch.float64)
    mask = padding()
    capture, output = run(KEPT[form], q, k, v, mask)
    assert (capture.rewritten, capture.kept) == (0, 1)
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    added = form == "of numbers, added"
    assert decision.reason == ("product of masks that is added to the scores" if added else "per-query attention mask")
    assert torch.equal(output, KEPT[form](q, k, v, mask))


BINARY: tuple[Callable[..., Any], ...] = (operator.and_, operator.mul, torch.logical_and, operator.or_, torch.add)
BINARY += (torch.minimum, torch.maximum, torch.bitwise_xor)
UNARY: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = (
    *((torch.logical_not, ()), (operator.invert, ()), (Tensor.to, (torch.uint8,)), (Tensor.to, (torch.bool,))),
    *((Tensor.to, (torch.float64,)), (torch.transpose, (-1, -2)), (torch.gt, (0,)), (torch.eq, (1,)), (torch.lt, (1,))),
    *((torch.mul, (2,)), (torch.unsqueeze, (1,)), (torch.Tensor.expand, (2, 3, -1, -1)), (torch.squeeze, (1,))),
    *((torch.flatten, (0, 1)), (torch.repeat_interleave, (2, 0)), (operator.getitem, ((slice(1, None),),))),
)


def expression(draw: random.Random) -> fx.Node:
    """The last node of a graph of random operations on masks of keys, of queries and of pairs."""
    graph = fx.Graph()
    nodes = []
    for shape in ((2, 1, 1, 4), (2, 1, 4, 1), (2, 1, 4, 4), (1, 1, 4, 1)):
        nodes.append(graph.placeholder("mask"))
        nodes[-1].meta["example_value"] = torch.rand(shape) < 0.7
    for _ in range(draw.randint(2, 9)):
        function, arguments = draw.choice([*((f, None) for f in BINARY), *UNARY])
        given = draw.sample(nodes[-5:], 2) if arguments is None else [draw.choice(nodes[-3:]), *arguments]
        values = [node.meta["example_value"] if isinstance(node, fx.Node) else node for node in given]
        try:
            value = function(*values)
        except (RuntimeError, TypeError, IndexError):
            continue
        if value.dim() < 2 or value.numel() > 5000 or value.shape[-2:] == (1, 1):
            continue
        nodes.append(graph.call_function(function, tuple(given)))
        nodes[-1].meta["example_value"] = value
    return nodes[-1]


@pytest.mark.parametrize("seed", range(3))
def test_all_factors_are_true_where_the_mask_is(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    products = 0
    for _ in range(700):
        node = expression(draw)
        value, found = node.meta["example_value"], factors(node)
        together = torch.ones_like(value, dtype=torch.bool)
        for part in found:
            together = together & part.meta["example_value"].bool()
        assert together.shape == value.shape
        assert torch.equal(together, value.bool()), node.graph
        products += len(found) > 1
    assert products > 70


def test_factors_of_a_tensor_are_found_by_its_values() -> None:
    """An eager call, as calibration sees it, shows no graph."""
    mask = padding()
    whole = keys(mask) & queries(mask.flip(-1))
    both: list[Tensor] = factors(whole)
    assert len(both) == 2
    assert torch.equal(both[0] & both[1], whole)
    whole[0, 0, 3, 4] = ~whole[0, 0, 3, 4]
    assert len(factors(whole)) == 1
