"""Every spelling of an operation is read as one word with the same arguments; and what writes is told by what it is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sla_compile.passes.node_ops import NodeOp, read
from sla_compile.passes.operands import Step, after
from tests.support.view_spellings import graph_of, joined, one_of, part_of, permuted, regrouped, unsqueezed, working

aten = torch.ops.aten
X = torch.rand(2, 3, 4, 6)


def last_of(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.Node, list[fx.Node]]:
    """The node that gives the function's result, and its inputs."""
    graph = graph_of(function, *inputs).graph
    (result,) = graph.output_node().args
    assert isinstance(result, fx.Node)
    return result, graph.find_nodes(op="placeholder")


def read_by_place(function: Callable[..., Any], *inputs: Tensor) -> tuple[str, dict[str, Any], bool]:
    """The operation of the function's last node, its inputs by their number instead of as nodes."""
    node, given = last_of(function, *inputs)
    op = read(node)
    return op.word, fx.map_arg(dict(op.arguments), lambda n: f"input {given.index(n)}"), op.in_place


VIEWS: dict[str, tuple[Iterator[Callable[[Any], Any]], str]] = {
    "two axes swapped": (permuted([0, 2, 1, 3]), "permute"),
    "the last two swapped": (permuted([0, 1, 3, 2]), "permute"),
    "an axis moved": (permuted([2, 0, 1, 3]), "permute"),
    "split": (regrouped(X.shape, [2, 3, 4, 2, 3]), "reshape"),
    "merged": (regrouped(X.shape, [2, 12, 6]), "reshape"),
    "a new axis": (unsqueezed(2, 4), "unsqueeze"),
    "a part": (part_of(2, 1, 3, X.shape), "getitem"),
    "a part from the start": (part_of(2, 0, 3, X.shape), "getitem"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_have_one_word_in_every_spelling(name: str) -> None:
    spellings, word = VIEWS[name]
    found = [read_by_place(way, X) for way in working(spellings, X)]
    assert len(found) >= 4
    for one in found:
        if word == "unsqueeze" and one[0] == "getitem":  # x[:, None]
            continue
        assert one[0] == word
        assert (one[1], one[2]) == (found[0][1], False) or word == "unsqueeze"


def test_one_of_an_axis_is_an_index_in_every_spelling() -> None:
    for way in list(one_of(1, 2, X.shape))[:-2]:  # the last two are a part and a squeeze
        whole = slice(None)
        assert read_by_place(way, X) == ("getitem", {"input": "input 0", "index": (whole, 2, whole, whole)}, False)


def test_matrices() -> None:
    x = torch.rand(3, 4)
    for way in working(permuted([1, 0]), x):
        assert read_by_place(way, x) == ("permute", {"input": "input 0", "dims": (1, 0)}, False)
    dims = read(last_of(torch.adjoint, torch.rand(3, 4, dtype=torch.complex64))[0]).arguments
    assert "dims" not in dims, "a conjugate transpose is more than a permutation"


PAIRS: dict[str, list[Callable[..., Any]]] = {
    "mul": [
        *(lambda x, y: x * y, torch.mul, torch.multiply, lambda x, y: x.mul(y), lambda x, y: x.__mul__(y)),
        *(lambda x, y: y.__rmul__(x), lambda x, y: torch.mul(input=x, other=y), lambda x, y: x.mul(other=y)),
        *(lambda x, y: aten.mul.Tensor(x, y), lambda x, y: aten.mul(x, y)),
    ],
    "div": [
        *(lambda x, y: x / y, torch.true_divide, torch.divide, lambda x, y: x.div(y), lambda x, y: x.true_divide(y)),
        lambda x, y: aten.div.Tensor(x, y),
    ],
    "sub": [
        *(lambda x, y: x - y, torch.subtract, lambda x, y: x.sub(y), lambda x, y: torch.rsub(y, x)),
        *(lambda x, y: y.__rsub__(x), lambda x, y: aten.rsub.Tensor(y, x)),
    ],
    "matmul": [
        *(lambda x, y: x @ y, torch.matmul, torch.bmm, lambda x, y: x.bmm(y), lambda x, y: torch.bmm(x, mat2=y)),
        *(lambda x, y: torch.linalg.matmul(x, y), lambda x, y: aten.bmm.default(x, y)),
    ],
    "bitwise_and": [lambda x, y: x & y, torch.bitwise_and, lambda x, y: x.__and__(y), lambda x, y: operator.and_(x, y)],
    "gt": [lambda x, y: x > y, torch.gt, torch.greater, lambda x, y: x.gt(y)],
    "linear": [F.linear, lambda x, y: F.linear(input=x, weight=y), lambda x, y: aten.linear.default(x, y)],
}
PAIRS["linear"] = [lambda x, y, way=way: way(x, y) for way in PAIRS["linear"]]


@pytest.mark.parametrize("word", PAIRS)
def test_operations_of_two_tensors(word: str) -> None:
    x, y = (torch.randint(2, (2, 3, 3)) for _ in range(2))
    y = y[0] if word == "linear" else y
    other = "weight" if word == "linear" else "other"
    for way in PAIRS[word]:
        assert read_by_place(way, x, y) == (word, {"input": "input 0", other: "input 1"}, False)


def test_joins_conditions_and_products_by_name() -> None:
    for join in joined(2, 4):
        word, given, _ = read_by_place(lambda x, y, join=join: join([x, y]), X, X)
        assert (word, list(given["tensors"])) == ("cat", ["input 0", "input 1"])
        assert given["dim"] in (2, -2)
    where = {"condition": "input 0", "input": "input 1", "other": 0.0}
    for way in (
        lambda c, x: torch.where(c, x, 0.0),
        lambda c, x: x.where(c, 0.0),
        lambda c, x: x.where(condition=c, other=0.0),
        lambda c, x: aten.where.ScalarOther(c, x, 0.0),
    ):
        assert read_by_place(way, X > 0.5, X) == ("where", where, False)
    for product in (
        lambda x, y: torch.einsum("abij,abjk->abik", x, y),
        lambda x, y: torch.einsum("abij,abjk->abik", [x, y]),
        lambda x, y: aten.einsum.default("abij,abjk->abik", [x, y]),
    ):
        given = {"equation": "abij,abjk->abik", "operands": ("input 0", "input 1")}
        assert read_by_place(product, X, X.mT) == ("einsum", given, False)


def test_casts_read_only_what_they_cast() -> None:
    for way in (
        *(lambda x, y: x.type_as(y), lambda x, y: x.to(y), lambda x, y: x.float(), lambda x, y: x.to(torch.float64)),
        *(lambda x, y: x.type(torch.float64), lambda x, y: aten.to.dtype(x, torch.float64)),
    ):
        node, (x, _) = last_of(way, X, X)
        assert read(node).word == "to"
        assert read(node).read_from == [x]


def test_what_only_sounds_alike_is_something_else() -> None:
    assert read_by_place(lambda x: x.view(torch.int32), X)[0] == "view_dtype"
    assert read_by_place(lambda x, i: x[i], X, torch.tensor([1, 0]))[0] == "index"
    assert read_by_place(lambda x, i: x[:, i], X, torch.tensor([True, False, True]))[0] == "index"

    def transpose(x: Tensor) -> Tensor:
        return x

    graph = fx.Graph()
    assert read(graph.call_function(transpose, (graph.placeholder("x"),))).word == "tests.transpose"
    assert read(graph.placeholder("y")) == read(3) == NodeOp()


def test_steps_of_operands_are_read_as_nodes_are() -> None:
    node = graph_of(lambda x: x.sin(), X).graph.find_nodes(op="placeholder")[0]
    first, second = Step("swapaxes", (1, 2)), Step(torch.nn.functional.softmax, (-1,))
    op = read(after(node, first))
    assert (op.word, op.arguments) == ("permute", {"input": node, "dims": (0, 2, 1, 3)})
    op = read(after(node, first, second))
    assert (op.word, op.input, op.arguments["dim"]) == ("softmax", after(node, first), -1)
