"""Which order the tokens of one attention get, from the settings and what the graph shows; or why the model's own.

An order never changes what an attention gives, only which tokens share a block. So where none can be had with
certainty the attention is rewritten all the same, in the model's order, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from sla_compile.common.token_orders import RASTER, Placement, block_ranges, place
from sla_compile.passes.node_ops import NodeOp, read
from sla_compile.passes.operands import Step, after, example
from sla_compile.passes.view_axes import origins

__all__ = ["AS_IN_THE_MODEL", "AS_IT_IS", "Grid", "TokenOrder", "Wanted"]
__all__ += ["back", "grids_of", "ordered", "ordered_mask", "outside_grid", "token_order"]


@dataclass(frozen=True)
class Grid:
    """A grid of tokens seen in a model: its sizes, and the token where it starts in a sequence of ``tokens``."""

    sizes: tuple[int, ...]
    start: int
    tokens: int


@dataclass(frozen=True)
class Wanted:
    """What the settings of a site ask of the order of its tokens."""

    kind: str = RASTER
    grid: tuple[int, ...] | None = None
    """None: the grid that was seen in the model."""
    start: int | None = None
    blocks: tuple[int, ...] = (64, 64)


@dataclass(frozen=True)
class TokenOrder:
    """The orders of queries and of keys, None being the model's; and why it is that, where another was wanted."""

    queries: Placement | None = None
    keys: Placement | None = None
    obstacle: str = ""


AS_IN_THE_MODEL, AS_IT_IS = Wanted(), TokenOrder()
"""Nothing asked for, and nothing changed."""


def grids_of(
    seen: Sequence[Grid | None], queries: int | torch.SymInt, keys: int | torch.SymInt
) -> tuple[Grid | None, Grid | None]:
    """Of the grids ``seen``, of queries and of keys in turn, those in so many tokens; without one the first.

    A symbolic number has none: to compare it would make it a constant.
    """
    found = []
    for tokens, grids in ((queries, seen[::2]), (keys, seen[1::2])):
        fitting = (grid for grid in grids if grid and isinstance(tokens, int) and grid.tokens == tokens)
        found.append(next(fitting, grids[0]))
    return found[0], found[1]


def token_order(
    wanted: Wanted,
    query: Any,
    key: Any,
    causal: bool,
    seen: tuple[Grid | None, Grid | None],
    *,
    masked: bool,
    ranges: tuple[int, ...],
) -> tuple[TokenOrder, tuple[int, ...]]:
    """The order for an attention of ``query`` and ``key`` (B, H, N, D), and ``ranges`` of keys in it.

    ``seen`` are the grids in their tokens; ``ranges``, start, stop, start, stop, ..., come out as whole blocks.
    """
    order = _order(wanted, query, key, causal, seen)
    if order.keys is None:
        return order, ranges
    if masked and len(order.keys.heads) > 1:
        return TokenOrder(obstacle="a mask, which is of all heads, needs one order for them"), ranges
    if not ranges:
        return order, ranges
    tokens, block = int(example(key).shape[2]), wanted.blocks[1]
    found = {block_ranges(head, tokens, ranges, block) for head in order.keys.heads}
    if len(found) > 1:
        return TokenOrder(obstacle="tokens that are always critical are in other blocks in each head's order"), ranges
    return order, found.pop()


def _order(wanted: Wanted, query: Any, key: Any, causal: bool, seen: tuple[Grid | None, Grid | None]) -> TokenOrder:
    if wanted.kind == RASTER:
        return AS_IT_IS
    if causal:
        return TokenOrder(obstacle="causal attention needs the model's own order")
    each, heads = wanted.kind.count(",") + 1, [int(example(side).shape[1]) for side in (query, key)]
    if each > 1 and heads != [each, each]:
        value = f"{each} orders, one for each head, for {heads[0]} heads of queries, {heads[1]} of keys"
        return TokenOrder(obstacle=value)
    sides = [_placement(wanted, side, grid) for side, grid in zip((query, key), seen, strict=True)]
    queries, keys = (side if isinstance(side, Placement) else None for side in sides)
    reasons = [side for side in sides if isinstance(side, str)]
    return TokenOrder(queries, keys, reasons[0] if len(reasons) == 2 else "")


def outside_grid(wanted: Wanted, side: Any, seen: Grid | None) -> tuple[tuple[int, int], ...] | str:
    """(start, stop) of the tokens of ``side`` (B, H, N, D) before and behind its grid; or why that is not known."""
    placed = _placement(wanted, side, seen)
    if isinstance(placed, str):
        return placed
    end, tokens = placed.start + prod(placed.grid), int(example(side).shape[2])
    return tuple((start, stop) for start, stop in ((0, placed.start), (end, tokens)) if start < stop)


def _placement(wanted: Wanted, side: Any, seen: Grid | None) -> Placement | str:
    """The grid and the order of one side's tokens, or why it keeps its own."""
    tokens = example(side).shape[2]
    if not isinstance(tokens, int):
        return f"the number of tokens, {tokens}, is symbolic"
    if wanted.grid is None:
        if seen is None:
            return "no grid of tokens was seen in the model; give one by grid=(T, H, W)"
        if tokens != seen.tokens:
            return f"{tokens} tokens; a grid was seen in {seen.tokens}"
        return Placement(wanted.kind, seen.sizes, seen.start, wanted.blocks)
    size = prod(wanted.grid)
    start = place(tokens, wanted.grid, wanted.start)
    if start is None and wanted.start is None:
        start = _joined(side, size)
        if start is None and seen is not None and (seen.sizes, seen.tokens) == (wanted.grid, tokens):
            start = seen.start
    if start is None:
        sizes = " x ".join(map(str, wanted.grid))
        if wanted.start is not None:
            return f"a grid of {sizes} = {size} from token {wanted.start} on does not lie in {tokens} tokens"
        where = "; give its first token by grid_start" if size < tokens else ""
        return f"{tokens} tokens are not a grid of {sizes} = {size}{where}"
    return Placement(wanted.kind, wanted.grid, start, wanted.blocks)


def _joined(side: Any, size: int) -> int | None:
    """Where the only part of ``size`` tokens begins, if ``side`` (B, H, N, D) was joined of parts along its tokens."""
    op, axis = read(side), 2
    while op.word != "cat":
        if op.word not in _COPIES:
            found = origins(op)
            origin = None if found is None else found[axis]
            if origin is None or origin.axis is None or not origin.whole:
                return None
            axis = origin.axis
        op = read(op.input)
    return _part(op, axis, size)


_COPIES = ("to", "contiguous", "clone", "detach")


def _part(op: NodeOp, axis: int, size: int) -> int | None:
    """Where the only tensor of ``size`` along ``axis`` begins in what ``op`` joins along it; None without one."""
    given: Any = op.arguments.get("tensors", ())
    parts, dim = [example(part) for part in given], op.arguments.get("dim", 0)
    if not all(isinstance(part, torch.Tensor) and isinstance(part.shape[axis], int) for part in parts):
        return None
    if not isinstance(dim, int) or dim % parts[0].dim() != axis:
        return None
    lengths = [part.shape[axis] for part in parts]
    return sum(lengths[: lengths.index(size)]) if lengths.count(size) == 1 else None


def _steps(placement: Placement | None, inverse: bool = False) -> tuple[Step, ...]:
    if placement is None:
        return ()
    arguments = placement.kind, list(placement.grid), placement.start, list(placement.blocks), inverse
    return (Step(torch.ops.sla.reorder.default, arguments),)


def ordered(source: Any, placement: Placement | None) -> Any:
    """``source`` (..., N, D) with its tokens in this order."""
    return after(source, *_steps(placement))


def back(source: Any, placement: Placement | None, *more: Step) -> Any:
    """``source`` (..., N, D), whose tokens are in this order, with them in the model's; and then ``more``."""
    return after(source, *_steps(placement, inverse=True), *more)


def ordered_mask(source: Any, placement: Placement | None) -> Any:
    """``source`` (B, N) with its tokens in this order."""
    if placement is None:
        return source
    return after(source, Step("unsqueeze", (-1,)), *_steps(placement), Step("squeeze", (-1,)))
