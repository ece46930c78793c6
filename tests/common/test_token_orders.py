"""Orders of tokens: permutations of any grid whose blocks are compact, the same every time."""

from __future__ import annotations

import random
from itertools import pairwise
from math import prod

import pytest

from sla_compile.common.token_orders import ORDERS, Placement, block_ranges, inverted, joined_order, place, positions

COMPACT = tuple(kind for kind in ORDERS if kind != "raster")
GRIDS = [(21, 30, 52), (13, 17, 9), (16, 16, 16), (30, 52), (7, 5), (1, 40, 64), (64, 3, 3), (2, 2, 2), (1, 1)]


def coordinates(token: int, grid: tuple[int, ...]) -> list[int]:
    found = []
    for size in reversed(grid):
        found.append(token % size)
        token //= size
    return found[::-1]


def spread(placement: Placement, tokens: int, block: int) -> float:
    """The mean square distance of the grid's tokens to the middle of their block."""
    total, count = 0.0, 0
    order, last = positions(placement, tokens), placement.start + prod(placement.grid)
    for first in range(0, tokens, block):
        inside = [token for token in order[first : first + block] if placement.start <= token < last]
        points = [coordinates(token - placement.start, placement.grid) for token in inside]
        for along in zip(*points, strict=True):
            middle = sum(along) / len(along)
            total += sum((place_there - middle) ** 2 for place_there in along)
        count += len(points)
    return total / count


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", [*ORDERS, "tiles:1", "tiles:4", "tiles:99"])
@pytest.mark.parametrize(("before", "behind"), [(0, 0), (77, 0), (5, 40)])
def test_an_order_is_a_permutation_that_leaves_other_tokens_alone(
    kind: str, grid: tuple[int, ...], before: int, behind: int
) -> None:
    size = prod(grid)
    tokens = before + size + behind
    placement = Placement(kind, grid, before, (64, 64))
    order = positions(placement, tokens)
    assert sorted(order) == list(range(tokens))
    assert order[:before] == tuple(range(before))
    assert order[before + size :] == tuple(range(before + size, tokens))
    inverse = inverted(placement, tokens)
    assert all(inverse[token] == place_there for place_there, token in enumerate(order))


@pytest.mark.parametrize("kind", COMPACT)
@pytest.mark.parametrize(
    ("grid", "block", "start", "most"),
    [
        # Mean square distances of the model's own order: 226, 235, 226, 506, 341. A cube of 64 tokens has 3.75.
        ((21, 30, 52), 64, 0, 6.5),
        ((21, 30, 52), 128, 0, 10.5),
        ((21, 30, 52), 64, 226, 7.0),
        ((21, 45, 80), 64, 0, 6.5),
        ((1, 64, 64), 64, 0, 10.6),
    ],
)
def test_blocks_are_compact(kind: str, grid: tuple[int, ...], block: int, start: int, most: float) -> None:
    tokens = start + prod(grid)
    assert spread(Placement(kind, grid, start, (block, block)), tokens, block) <= most
    assert spread(Placement("raster", grid, start, (block, block)), tokens, block) > 20 * most


@pytest.mark.parametrize(
    ("frames", "box"),
    [(1, (1, 8, 8)), (2, (2, 4, 8)), (4, (4, 4, 4)), (8, (8, 2, 4)), (16, (16, 2, 2)), (99, (16, 2, 2))],
)
def test_tiles_of_so_many_frames(frames: int, box: tuple[int, ...]) -> None:
    order = positions(Placement(f"tiles:{frames}", (16, 32, 32), 0, (64, 64)), 16 * 32 * 32)
    for first in range(0, len(order), 64):
        points = zip(*(coordinates(token, (16, 32, 32)) for token in order[first : first + 64]), strict=True)
        assert tuple(max(along) - min(along) + 1 for along in points) == box


@pytest.mark.parametrize("frames", [1, 2, 4, 8])
def test_tiles_of_so_many_frames_in_a_grid_that_is_no_multiple_of_them(frames: int) -> None:
    order = positions(Placement(f"tiles:{frames}", (21, 30, 52), 0, (64, 64)), 21 * 30 * 52)
    spans = []
    for first in range(0, len(order), 64):
        times = {token // (30 * 52) for token in order[first : first + 64]}
        spans.append(max(times) - min(times) + 1)
    assert sum(span <= frames + 1 for span in spans) > 0.9 * len(spans)
    assert frames / 2 <= sum(spans) / len(spans) <= frames + 1


@pytest.mark.parametrize("kind", ["tiles:1", "tiles:7"])
def test_a_picture_has_one_frame(kind: str) -> None:
    grid = (30, 52)
    tiles, own = (Placement(name, grid, 0, (64, 64)) for name in ("tiles", kind))
    assert positions(own, prod(grid)) == positions(tiles, prod(grid))


def test_tiles_suit_blocks_of_queries_and_of_keys() -> None:
    grid = (21, 30, 52)
    both, alone = Placement("tiles", grid, 0, (128, 64)), Placement("tiles", grid, 0, (64, 64))
    assert spread(both, prod(grid), 64) < 1.1 * spread(alone, prod(grid), 64)
    assert spread(both, prod(grid), 128) == spread(Placement("tiles", grid, 0, (128, 128)), prod(grid), 128)


def test_tiles_begin_where_blocks_do_behind_text() -> None:
    grid, start = (8, 16, 16), 100
    aligned = spread(Placement("tiles", grid, start, (64, 64)), start + prod(grid), 64)
    shifted = Placement("tiles", grid, 0, (64, 64))
    order = (*range(start), *(start + token for token in positions(shifted, prod(grid))))
    loose = 0.0
    for first in range(0, len(order), 64):
        points = [coordinates(token - start, grid) for token in order[first : first + 64] if token >= start]
        for along in zip(*points, strict=True):
            loose += sum((one - sum(along) / len(along)) ** 2 for one in along)
    assert aligned < 0.7 * loose / prod(grid)


def test_a_grid_that_tiles_divide_is_cut_into_boxes() -> None:
    grid = (8, 16, 16)
    order = positions(Placement("tiles", grid, 0, (64, 64)), prod(grid))
    for first in range(0, prod(grid), 64):
        points = [coordinates(token, grid) for token in order[first : first + 64]]
        assert order[first : first + 64] == tuple(sorted(order[first : first + 64]))
        assert prod(max(along) - min(along) + 1 for along in zip(*points, strict=True)) == 64


@pytest.mark.parametrize("grid", [(8, 8, 8), (16, 16), (4, 4, 4)])
def test_a_hilbert_curve_takes_one_step_at_a_time(grid: tuple[int, ...]) -> None:
    points = [coordinates(token, grid) for token in positions(Placement("hilbert", grid, 0, (16, 16)), prod(grid))]
    assert all(sum(abs(a - b) for a, b in zip(one, other, strict=True)) == 1 for one, other in pairwise(points))


@pytest.mark.parametrize(
    ("tokens", "grid", "start", "found"),
    [
        (64, (4, 4, 4), None, 0),
        (65, (4, 4, 4), None, None),
        (80, (4, 4, 4), 16, 16),
        (80, (4, 4, 4), -64, 16),
        (80, (4, 4, 4), 17, None),
        (80, (4, 4, 4), -65, 15),
        (80, (4, 4, 4), -63, None),
        (80, (4, 4, 4), -81, None),
    ],
)
def test_where_a_grid_lies(tokens: int, grid: tuple[int, ...], start: int | None, found: int | None) -> None:
    assert place(tokens, grid, start) == found


def test_ranges_become_the_blocks_that_hold_their_tokens() -> None:
    generator = random.Random(0)
    placement, tokens = Placement("tiles", (4, 6, 6), 20, (16, 16)), 180
    order = positions(placement, tokens)
    for _ in range(20):
        start = generator.randrange(tokens - 9)
        wanted = {i // 16 for i, token in enumerate(order) if start <= token < start + 9}
        flat = block_ranges(placement, tokens, (start, start + 9), 16)
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        assert {i // 16 for first, last in pairs for i in range(first, last)} == wanted
        assert all(first % 16 == 0 and last <= tokens for first, last in pairs)
        assert all(one[1] < other[0] for one, other in pairwise(pairs))


@pytest.mark.parametrize(
    ("placement", "tokens"),
    [
        (Placement("snake", (4, 4), 0, (16, 16)), 16),
        (Placement("tiles", (4,), 0, (16, 16)), 4),
        (Placement("tiles", (4, 0), 0, (16, 16)), 4),
        (Placement("hilbert", (4, 4), 1, (16, 16)), 16),
        (Placement("raster", (4, 4), -1, (16, 16)), 32),
    ],
)
def test_what_is_no_order_of_these_tokens_is_refused(placement: Placement, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"token order '{placement.kind}' of a grid .* accepted: one of raster, tiles"):
        positions(placement, tokens)


def test_orders_of_heads_are_written_in_one_word_and_read_again() -> None:
    assert joined_order(["tiles:4", "raster"]) == joined_order("tiles:4,raster") == "tiles:4,raster"
    assert joined_order(["tiles", "tiles"]) == joined_order("tiles") == "tiles"
    placed = Placement("tiles:4,raster", (2, 3), 1, (16,))
    assert placed.heads == (Placement("tiles:4", (2, 3), 1, (16,)), Placement("raster", (2, 3), 1, (16,)))
    assert placed.heads[1].heads == placed.heads[1:]
