"""Tensors that a rewrite needs and the graph does not hold: a node and the steps that lead from it to them.

Nothing is added to a graph until the rewrite is decided, so that what is kept stays exactly as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

__all__ = ["REPLACED_BY", "Operand", "Source", "Step", "after", "build", "current", "example", "memory"]

REPLACED_BY = "sla_replaced_by"
"""Key in the meta of an erased node: the nodes that stand there now, the last with its value."""


@dataclass(frozen=True)
class Step:
    """One call on a tensor: a method by its name, or a function; ``arguments`` and ``keywords`` follow the tensor.

    ``arguments`` may hold nodes and operands, ``keywords`` neither.
    """

    target: str | Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        values = map_aggregate(self.arguments, example)
        function: Any = getattr(torch.Tensor, self.target) if isinstance(self.target, str) else self.target
        result: torch.Tensor = function(tensor, *values, **dict(self.keywords))
        return result

    def text(self, tensor: str, written: Callable[[Any], str] = str) -> str:
        """The call as Python writes it, each argument as ``written`` gives it."""
        named = [f"{name}={value}" for name, value in self.keywords]
        arguments = ", ".join([*map(written, self.arguments), *named])
        if isinstance(self.target, str):
            return f"{tensor}.{self.target}({arguments})"
        return f"{getattr(self.target, '__name__', self.target)}({', '.join(filter(None, (tensor, arguments)))})"


@dataclass(frozen=True)
class Operand:
    """The tensor that ``steps``, in their order, make of ``source``."""

    source: fx.Node
    steps: tuple[Step, ...]

    @cached_property
    def meta(self) -> dict[str, Any]:
        """As of a node: ``example_value``, where that of the source is known."""
        value = example(self.source)
        if not isinstance(value, torch.Tensor):
            return {}
        with torch.no_grad():
            for step in self.steps:
                value = step(value)
        return {"example_value": value}

    def __str__(self) -> str:
        text = self.source.name
        for step in self.steps:
            text = step.text(text)
        return text


Source = fx.Node | Operand


def after(source: Source, *steps: Step) -> Source:
    """What ``steps`` make of ``source``: itself where there are none."""
    if not steps:
        return source
    return Operand(source.source, (*source.steps, *steps)) if isinstance(source, Operand) else Operand(source, steps)


def example(argument: Any) -> Any:
    """The traced value of a node or operand, None where it has none; anything else as it is."""
    if isinstance(argument, fx.Node | Operand):
        return argument.meta.get("example_value", argument.meta.get("val"))
    return argument


def memory(value: torch.Tensor) -> int | None:
    """Which memory a tensor lies in, as a number; None where it does not tell, as inside a transform of torch.func."""
    try:
        place: int = value.untyped_storage()._cdata
        return place
    except NotImplementedError:
        return None


def current(node: fx.Node) -> fx.Node:
    """``node``, or what has replaced it."""
    while REPLACED_BY in node.meta:
        node = node.meta[REPLACED_BY][-1]
    return node


def build(graph: fx.Graph, operands: Sequence[Source]) -> list[fx.Node]:
    """The nodes of ``operands`` in ``graph`` at its insertion point; equal first steps become one node."""
    built: dict[Any, fx.Node] = {}

    def made(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return current(argument)
        if not isinstance(argument, Operand):
            return argument
        node = current(argument.source)
        for step in argument.steps:
            arguments: Any = map_aggregate(step.arguments, made)
            key = (node, step.target, str(arguments), step.keywords)
            if key not in built:
                call = graph.call_method if isinstance(step.target, str) else graph.call_function
                built[key] = call(step.target, (node, *arguments), dict(step.keywords))  # type: ignore[arg-type]
                value = example(node)
                if isinstance(value, torch.Tensor):
                    with torch.no_grad():
                        of_node = Step(step.target, arguments, step.keywords)
                        built[key].meta["example_value"] = of_node(value)
            node = built[key]
        return node

    return [made(operand) for operand in operands]
