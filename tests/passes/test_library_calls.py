"""Calls that hold a whole attention: multi-head attention of torch, and functions of flash-attn and xformers."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from sla_compile.passes.decide import Keep
from tests.support.capture import TOKENS, Capture, run
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS, randomize_gates

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH, HEADS = 32, 2


class MultiHead(nn.Module):
    """Self-attention by nn.MultiheadAttention; ``call`` are the arguments of its call."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.call = {"need_weights": False, **(call or {})}

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.call)[0]


class WithWeights(MultiHead):
    def forward(self, x: Tensor) -> Tensor:
        output, weights = self.attention(x, x, x)
        return output * weights.amax()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention(batch_first: bool, inference: bool, bias: bool) -> None:
    # weights that nobody reads, as by default, are no matter
    model = MultiHead({"need_weights": bias}, batch_first=batch_first, bias=bias).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1).contiguous()
    model.train(not inference)
    with torch.set_grad_enabled(not inference):
        capture = Capture(topk=1.0, bottomk=0.0)
        output = torch.compile(model, backend=capture)(x)
        assert capture.rewritten == 1
        assert capture.sites[0].path == "attention"
        assert not [n for n in capture.graph.graph.nodes if "multi_head" in n.name]  # type: ignore[union-attr]
        assert_close("topk=1 is dense attention", output, model(x), 1e-12)
        if not inference:
            parameters = [p for name, p in model.named_parameters() if "sla" not in name]
            got = torch.autograd.grad(output.square().sum(), parameters)
            wanted = torch.autograd.grad(model(x).square().sum(), parameters)
            for gradient, expected in zip(got, wanted, strict=True):
                assert_close("gradient", gradient, expected, 1e-10)


MULTI_HEAD_KEPT: dict[str, tuple[nn.Module, str, str]] = {
    "weights": (WithWeights(), "attention inside torch.nn.MultiheadAttention", "its attention weights are read"),
    "key bias": (MultiHead(add_bias_kv=True), "attention inside torch.nn.MultiheadAttention", "bias_k given"),
    "zero key": (MultiHead(add_zero_attn=True), "attention inside torch.nn.MultiheadAttention", "add_zero_attn=True"),
    "mask": (MultiHead({"attn_mask": torch.zeros(TOKENS, TOKENS)}), "attention mask", "attn_mask of"),
    "dropout": (MultiHead(dropout=0.1), "attention dropout", "dropout_p=0.1"),
}


@pytest.mark.parametrize("form", MULTI_HEAD_KEPT)
def test_multi_head_attention_that_stays(form: str) -> None:
    model, reason, value = MULTI_HEAD_KEPT[form]
    x = torch.randn(TOKENS, 2, WIDTH)
    capture = Capture()
    output = torch.compile(model, backend=capture)(x)
    assert capture.rewritten == 0
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert (decision.reason, value in decision.value) == (reason, True), decision
    if form != "dropout":
        assert torch.equal(output, model(x))


class Cross(MultiHead):
    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, 2 * x, x, **self.call)[0]


def test_multi_head_attention_of_other_keys_stays() -> None:
    capture = Capture()
    torch.compile(Cross(), backend=capture)(torch.randn(TOKENS, 2, WIDTH))
    assert "query, key and value are different tensors" in str(capture.sites[0].decision)
    assert capture.rewritten == 0


def test_transformer_encoder_layer() -> None:
    """In training it is multi-head attention; its fused call for inference says how to reach it."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, TOKENS, WIDTH)
    layer.eval()
    with torch.no_grad():
        dense = layer(x)
        capture = Capture()
        assert torch.equal(torch.compile(layer, backend=capture)(x), dense)
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert decision.reason == "attention inside torch.nn.TransformerEncoderLayer"
    assert "prepare" in decision.accepted
    sla_compile.prepare(layer.train(), (x,), config={**OPTIONS, "topk": 1.0, "bottomk": 0.0})
    layer.eval()
    assert list(sla_compile.gates(layer)) == ["self_attn.sla"]
    with torch.no_grad():
        capture = Capture(topk=1.0, bottomk=0.0)
        torch._dynamo.reset()
        output = torch.compile(layer, backend=capture)(x)
    assert capture.rewritten == 1, "a gate's hook turns torch's fused call off"
    assert_close("topk=1 is dense attention", output, dense, 1e-5)


def test_gates_of_multi_head_attention_are_trained() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, "inner": "aot_eager"})
    x = torch.randn(2, TOKENS, WIDTH)
    compiled(x)
    assert list(sla_compile.gates(model)) == ["layers.0.self_attn.sla", "layers.1.self_attn.sla"]
    randomize_gates(model)
    compiled(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in sla_compile.gate_parameters(model))


def attention_of_another_package(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) if x.dim() == 4 else x for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal, enable_gqa=q.dim() == 4)
    return out.transpose(1, 2) if out.dim() == 4 else out


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """flash_attn and xformers as far as a graph shows them: functions that Dynamo leaves as one call."""

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> Tensor:
        return attention_of_another_package(q, k, v, softmax_scale, causal)

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None
    ) -> Tensor:
        return attention_of_another_package(query, key, value, scale)

    flash_attn_func.__module__ = "flash_attn.flash_attn_interface"
    memory_efficient_attention.__module__ = "xformers.ops.fmha"
    for function in (flash_attn_func, memory_efficient_attention):
        name, _, _ = function.__module__.partition(".")
        package = types.ModuleType(name)
        setattr(package, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, package)
        torch.compiler.allow_in_graph(function)
    return types.SimpleNamespace(flash=flash_attn_func, xformers=memory_efficient_attention)


def token_major(dims: int = 4) -> tuple[Tensor, ...]:
    shape = (2, TOKENS, HEADS, 16) if dims == 4 else (2, TOKENS, 16)
    return tuple(torch.randn(shape, dtype=torch.float64) for _ in range(3))


FOREIGN = {
    "flash": lambda f, q, k, v: f.flash(q, k, v),
    "flash, causal": lambda f, q, k, v: f.flash(q, k, v, causal=True),
    "flash in groups": lambda f, q, k, v: f.flash(q, k[:, :, :1], v[:, :, :1]),
    "flash with a scale": lambda f, q, k, v: f.flash(q, k, v, 0.0, 0.3, deterministic=True),
    "flash with its default window": lambda f, q, k, v: f.flash(q, k, v, window_size=[-1, -1]),
    "xformers": lambda f, q, k, v: f.xformers(q, k, v, scale=0.3),
    "xformers of one head": lambda f, q, k, v: f.xformers(q, k, v, None, 0.0),
}


@pytest.mark.parametrize("form", FOREIGN)
def test_functions_of_other_packages(form: str, packages: types.SimpleNamespace) -> None:
    inputs = token_major(3 if "one head" in form else 4)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return FOREIGN[form](packages, q, k, v)

    capture, output = run(call, *inputs, topk=1.0, bottomk=0.0)
    assert capture.rewritten == 1
    assert all(capture.count(function) == 0 for function in vars(packages).values())
    assert_close("topk=1 is dense attention", output, call(*inputs), 1e-12)


FOREIGN_KEPT = {
    "window": (lambda f, q, k, v: f.flash(q, k, v, window_size=(8, 8)), "an option of flash_attn_func"),
    "dropout": (lambda f, q, k, v: f.flash(q, k, v, 0.1), "attention dropout"),
    "bias": (lambda f, q, k, v: f.xformers(q, k, v, q[:, :, 0, :1]), "attention mask of another shape"),
    "no tensor": (lambda f, q, k, v: f.xformers(q, k, v, "lower"), "an option of memory_efficient_attention"),
}


@pytest.mark.parametrize("form", FOREIGN_KEPT)
def test_functions_of_other_packages_that_stay(form: str, packages: types.SimpleNamespace) -> None:
    call, reason = FOREIGN_KEPT[form]
    inputs = token_major()
    capture, output = run(lambda q, k, v: call(packages, q, k, v), *inputs)
    assert capture.rewritten == 0
    decision = capture.sites[0].decision
    assert isinstance(decision, Keep)
    assert decision.reason == reason
    assert torch.equal(output, call(packages, *inputs))


def test_a_function_of_the_same_name_elsewhere_is_not_known(packages: types.SimpleNamespace) -> None:
    packages.flash.__module__ = "my_flash_attn"
    capture, _ = run(lambda q, k, v: packages.flash(q, k, v), *token_major())
    assert capture.sites == []


def test_the_op_under_flash_attn() -> None:
    """What Dynamo shows of flash_attn_func without gradients: the library op inside it."""
    library = torch.library.Library("flash_attn", "FRAGMENT")
    library.define(
        "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal,"
        " int window_size_left=-1) -> (Tensor, Tensor)"
    )
    library.impl(
        "_flash_attn_forward",
        lambda q, k, v, p, scale, causal, window=-1: (attention_of_another_package(q, k, v, scale).clone(), q.sum()),
        "CompositeExplicitAutograd",
    )
    inputs = token_major()
    op: Any = torch.ops.flash_attn._flash_attn_forward
    with torch.no_grad():
        expected = op(*inputs, 0.0, 0.3, False)[0]
        capture, output = run(lambda q, k, v: op(q, k, v, 0.0, 0.3, False)[0], *inputs, topk=1.0, bottomk=0.0)
        assert capture.rewritten == 1
        assert_close("topk=1 is dense attention", output, expected, 1e-12)
        capture, _ = run(lambda q, k, v: op(q, k, v, 0.0, 0.3, False, 5)[0], *inputs)
        assert capture.rewritten == 0
        assert "window_size_left=5" in str(capture.sites[0].decision)
