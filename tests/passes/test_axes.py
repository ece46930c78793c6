"""The factors of axes, followed through operations in every spelling; what is not known is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sla_compile.passes.axes import Atom, Labels
from sla_compile.passes.token_grids import Followed
from tests.support.view_spellings import View, graph_of, joined, part_of

X = torch.rand(2, 3, 4, 6)
TIME, ROWS = 2, 3
"""Axes of X that are known."""


def followed(function: Callable[[Any], Any]) -> list[Any]:
    """For each axis of the function's result, the known axes that it is made of and where they start; or None."""
    graph = graph_of(function, X).graph
    (x,) = graph.find_nodes(op="placeholder")
    start: Labels = tuple((Atom(size, x if axis in (TIME, ROWS) else None, axis),) for axis, size in enumerate(X.shape))
    result = graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    labels = Followed({x: start}, graph.nodes).labels.get(result)
    if labels is None:
        return []
    found = []
    for axis in labels:
        atoms = axis[0].part or axis
        named = [atom.dim for atom in atoms if atom.known]
        found.append((named, axis[0].start) if named else None)
    return found


T, R = ([TIME], 0), ([ROWS], 0)
KNOWN: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "permute": (lambda x: x.permute(2, 0, 3, 1), [T, None, R, None]),
    "movedim": (lambda x: torch.movedim(x, -1, 0), [R, None, None, T]),
    "merged": (lambda x: x.flatten(2), [None, None, ([TIME, ROWS], 0)]),
    "merged and split": (lambda x: x.flatten(2).view(2, 3, 4, 6), [None, None, T, R]),
    "one of a batch": (lambda x: x[0], [None, T, R]),
    "unbind": (lambda x: x.unbind(1)[2], [None, T, R]),
    "chunks of another axis": (lambda x: x.chunk(3, dim=1)[1], [None, None, T, R]),
    "new axes": (lambda x: x[:, None].unsqueeze(-1), [None, None, None, T, R, None]),
    "text before and behind": (
        lambda x: torch.cat([x[:, :, :0].expand(-1, -1, 0, -1), x], 2),
        [None, None, T, R],
    ),
    "joined and cut again": (
        lambda x: torch.cat([torch.ones(2, 3, 5, 6), x], dim=2)[:, :, 5:],
        [None, None, T, R],
    ),
    "joined": (lambda x: torch.cat([torch.ones(2, 3, 5, 6), x], dim=-2), [None, None, ([TIME], 5), R]),
    "element by element": (lambda x: (2 * x).sin() + torch.ones(6), [None, None, T, R]),
    "a projection": (lambda x: torch.nn.functional.linear(input=x, weight=torch.ones(8, 6)), [None, None, T, None]),
    "a cast to another's dtype": (lambda x: x.type_as(torch.ones(2, dtype=torch.float64)), [None, None, T, R]),
    "a part": (lambda x: x[:, :, 1:], [None, None, None, R]),
    "repeated": (lambda x: x[:, :, :1].expand(-1, -1, 4, -1), [None, None, None, R]),
    "a cast like it": (lambda x: torch.ones(2, 3, 4, 6).to(x), []),
    "an order of its own": (lambda x: x[:, :, torch.tensor([1, 0, 2, 3])], []),
    "other bits": (lambda x: x.view(torch.int32), []),
}


@pytest.mark.parametrize("name", KNOWN)
def test_axes_are_followed(name: str) -> None:
    function, expected = KNOWN[name]
    found = followed(function)
    assert found == expected or (expected == [] and not any(found))


def joined_and_cut(join: Callable[[list[Any]], Any], cut: View) -> View:
    return lambda x: cut(join([torch.ones(2, 3, 5, 6), x, torch.ones(2, 3, 2, 6)]))


def test_a_cut_is_followed_in_every_spelling() -> None:
    for join in joined(2, 4):
        for cut in part_of(2, 5, 9, (2, 3, 11, 6)):
            assert followed(joined_and_cut(join, cut)) == [None, None, T, R]


def in_place(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        y = x * 1
        change(y)
        return y.sin()

    return call


def test_writes_keep_or_forget_axes() -> None:
    whole = [None, None, T, R]
    assert followed(in_place(lambda y: y.add_(1))) == whole
    assert followed(in_place(lambda y: y.__setitem__((slice(None), 0), 1.0))) == whole
    assert followed(in_place(lambda y: y.__setitem__((..., slice(0, 6)), 2 * y))) == whole
    assert followed(in_place(lambda y: y.__setitem__((slice(None), 1), 2 * y[:, 0]))) == whole
    assert not any(followed(in_place(lambda y: y.__setitem__(slice(None), y.flip(2)))))
    assert not any(followed(in_place(lambda y: y.__setitem__((..., slice(0, 2), slice(None)), 0.0))))
    assert not any(followed(in_place(lambda y: y.copy_(torch.ones(6)))))
    assert not any(followed(in_place(lambda y: y.view(2, 3, 4, 6).copy_(torch.ones(6)))))
