"""A grid of tokens and its orders: settings, the definition on gathered tokens, what a compile made of it."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import sla_compile
from sla_compile.common.token_orders import Placement, positions
from sla_compile.kernels import reference
from sla_compile.passes.decide import Rewrite
from tests.support.capture import HEAD_DIM, Capture
from tests.support.closeness import assert_close
from tests.support.models import OPTIONS, WIDTH

GRID, TOKENS = (4, 5, 6), 120


TILES: dict[str, Any] = {"reorder": "tiles", "grid": GRID}


EXACT: dict[str, Any] = {"topk": 1.0, "bottomk": 0.0}


BLOCKS: dict[str, Any] = {name: OPTIONS[name] for name in ("topk", "bottomk", "block_q", "block_k")}


SEEN = {"kind": "tiles", "grid": list(GRID), "start": 0}


sdpa = F.scaled_dot_product_attention


def qkv(queries: int = TOKENS, keys: int | None = None, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, queries), (heads, keys or queries), (heads, keys or queries)
    q, k, v = (torch.randn(2, *shape, HEAD_DIM, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, queries: Placement | None, keys: Placement | None, **told: Any) -> Tensor:
    """The definition on tokens gathered by plain indexing, and its output scattered back."""
    rows = torch.tensor(positions(queries, q.shape[2]) if queries else range(q.shape[2]))
    columns = torch.tensor(positions(keys, k.shape[2]) if keys else range(k.shape[2]))
    told = {"linear": "taylor", **BLOCKS, **told}
    out = reference.sparse_linear_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], **told)
    return out[:, :, rows.argsort()]


def placement(kind: str = "tiles", start: int = 0) -> Placement:
    return Placement(kind, GRID, start, (16, 16))


def order_of(capture: Capture) -> Any:
    (decision,) = (site.decision for site in capture.sites)
    assert isinstance(decision, Rewrite)
    return decision.order


def orders(model: nn.Module) -> list[dict[str, Any]]:
    return [site.order for site in sla_compile.report(model).sites]


def kernels_of(model: nn.Module, order: str) -> list[str]:
    """The names of Inductor's loops in the compiled model, which is checked against dense attention."""
    x = torch.randn(1, TOKENS, WIDTH)
    torch._dynamo.reset()
    sla_compile.detach(model)
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, **TILES, **EXACT, "reorder": order})
    with torch.no_grad():
        output, codes = run_and_get_code(compiled, x)
        assert_close("output", output, model(x), 1e-5)
    assert "sla.forward.default(" in codes[-1]
    assert "sla.reorder.default(" not in codes[-1]
    return re.findall(r"^(\w+fused\w+) = async_compile", codes[-1], re.MULTILINE)
