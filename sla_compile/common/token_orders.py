"""Token orders: which token of a video stands where, so that a block of consecutive ones is compact in space and time.

Plain integers and no tensors, shared by every room. A grid (T, H, W) or (H, W) of tokens stands in a sequence from
the token ``start`` on, its last axis first to change ("raster order"); the tokens before and after it, text say,
keep their places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

__all__ = ["ORDERS", "RASTER", "Placement", "block_ranges", "inverted", "place", "positions"]

RASTER = "raster"
ORDERS = (RASTER, "tiles", "hilbert")
"""What ``reorder`` takes: as the model has them; in compact boxes of one block each; along a Hilbert curve."""


@dataclass(frozen=True)
class Placement:
    """An order and the part of a sequence that it is of. Every field is data: it stands in graphs and in files."""

    kind: str
    grid: tuple[int, ...]
    start: int
    """The first token of the grid, at least 0."""
    blocks: tuple[int, ...]
    """Tokens in a block, of queries and of keys, that are to be compact."""


def place(tokens: int, grid: Sequence[int], start: int | None) -> int | None:
    """The first token of ``grid`` in a sequence of ``tokens``; None where it has no place there.

    ``start`` counts from the end where it is negative. Without it, only a grid of all the tokens has a place.
    """
    size = prod(grid)
    if start is None:
        return 0 if size == tokens else None
    first = start if start >= 0 else tokens + start
    return first if first >= 0 and first + size <= tokens else None


@lru_cache(maxsize=64)
def positions(placement: Placement, tokens: int) -> tuple[int, ...]:
    """For each place in the new order the token of the model that goes there: a permutation of range(tokens).

    Raises ValueError for an order that is not known, or a grid that does not fit.
    """
    grid, start = placement.grid, placement.start
    if placement.kind not in ORDERS or len(grid) not in (2, 3) or min(grid) < 1 or place(tokens, grid, start) != start:
        raise ValueError(
            f"token order {placement.kind!r} of a grid {grid} from token {start} on, in {tokens} tokens; accepted: one "
            f"of {', '.join(ORDERS)}, a grid (T, H, W) or (H, W) that lies within the tokens"
        )
    size = prod(grid)
    if placement.kind == RASTER:
        inner: Sequence[int] = range(size)
    elif placement.kind == "tiles":
        units = sorted({*placement.blocks}, reverse=True)
        inner = _tiles(list(range(size)), start, units, _Grid(grid))
    else:
        inner = _hilbert(grid)
    return (*range(start), *(start + token for token in inner), *range(start + size, tokens))


@lru_cache(maxsize=64)
def inverted(placement: Placement, tokens: int) -> tuple[int, ...]:
    """For each token of the model its place in the new order."""
    inverse = [0] * tokens
    for place_there, token in enumerate(positions(placement, tokens)):
        inverse[token] = place_there
    return tuple(inverse)


def block_ranges(placement: Placement, tokens: int, ranges: Sequence[int], block: int) -> tuple[int, ...]:
    """Ranges start, stop, start, stop, ... in the new order: the blocks that have a token of the model's ``ranges``."""
    places = inverted(placement, tokens)
    pairs = zip(ranges[::2], ranges[1::2], strict=True)
    touched = sorted({places[token] // block for start, stop in pairs for token in range(start, stop)})
    found: list[int] = []
    for index in touched:
        first, last = index * block, min((index + 1) * block, tokens)
        if found and found[-1] == first:
            found[-1] = last
        else:
            found += [first, last]
    return tuple(found)


class _Grid:
    """Coordinates of the tokens of a grid, and keys that sort tokens by one axis before the others."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        strides = [prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        self.axes = [
            [token // stride % size for token in range(prod(sizes))]
            for size, stride in zip(sizes, strides, strict=True)
        ]
        self._keys: dict[tuple[int, ...], list[int]] = {}

    def extent(self, tokens: Iterable[int], axis: int) -> int:
        """How far ``tokens`` reach along ``axis``; a step in time, the first of three axes, counts double."""
        along = [self.axes[axis][token] for token in tokens]
        return (max(along) - min(along) + 1) * (2 if axis == 0 and len(self.sizes) == 3 else 1)

    def keys(self, axes: tuple[int, ...]) -> list[int]:
        """For each token a number that orders by the first of ``axes``, then the second, then the third."""
        if axes not in self._keys:
            keys = [0] * prod(self.sizes)
            for axis in axes:
                size = self.sizes[axis]
                keys = [key * size + along for key, along in zip(keys, self.axes[axis], strict=True)]
            self._keys[axes] = keys
        return self._keys[axes]


def _tiles(tokens: list[int], first: int, units: Sequence[int], grid: _Grid) -> list[int]:
    """``tokens``, to stand at the places from ``first`` on, halved across their longest axis again and again.

    Cuts lie where blocks meet, multiples of the first of ``units`` until there is none within, then of the next. So
    every block is a box, but for what a grid that no tile divides leaves over. The tokens of a block stay in raster
    order.
    """
    last = first + len(tokens)
    while units and (first // units[0] + 1) * units[0] >= last:
        units = units[1:]
    if not units:
        return sorted(tokens)
    unit, middle = units[0], (first + last) / 2
    cut = min(range((first // unit + 1) * unit, last, unit), key=lambda place_there: abs(place_there - middle))
    extents = [grid.extent(tokens, axis) for axis in range(len(grid.sizes))]
    axes = tuple(sorted(range(len(extents)), key=lambda axis: -extents[axis]))
    tokens.sort(key=grid.keys(axes).__getitem__)
    before, after = tokens[: cut - first], tokens[cut - first :]
    return _tiles(before, first, units, grid) + _tiles(after, cut, units, grid)


@cache
def _hilbert(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens of a grid as a Hilbert curve meets them that fills the cube, of a power of two, around it."""
    bits = max((max(sizes) - 1).bit_length(), 1)
    axes = _Grid(sizes).axes
    along = [_hilbert_index([axis[token] for axis in axes], bits) for token in range(prod(sizes))]
    return tuple(sorted(range(prod(sizes)), key=along.__getitem__))


def _hilbert_index(point: list[int], bits: int) -> int:
    """How far along the Hilbert curve ``point`` lies (J. Skilling, Programming the Hilbert curve, AIP 707, 2004)."""
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
