"""Models and helpers of the tests of reports."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.nn.functional as F
from rich.cells import cell_len
from rich.console import Console
from torch import Tensor, nn

import sla_compile
from sla_compile.reporting.model_report import Report
from tests.support.models import HEADS, OPTIONS, WIDTH, Model, random_input

WIDTHS = (20, 27, 40, 60, 87, 88, 100, 133, 250)


class Cross(nn.Module):
    """Self-attention, then attention to a text of another length, as video DiTs have."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(), CrossAttention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        return x + self.attn2(x, text)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k = (self.project(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in (x, y))
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Cross() for _ in range(blocks))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


class BrokenBlocks(Model):
    """A break after each block: every block is a frame of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def explain(model: nn.Module, *args: Any, **changes: Any) -> Report:
    return sla_compile.explain(model.double(), args or (random_input(),), config={**OPTIONS, **changes})


def rendered(view: Any, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def assert_fits(view: Any) -> None:
    for width in WIDTHS:
        lines = rendered(view, width)
        assert lines
        wide = [line for line in lines if cell_len(line) > width]
        assert not wide, f"wider than {width}: {wide[0]!r}"


def flat(text: str) -> str:
    return " ".join(text.split())
