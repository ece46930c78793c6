"""Which axis of each tensor of a graph is a grid of tokens, (T, H, W) or (H, W), in raster order: proved, not guessed.

A convolution's output has axes in space and time; patch embeddings are such, of a video or of each of its frames. They
are followed through the graph: a flatten joins them into tokens, text is put before or behind. Of a grid whose sizes
the user gives, what is looked for is where it is joined with text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from sla_compile.passes.axes import ALIGNED, Atom, Axis, Labels, is_labels, same_axis, size_of, through, unpacked
from sla_compile.passes.node_ops import NodeOp, read, tensor
from sla_compile.passes.operands import Operand, after, example, memory
from sla_compile.passes.spellings import spelling_of
from sla_compile.passes.token_order import Grid
from sla_compile.passes.view_axes import origins_of_write, same_size

__all__ = ["Followed", "GivenGrid", "Grids"]


def _only(known: Any, labels: Any, argument: Any) -> Any:
    """The labels of the one argument that is known."""
    return labels if argument is known else None


class Followed:
    """The axes of the tensors of a graph, from those that ``labels`` begins with."""

    def __init__(self, labels: Mapping[fx.Node, Labels], nodes: Iterable[fx.Node] = ()) -> None:
        self.labels: dict[fx.Node, Any] = dict(labels)
        for node in nodes:
            self.visit(node)

    makes: frozenset[str] = frozenset()
    """Words of the operations that may make axes anew."""

    def fresh(self, op: NodeOp) -> Labels | None:
        """The axes that ``op``, one that ``makes`` names, makes anew."""
        return None

    def visit(self, node: fx.Node, gm: fx.GraphModule | None = None) -> None:
        """Find the axes of ``node``'s result from those of its inputs; those of a subgraph's nodes too."""
        if node.op in ("call_function", "call_method"):
            labels = (gm and self._subgraph(node, gm)) or self._node(node)
            if labels is not None:
                self.labels[node] = labels

    def _node(self, node: fx.Node) -> Any:
        if not self.labels and spelling_of(node.target).word not in self.makes:
            return None
        op = read(node)
        if op.in_place and not self._keeps(op):
            for written in op.written:
                self._forget(written)
            return None
        fresh = self.fresh(op) if op.word in self.makes else None
        return fresh if fresh is not None else through(op, self.known)

    def known(self, argument: Any) -> Any:
        """The labels of an argument; a list of them where it is several tensors."""
        if isinstance(argument, tuple | list):
            return [self.known(part) for part in argument]
        return self.labels.get(argument) if isinstance(argument, fx.Node) else None

    def _keeps(self, op: NodeOp) -> bool:
        """Whether a write leaves each axis that is known as it was: element by element, or all of it from its like."""
        if op.word != "setitem":
            return op.word in ALIGNED and op.written == (op.input,)
        labels: Any = self.labels.get(op.input)
        written = origins_of_write(op)
        if not is_labels(labels) or written is None:
            return False
        backs = {origin.axis: len(written) - i for i, origin in enumerate(written) if origin and origin.whole}
        known = [axis for axis, atoms in enumerate(labels) if any(atom.known for atom in atoms)]
        return all(axis in backs and self._gives(op.arguments["value"], backs[axis], labels[axis]) for axis in known)

    def _gives(self, value: Any, back: int, axis: Axis) -> bool:
        """Whether ``value`` has ``axis`` as its ``-back``, or one value for all of it."""
        given, labels = tensor(value), self.known(value)
        if given is None or given.dim() < back or same_size(given.shape[-back], 1):
            return True
        return is_labels(labels) and same_axis(labels[-back], axis)

    def _forget(self, written: Any) -> None:
        """Take away what is known of the tensor ``written`` and of all that share its memory."""
        value = tensor(written)
        if value is None:
            return
        here = memory(value)
        for node in list(self.labels):
            other = tensor(node)
            if node is written or (other is not None and (here is None or memory(other) in (here, None))):
                del self.labels[node]

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

    makes = frozenset({"conv2d", "conv3d"})

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__({})
        for node in gm.graph.nodes:
            value = example(node)
            if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dim() == 5:
                self.labels[node] = tuple((Atom(size, node, axis),) for axis, size in enumerate(value.shape))
            self.visit(node, gm)

    def fresh(self, op: NodeOp) -> Labels | None:
        """(batch, channels, *space), of a convolution; its batch may be the frames of a video."""
        value, node = op.result, op.source
        if not isinstance(value, torch.Tensor) or not isinstance(node, fx.Node):
            return None
        inside = value.dim() - (3 if op.word == "conv3d" else 2)
        sizes = enumerate(value.shape)
        axes = [(Atom(n, node, axis - inside) if axis >= inside else Atom(n),) for axis, n in sizes]
        before = self.known(op.input)
        if is_labels(before) and len(before) == value.dim():
            axes[0] = before[0]
        return tuple(axes)

    def of(self, source: Any) -> Grid | None:
        """The grid that the tokens of ``source`` (B, H, N, D) are, if it is known and each size is a number."""
        labels = axes_of(self.labels, source)
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


class GivenGrid(Followed):
    """Where in the sequences of ``gm`` and its subgraphs a grid of these ``sizes`` is: the one part as long as it."""

    makes = frozenset({"cat"})

    def __init__(self, gm: fx.GraphModule, sizes: tuple[int, ...]) -> None:
        super().__init__({})
        self.sizes = sizes
        for node in gm.graph.nodes:
            self.visit(node, gm)

    def fresh(self, op: NodeOp) -> Labels | None:
        """Of a join, where exactly one part may be the grid: as long, or holding one of that length already."""
        given, axis, node = op.arguments.get("tensors"), op.arguments.get("dim", 0), op.source
        if not isinstance(given, tuple | list) or type(axis) is not int or not isinstance(node, fx.Node):
            return None
        parts = [tensor(part) for part in given]
        if not isinstance(op.result, torch.Tensor) or any(part is None for part in parts):
            return None
        axis %= op.result.dim()
        lengths = [part.shape[axis] for part in parts if part is not None]
        labels = [self.known(part) for part in given]
        held = [is_labels(one) and any(atom.known for atom in one[axis]) for one in labels]
        fits = [same or length == prod(self.sizes) for same, length in zip(held, lengths, strict=True)]
        plain = tuple((Atom(size),) for size in op.result.shape)
        if not all(isinstance(length, int) for length in lengths) or sum(fits) != 1:
            return plain
        if any(held):  # ``through`` knows where
            return None
        start = sum(lengths[: fits.index(True)])
        grid = Atom(op.result.shape[axis], part=(Atom(prod(self.sizes), node),), start=start)
        return (*plain[:axis], (grid,), *plain[axis + 1 :])

    def of(self, source: Any) -> Grid | None:
        """The grid in the tokens of ``source`` (B, H, N, D), where its place is known."""
        labels = axes_of(self.labels, source)
        if not is_labels(labels) or len(labels) != 4 or not isinstance(size_of(labels[2]), int):
            return None
        start, atoms = unpacked(labels[2])
        whole = len(atoms) == 1 and atoms[0].of is not None and atoms[0].size == prod(self.sizes)
        return Grid(self.sizes, start, size_of(labels[2])) if whole else None


def axes_of(labels: Mapping[fx.Node, Any], source: Any) -> Any:
    """The axes of ``source``, a node or the steps from one, of whose nodes these ``labels`` are known."""
    if not isinstance(source, Operand):
        return labels.get(source) if isinstance(source, fx.Node) else None
    found = labels.get(source.source)
    for count in range(1, len(source.steps) + 1):
        op = read(after(source.source, *source.steps[:count]))
        found = through(op, partial(_only, op.input, found))
    return found
