"""Masks by which runs of queries each see one range of keys: samples in one sequence, frames that see earlier frames.

Each run is then an attention of its own. The mask has to be one that the graph makes of constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from sla_compile.passes.known_values import Known, known_values

__all__ = ["MOST_SEGMENTS", "Segment", "segments", "within"]

MOST_SEGMENTS = 64
"""Each is one call of the op."""


@dataclass(frozen=True)
class Segment:
    """Queries ``first`` to ``last`` see the keys ``start`` to ``stop``, each without its end, and no others."""

    first: int
    last: int
    start: int
    stop: int

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key."""
        return (self.last - self.first) * (self.stop - self.start)


def segments(mask: Any, queries: Any, keys: Any, end: fx.Node) -> tuple[Segment, ...] | str:
    """Those of ``mask`` (..., queries or 1, keys or 1), bool or added to the scores, where the node ``end`` reads it.

    Or why it is no such mask.
    """
    known = known_values(mask, end)
    if known is None:
        return "values that are not known while compiling"
    seen = _seen(known)
    if seen is None:
        return "numbers other than 0 and -inf"
    if any(len(ends) > 1 for ends in known.ends[:-2]):
        return "other masks for other heads or samples"
    rows, columns = ((1,), (1,), *known.ends)[-2:]
    seen = seen.reshape(len(rows), len(columns))
    rows, columns = (ends if ends != (1,) else (size,) for ends, size in ((rows, queries), (columns, keys)))
    found: list[Segment] = []
    for first, last, row in _runs(rows, seen):
        bounds = [(start, stop) for start, stop, key in _runs(columns, row) if key]
        if not bounds:
            return f"query {first} sees no key"
        if any(stop != start for (_, stop), (start, _) in pairwise(bounds)):
            return f"query {first} sees more than one range of keys"
        start, stop = bounds[0][0], bounds[-1][1]
        if found and (found[-1].start, found[-1].stop) == (start, stop):
            first = found.pop().first
        found.append(Segment(first, last, start, stop))
    if len(found) > MOST_SEGMENTS:
        return f"{len(found)} runs of queries that each see another range of keys"
    return tuple(found)


def _runs(ends: tuple[int, ...], of: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    return zip((0, *ends), ends, of, strict=False)


def _seen(known: Known) -> Tensor | None:
    """Where a mask lets a query see a key, as runs; None where it also weighs the keys."""
    values = known.values
    if values.dtype == torch.bool:
        return values
    nothing = (values == -torch.inf) | (values == torch.finfo(values.dtype).min)
    return values == 0 if bool((nothing | (values == 0)).all()) else None


def within(ranges: tuple[int, ...], segment: Segment) -> tuple[int, ...]:
    """Of ``ranges`` of keys, start, stop, start, stop, ..., those of a segment, counted from its first key."""
    found: list[int] = []
    for start, stop in zip(ranges[::2], ranges[1::2], strict=True):
        first, last = max(start, segment.start), min(stop, segment.stop)
        if first < last:
            found += [first - segment.start, last - segment.start]
    return tuple(found)
