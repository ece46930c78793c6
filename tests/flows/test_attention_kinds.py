"""Grouped heads, causal and cross-attention, and keys that are always critical: topk=1, the definition, what stays."""

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
from sla_compile.passes.profitability import UnknownRange, token_ranges
from tests.support.capture import HEAD_DIM, TOKENS, Caller, Capture, Wrapper, run
from tests.support.closeness import assert_close, relative_error
from tests.support.models import OPTIONS, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BATCH, HEADS, KEYS = 2, 6, 40
EXACT: dict[str, Any] = {"topk": 1.0, "bottomk": 0.0}
BLOCKS: dict[str, Any] = {name: OPTIONS[name] for name in ("topk", "bottomk", "block_q", "block_k")}
sdpa = F.scaled_dot_product_attention


def qkv(heads: int = HEADS, keys: int = TOKENS, queries: int = TOKENS, values: int = 0) -> list[Tensor]:
    shapes = (HEADS, queries), (heads, keys), (values or heads, keys)
    return [torch.randn(BATCH, *shape, HEAD_DIM, dtype=torch.float64, requires_grad=True) for shape in shapes]


def repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(HEADS // heads, dim=1)


def grouped_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As models repeat keys and values themselves, by an expand."""
    k, v = (x[:, :, None].expand(-1, -1, HEADS // x.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


Call = Callable[..., Tensor]
REWRITTEN: dict[str, tuple[Call, list[int], dict[str, Any], dict[str, Any]]] = {
    # The call, (heads, keys) of k and v, settings, and what the definition is told.
    "grouped heads": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), [2, TOKENS], {}, {}),
    "one head of keys": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), [1, TOKENS], {}, {}),
    "as many heads": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), [HEADS, TOKENS], {}, {}),
    "grouped by hand": (grouped_by_hand, [3, TOKENS], {}, {"scale": 1.0}),
    "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), [HEADS, TOKENS], {}, {"causal": True}),
    "causal in groups": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
        [3, TOKENS],
        {},
        {"causal": True},
    ),
    "fewer keys": (lambda q, k, v: sdpa(q, k, v, scale=0.3), [HEADS, KEYS], {"cross_attention": True}, {"scale": 0.3}),
    "more keys": (sdpa, [HEADS, 2 * TOKENS + 7], {"cross_attention": True}, {}),
    "cross-attention by hand": (
        lambda q, k, v: ((q @ k.mT) * 0.3).softmax(-1) @ v,
        [HEADS, KEYS],
        {"cross_attention": True},
        {"scale": 0.3},
    ),
    "cross-attention in groups": (
        lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
        [2, KEYS],
        {"cross_attention": True},
        {},
    ),
    "always critical": (
        sdpa,
        [HEADS, TOKENS],
        {"always_critical": ((0, 20), (-5, None))},
        {"always_critical": [0, 20, TOKENS - 5, TOKENS]},
    ),
    "always critical in a cross-attention": (
        sdpa,
        [HEADS, 2 * TOKENS],
        {"always_critical": [[-3, None], [180, 1000]], "cross_attention": True},
        {"always_critical": [180, 2 * TOKENS]},
    ),
    "always critical and causal": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True),
        [HEADS, TOKENS],
        {"always_critical": ((0, 17),)},
        {"always_critical": [0, 17], "causal": True},
    ),
}


@pytest.mark.parametrize("form", REWRITTEN)
def test_it_is_dense_attention_at_topk_of_one_and_the_definition_below(form: str) -> None:
    call, (heads, keys), settings, told = REWRITTEN[form]
    inputs = qkv(heads, keys)
    results = []
    capture, output = run(call, *inputs, **EXACT, **settings)
    assert [site.decision for site in capture.sites if isinstance(site.decision, Keep)] == []
    assert (capture.rewritten, capture.kept) == (1, 0)
    cotangent = torch.randn_like(output)
    for result in (output, call(*inputs)):
        results.append((result, *torch.autograd.grad(result, inputs, cotangent)))
    for name, actual, expected in zip(("topk=1", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, actual, expected, 1e-11)
    _, output = run(call, *inputs, **settings)
    q, k, v = inputs
    told = {"linear": "taylor", **BLOCKS, **told}
    wanted = reference.sparse_linear_attention(q, repeated(k, heads), repeated(v, heads), **told)
    results = []
    for result in (output, wanted):
        results.append((result, *torch.autograd.grad(result, inputs, cotangent)))
    for name, actual, expected in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, actual, expected, 1e-11)
    assert relative_error(output, call(*inputs)) > 0.01, "with topk below 1 it is another function"


KEPT: dict[str, tuple[Call, list[int], dict[str, Any], str, str]] = {
    "cross-attention that nobody asked for": (sdpa, [HEADS, KEYS], {}, "cross-attention", "96 queries, 40 keys"),
    "cross-attention with a mask": (
        lambda q, k, v: sdpa(q, k, v, q.new_zeros(TOKENS, KEYS)),
        [HEADS, KEYS],
        {},
        "cross-attention",
        "96 queries, 40 keys",
    ),
    "causal cross-attention": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True),
        [HEADS, KEYS],
        {"cross_attention": True},
        "causal cross-attention",
        "96 queries, 40 keys",
    ),
    "other heads without groups": (
        lambda q, k, v: sdpa(q, k, v) if k.shape[1] == HEADS else sdpa(q, k.expand(-1, HEADS, -1, -1)[:, :1], v),
        [1, TOKENS],
        {},
        "query and key differ in shape",
        "(2, 6, 96, 16), (2, 1, 96, 16)",
    ),
    "a short one with a mask": (
        lambda q, k, v: sdpa(q, k, v, torch.ones(TOKENS, TOKENS).tril() > 0),
        [HEADS, TOKENS],
        {"min_tokens": TOKENS + 1},
        "short sequence",
        "96 tokens",
    ),
}


@pytest.mark.parametrize("form", KEPT)
def test_what_stays_says_why(form: str) -> None:
    call, (heads, keys), settings, reason, value = KEPT[form]
    inputs = qkv(heads, keys)
    capture, output = run(call, *inputs, **settings)
    assert (capture.rewritten, capture.kept) == (0, 1)
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert (decision.reason, decision.value) == (reason, value)
    assert decision.accepted
    assert torch.equal(output, call(*inputs))


def test_groups_of_other_values_stay() -> None:
    capture, _ = run(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), *qkv(2, values=3))
    assert capture.rewritten == 0
    assert "query and value differ in shape" in str(capture.sites[0].decision)


@pytest.mark.parametrize(
    ("settings", "queries", "keys", "causal", "enough"),
    [
        # Pairs of tokens that may be skipped, against those of self-attention over min_tokens.
        ({"cross_attention": True}, 128, 32, False, 64),
        ({}, 64, 64, False, 64),
        ({}, 91, 91, True, 64),  # 91 * 91 / 2 is at least 64 * 64, 90 * 90 / 2 is not
        ({"always_critical": ((0, 30),)}, 81, 81, False, 64),  # 81 * 51 is at least 64 * 64
        ({"cross_attention": True, "always_critical": ((-16, None),)}, 128, 48, False, 64),
    ],
)
def test_min_tokens_counts_the_pairs_that_may_be_skipped(
    settings: dict[str, Any], queries: int, keys: int, causal: bool, enough: int
) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=causal)

    def rewritten(queries: int) -> int:
        inputs = qkv(keys=queries if keys == 0 else keys, queries=queries)
        return run(call, *inputs, min_tokens=enough, **settings)[0].rewritten

    if queries == keys:
        keys = 0
    assert rewritten(queries) == 1
    assert rewritten(queries - 1) == 0


def test_the_report_of_a_short_one_says_what_would_do() -> None:
    capture, _ = run(lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv(), min_tokens=90)
    assert str(capture.sites[0].decision) == (
        "short sequence: 96 tokens, causal (accepted: at least 128 tokens, the work of min_tokens=90)"
    )
    capture, _ = run(sdpa, *qkv(keys=KEYS), min_tokens=90, cross_attention=True, always_critical=[(0, 8)])
    assert str(capture.sites[0].decision) == (
        "short sequence: 96 queries, 40 keys, 8 keys always critical "
        "(accepted: queries x keys of at least min_tokens=90 squared)"
    )


class Owner(nn.Module):
    """An attention of each kind, with projections; the graph and an eager call have to see the same."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.out = (nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        source = x[:, :KEYS] if self.kind == "cross" else x
        heads = 2 if self.kind == "grouped" else HEADS
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = (layer(source).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)[:, :heads] for layer in (self.k, self.v))
        arguments: dict[str, Any] = {}
        if self.kind == "masked":  # materialised, so that only the graph or the values tell
            arguments["attn_mask"] = mask[:, None, None].repeat(1, HEADS, x.shape[1], 1)
        y = sdpa(q, k, v, is_causal=self.kind == "causal", enable_gqa=self.kind == "grouped", **arguments)
        return self.out(y.transpose(1, 2).flatten(2))


KINDS = ("masked", "grouped", "causal", "cross", "always critical")


def settings_of(kind: str) -> dict[str, Any]:
    more: dict[str, dict[str, Any]] = {
        "cross": {"cross_attention": True},
        "always critical": {"always_critical": ((-20, None),)},
    }
    return {**OPTIONS, **more.get(kind, {})}


def example(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    mask = torch.rand(batch, TOKENS) < 0.7
    mask[:, 30:60] = False
    return torch.randn(batch, TOKENS, HEADS * HEAD_DIM, dtype=torch.float64), mask


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_calibrated_is_what_the_compiled_model_computes(kind: str) -> None:
    model = nn.Sequential(Wrapper(Owner(kind))).double()
    wrapper: Any = model[0]
    data = [example() for _ in range(2)]
    sla_compile.prepare(wrapper, data[0], config={**settings_of(kind), "linear": "marginal"})
    assert list(sla_compile.gates(wrapper)) == ["inner.sla"]
    report = sla_compile.calibrate(wrapper, data)
    caught: list[Tensor] = []
    handle = wrapper.inner.out.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        for inputs in data:
            wrapper(*inputs)
        compiled = torch.compile(wrapper, backend="sla", options={"inner": "eager"})
        for inputs in data:
            compiled(*inputs)
    handle.remove()
    error = relative_error(torch.stack(caught[2:]), torch.stack(caught[:2]))
    assert abs(error - report.sites[0].after) < 1e-7
    assert 0 < report.sites[0].after < report.sites[0].sparse_only


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_trains_the_gate(kind: str) -> None:
    wrapper, batches = Wrapper(Owner(kind)).double(), [example(), example()]
    sla_compile.prepare(wrapper, batches[0], config={**settings_of(kind), "linear": "marginal"})
    report = sla_compile.distill(wrapper, batches, steps=20, lr=3e-2, loss="attention")
    assert report.sites[0].after < report.sites[0].before


@pytest.mark.parametrize("kind", KINDS)
def test_gates_get_gradients_through_inductor(kind: str) -> None:
    model, (x, mask) = Wrapper(Owner(kind)).double(), example()
    compiled = torch.compile(model, backend="sla", options=settings_of(kind))
    compiled(x, mask)
    randomize_gates(model)
    output = compiled(x, mask)
    plain = torch.compile(model, backend="sla", options={"inner": "eager"})
    assert_close("inductor against eager", output, plain(x, mask), 1e-10)
    output.square().sum().backward()
    for parameter in sla_compile.gate_parameters(model):
        assert parameter.grad is not None
        assert parameter.grad.norm() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_names_the_kind(kind: str) -> None:
    report = sla_compile.explain(Wrapper(Owner(kind)).double(), example(), config=settings_of(kind))
    (site,) = report.sites
    assert site.rewritten
    names = {"causal": "causal self-attention", "cross": "cross-attention"}
    assert site.reason == names.get(kind, "self-attention")
    assert site.value == ("96 queries, 40 keys" if kind == "cross" else "96 tokens")
    assert (site.causal, bool(site.mask)) == (kind == "causal", kind == "masked")
    assert site.shape.get("key_heads") == (2 if kind == "grouped" else None)
    pairs = {"cross": TOKENS * KEYS, "causal": TOKENS * (TOKENS + 1) / 2}.get(kind, TOKENS**2)
    assert site.flops_before == 4 * BATCH * HEADS * pairs * HEAD_DIM
    assert site.settings["always_critical"] == ([[-20, None]] if kind == "always critical" else [])
    text = " ".join(str(report).split())
    assert ("key tokens -20 to the end always critical" in text) == (kind == "always critical")
    assert ("dense (causal): B*H*(2*N^2*d + 2*N*d)" in text) == (kind == "causal")
    assert ("dense (L keys): 4*B*H*N*L*d" in text) == (kind == "cross")
    if kind == "always critical":
        assert "C = min(Tk, 2 + max(1, floor(0.3*Tk)))" in site.where


def test_settings_of_one_site_and_of_a_file(tmp_path: Any) -> None:
    """cross_attention and always_critical by overrides; through a file; contradicted at the compile."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Owner("cross"), Owner("cross")

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.second(self.first(x, mask), mask)

    overrides = {"second": {"cross_attention": True, "always_critical": [[0, 8]]}}
    model, inputs = Two().double(), example()
    sla_compile.prepare(model, inputs, config={**OPTIONS, "overrides": overrides})
    assert list(sla_compile.gates(model)) == ["second.sla"]
    randomize_gates(model)
    sla_compile.save(model, tmp_path / "gates.safetensors")
    fresh = Two().double()
    fresh.load_state_dict({n: p for n, p in model.state_dict().items() if ".sla." not in n})
    sla_compile.load(fresh, tmp_path / "gates.safetensors")
    gate = sla_compile.gates(fresh)["second.sla"]
    assert (gate.config.cross_attention, gate.config.always_critical) == (True, ((0, 8),))
    expected = torch.compile(model, backend="sla", options={"inner": "eager"})(*inputs)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(fresh, backend="sla", options={"inner": "eager"})(*inputs), expected)
    assert [site.rewritten for site in sla_compile.report(fresh).sites] == [False, True]
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"always_critical=\(\) here, \(\(0, 8\),\) in its gate"):
        torch.compile(model, backend="sla", options=dict[str, Any](inner="eager", always_critical=()))(*inputs)
    torch._dynamo.reset()
    same: dict[str, Any] = {"inner": "eager", "overrides": {"second": {"always_critical": [[0, 8]]}}}
    torch.compile(model, backend="sla", options=same)(*inputs)


def test_symbolic_ranges_follow_the_rules_of_slices() -> None:
    """Counted from either end of a symbolic number of keys, as long as how many they are is known."""
    settings = {"always_critical": ((0, 20), (-24, -8), (-8, None))}
    capture = Capture(**settings)
    compiled = torch.compile(Wrapper(Caller(lambda x, y: sdpa(x, 2 * x, x + y))), backend=capture)
    for tokens in (80, 112, TOKENS):
        x = torch.randn(BATCH, HEADS, tokens, HEAD_DIM, dtype=torch.float64)
        expected = reference.sparse_linear_attention(
            x, 2 * x, x, **BLOCKS, linear="taylor", always_critical=[0, 20, tokens - 24, tokens]
        )
        assert_close("output", compiled(x, torch.zeros_like(x)), expected, 1e-12)
        assert isinstance(capture.sites[0].decision, Rewrite)
    decision = capture.sites[0].decision
    assert isinstance(decision, Rewrite)
    assert isinstance(decision.shape.tokens, torch.SymInt)
    mixed = Capture(always_critical=((16, -16),))
    torch._dynamo.reset()
    compiled = torch.compile(Wrapper(Caller(lambda x, y: sdpa(x, 2 * x, x + y))), backend=mixed)
    for tokens, rewritten in ((80, 1), (112, 0)):
        x = torch.randn(BATCH, HEADS, tokens, HEAD_DIM)
        compiled(x, torch.zeros_like(x))
        assert mixed.rewritten == rewritten
    decision = mixed.sites[0].decision
    assert isinstance(decision, Keep)
    assert decision.reason == "always_critical has a range of unknown size"
    assert decision.value.startswith("(16, -16) of s")
    with pytest.raises(UnknownRange):
        token_ranges(((16, None),), decision_tokens(mixed))


def decision_tokens(capture: Capture) -> torch.SymInt:
    tokens = capture.sites[0].call.query.meta["example_value"].shape[2]
    assert isinstance(tokens, torch.SymInt)
    return tokens
