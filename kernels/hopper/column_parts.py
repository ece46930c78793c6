"""Long lists of columns cut into parts, for programs that share the work: made on the device, with no host sync.

One column of keys was one program's. With few columns for each program the longest took all of the time. A list longer
than an even share of all entries becomes parts of about one length, which are worked on like columns; what they give is
added in pairs, in float32, so that the bits do not depend on who is done first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..steps import BlockLists
from ..triton.overlap import let_next_start
from ..triton.tiles import ceil_div

__all__ = ["LEAST", "cut_columns", "worth_cutting"]

_TILE = 16
_STEP = 512
_BINS = 32

LEAST = 7 * 128
"""Queries whose blocks stay together at least: a part costs its own tiles, and each sum that goes through memory about
6 us (H200), as much as 250 queries."""
MANY = 16
"""From so many columns for each program on, one is little."""


@triton.jit
def share_limit(counts, total, slots, least, STEP: tl.constexpr):
    """Entries of the longest part: no more than ``slots`` sums are then to be made."""
    entries = tl.zeros([STEP], tl.int32)
    for first in range(0, total, STEP):
        lines = first + tl.arange(0, STEP)
        entries += tl.load(counts + lines, mask=lines < total, other=0)
    return tl.maximum((tl.sum(entries, 0) + slots - 1) // slots, least)


@triton.jit
def parts_and_key(counts, lines, total, longest, limit, BINS: tl.constexpr):
    """Parts of each line, none past the last, and a key by which the longest come first: bin of length, then index."""
    count = tl.load(counts + lines, mask=lines < total, other=0)
    parts = tl.maximum((count + limit - 1) // limit, 1)
    length = (count + parts - 1) // parts
    bin_of_length = BINS - 1 - tl.minimum(length * BINS // (longest + 1), BINS - 1)
    return tl.where(lines < total, parts, 0), bin_of_length * total + lines


@triton.jit(do_not_specialize=["total", "longest", "slots", "least", "meetings"])
def column_parts_kernel(
    counts,
    work,
    total,
    longest,
    slots,
    least,
    meetings,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    if ON_GPU:
        let_next_start()
    limit = share_limit(counts, total, slots, least, STEP)
    lines = tl.program_id(0) * TILE + tl.arange(0, TILE)
    parts, key = parts_and_key(counts, lines, total, longest, limit, BINS)
    before = tl.zeros([TILE, STEP], tl.int32)
    sums_before = tl.zeros([TILE, STEP], tl.int32)
    all_parts = tl.zeros([STEP], tl.int32)
    for first in range(0, total, STEP):
        others = first + tl.arange(0, STEP)
        other_parts, other_key = parts_and_key(counts, others, total, longest, limit, BINS)
        before += tl.where(other_key[None, :] < key[:, None], other_parts[None, :], 0)
        sums_before += tl.where(
            (others[None, :] < lines[:, None]) & (others < total)[None, :], other_parts[None, :] - 1, 0
        )
        all_parts += other_parts
    order = work + 2
    position = tl.sum(before, 1)
    for part in range(tl.max(parts, 0)):
        tl.store(order + position + part, lines + part * total, mask=part < parts)
    of_columns = order + total + slots
    tl.store(of_columns + lines, parts, mask=lines < total)
    tl.store(of_columns + total + lines, tl.sum(sums_before, 1), mask=lines < total)
    if tl.program_id(0) == 0:
        tl.store(work, 0)
        tl.store(work + 1, tl.sum(all_parts, 0))
        for first in range(0, meetings, STEP):
            places = first + tl.arange(0, STEP)
            tl.store(of_columns + 2 * total + places, 0, mask=places < meetings)


def worth_cutting(columns: int, programs: int) -> bool:
    """Whether so few ``columns`` are for each program that the longest may take longer than an even share."""
    return columns <= MANY * programs


def cut_columns(lists: BlockLists, programs: int, consumers: int, least: int) -> torch.Tensor:
    """The parts of the columns' ``lists``, none longer than an even share of one of ``programs``, but those of
    ``least`` entries and fewer stay whole. There are then at most as many sums of two as programs; ``consumers`` make
    each.

    Returns int32: what is taken next, 0; how many parts there are; room for columns + ``programs`` of them, the longest
    first, each as column + columns * part; of each column how many, then the first of its sums; and a 0 for each sum
    and consumer.
    """
    counts = lists.counts
    assert counts is not None
    total = counts.numel()
    work = counts.new_empty(2 + total + programs + 2 * total + programs * consumers)
    column_parts_kernel[(ceil_div(total, _TILE),)](
        counts,
        work,
        total,
        lists.blocks.shape[3],
        programs,
        least,
        programs * consumers,
        TILE=_TILE,
        STEP=_STEP,
        BINS=_BINS,
        # the interpreter has no such instruction
        ON_GPU=isinstance(column_parts_kernel, triton.JITFunction),
    )
    return work
