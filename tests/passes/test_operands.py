"""Operands: steps that are written down before they are in a graph, and built once where they are equal."""

from __future__ import annotations

import torch
from torch import fx

from sla_compile.passes.operands import REPLACED_BY, Operand, Step, after, build, current, example
from tests.support.view_spellings import graph_of

X = torch.rand(2, 3, 4)


def test_an_operand_knows_its_value_and_its_text() -> None:
    (x,) = graph_of(lambda x: x.sin(), X).graph.find_nodes(op="placeholder")
    operand = after(after(x, Step("transpose", (1, 2))), Step(torch.mul, (2,)))
    assert isinstance(operand, Operand)
    assert torch.equal(example(operand), 2 * X.mT)
    assert str(operand) == "mul(x0.transpose(1, 2), 2)"
    assert after(x) is x
    assert example(3) == 3


def test_equal_first_steps_become_one_node() -> None:
    module = graph_of(lambda x: x.sin(), X)
    graph = module.graph
    (x,) = graph.find_nodes(op="placeholder")
    turned = after(x, Step("transpose", (1, 2)))
    with graph.inserting_before(graph.output_node()):
        one, other = build(graph, [after(turned, Step("neg")), after(turned, Step("exp"))])
    assert one.args == other.args
    graph.output_node().args = ((one, other),)
    results = fx.Interpreter(module).run(X)
    assert torch.equal(results[0], -X.mT)
    assert torch.equal(results[1], X.mT.exp())


def test_what_was_replaced_is_read_as_what_replaced_it() -> None:
    graph = graph_of(lambda x: x.sin().cos(), X).graph
    sine, cosine = (node for node in graph.nodes if node.op == "call_method")
    sine.meta[REPLACED_BY] = (cosine,)
    assert current(sine) is cosine
