"""Symbolic shapes: no more compiles than the same inner compiler makes without us, and guards only that matter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sla_compile
from sla_compile.reporting.terminal import ReportView, plain_text
from tests.support.closeness import assert_close
from tests.support.models import HEADS, OPTIONS, WIDTH

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

DIM = WIDTH // HEADS


class Joint(nn.Module):
    """Text and image tokens in one sequence, the text padded, as in HunyuanVideo; and cross-attention to the text."""

    def __init__(self, cross: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.text = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.cross, self.causal = cross, causal

    def forward(self, image: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2)  # (B, C, H, W) to (B, H*W, C)
        valid = torch.arange(text.shape[1], device=text.device)[None] < lengths[:, None]
        if self.cross:
            q = self.qkv(x)[..., :WIDTH].unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            k, v = self.text(text).unflatten(-1, (2, HEADS, DIM)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        else:
            joint = torch.cat([x, text], dim=1)
            q, k, v = self.qkv(joint).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
            mask = torch.cat([valid.new_ones(x.shape[:2]), valid], dim=1)[:, None, None]
            mask = mask.expand(-1, HEADS, joint.shape[1], -1)
            y = F.scaled_dot_product_attention(q, k, v, **({"is_causal": True} if self.causal else {"attn_mask": mask}))
        return self.out(y.transpose(1, 2).flatten(2))


def call_of(height: int, width: int, text: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([text, max(1, text // 3), 1])[:batch]
    return torch.randn(batch, WIDTH, height, width), torch.randn(batch, text, WIDTH), lengths


# Height, width, text: first as many image as text tokens, by chance. All of more than one block of 16: as a size of 1
# is a graph of its own in PyTorch, so is one block.
SIZES = [(5, 8, 40), (8, 8, 20), (7, 9, 33), (12, 5, 17)]


def compiles(model: nn.Module, backend: str, sizes: list[tuple[int, int, int]], backward: bool, **how: Any) -> int:
    """Graphs that were compiled for the calls, each checked against eager."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend, **how)
    for size in sizes:
        inputs = call_of(*size)
        output = compiled(*inputs)
        with torch.compiler.set_stance("force_eager"):
            assert_close(f"{backend} at {size}", output, model(*inputs), 1e-5)
        if backward:
            output.sum().backward()
    return int(counters["stats"]["unique_graphs"])


@cache
def plain_compiles(kind: str, dynamic: bool | None) -> int:
    """Graphs of the model by itself, whether or not gates are prepared for the other one."""
    return compiles(MODELS[kind](), "aot_eager", SIZES, backward=True, dynamic=dynamic)


MODELS: dict[str, Callable[[], Joint]] = {
    "joint with a mask": Joint,
    "causal": lambda: Joint(causal=True),
    "cross": lambda: Joint(cross=True),
}
EXACT: dict[str, Any] = {**OPTIONS, "topk": 1.0, "bottomk": 0.0, "cross_attention": True}


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("kind", MODELS)
def test_no_more_compiles_than_without_us(kind: str, dynamic: bool | None, prepared: bool) -> None:
    plain = plain_compiles(kind, dynamic)
    model, options = MODELS[kind](), {**EXACT, "inner": "aot_eager"}
    if prepared:
        sla_compile.prepare(model, call_of(*SIZES[0]), config=options)
    assert compiles(model, "sla", SIZES, backward=True, dynamic=dynamic, options=options) == plain
    site = sla_compile.report(model).sites[-1]
    assert site.rewritten
    assert isinstance(site.shape["tokens"], str), "the last graph is the symbolic one"
    assert site.condition == "", "nothing was asked of the number of tokens"


@pytest.mark.parametrize("kind", ["joint with a mask", "cross"])
def test_no_more_compiles_than_inductor(kind: str) -> None:
    sizes = SIZES[1:4]
    plain = compiles(MODELS[kind](), "inductor", sizes, backward=False)
    assert compiles(MODELS[kind](), "sla", sizes, backward=False, options=EXACT) == plain


CONDITIONS: dict[str, tuple[str, int]] = {
    # The shape of the condition, and the least number of tokens in it where there is one.
    "joint with a mask": (">= 80", 80),
    "causal": (">= 114", 114),  # 114 * 114 / 2 is at least 80 * 80
    "cross": (">= 6400", 0),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_min_tokens_is_one_guard_and_the_report_says_it(kind: str) -> None:
    """Two graphs where plain Dynamo has one: dense below the condition, sparse from there on."""
    model = MODELS[kind]()
    options = {**EXACT, "inner": "aot_eager", "min_tokens": 80}
    long = [(10, 13, 60), (12, 12, 50), (13, 16, 41)]
    short = [(4, 5, 19), (6, 5, 18), (5, 5, 17)]
    assert compiles(model, "sla", long, backward=False, dynamic=True, options=options) == 1
    (site,) = sla_compile.report(model).sites
    ending, least = CONDITIONS[kind]
    assert site.condition.endswith(ending)
    tokens, keys = site.shape["tokens"], site.shape.get("key_tokens")
    assert site.condition.startswith(f"{tokens} " if least else f"{tokens}*{keys} ")
    assert compiles(model, "sla", long + short, backward=False, dynamic=True, options=options) == 2
    site, before = sla_compile.report(model).sites
    assert (before.rewritten, before.current) == (True, False)
    assert before.condition.endswith(ending)
    assert (site.rewritten, site.reason, site.current) == (False, "short sequence", True)
    assert site.condition.endswith(ending.replace(">=", "<"))
    assert f"while {site.condition}" in plain_text(ReportView(sla_compile.report(model)), 300)


def test_a_guard_on_tokens_is_not_made_for_what_stays_anyway() -> None:
    """A per-query mask keeps it dense at any length: one graph."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=q.new_ones(x.shape[1], x.shape[1]).tril() > 0)

    model = Masked()
    compiled = torch.compile(model, backend="sla", dynamic=True, options={**EXACT, "min_tokens": 80, "inner": "eager"})
    for tokens in (100, 60, 81, 79):
        compiled(torch.randn(2, tokens, WIDTH))
    assert counters["stats"]["unique_graphs"] == 1
    assert sla_compile.report(model).sites[0].reason == "per-query attention mask"
