"""Which axis of each tensor of a graph is a grid of tokens, (T, H, W) or (H, W), in raster order: proved, not guessed.

A convolution's output has axes in space and time; patch embeddings are such, of a video or of each of its frames. They
are followed through the graph: a flatten joins them into tokens, text is put before or behind.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from sla_compile.passes.axes import Atom, Call, Labels, is_labels, size_of, through, unpacked
from sla_compile.passes.operands import Operand, example
from sla_compile.passes.token_order import Grid

__all__ = ["Followed", "Grids", "name_of"]


def name_of(node: fx.Node) -> str:
    """The function or method that ``node`` calls, without an overload."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name).partition(".")[0]


class Followed:
    """The axes of the tensors of a graph, from those that ``labels`` begins with."""

    def __init__(self, labels: Mapping[fx.Node, Labels], nodes: Iterable[fx.Node] = ()) -> None:
        self.labels: dict[fx.Node, Any] = dict(labels)
        for node in nodes:
            self.visit(node)

    def fresh(self, name: str, node: fx.Node, value: Any) -> Labels | None:
        """The axes that ``node``, a call of ``name``, makes anew."""
        return None

    def visit(self, node: fx.Node, gm: fx.GraphModule | None = None) -> None:
        """Find the axes of ``node``'s result from those of its inputs; those of a subgraph's nodes too."""
        if node.op in ("call_function", "call_method"):
            labels = (gm and self._subgraph(node, gm)) or self._node(node)
            if labels is not None:
                self.labels[node] = labels

    def _node(self, node: fx.Node) -> Any:
        name = name_of(node)
        if node.target is operator.setitem:
            self._written(node)
            return None
        value = example(node)
        if (fresh := self.fresh(name, node, value)) is not None:
            return fresh
        known = {other: self.labels[other] for other in node.all_input_nodes if other in self.labels}
        if not known:
            return None

        def labels(argument: Any) -> Any:
            if isinstance(argument, tuple | list):
                return [labels(part) for part in argument]
            return known.get(argument) if isinstance(argument, fx.Node) else None

        given: Any = node.args or tuple(node.kwargs.values())
        values, named = fx.node.map_arg((tuple(given), dict(node.kwargs)), example)
        return through(name, Call(tuple(map(labels, given)), dict(named), tuple(values), value))

    def _written(self, node: fx.Node) -> None:
        """A write by slices of other axes keeps what is known of the tensor written to; any other does not."""
        target, index, _ = node.args
        parts = index if isinstance(index, tuple | list) else (index,)
        if isinstance(target, fx.Node) and not all(part is ... or isinstance(part, slice) for part in parts):
            self.labels.pop(target, None)

    def _subgraph(self, node: fx.Node, gm: fx.GraphModule) -> Any:
        """Through a region that is traced by itself, as a checkpoint is: its inputs, nodes and outputs."""
        if not isinstance(node.target, torch._ops.HigherOrderOperator) or not node.args:
            return None
        first = node.args[0]
        body = getattr(gm, str(first.target), None) if isinstance(first, fx.Node) and first.op == "get_attr" else None
        if not isinstance(body, fx.GraphModule):
            return None
        inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        if len(inputs) != len(node.args) - 1:
            return None
        for inner, outer in zip(inputs, node.args[1:], strict=True):
            if isinstance(outer, fx.Node) and outer in self.labels:
                self.labels[inner] = self.labels[outer]
        for inner in body.graph.nodes:
            self.visit(inner, body)
        (outputs,) = next(inner for inner in reversed(body.graph.nodes) if inner.op == "output").args
        if isinstance(outputs, tuple | list):
            return [self.labels.get(part) if isinstance(part, fx.Node) else None for part in outputs]
        return self.labels.get(outputs) if isinstance(outputs, fx.Node) else None


class Grids(Followed):
    """The grids of tokens in ``gm`` and its subgraphs."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__({})
        for node in gm.graph.nodes:
            value = example(node)
            if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dim() == 5:
                self.labels[node] = tuple((Atom(size, node, axis),) for axis, size in enumerate(value.shape))
            self.visit(node, gm)

    def fresh(self, name: str, node: fx.Node, value: Any) -> Labels | None:
        """(batch, channels, *space), of a convolution; its batch may be the frames of a video."""
        if name not in ("conv2d", "conv3d") or not isinstance(value, torch.Tensor):
            return None
        inside = value.dim() - (3 if name == "conv3d" else 2)
        sizes = enumerate(value.shape)
        axes = [(Atom(n, node, axis - inside) if axis >= inside else Atom(n),) for axis, n in sizes]
        before: Any = self.labels.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if is_labels(before) and len(before) == value.dim():
            axes[0] = before[0]
        return tuple(axes)

    def of(self, source: Any) -> Grid | None:
        """The grid that the tokens of ``source`` (B, H, N, D) are, if it is known and each size is a number."""
        labels = self._of(source)
        if not is_labels(labels) or len(labels) != 4 or not isinstance(size_of(labels[2]), int):
            return None
        start, atoms = unpacked(labels[2])
        atoms = [atom for atom in atoms if atom.size != 1]
        if len(atoms) not in (2, 3) or not all(isinstance(atom.size, int) for atom in atoms):
            return None
        origin, dims = [atom.of for atom in atoms], [atom.dim for atom in atoms]
        if len(atoms) == 3 and origin[0] is not None and origin[0].op == "placeholder":  # an image at a time
            origin, dims = origin[1:], dims[1:]
        if origin[0] is None or origin[0].op == "placeholder" or len(set(origin)) != 1 or dims != sorted(set(dims)):
            return None
        return Grid(tuple(atom.size for atom in atoms), start, size_of(labels[2]))

    def _of(self, source: Any) -> Any:
        if not isinstance(source, Operand):
            return self.labels.get(source) if isinstance(source, fx.Node) else None
        labels = self.labels.get(source.source)
        for count, step in enumerate(source.steps, 1):
            value = example(Operand(source.source, source.steps[:count]))
            name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", "")
            before = example(Operand(source.source, source.steps[: count - 1]))
            call = Call((labels, *(None for _ in step.arguments)), {}, (before, *step.arguments), value)
            labels = through(name, call)
        return labels
