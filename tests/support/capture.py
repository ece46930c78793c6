"""A backend that rewrites as ``backend="sla"`` does and keeps the graph, and the modules to compile with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sla_compile.compat import current_frame
from sla_compile.compiler.rewriting import rewrite_graph
from sla_compile.compiler.sites import Settings, Site
from tests.support.models import OPTIONS

HEADS, TOKENS, HEAD_DIM = 2, 96, 16


class Caller(nn.Module):
    """A module whose forward is one attention call, written as ``call`` writes it."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


class Capture:
    """Rewrites as the backend does, keeps the sites and the graph, and runs the graph as it is."""

    once = False
    """Whether it serves one call alone, and so needs no second trace to see the gates: as in a dry run."""

    def __init__(self, **options: Any) -> None:
        self.settings = Settings.of({**OPTIONS, **options})
        self.sites: list[Site] = []
        self.graph: fx.GraphModule | None = None

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.sites, _ = rewrite_graph(gm, self.settings, current_frame(), once=self.once)
        self.graph = gm
        return gm.forward

    def count(self, target: Any) -> int:
        assert self.graph is not None
        return sum(
            node.target is target
            for module in self.graph.modules()
            if isinstance(module, fx.GraphModule)
            for node in module.graph.nodes
        )

    @property
    def rewritten(self) -> int:
        return self.count(torch.ops.sla.forward.default)

    @property
    def kept(self) -> int:
        return self.count(F.scaled_dot_product_attention)


def qkv(tokens: int = TOKENS, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (2, HEADS, tokens, HEAD_DIM)
    return torch.randn(shape, **changes), torch.randn(shape, **changes), torch.randn(shape, **changes)


def run(call: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> tuple[Capture, Tensor]:
    """What became of the attention that ``call`` writes, and its output; ``options`` are on top of OPTIONS."""
    capture = Capture(**options)
    capture.once = True
    model = nn.Sequential(Caller(call)) if len(inputs) == 1 else Wrapper(Caller(call))
    return capture, torch.compile(model, backend=capture, dynamic=False)(*inputs)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)
