"""Attention that Dynamo leaves out of every graph is told of: by a warning at a graph break, and in the report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.torch_version import TorchVersion

import sla_compile
from tests.support.models import HEADS, OPTIONS, WIDTH, Attention, Doubled, random_input
from tests.support.reports import BrokenBlocks

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning"),
]

EAGER: dict[str, Any] = {**OPTIONS, "inner": "eager"}


class Disabled(Attention):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class GivenUp(Attention):
    def forward(self, x: Tensor) -> Tensor:
        with open("/dev/null"):  # Dynamo cannot go on after a break in here, and leaves all of it to Python
            q, k, v = self.heads(x)
            torch._dynamo.graph_break()
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Exact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad([out], [q, k, v], grads)  # which Dynamo does not trace by default


class OwnBackward(Attention):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Exact.apply(*self.heads(x))
        return self.out(out.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x, x, x, need_weights=False)[0]


def with_lora() -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model: nn.Module = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["packed"]), Packed())
    return model


class Odd(nn.Module):
    """An attention that is compiled, before one that may not be; only then are there tensors to compute at the end."""

    def __init__(self, odd: nn.Module, *, more: bool) -> None:
        super().__init__()
        self.plain, self.odd, self.more = Attention(), odd, more

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.odd(self.plain(x))
        return y + x if self.more else y


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore:Iterating over a tensor")
@pytest.mark.parametrize(
    ("make", "path", "more"),
    [
        pytest.param(Disabled, "odd", True, id="disabled"),
        pytest.param(Disabled, "odd", False, id="disabled, told at the next call"),
        pytest.param(GivenUp, "odd", True, id="given up"),
        pytest.param(OwnBackward, "odd", True, id="autograd.Function"),
        pytest.param(lambda: torch.jit.trace(Attention(), random_input().float()), "odd", True, id="torch.jit"),
        pytest.param(with_lora, "odd.packed", True, id="LoRA of MultiheadAttention"),
    ],
)
def test_told_once_and_listed(make: Callable[[], nn.Module], path: str, more: bool) -> None:
    model, x = Odd(make(), more=more), random_input().float()
    run = torch.compile(model, backend="sla", options=EAGER)
    if not more:
        run(x)
    told = rf"^{path}: its attention runs dense if it is called: no graph holds it \(graph break: \w"
    # From 2.15 on Dynamo leaves all of the forward around this break to Python, so that no compile can warn.
    skipped = make is OwnBackward and TorchVersion(torch.__version__) >= "2.15"
    with contextlib.nullcontext() if skipped else pytest.warns(sla_compile.DenseAttentionWarning, match=told):
        run(x)
    run(x)  # a second warning would be an error
    report = sla_compile.report(model)
    assert [site.path for site in report.sites if site.rewritten] == ["plain"]
    assert report.outside_graphs == (path,)
    assert "attention that no graph holds: 1 -" in str(report)


def test_listed_where_nothing_is_compiled() -> None:
    model = with_lora()
    torch.compile(model, backend="sla", options=EAGER)(random_input().float())
    assert sla_compile.report(model).outside_graphs == ("packed",)


@pytest.mark.parametrize("excluded", [True, False])
def test_silent_where_it_is_held_or_excluded(excluded: bool) -> None:
    model = Odd(Doubled(Disabled() if excluded else Attention()), more=True)
    run = torch.compile(model, backend="sla", options=EAGER | ({"exclude": ["odd.*"]} if excluded else {}))
    run(random_input().float())
    assert sla_compile.report(model).outside_graphs == (("odd.attention",) if excluded else ())


@pytest.mark.parametrize("by_blocks", [True, False])
def test_silent_where_code_is_shared(by_blocks: bool) -> None:
    """Blocks that are short run what was compiled for the first: they have no compile, and no gate, of their own."""
    model = BrokenBlocks(3)
    if by_blocks:
        for block in model.blocks:
            block.compile(backend="sla", options={"inner": "eager"})
    run: Any = model if by_blocks else torch.compile(model, backend="sla", options={"inner": "eager"})
    for _ in range(2):
        run(random_input().float())
    assert not sla_compile.report(model).outside_graphs


def test_inlined_functions_and_fused_layers_are_held() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True).eval()
    other: Any = torch.compile(Attention(), backend="eager")
    model = nn.Sequential(Packed(), layer, other)
    with torch.no_grad():
        torch.compile(model, backend="sla", options=EAGER)(random_input().float())
    report = sla_compile.report(model)
    assert [site.path for site in report.sites] == ["0.packed", "1", "2"]
    assert not report.outside_graphs


def test_a_report_has_nothing_of_another_model_of_its_class() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True).eval()
    with torch.no_grad():
        for odd in (layer, nn.Linear(WIDTH, WIDTH)):
            model = Odd(odd, more=True)
            torch.compile(model, backend="sla", options=EAGER)(random_input().float())
    assert [site.path for site in sla_compile.report(model).sites] == ["plain"]


def test_functions_behind_methods_and_processors_are_seen() -> None:
    class Processor:
        def __call__(self, attention: Attention, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return Attention.forward(attention, x)

    class Processed(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.processor = Processor()

        def forward(self, x: Tensor) -> Tensor:
            return self._attend(x)

        def _attend(self, x: Tensor) -> Tensor:
            return self.processor(self, x)

    assert sla_compile.report(Processed()).outside_graphs == ("",)
    assert sla_compile.report(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).outside_graphs == ()
