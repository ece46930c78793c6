"""Token orders: permutations of a video's tokens by which a block of consecutive ones is compact in space and time.

Plain integers and no tensors, shared by passes, ops and kernels. The model's own order is raster order: a grid
(T, H, W) or (H, W) of tokens is flattened, last axis fastest, and lies in the sequence from token ``start`` on. The
tokens before and after it, text say, keep their positions.

An order is a name, or with one for each head their names joined by commas: "raster,tiles:4".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import prod

__all__ = ["ORDERS", "RASTER", "TILES_OF", "Placement"]
__all__ += ["block_ranges", "inverted", "is_order", "joined_order", "place", "positions"]

RASTER = "raster"
ORDERS = (RASTER, "tiles", "hilbert")
"""Values of ``reorder``: the model's own order; boxes of one block each; along a Hilbert curve. See `is_order`."""

TILES_OF = "tiles:N"
"""And boxes of at most N frames, N from 1 to 99, as this is written in messages."""

_TIME_WEIGHT = 2
"""A step in time counts as so many in space when boxes are cut; chosen by measurement (benchmarks/RESULTS.md)."""


@dataclass(frozen=True)
class Placement:
    """An order, and the grid of tokens that it permutes. Plain data, which the op takes as arguments."""

    kind: str
    """An order, or one for each head, as `joined_order` has it."""
    grid: tuple[int, ...]
    start: int
    """The first token of the grid, at least 0."""
    blocks: tuple[int, ...]
    """Sizes of the blocks, of queries and of keys, that are to be compact."""

    @property
    def heads(self) -> tuple[Placement, ...]:
        """The placement of each head; this one alone where it is that of all heads."""
        kinds = self.kind.split(",")
        return (self,) if len(kinds) == 1 else tuple(replace(self, kind=kind) for kind in kinds)


def is_order(kind: object) -> bool:
    """Whether ``kind`` names an order: one of ``ORDERS``, or "tiles:1" to "tiles:99"."""
    return isinstance(kind, str) and (kind in ORDERS or re.fullmatch("tiles:[1-9][0-9]?", kind, re.ASCII) is not None)


def joined_order(kinds: str | Sequence[str]) -> str:
    """The stored form of an order, or of one for each head; one that all heads have is written once."""
    each = kinds.split(",") if isinstance(kinds, str) else list(kinds)
    return each[0] if len({*each}) == 1 else ",".join(each)


def place(tokens: int, grid: Sequence[int], start: int | None) -> int | None:
    """The first token of ``grid`` in a sequence of ``tokens``; None if the grid does not fit there.

    A negative ``start`` counts from the end. Without one, the grid has to be all of the tokens.
    """
    size = prod(grid)
    if start is None:
        return 0 if size == tokens else None
    first = start if start >= 0 else tokens + start
    return first if first >= 0 and first + size <= tokens else None


@lru_cache(maxsize=64)
def positions(placement: Placement, tokens: int) -> tuple[int, ...]:
    """The permutation of range(tokens) to gather by: for each position in the new order, the model's token there.

    ``placement`` is of one head, or of all alike. Raises ValueError for an unknown order, or a grid that does not lie
    within the tokens.
    """
    grid, start = placement.grid, placement.start
    known = is_order(placement.kind)
    if not known or len(grid) not in (2, 3) or min(grid) < 1 or place(tokens, grid, start) != start:
        raise ValueError(
            f"token order {placement.kind!r} of a grid {grid} from token {start} on, in {tokens} tokens; accepted: one "
            f"of {', '.join(ORDERS)}, {TILES_OF}, a grid (T, H, W) or (H, W) that lies within the tokens"
        )
    size = prod(grid)
    if placement.kind == RASTER:
        inner: Sequence[int] = range(size)
    elif placement.kind == "hilbert":
        inner = _hilbert(grid)
    else:
        units = sorted({*placement.blocks}, reverse=True)
        _, _, frames = placement.kind.partition(":")
        inner = _tiles(list(range(size)), start, units, _GridCoordinates(grid, int(frames) if frames else None))
    return (*range(start), *(start + token for token in inner), *range(start + size, tokens))


@lru_cache(maxsize=64)
def inverted(placement: Placement, tokens: int) -> tuple[int, ...]:
    """The inverse of ``positions``: for each token of the model, its position in the new order."""
    inverse = [0] * tokens
    for position, token in enumerate(positions(placement, tokens)):
        inverse[token] = position
    return tuple(inverse)


def block_ranges(placement: Placement, tokens: int, ranges: Sequence[int], block: int) -> tuple[int, ...]:
    """The blocks of the new order that hold a token of ``ranges``, as ranges of positions there.

    Both are flat: start, stop, start, stop, ...; ``ranges`` are tokens of the model.
    """
    new_positions = inverted(placement, tokens)
    pairs = zip(ranges[::2], ranges[1::2], strict=True)
    touched = sorted({new_positions[token] // block for start, stop in pairs for token in range(start, stop)})
    found: list[int] = []
    for index in touched:
        first, last = index * block, min((index + 1) * block, tokens)
        if found and found[-1] == first:
            found[-1] = last
        else:
            found += [first, last]
    return tuple(found)


class _GridCoordinates:
    """Coordinates of the tokens of a grid, along each axis; tokens are numbered in raster order.

    frames: how many a box may have. Until it has no more it is cut in time, and from then on in space alone.
    """

    def __init__(self, sizes: tuple[int, ...], frames: int | None = None) -> None:
        self.sizes, self.frames = sizes, frames
        strides = [prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        self.axes = [
            [token // stride % size for token in range(prod(sizes))]
            for size, stride in zip(sizes, strides, strict=True)
        ]
        self._keys: dict[tuple[int, ...], list[int]] = {}

    def extent(self, tokens: Iterable[int], axis: int) -> int:
        """Length of the box around ``tokens`` along ``axis``; in time, the first of three axes, it counts double.

        Or with ``frames`` more than any length in space, or nothing.
        """
        along = [self.axes[axis][token] for token in tokens]
        length = max(along) - min(along) + 1
        if axis > 0 or len(self.sizes) < 3:
            return length
        if self.frames is None:
            return _TIME_WEIGHT * length
        return sum(self.sizes) if length > self.frames else 0

    def sort_keys(self, axes: tuple[int, ...]) -> list[int]:
        """For each token its sorting key by the first of ``axes``, then the second, then the third."""
        if axes not in self._keys:
            keys = [0] * prod(self.sizes)
            for axis in axes:
                size = self.sizes[axis]
                keys = [key * size + along for key, along in zip(keys, self.axes[axis], strict=True)]
            self._keys[axes] = keys
        return self._keys[axes]


def _tiles(tokens: list[int], first: int, units: Sequence[int], grid: _GridCoordinates) -> list[int]:
    """``tokens`` in the order in which they fill the positions from ``first`` on: halved along their longest axis.

    The halves are halved again, until each is one block. Cuts are at multiples of the block size ``units[0]``, and
    where none is left within, of the next of ``units``. So every block is a box, except where the grid is no multiple
    of it. Within a block tokens are in raster order.
    """
    last = first + len(tokens)
    while units and (first // units[0] + 1) * units[0] >= last:
        units = units[1:]
    if not units:
        return sorted(tokens)
    unit, middle = units[0], (first + last) / 2
    cut = min(range((first // unit + 1) * unit, last, unit), key=lambda position: abs(position - middle))
    extents = [grid.extent(tokens, axis) for axis in range(len(grid.sizes))]
    axes = tuple(sorted(range(len(extents)), key=lambda axis: -extents[axis]))
    tokens.sort(key=grid.sort_keys(axes).__getitem__)
    before, after = tokens[: cut - first], tokens[cut - first :]
    return _tiles(before, first, units, grid) + _tiles(after, cut, units, grid)


@cache
def _hilbert(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens of a grid in the order of a Hilbert curve through the smallest cube, of side 2^n, that contains it."""
    bits = max((max(sizes) - 1).bit_length(), 1)
    axes = _GridCoordinates(sizes).axes
    along = [_hilbert_index([axis[token] for axis in axes], bits) for token in range(prod(sizes))]
    return tuple(sorted(range(prod(sizes)), key=along.__getitem__))


def _hilbert_index(point: list[int], bits: int) -> int:
    """Index of ``point`` along the Hilbert curve through the cube of side 2^bits.

    J. Skilling, Programming the Hilbert curve, AIP Conference Proceedings 707, 2004.
    """
    dimensions = range(len(point))
    for bit in reversed(range(1, bits)):
        lower = (1 << bit) - 1
        for i in dimensions:
            if point[i] >> bit & 1:
                point[0] ^= lower
            else:
                swap = (point[0] ^ point[i]) & lower
                point[0], point[i] = point[0] ^ swap, point[i] ^ swap
    for i in dimensions[1:]:
        point[i] ^= point[i - 1]
    flip = 0
    for bit in range(1, bits):
        flip ^= (1 << bit) - 1 if point[-1] >> bit & 1 else 0
    index = 0
    for bit in reversed(range(bits)):
        for i in dimensions:
            index = index << 1 | (point[i] ^ flip) >> bit & 1
    return index
