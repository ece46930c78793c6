"""Whether queries and keys of equal length are projections of different tensors, as in cross-attention.

They are taken for self-attention unless the graph shows otherwise: projections of tensors that share no origin on which
both depend token by token. Operations that are not known here are walked through. What is not such an origin: a
parameter, a buffer or what is computed from those alone, a tensor without an axis of tokens, what only came in through
a projection or an attention that was added, as the output of a cross-attention is, and other items of the same batch:
two frames, say, that were joined along it and see each other after its halves were swapped, or it was reversed, whole
or window by window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate, zip_longest
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.passes.known_values import known_values
from sla_compile.passes.node_ops import VIEWS, NodeOp, read, writes
from sla_compile.passes.operands import Operand, example
from sla_compile.passes.view_axes import same_size

__all__ = ["of_different_tensors"]

_MOST_NODES = 400
_MOST_COPIES = 8
_PROJECTIONS = {"linear", "conv1d", "conv2d", "conv3d"}
_ATTENTION = {"scaled_dot_product_attention", "softmax"}
_OF_ONE = VIEWS | {"layer_norm", "rms_norm", "group_norm", "dropout", "to", "contiguous", "clone", "detach"}
_OF_NO_VALUES = {f"{made}_like" for made in ("zeros", "ones", "full", "empty", "rand", "randn")}
_OF_NO_VALUES |= {f"new_{made}" for made in ("zeros", "ones", "full", "empty")}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "addmm", "mm", "einsum"}


_Place = tuple[fx.Node, int]
"""A tensor, and how many items of its batch its items lie behind those of the attention that they become."""


def of_different_tensors(query: Any, key: Any) -> bool:
    """Whether the graph shows that ``query`` and ``key`` were projected from tensors without a common origin."""
    batch, _, tokens, _ = example(query).shape
    items = batch if isinstance(batch, int) and batch > 1 and not statically_known_true(batch == tokens) else None
    queries, keys = _projected(query, items), _projected(key, items)
    if not queries or not keys or queries & keys:
        return False
    left: set[_Place] = set()
    right: set[_Place] = set()
    for one, other in zip_longest(_origins(queries, items), _origins(keys, items)):
        for place, mine, others in ((one, left, right), (other, right, left)):
            if place is None:
                continue
            mine.add(place)
            if place in others and _may_hold(place[0], tokens) and not _is_constant(place[0]):
                return False
    return True


def _projected(side: Any, items: int | None) -> set[_Place] | None:
    """The inputs of the projections that ``side`` was made by; None where something else is behind it.

    ``items`` is the size of an axis of the batch, None where it is not told from others.
    """
    node = side.source if isinstance(side, Operand) else side
    if not isinstance(node, fx.Node):
        return None
    found: set[_Place] = set()
    seen, pending = {(node, 0)}, [(node, 0)]
    while pending:
        node, moved = pending.pop()
        op = read(node)
        if op.word in _PROJECTIONS and isinstance(op.input, fx.Node):
            found.add((op.input, moved))
            continue
        if op.word in _ATTENTION or len(seen) > _MOST_NODES or (node.op == "placeholder" and _is_activation(node)):
            return None
        behind = {place for other in _behind(node) for place in _places(node, other, moved, items)} - seen
        seen |= behind
        pending += behind
    return found


def _is_activation(node: fx.Node) -> bool:
    return isinstance(example(node), torch.Tensor) and _has_batch(node) and not _is_parameter(node)


def _origins(starts: set[_Place], items: int | None) -> Iterator[_Place]:
    """``starts`` and what they depend on token by token, the nearest first.

    Projections are passed until a sum is: what is added to a stream of tokens through one, as the output of an
    attention or of an adapter, does not make it the stream that it came from.
    """
    passed: dict[_Place, bool] = {}  # by place, whether there was a way to it without a sum
    pending = [(place, True) for place in starts]
    for place, alone in pending:
        if passed.get(place, False) or (place in passed and not alone):
            continue
        passed[place] = alone
        yield place
        node, moved = place
        op = read(node)
        if op.word in _ATTENTION or (op.word in _PROJECTIONS and not alone) or _mixes_tokens(op, node):
            continue
        behind = [op.input] if op.word in _PROJECTIONS else _behind(node)
        alone = alone and (op.word == "cat" or len(behind) == 1)
        for other in behind:
            if isinstance(other, fx.Node):
                pending += [(place, alone) for place in _places(node, other, moved, items)]


def _behind(node: fx.Node) -> list[fx.Node]:
    """The inputs of ``node`` that its tokens may be of.

    Those of its own shape where there are any: the others were broadcast, as a modulation is, or are weights and
    tables.
    """
    op = read(node)
    written = [other for user in node.users if node in writes(user) for other in user.all_input_nodes if other != node]
    if op.word in _OF_NO_VALUES:
        return [*filter(_is_data, written)]
    if op.word in _OF_ONE and isinstance(op.input, fx.Node):
        return [op.input, *filter(_is_data, written)]
    inputs = [other for other in (*node.all_input_nodes, *written) if _is_data(other)]
    whole = [other for other in inputs if _same_shape(other, node)]
    return inputs if op.word == "cat" or written else whole or inputs


def _places(node: fx.Node, behind: fx.Node, moved: int, items: int | None) -> list[_Place]:
    """``behind``, an input of ``node``, with all that its items may be ``moved`` by; without what is no item then."""
    places = [moved + by for by in _moved(node, behind, items)]
    return [(behind, place) for place in places if items is None or abs(place) < items]


def _moved(node: fx.Node, behind: fx.Node, items: int | None) -> list[int]:
    """How many items of the batch those of ``node`` lie behind theirs in ``behind``, an input; one for each use of it.

    Items are the attention's: one of an outer batch, of pictures that are cut into windows later, is many of them. 0
    where ``node`` takes or joins no items, or sizes do not tell the axis of the batch, the first, from others.
    """
    op, value = read(node), example(node)
    many = _items_in_one(value, items)
    if many and op.word == "cat" and op.arguments.get("dim", 0) in (0, -value.dim()):
        given = op.arguments.get("tensors", ())
        parts: Any = given if isinstance(given, tuple | list) else ()  # a node that gives several
        sizes = [getattr(example(part), "shape", [None])[0] for part in parts]
        if all(isinstance(size, int) for size in sizes):
            starts = accumulate(sizes, initial=0)
            return [-start * many for part, start in zip(parts, starts, strict=False) if part is behind] or [0]
    if many and op.word == "roll":
        (shift, axis), size = (_alone(op.arguments.get(name)) for name in ("shifts", "dims")), value.shape[0]
        if type(shift) is int and axis in (0, -value.dim()) and shift % size:
            return [-(shift % size) * many, (size - shift % size) * many]
    if many and (taken := _taken(op, node, behind)):
        moves = {(item - place) * many for place, item in enumerate(taken)} - {0}
        return [min(moves), max(moves)] if moves else [0]  # others lie nearer; some that stay make no self-attention
    if op.word == "getitem" and (many := _items_in_one(example(behind), items)):
        index = op.arguments.get("index")
        first = index[0] if isinstance(index, tuple) and index else None
        if isinstance(first, slice) and type(first.start) is int and first.step in (None, 1):
            return [first.start % example(behind).shape[0] * many]
    if items is not None and _items_in_one(value, items) == 1 and isinstance(source := example(behind), torch.Tensor):
        size = source.shape[0] if source.dim() == value.dim() else None
        if isinstance(size, int) and 0 < size < items <= _MOST_COPIES * size:  # repeated, in whatever way
            return [-start for start in range(0, items, size)]
    return [0]


def _taken(op: NodeOp, node: fx.Node, behind: fx.Node) -> list[int]:
    """For each place along the first axis of ``node`` the one of ``behind`` that stands there now, if the graph tells.

    Nothing where ``node`` does not put those of ``behind`` in another order.
    """
    value, arguments = example(node), op.arguments
    first, size = {0, -value.dim()}, value.shape[0]
    if op.word == "flipud" or (op.word == "flip" and first & {*arguments.get("dims", ())}):
        return [*range(size)][::-1]
    if op.word != "index" and (op.word != "index_select" or arguments.get("dim") not in first):
        return []
    index = arguments.get("index", arguments.get("indices"))  # indices: of aten
    if isinstance(index, tuple | list) and index and not _are_numbers(index):
        index = index[0]
    if isinstance(index, fx.Node):
        known = known_values(index, node) if getattr(example(index), "shape", ()) == (size,) else None
        index = None if known is None or known.values.dtype == torch.bool else known.whole().tolist()
    source = example(behind)
    alike = isinstance(source, torch.Tensor) and source.dim() == value.dim() and source.shape[0] == size
    if not alike or not isinstance(index, list) or len(index) != size or not _are_numbers(index):
        return []
    return [item % size for item in index]


def _are_numbers(values: Any) -> bool:
    return all(type(value) is int for value in values)


def _items_in_one(value: Any, items: int | None) -> int:
    """How many ``items`` one along the first axis of ``value``, of tokens or of a picture, is; 0 where it is none."""
    known = isinstance(value, torch.Tensor) and value.dim() in (3, 4) and items is not None
    size = value.shape[0] if known else None
    return items // size if items is not None and isinstance(size, int) and size > 1 and items % size == 0 else 0


def _alone(value: Any) -> Any:
    """The one entry of a tuple or list of one; ``value`` itself where it is none."""
    return value[0] if isinstance(value, tuple | list) and len(value) == 1 else value


def _is_data(node: fx.Node) -> bool:
    """Whether it may stand for tensors; several, as those of ``chunk``, or one that was not traced."""
    value = example(node)
    return value is None or isinstance(value, torch.Tensor | tuple | list)


def _mixes_tokens(op: NodeOp, node: fx.Node) -> bool:
    """A product of two activations, as the last one of an attention written out; not one with a matrix."""
    factors = [other for other in node.all_input_nodes if _is_data(other) and not _is_constant(other)]
    return op.word in _PRODUCTS and sum(_has_batch(other) for other in factors) > 1


def _has_batch(node: fx.Node) -> bool:
    value = example(node)
    return not isinstance(value, torch.Tensor) or value.dim() >= 3


def _may_hold(node: fx.Node, tokens: int | torch.SymInt) -> bool:
    """Whether a tensor may have an axis of ``tokens``; False for a vector of conditions."""
    value = example(node)
    if not isinstance(value, torch.Tensor):
        return True
    axes = range(value.dim())
    if any(statically_known_true(math.prod(value.shape[i : j + 1]) == tokens) for i in axes for j in axes[i:]):
        return True
    return not statically_known_true(math.prod(value.shape[:-1]) < tokens)


def _is_constant(node: fx.Node) -> bool:
    """Whether ``node`` is computed from parameters and buffers alone, or from nothing."""
    seen, pending = {node}, [node]
    while pending:
        node = pending.pop()
        if node.op == "placeholder" and isinstance(example(node), torch.Tensor) and not _is_parameter(node):
            return False
        op = read(node)
        values = [] if op.word in _OF_NO_VALUES else op.read_from if op.word == "to" else node.all_input_nodes
        behind = {other for other in values if isinstance(other, fx.Node) and _is_data(other)} - seen
        seen |= behind
        pending += behind
    return True


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(example(node), torch.nn.Parameter) or "_parameters_" in node.name or "_buffers_" in node.name


def _same_shape(left: fx.Node, right: fx.Node) -> bool:
    one, other = example(left), example(right)
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.dim() != other.dim():
        return False
    return all(same_size(a, b) for a, b in zip(one.shape, other.shape, strict=True))
