"""Linear layers in float8, as torchao's: the attention behind them is found and rewritten as it is behind others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sla_compile
from tests.support.closeness import assert_close
from tests.support.models import HEADS, OPTIONS, WIDTH, random_input

FLOAT8, LARGEST = torch.float8_e4m3fn, 448.0


@pytest.fixture(autouse=True)
def fresh_dynamo_and_zero_gates() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sla_compile.UntrainedGatesWarning)
        yield


def rows_in_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with a scale of its own for each row, and the scales."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(FLOAT8), scale


class Float8Weight(Tensor):
    """A weight (out, in) in float8 that quantizes what it is multiplied with: a subclass, as torchao's is."""

    rows: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor) -> Float8Weight:
        made: Any = Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype, device=rows.device)
        made.rows, made.scale = rows, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["rows", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> Float8Weight:
        return Float8Weight(parts["rows"], parts["scale"])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            return float8_linear(x, weight.rows, weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            return Float8Weight(args[0].rows, args[0].scale)
        raise NotImplementedError(f"{function} of a weight in float8")


def float8_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    x8, of_x = rows_in_float8(x)
    return F.linear(x8.to(x.dtype) * of_x, values.to(x.dtype) * scale, bias)


@torch.library.custom_op("sla_tests::float8_linear", mutates_args=())
def float8_linear_op(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return float8_linear(x, values, scale, bias)


@float8_linear_op.register_fake
def _(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


class OpLinear(nn.Module):
    """A linear layer that is one op, which the compiler does not see into."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.values, self.scale = rows_in_float8(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return float8_linear_op(x, self.values, self.scale, self.bias)


def by_op(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, OpLinear(child))


def by_subclass(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Float8Weight(*rows_in_float8(module.weight.detach())), requires_grad=False)


class Block(nn.Module):
    """Self-attention, then cross-attention, with a linear layer for each of query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.text = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)) for _ in range(2))

    def attend(self, layers: nn.ModuleList, x: Tensor, other: Tensor) -> Tensor:
        sources = (x, other, other)
        q, k, v = (
            layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer, y in zip(layers, sources, strict=False)
        )
        y: Tensor = layers[3](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attend(self.own, x, x)
        return x + self.attend(self.text, x, text)


@pytest.mark.parametrize("quantize", [by_op, by_subclass])
def test_self_attention_is_found_behind_float8(quantize: Callable[[nn.Module], None]) -> None:
    model = Block().eval()
    x, text = random_input().float(), torch.randn(1, 7, WIDTH)
    before = model(x, text)
    quantize(model)
    with torch.no_grad():
        expected = model(x, text)
        options = {**OPTIONS, "topk": 1.0, "bottomk": 0.0, "inner": "aot_eager"}
        compiled: Any = torch.compile(model, backend="sla", options=options, fullgraph=True)
        out = compiled(x, text)
    assert (expected - before).norm() > 1e-3 * before.norm()  # it is in float8
    # A value that rounding takes to the next one of float8 is an eighth off.
    assert_close("output", out, expected, 3e-3)
    sites = [(site.rewritten, site.reason) for site in sla_compile.report(compiled).sites]
    assert sites == [(True, "self-attention"), (False, "cross-attention")]
    assert not counters["graph_break"]
