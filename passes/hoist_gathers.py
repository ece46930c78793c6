"""Move the gathers of ``sla::reorder`` to where they cost nothing.

Right at an attention a gather of q, k, v or of the output is a pass over memory of its own, as soon as a projection or
a rotary embedding stands next to it. Both work token by token, so the tokens may as well be reordered before: the input
of the projections, where Inductor fuses the gather into the norm or modulation that makes it, with the rotary angles in
the same order. And back behind the output's projection, where it is fused into the residual sum.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from sla_compile.passes.axes import ALIGNED, Atom, unknown
from sla_compile.passes.node_ops import NodeOp, read, writes
from sla_compile.passes.operands import example
from sla_compile.passes.rewrite import copied_meta
from sla_compile.passes.token_grids import Followed

__all__ = ["MOVED_HERE", "hoist_gathers"]

MOVED_HERE = "sla_moved_here"
"""Key in the meta of a node that this pass added: the attention it is for. Its first argument was read before."""

_MOST_NODES = 400
_PASSED_BY_OUTPUTS = {"permute", "reshape", "contiguous", "to", "linear"}
_OTHERS_DO_NOT_MATTER = {"linear": 2, "matmul": 2, "layer_norm": 1, "rms_norm": 1}
"""Operations that take nothing by token but their first argument, where the others have at most so many axes: a norm
over tokens and channels has a weight for each token."""


def hoist_gathers(module: fx.GraphModule) -> int:
    """Move what can be moved in the graph of ``module``; how many attentions changed. The graph is not recompiled."""
    forwards = [n for n in module.graph.nodes if n.op == "call_function" and n.target is torch.ops.sla.forward.default]
    return sum(any((_hoist_inputs(forward), _sink_output(forward))) for forward in forwards)


def _is_gather(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.sla.reorder.default


def _by_head(gather: fx.Node) -> bool:
    """Whether each head has an order of its own: there are no heads outside the projections."""
    return "," in str(gather.args[1])


def _hoist_inputs(forward: fx.Node) -> bool:
    """From q, k and v to the one tensor (B, N, C) that they were projected from."""
    gathers = [a for a in forward.args[:3] if isinstance(a, fx.Node) and _is_gather(a) and len(a.users) == 1]
    if len(gathers) != 3 or len({str(gather.args[1:]) for gather in gathers}) != 1 or _by_head(gathers[0]):
        return False
    projections = {found for gather in gathers for found in _projections(gather.args[0])}
    sources = {read(projection).input for projection in projections}
    if len(sources) != 1:
        return False
    (source,) = sources
    value, tokens = example(source), example(gathers[0]).shape[2]
    if not isinstance(source, fx.Node) or not isinstance(value, torch.Tensor) or value.dim() != 3:
        return False
    if value.shape[1] != tokens:
        return False
    region = _Region(source, projections, gathers)
    if not region.whole():
        return False
    region.reorder(gathers[0].args[1:], forward)
    for gather in gathers:
        gather.replace_all_uses_with(gather.args[0])  # type: ignore[arg-type]
        gather.graph.erase_node(gather)
    return True


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values ``node`` takes: of one that gives only its dtype, none."""
    op = read(node)
    return [op.input] if op.word == "to" and isinstance(op.input, fx.Node) else node.all_input_nodes


def _gives_its_input(dropout: NodeOp) -> bool:
    """Whether a call of dropout drops nothing: another order would hand the random numbers to other tokens."""
    given = dropout.arguments
    return bool(given.get("p", 0.5) == 0 or given.get("training", True) is False)


def _projections(node: Any) -> set[fx.Node]:
    """The nearest linear projections behind ``node``."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = [node]
    while pending and len(seen) < _MOST_NODES:
        node = pending.pop()
        if node in seen or not isinstance(node, fx.Node):
            continue
        seen.add(node)
        if read(node).word == "linear":
            found.add(node)
        else:
            pending += _read_by(node)
            pending += [user for user in node.users if user.target is operator.setitem]  # who writes into it
    return found


class _Region:
    """What lies between the input of some projections and the attention, and works token by token."""

    def __init__(self, source: fx.Node, projections: set[fx.Node], ends: list[fx.Node]) -> None:
        self.source, self.projections, self.ends = source, projections, ends
        value = example(source)
        self.tokens = Atom(value.shape[1], source)
        axes = (unknown(value.shape[0]), (self.tokens,), unknown(value.shape[2]))
        self.nodes = self._reached()
        self.followed = Followed({source: axes}, self.nodes)
        self.aside: dict[fx.Node, int] = {}
        """Tensors from elsewhere that are by token too, and that axis."""

    def _reached(self) -> list[fx.Node]:
        """Every node that depends on the projections up to the ends, in graph order."""
        reached = set(self.projections)
        order: list[fx.Node] = []
        first = next(node for node in self.source.graph.nodes if node in self.projections)
        node = first
        while node.op != "root" and len(order) <= _MOST_NODES:
            if node not in self.ends and (node in reached or reached.intersection(_read_by(node))):
                reached.add(node)
                order.append(node)
            node = node.next
        return order

    def whole(self) -> bool:
        """Whether all that depends on the projections is between them and the ends, token by token.

        And each of the ends depends on them: one that comes another way would keep its order.
        """
        if len(self.nodes) > _MOST_NODES or not {end.args[0] for end in self.ends} <= {*self.nodes}:
            return False
        return all(map(self._by_token, self.nodes)) and not self._written_between()

    def _written_between(self) -> bool:
        """Whether anything else writes to a tensor while the region runs: it may be one that is gathered before."""
        inside, node = set(self.nodes), self.nodes[0]
        while node is not self.nodes[-1]:
            if node not in inside and writes(node):
                return True
            node = node.next
        return False

    def _by_token(self, node: fx.Node) -> bool:
        op = read(node)
        if any(written not in self.nodes for written in op.written):
            return False
        if op.word == "setitem":  # one that does not go by token has left no labels
            value = op.arguments.get("value")
            labels = self.followed.labels.get(op.input)
            known = labels is not None and self._axis(labels) is not None
            return known and (value in self.nodes or not isinstance(value, fx.Node))
        if op.word == "dropout" and not _gives_its_input(op):
            return False
        labels = self.followed.labels.get(node)
        for piece in labels if isinstance(labels, list) else [labels]:
            axis = None if piece is None else self._axis(piece)
            if axis is None or (op.word == "group_norm" and axis == 1):  # its channels
                return False
        if node in self.projections:
            return all(other is self.source or int(example(other).dim()) <= 2 for other in node.all_input_nodes)
        return all(other in self.nodes or self._beside(node, other) for other in node.all_input_nodes)

    def _beside(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether an input from elsewhere can stay, or be reordered: if it is, it is noted."""
        op = read(node)
        value, result = example(other), op.result
        if not isinstance(value, torch.Tensor) or other not in _read_by(node):
            return True
        if op.word in _OTHERS_DO_NOT_MATTER:
            most = min(_OTHERS_DO_NOT_MATTER[op.word], result.dim() - 1)
            return bool(value.dim() <= most) and other is not op.input
        if op.word not in ALIGNED or not isinstance(result, torch.Tensor):
            return False
        axis = self._axis(self.followed.labels[node])
        back = result.dim() - (axis or 0)
        if value.dim() < back or value.shape[-back] == 1:
            return True
        if back == 1 or self.aside.get(other, back) != back:
            return False
        self.aside[other] = back
        return bool(value.shape[-back] == self.tokens.size)

    def _axis(self, labels: Any) -> int | None:
        """The axis that is the tokens, all of them and nothing else."""
        places = [axis for axis, atoms in enumerate(labels) if self.tokens in atoms]
        return places[0] if len(places) == 1 and labels[places[0]] == (self.tokens,) else None

    def reorder(self, arguments: tuple[Any, ...], forward: fx.Node) -> None:
        """Give the region its tokens in the new order, for the attention ``forward``."""
        inside = set(self.nodes)
        moved = {self.source: 2} | self.aside
        for tensor, back in moved.items():
            users = [node for node in self.nodes if tensor in node.all_input_nodes]
            with tensor.graph.inserting_before(users[0]):
                gathered = _gathered(tensor, back, arguments, forward)
            for user in list(tensor.users):
                if user in inside and tensor in _read_by(user):
                    user.replace_input_with(tensor, gathered)


def _gathered(tensor: fx.Node, back: int, arguments: tuple[Any, ...], forward: fx.Node) -> fx.Node:
    """``tensor`` gathered along its axis ``-back``; views around the op bring that to its place, -2."""
    graph, node = tensor.graph, tensor
    steps: list[tuple[Any, tuple[Any, ...]]] = [(torch.ops.sla.reorder.default, arguments)]
    if back != 2:
        steps = [("transpose", (-back, -2)), *steps, ("transpose", (-back, -2))]
    for target, rest in steps:
        call: Any = graph.call_method if isinstance(target, str) else graph.call_function
        made: fx.Node = call(target, (node, *rest))
        made.meta = {**copied_meta(tensor), MOVED_HERE: forward}
        with torch.no_grad():
            value = example(node)
            made.meta["example_value"] = value.transpose(*rest) if isinstance(target, str) else target(value, *rest)
        node = made
    return node


def _sink_output(forward: fx.Node) -> bool:
    """From the output behind its projection, (B, N, C), if nothing else reads what is between."""
    gather = next((user for user in _outputs(forward) if _is_gather(user)), None)
    if gather is None or _by_head(gather):
        return False
    output, *arguments = gather.args
    value = example(gather)
    if not isinstance(value, torch.Tensor):
        return False
    tokens = Atom(value.shape[2], gather)
    axes = (*map(unknown, value.shape[:2]), (tokens,), unknown(value.shape[3]))
    followed, last, node = Followed({gather: axes}), None, gather
    while len(node.users) == 1:
        (node,) = node.users
        op = read(node)
        others = [example(other) for other in _read_by(node) if other is not op.input]
        if op.word not in _PASSED_BY_OUTPUTS or any(getattr(other, "ndim", 0) > 2 for other in others):
            break
        followed.visit(node)
        labels = followed.labels.get(node)
        if not isinstance(labels, tuple) or (tokens,) not in labels:
            break
        if op.word == "linear" and labels[-2] == (tokens,):
            last = node
    if last is None:
        return False
    output.meta["example_value"] = value  # type: ignore[union-attr]
    gather.replace_all_uses_with(output)  # type: ignore[arg-type]
    gather.graph.erase_node(gather)
    with last.graph.inserting_after(last):
        moved = last.graph.call_function(torch.ops.sla.reorder.default, (last, *arguments))
    last.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    moved.meta = {**copied_meta(last), MOVED_HERE: forward, "example_value": example(last)}
    return True


def _outputs(forward: fx.Node) -> Iterator[fx.Node]:
    """Who reads the first result of ``forward``, if it is one alone."""
    for user in forward.users:
        if user.target is operator.getitem and user.args[1] == 0 and len((last := _scaled(user)).users) == 1:
            yield from last.users


def _scaled(output: fx.Node) -> fx.Node:
    """``output``, or what is read in its place where a gate scales it: ``output.mul(scale).type_as(output)``."""
    for cast in output.users:
        op = read(cast)
        if op.word == "to" and op.input is not output and {*output.users} == {cast, op.input}:
            return cast
    return output
