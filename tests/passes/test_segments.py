"""Masks by which runs of queries each see one range of keys: dense at topk=1, the definition on each run below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sla_compile
import sla_compile.passes.known_values as known_values_module
from sla_compile import TokenOrderWarning
from sla_compile.kernels import reference
from sla_compile.passes.decide import Keep, Rewrite
from sla_compile.passes.known_values import Known, known_values
from sla_compile.passes.segments import Segment, segments
from tests.support.capture import HEAD_DIM, TOKENS, Capture, qkv, run
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS, WIDTH, Attention, Model, random_input, randomize_gates
from tests.support.token_grids import BLOCKS, EXACT

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

FRAMES = tuple(Segment(first, first + 24, 0, first + 24) for first in range(0, TOKENS, 24))
SAMPLES = tuple(Segment(first, first + 32, first, first + 32) for first in range(0, TOKENS, 32))
UNEVEN = (Segment(0, 40, 0, 40), Segment(40, 57, 40, 57), Segment(57, 96, 57, 96))


def frame(size: int) -> Tensor:
    return torch.arange(TOKENS) // size


def by_index(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths), output_size=TOKENS)


def of_frames() -> Tensor:
    """As models that generate frame by frame write it: over frames, then for every token of them."""
    seen = torch.arange(4).unsqueeze(0) <= torch.arange(4).unsqueeze(1)
    seen = seen.view(4, 1, 1, 4, 1, 1).repeat(1, 4, 6, 1, 4, 6)
    return seen.reshape(TOKENS, TOKENS).unsqueeze(0).unsqueeze(0)


def written() -> Tensor:
    """As loops over samples write it."""
    mask = torch.zeros(1, TOKENS, TOKENS, dtype=torch.bool)
    for first, last in ((0, 40), (40, 57), (57, 96)):
        mask[..., first:last, first:last] = True
    return mask


def written_before_and_after() -> Tensor:
    """A view shows what is written later, a copy does not."""
    mask = torch.zeros(TOKENS, TOKENS)
    view, copy = mask.unsqueeze(0), mask + 1
    mask[:, :] = float("-inf")
    for first in range(0, TOKENS, 32):
        mask[first : first + 32, first : first + 32] = 0
    return view * copy


def ends_of_chunks() -> Tensor:
    """As causal video models write it: for each token, the first one that it does not see."""
    ends = torch.zeros(TOKENS, dtype=torch.long)
    for first in range(0, TOKENS, 24):
        ends[first : first + 24] = first + 24
    return torch.arange(TOKENS)[None, :] < ends[:, None]


MASKS: dict[str, tuple[Callable[[], Tensor], tuple[Segment, ...]]] = {
    "frames, repeated": (of_frames, FRAMES),
    "frames, expanded": (
        lambda: torch.ones(4, 4, dtype=torch.bool).tril()[:, None, :, None].expand(4, 24, 4, 24).reshape(96, 96),
        FRAMES,
    ),
    "frames, compared": (lambda: frame(24)[:, None] >= frame(24)[None, :], FRAMES),
    "frames, twice interleaved": (
        lambda: torch.ones(4, 4, dtype=torch.bool).tril().repeat_interleave(24, 0).repeat_interleave(24, dim=1),
        FRAMES,
    ),
    "frames, added": (
        lambda: torch.zeros(TOKENS, TOKENS).masked_fill(frame(24)[:, None] < frame(24), float("-inf"))[None],
        FRAMES,
    ),
    "samples": (lambda: frame(32).view(1, 1, -1, 1) == frame(32).view(1, 1, 1, -1), SAMPLES),
    "samples, added": (
        lambda: torch.where(frame(32)[:, None] == frame(32), 0.0, torch.finfo(torch.float64).min),
        SAMPLES,
    ),
    "uneven samples": (lambda: by_index([40, 17, 39])[:, None].eq(by_index([40, 17, 39])).expand(2, 1, -1, -1), UNEVEN),
    "samples, written": (written, UNEVEN),
    "samples, written between": (written_before_and_after, SAMPLES),
    "frames, by their ends": (ends_of_chunks, FRAMES),
    "a window of frames": (
        lambda: (frame(24)[:, None] - frame(24)).abs() <= 1,
        (Segment(0, 24, 0, 48), Segment(24, 48, 0, 72), Segment(48, 72, 24, 96), Segment(72, 96, 48, 96)),
    ),
}


def masked(mask: Callable[[], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask())


def by_definition(inputs: Sequence[Tensor], found: tuple[Segment, ...], **told: Any) -> Tensor:
    q, k, v = inputs
    each = [
        reference.sparse_linear_attention(
            q[:, :, s.first : s.last],
            k[:, :, s.start : s.stop],
            v[:, :, s.start : s.stop],
            **{"linear": "taylor", **BLOCKS, **told},
        )
        for s in found
    ]
    return torch.cat(each, dim=2)


def decided(capture: Capture) -> Rewrite:
    (site,) = capture.sites
    assert isinstance(site.decision, Rewrite), site.decision
    return site.decision


@pytest.mark.parametrize("form", ["frames, repeated", "samples, added", "uneven samples", "a window of frames"])
def test_each_run_of_queries_is_an_attention_of_its_own(form: str) -> None:
    mask, found = MASKS[form]
    inputs = [x.requires_grad_() for x in qkv()]
    cotangent = torch.randn_like(inputs[0])
    for exact in (EXACT, {}):
        capture, output = run(masked(mask), *inputs, **exact)
        assert decided(capture).segments == found
        assert (capture.rewritten, capture.kept) == (1 if found is SAMPLES else len(found), 0)
        wanted = masked(mask)(*inputs) if exact else by_definition(inputs, found)
        results = [(result, *torch.autograd.grad(result, inputs, cotangent)) for result in (output, wanted)]
        for name, actual, expected in zip(("output", "dq", "dk", "dv"), *results, strict=True):
            assert_close(name, actual, expected, 1e-11)


@pytest.mark.parametrize("small", [TOKENS, 2**20])
def test_every_spelling_is_found_of_short_and_of_long_masks(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long masks are not computed as they are: with ``small``, none that is longer than the tokens is."""
    monkeypatch.setattr(known_values_module, "SMALL", small)
    found: dict[str, Any] = {}

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        end = next(node for node in gm.graph.nodes if node.op == "output")
        found.update(zip(MASKS, (segments(mask, TOKENS, TOKENS, end) for mask in end.args[0]), strict=True))
        return gm.forward

    torch.compile(lambda x: [mask() for mask, _ in MASKS.values()], backend=look)(torch.randn(2))
    assert found == {form: wanted for form, (_, wanted) in MASKS.items()}


def test_tokens_that_are_always_critical_are_so_in_the_runs_that_see_them() -> None:
    inputs = qkv()
    capture, output = run(masked(MASKS["frames, compared"][0]), *inputs, always_critical=((20, 30),))
    assert decided(capture).always_critical == (20, 30)
    ranges = [[20, 24], *[[20, 30]] * 3]
    each = [by_definition(inputs, (s,), always_critical=r) for s, r in zip(FRAMES, ranges, strict=True)]
    assert_close("output", output, torch.cat(each, dim=2), 1e-11)
    capture, output = run(masked(MASKS["samples"][0]), *inputs, always_critical=((0, 8),))
    assert capture.rewritten == 3, "the samples differ, so they are no batch"
    each = [by_definition(inputs, (s,), always_critical=[0, 8] if s.first == 0 else []) for s in SAMPLES]
    assert_close("output", output, torch.cat(each, dim=2), 1e-11)


def test_grouped_heads_and_keys_of_another_number() -> None:
    q, k, v = (torch.randn(2, heads, tokens, HEAD_DIM) for heads, tokens in ((4, TOKENS), (2, 48), (2, 48)))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = frame(24)[:, None] >= 2 * (torch.arange(48) // 24)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    capture, output = run(call, q, k, v, cross_attention=True, **EXACT)
    assert decided(capture).segments == (Segment(0, 48, 0, 24), Segment(48, 96, 0, 48))
    assert_close("topk=1", output, call(q, k, v), 1e-11)


def with_ids(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=ids[:, None] == ids[None, :])


def written_through_a_view() -> Tensor:
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    mask[:50].fill_(True)
    mask[50:, 50:] = True
    return mask


def written_by_a_mask() -> Tensor:
    mask = frame(24)[:, None] >= frame(24)
    mask[mask] = False
    return mask | (frame(48)[:, None] == frame(48))


KEPT: dict[str, tuple[Callable[[], Tensor], str]] = {
    "a hole": (lambda: (frame(24)[:, None] - frame(24)) % 2 == 0, "query 0 sees more than one range of keys"),
    "a query without a key": (lambda: frame(24)[:, None] > frame(24), "query 0 sees no key"),
    "weights": (lambda: (frame(24)[:, None] == frame(24)) * 0.5, "numbers other than 0 and -inf"),
    "other heads": (
        lambda: (frame(24)[:, None] >= frame(24)) & torch.tensor([True, False])[:, None, None],
        "other masks for other heads or samples",
    ),
    "tokens": (
        lambda: torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(),
        "96 runs of queries that each see another range of keys",
    ),
    "written through a view": (written_through_a_view, "values that are not known while compiling"),
    "written where another mask is": (written_by_a_mask, "values that are not known while compiling"),
}


@pytest.mark.parametrize("why", KEPT)
def test_any_other_mask_stays_dense_and_says_what_it_is(why: str) -> None:
    mask, value = KEPT[why]
    inputs = qkv()
    capture, output = run(masked(mask), *inputs)
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert decision.reason == "per-query attention mask"
    assert value in decision.value
    assert "at most 64 runs of queries each see one range of keys" in decision.accepted
    torch.testing.assert_close(output, masked(mask)(*inputs), equal_nan=True, rtol=0, atol=0)


def test_sample_ids_that_a_run_alone_knows_stay_dense() -> None:
    inputs, ids = qkv(), frame(24).clone()
    capture, output = run(with_ids, *inputs, ids)
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert "values that are not known while compiling" in decision.value
    assert torch.equal(output, with_ids(*inputs, ids))


def test_runs_that_are_too_short_stay_dense() -> None:
    capture, _ = run(masked(MASKS["samples"][0]), *qkv(), min_tokens=33)
    assert str(capture.sites[0].decision) == (
        "short sequence: 96 tokens, 3 runs of queries with 1024 pairs of tokens on average (accepted: min_tokens=33 "
        "squared pairs for a run, on average)"
    )
    assert run(masked(MASKS["samples"][0]), *qkv(), min_tokens=32)[0].rewritten == 1


class Framewise(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mask = frame(24)[:, None] >= frame(24)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Samplewise(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mask = frame(32)[:, None] == frame(32)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


def test_one_gate_for_all_runs_its_cost_and_its_calibration() -> None:
    model = Model(1)
    model.blocks[0].attention = Framewise()
    x = random_input(TOKENS)
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, "inner": "aot_eager"})
    compiled(x)
    randomize_gates(model)
    compiled(x).square().mean().backward()
    (gate,) = sla_compile.gates(model).values()
    for parameter in gate.parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm() > 0
    (site,) = sla_compile.report(model).sites
    assert (site.reason, site.value) == ("self-attention", "96 tokens, 4 runs of queries")
    assert site.flops_before == 4 * 2 * 2 * TOKENS**2 * (WIDTH // 2)
    assert "in 4 runs of queries" in site.where[0]
    before = compiled(x)
    fitted = sla_compile.calibrate(model, [(x,)])
    assert [one.path for one in fitted.sites] == ["blocks.0.attention.sla"]
    errors = [(out - model(x)).norm() for out in (before, compiled(x))]
    assert errors[1] < errors[0]


FORMS: dict[str, dict[str, Any]] = {
    "virtual keys": {"linear": "taylor", "bottomk": 0.0},
    "a topk and a gate for each head": {
        "linear": "marginal",
        "gate": "per_head",
        "max_topk": 1.0,
        "topk_by": "head",
        "sparse_scale": True,
    },
}


@pytest.mark.parametrize(("attention", "form"), [*zip([Framewise, Samplewise], FORMS, strict=True)])
def test_every_form_of_gate_and_an_exported_program(attention: type[Attention], form: str) -> None:
    model, x = Model(1), random_input(TOKENS)
    model.blocks[0].attention = attention()
    sla_compile.prepare(model, (x,), config={**OPTIONS, **FORMS[form]})
    randomize_gates(model)
    compiled = torch.compile(model, backend="sla", options={"inner": "eager"})
    assert_close("exported", sla_compile.export(model, (x,)).module()(x), compiled(x), 1e-11)
    exact = Model(1)
    exact.blocks[0].attention = attention()
    compiled = torch.compile(exact, backend="sla", options={**OPTIONS, **FORMS[form], **EXACT, "inner": "eager"})
    assert_close("topk=1", compiled(x), exact(x), 1e-11)


def test_an_order_of_tokens_is_not_taken_and_says_why() -> None:
    settings: dict[str, Any] = {**OPTIONS, "reorder": "tiles", "grid": (4, 4, 6), "inner": "eager"}
    model = Model(1)
    model.blocks[0].attention = Framewise()
    with pytest.warns(TokenOrderWarning, match="queries that see different ranges of keys need the model's own order"):
        torch.compile(model, backend="sla", options=settings)(random_input(TOKENS))


def test_values_of_a_long_mask_are_found_without_making_it() -> None:
    frames, height, width = 21, 30, 52
    tokens, chunk = frames * height * width, 4680
    found: list[Known | None] = []

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes = {node.name: node for node in gm.graph.nodes}
        found.append(known_values(nodes["mask_2"], nodes["getitem_2"]))
        runs = tuple(Segment(first, first + chunk, 0, first + chunk) for first in range(0, tokens, chunk))
        assert segments(nodes["mask_2"], tokens, tokens, nodes["getitem_2"]) == runs
        return lambda *inputs: (inputs[0],)

    def call(x: Tensor) -> Tensor:
        block = torch.arange(frames // 3).repeat_interleave(3)
        mask = (block[None] <= block[:, None]).view(frames, 1, 1, frames, 1, 1)
        mask = mask.repeat(1, height, width, 1, height, width)
        mask = mask.reshape(tokens, tokens)
        return x * mask[0, 0]

    torch.compile(call, backend=look)(torch.randn(2))
    assert found[0] is not None
    assert (found[0].values.shape, found[0].shape) == ((7, 7), (tokens, tokens))
