"""What is said of the axes of a view is so: checked on values, for random views in random spellings."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sla_compile.passes.node_ops import read
from sla_compile.passes.view_axes import Origin, origins, origins_of_pieces, origins_of_write
from tests.support.view_spellings import graph_of, one_of, part_of, permuted, regrouped, some_way, unsqueezed

SIZES = (1, 2, 3, 4, 6)


def made_by(way: Callable[[Any], Any], value: Tensor) -> fx.Node:
    (node,) = graph_of(way, value).graph.output_node().args
    assert isinstance(node, fx.Node)
    return node


def random_view(value: Tensor, draw: random.Random) -> Iterator[Callable[[Any], Any]]:
    shape, axis = list(value.shape), draw.randrange(value.dim())
    kind = draw.choice(["permute", "split", "merge", "regroup", "unsqueeze", "one", "part", "expand", "squeeze"])
    if kind == "permute":
        return permuted(draw.sample(range(len(shape)), len(shape)))
    if kind == "split":
        factor = draw.choice([size for size in SIZES if shape[axis] % size == 0])
        return regrouped(shape, [*shape[:axis], shape[axis] // factor, factor, *shape[axis + 1 :]])
    if kind == "merge" and axis + 1 < len(shape):
        return regrouped(shape, [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]])
    if kind == "regroup":
        sizes, left = [], value.numel()
        while left > 1:
            sizes.append(draw.choice([size for size in range(2, left + 1) if left % size == 0]))
            left //= sizes[-1]
        return regrouped(shape, sizes or [1])
    if kind == "one":
        return one_of(axis, draw.randrange(shape[axis]), shape)
    if kind == "part" and shape[axis] > 1:
        first = draw.randrange(shape[axis] - 1)
        return part_of(axis, first, draw.randrange(first + 1, shape[axis]), shape)
    if kind == "expand":
        sizes = [draw.choice(SIZES) if size == 1 else -1 for size in shape]
        return iter(
            [lambda x: x.expand(2, *sizes), lambda x: torch.broadcast_to(x, (2, *value.expand(2, *sizes).shape[1:]))]
        )
    if kind == "squeeze":
        return iter([lambda x: x.squeeze(), torch.squeeze, lambda x: x.squeeze(dim=axis)])
    return unsqueezed(axis, len(shape))


def assert_is_so(origin: Origin, axis: int, before: Tensor, result: Tensor) -> None:
    """``before`` holds at each place its own position along ``origin.axis``, or 0."""
    positions = torch.arange(result.shape[axis])
    if origin.axis is None or origin.repeated:
        positions = torch.zeros_like(positions)
    elif origin.part is not None:
        positions = torch.arange(before.shape[origin.axis])[origin.part]
    elif origin.fastest is not None:
        result, positions = result % origin.fastest, positions % origin.fastest
    wanted = positions.view(-1, *[1] * (result.dim() - axis - 1)).expand(result.shape)
    assert torch.equal(result, wanted)


@pytest.mark.parametrize("seed", range(4))
def test_axes_of_random_views_are_where_they_are_said_to_be(seed: int) -> None:
    draw = random.Random(seed)
    known = 0
    for _ in range(150):
        shape = [draw.choice(SIZES) for _ in range(draw.randint(1, 4))]
        value = torch.zeros(shape, dtype=torch.int64)
        way = some_way(random_view(value, draw), value, draw)
        node = made_by(way, value)
        op = read(node)
        if op.tensor is None or op.tensor.shape != value.shape:  # the last of several steps
            continue
        found = origins(op)
        assert found is not None, node.format_node()
        assert len(found) == node.meta["example_value"].dim()
        for axis, origin in enumerate(found):
            if origin is not None:
                known += 1
                along = 0 if origin.axis is None else origin.axis
                steps = torch.arange(shape[along]).view(-1, *[1] * (len(shape) - along - 1)).expand(shape).contiguous()
                assert_is_so(origin, axis, steps, way(steps if origin.axis is not None else value))
    assert known > 150


def test_what_is_no_plain_view_is_not_known() -> None:
    x = torch.rand(2, 3, 4)
    for way in (lambda x: x.view(torch.int32), lambda x: x * 2, lambda x: x[[1, 0]], lambda x: x.diagonal(0, 1, 2)):
        assert origins(read(made_by(way, x))) is None
    assert origins(read(made_by(lambda x: x.reshape(6, 4), x))) == (None, Origin(2))
    assert origins(read(made_by(lambda x: x.reshape(2, 1, 3, 4), x)))[2:] == (Origin(1), Origin(2))  # type: ignore[index]
    assert origins(read(made_by(lambda x: x[:, 1:], x))) == (Origin(0), Origin(1, slice(1, 3)), Origin(2))


def test_pieces_and_writes() -> None:
    x = torch.rand(2, 5, 4)
    (split,) = [n for n in graph_of(lambda x: x.chunk(2, dim=-2)[0], x).graph.nodes if n.name == "chunk"]
    first, second = slice(0, 3), slice(3, 5)
    assert origins_of_pieces(read(split)) == [(Origin(0), Origin(1, part), Origin(2)) for part in (first, second)]
    assert origins_of_pieces(read(made_by(lambda x: x.sin(), x))) is None
    overlapping = made_by(lambda x: x.tensor_split([3, 1], dim=1)[2], x)
    assert origins(read(overlapping)) is None
    graph = graph_of(lambda x: x.sin(), x).graph
    node = graph.find_nodes(op="placeholder")[0]
    index: Any = (..., slice(None, None, 2))  # fx's annotation of arguments lacks the ellipsis
    write = graph.call_function(operator.setitem, (node, index, 0))
    assert origins_of_write(read(write)) == (Origin(0), Origin(1), Origin(2, slice(0, 4, 2)))
