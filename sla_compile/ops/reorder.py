"""``sla::reorder``: gather tokens into another order, or back; Inductor fuses it into the op that produces them.

The permutation is no tensor of the graph: the op takes the few numbers it follows from, so there is no index to move to
a device, to register as a buffer or to copy. A permutation is undone by a gather too, so the op is its own backward,
without atomics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sla_compile.common.token_orders import Placement, inverted, positions
from sla_compile.compat import lower_gather

__all__ = ["arguments", "inline_in_inductor", "reorder"]


def reorder(x: Tensor, placement: Placement, *, inverse: bool = False) -> Tensor:
    """x (..., N, D) with its tokens in the order of ``placement``; with ``inverse``, back from it. Differentiable.

    With a placement of each head x is (B, H, N, D), of as many heads.

    Raises ValueError if the grid of ``placement`` does not lie within N tokens.
    """
    result: Tensor = torch.ops.sla.reorder.default(x, *arguments(placement), inverse)
    return result


def arguments(placement: Placement) -> tuple[str, list[int], int, list[int]]:
    """The op's arguments kind, grid, start and blocks."""
    return placement.kind, list(placement.grid), placement.start, list(placement.blocks)


def inline_in_inductor() -> None:
    """Register a lowering in this process: Inductor then fuses the op into its neighbours instead of calling it."""
    lower_gather(torch.ops.sla.reorder.default, _index_for)


def _index_for(
    tokens: int, device: torch.device, kind: str, grid: list[int], start: int, blocks: list[int], inverse: bool = False
) -> Tensor:
    return _index(Placement(kind, tuple(grid), start, tuple(blocks)), tokens, inverse, device)


@lru_cache(maxsize=128)
def _index(placement: Placement, tokens: int, inverse: bool, device: torch.device) -> Tensor:
    """int32 (tokens), or (heads, tokens): which token each one of the result is; cached by device."""
    orders = [(inverted if inverse else positions)(head, tokens) for head in placement.heads]
    with torch.inference_mode(False):
        index = torch.tensor(orders, dtype=torch.int32, device=device)
    return index if len(orders) > 1 else index[0]


@torch.library.custom_op(
    "sla::reorder",
    mutates_args=(),
    schema="(Tensor x, str kind, int[] grid, int start, int[] blocks, bool inverse=False) -> Tensor",
    # any strides will do, so Inductor need not write the input out before it gathers
    tags=(torch.Tag.flexible_layout,),
)
def _reorder(x: Tensor, kind: str, grid: list[int], start: int, blocks: list[int], inverse: bool = False) -> Tensor:
    """x (..., N, D) gathered along N. A 4-d result, (B, H, N, D), is laid out in memory as (B, N, H, D)."""
    index = _index_for(x.shape[-2], x.device, kind, grid, start, blocks, inverse)
    if index.dim() == 2:
        if x.dim() != 4 or x.shape[1] != len(index):
            raise ValueError(f"sla::reorder: got {len(index)} orders, one for each head, and {tuple(x.shape)}")
        by_token = x.transpose(1, 2)
        return by_token.gather(1, index.T.long()[None, :, :, None].expand(by_token.shape)).transpose(1, 2)
    if x.dim() != 4:
        return x.index_select(-2, index)
    return x.transpose(1, 2).index_select(1, index).transpose(1, 2)


@_reorder.register_fake
def _(x: Tensor, kind: str, grid: list[int], start: int, blocks: list[int], inverse: bool = False) -> Tensor:
    if x.dim() != 4:
        return x.new_empty(x.shape)
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _remember_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.order = inputs[1:]


def _gather_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *order, inverse = ctx.order
    return torch.ops.sla.reorder.default(gradient, *order, not inverse), None, None, None, None, None


_reorder.register_autograd(_gather_back, setup_context=_remember_order)
