"""One node of a graph as one operation, however it was spelled.

``x.swapaxes(1, 2)``, ``torch.transpose(input=x, dim0=-3, dim1=-2)``, ``torch.ops.aten.permute.default(x, ...)`` and
``x.movedim(2, 1)`` are all ``permute`` with the same ``dims``. Methods, functions of torch, operators of Python, aten
ops, attributes such as ``x.mT``, and the steps of an ``Operand`` are read alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.passes.operands import Operand, Source, after, example
from sla_compile.passes.spellings import KEYWORDS, Spelling, spelling_of

__all__ = [
    "ELEMENTWISE",
    "VIEWS",
    "NodeOp",
    "disturbs",
    "is_number",
    "pieces",
    "read",
    "tensor",
    "whole_index",
    "writes",
]

VIEWS = frozenset({"permute", "reshape", "getitem", "unsqueeze", "squeeze", "expand"})
"""The words for operations that only give their input another shape; ``view_axes`` says what each does to axes."""

ELEMENTWISE = frozenset(
    {
        *("add", "sub", "mul", "div", "floor_divide", "remainder", "pow", "neg", "abs", "square", "sqrt", "rsqrt"),
        *("reciprocal", "exp", "log", "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "relu", "clamp", "nan_to_num"),
        *("addcmul", "lerp", "minimum", "maximum", "where", "masked_fill", "eq", "ne", "gt", "ge", "lt", "le"),
        *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"),
        *("logical_and", "logical_or", "logical_xor", "logical_not", "to", "contiguous", "clone", "detach"),
    }
)
"""Operations each of whose results is of the elements of its inputs at the same place, after broadcasting."""


@dataclass(frozen=True)
class NodeOp:
    """What a node or an operand's last step does: ``word`` is empty where it calls nothing."""

    word: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """By name, as in the graph. Of ``permute``, ``dims`` counts from 0 and is missing where it is not known; of
    ``getitem``, ``index`` is a tuple with an entry for each axis where it has only slices, numbers and None."""
    source: Source | None = None
    """What was read."""
    written: tuple[Any, ...] = ()
    """The arguments that it writes into."""

    @property
    def in_place(self) -> bool:
        return bool(self.written)

    @property
    def input(self) -> Any:
        return self.arguments.get("input")

    @cached_property
    def tensor(self) -> torch.Tensor | None:
        """The traced value of its input; None where that is no tensor."""
        return tensor(self.input)

    @cached_property
    def result(self) -> Any:
        """Its own traced value."""
        return example(self.source)

    @property
    def read_from(self) -> list[Any]:
        """The arguments whose values it takes: not of what a cast takes only the dtype of."""
        return [self.input] if self.word == "to" else list(self.arguments.values())

    def dim(self, name: str = "dim", default: Any = None) -> int | None:
        """An argument that names an axis of the input, from 0; None where that is not known."""
        axis = self.arguments.get(name, default)
        return axis % self.tensor.dim() if type(axis) is int and self.tensor is not None and self.tensor.dim() else None


def tensor(argument: Any) -> torch.Tensor | None:
    """The traced tensor of a node or operand; None where it is something else."""
    value = example(argument) if isinstance(argument, fx.Node | Operand) else None
    return value if isinstance(value, torch.Tensor) else None


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number of Python; True and False are none."""
    return type(value) in (int, float)


def read(source: Any) -> NodeOp:
    """The operation that makes ``source``, a node or an operand, from its arguments."""
    if isinstance(source, Operand):
        step = source.steps[-1]
        target: Any = step.target
        given: tuple[Any, ...] = (after(source.source, *source.steps[:-1]), *step.arguments)
        named: Mapping[str, Any] = dict(step.keywords)
    elif isinstance(source, fx.Node) and source.op in ("call_function", "call_method"):
        target, given, named = source.target, source.args, source.kwargs
    else:
        return NodeOp()
    if target is getattr and len(given) == 2 and isinstance(given[1], str):  # x.mT
        target, given = given[1], given[:1]
    spelling = spelling_of(target)
    arguments = _bound(spelling, given, named)
    written = tuple(arguments[name] for name in spelling.mutable if arguments.get(name) is not None)
    if spelling.in_place or arguments.get("inplace"):
        written = (arguments.get("input", next(iter(arguments.values()), None)),)
    elif "out" in named and named["out"] is not None:
        written = (named["out"],)
    return _canonical(NodeOp(spelling.word, arguments, source, written))


def _bound(spelling: Spelling, given: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name; those that have none are numbered."""
    names = spelling.parameters
    rest = names[-1][1:] if names and names[-1].startswith("*") else None
    found: dict[str, Any] = {}
    if rest is not None:
        names = names[:-1]
        more = given[len(names) :]
        if more:
            found[rest] = tuple(more[0]) if len(more) == 1 and isinstance(more[0], tuple | list) else more
        given = given[: len(names)]
    for i, value in enumerate(given):
        found[names[i] if i < len(names) else str(i)] = value
    for name, value in named.items():
        found[KEYWORDS.get(name, name)] = value
    if spelling.swapped and "input" in found and "other" in found:
        found["input"], found["other"] = found["other"], found["input"]
    return found


def _canonical(op: NodeOp) -> NodeOp:
    """``op`` with one word and one set of arguments for all operations that do the same to axes."""
    if op.word in _ORDERS:
        order = _order(op)
        known = {} if order is None else {"dims": order}
        return replace(op, word="permute", arguments={"input": op.input, **known})
    if op.word == "reshape" and any(isinstance(value, torch.dtype) for value in op.arguments.values()):
        return replace(op, word="view_dtype")
    if op.word in ("reshape", "expand"):
        return replace(op, arguments={"input": op.input})
    if op.word in ("chunk", "tensor_split"):
        return replace(op, word="split")
    if op.word in ("getitem", "select", "narrow", "slice"):
        return _indexing(op)
    if op.word == "einsum":
        operands = op.arguments.get("operands", ())
        if len(operands) == 1 and isinstance(operands[0], tuple | list):
            return replace(op, arguments={**op.arguments, "operands": tuple(operands[0])})
    return op


_ORDERS = {"transpose", "permute", "movedim", "t", "T", "mT", "mH"}


def _order(op: NodeOp) -> tuple[int, ...] | None:
    """Which axis of the input each axis of the result is, for what permutes them."""
    if op.tensor is None:
        return None
    count = op.tensor.dim()
    given = op.arguments
    moved: tuple[tuple[Any, ...], tuple[Any, ...]]
    if op.word == "permute":
        dims = given.get("dims", ())
        return tuple(axis % count for axis in dims) if _are_axes(dims, count) and len(dims) == count else None
    if op.word in ("T", "t"):
        return tuple(reversed(range(count)))
    if op.word in ("mT", "mH"):
        if op.word == "mH" and op.tensor.is_complex():
            return None
        moved = (-2, -1), (-1, -2)
    elif op.word == "transpose":
        pair = given.get("dim0"), given.get("dim1")
        moved = pair, pair[::-1]
    else:
        source, destination = given.get("source"), given.get("destination")
        moved = (
            tuple(source) if isinstance(source, tuple | list) else (source,),
            tuple(destination) if isinstance(destination, tuple | list) else (destination,),
        )
    if len(moved[0]) != len(moved[1]) or not all(_are_axes(axes, count) for axes in moved):
        return None
    placed = {to % count: axis % count for axis, to in zip(*moved, strict=True)}
    rest = iter([axis for axis in range(count) if axis not in placed.values()])
    return tuple(placed[place] if place in placed else next(rest) for place in range(count))


def _are_axes(axes: Sequence[Any], count: int) -> bool:
    return all(type(axis) is int and -count <= axis < count for axis in axes)


def _indexing(op: NodeOp) -> NodeOp:
    """select, narrow, a slice of aten and ``x[...]`` as getitem, also of what chunk, split or unbind gave."""
    if op.word == "getitem":
        index = op.arguments.get("index")
        if isinstance(op.input, fx.Node) and type(index) is int and (of := read(op.input)).word in ("split", "unbind"):
            found = pieces(of)
            if found is None or not -len(found) <= index < len(found):
                return op
            return replace(op, arguments={"input": of.input, "index": found[index]})
        whole = None if op.tensor is None else whole_index(index, op.tensor)
        if whole is None:  # of something else than a tensor, or by a tensor
            return op if op.tensor is None else replace(op, word="index")
        return replace(op, arguments={"input": op.input, "index": whole})
    axis = op.dim(default=0)
    first = op.arguments.get("index", op.arguments.get("start"))
    if op.word == "select":
        part: Any = first
    elif op.word == "narrow":
        last = _sum(example(first), example(op.arguments.get("length")))
        part = slice(first, last) if last is not None else None
    else:
        part = slice(first, op.arguments.get("end"), op.arguments.get("step"))
    if axis is None or part is None or op.tensor is None:
        return op
    whole = whole_index((*[slice(None)] * axis, part), op.tensor)
    return op if whole is None else replace(op, word="getitem", arguments={"input": op.input, "index": whole})


def _sum(left: Any, right: Any) -> Any:
    """The sum of two sizes; None where they are no sizes, or the first counts from the end."""
    if not all(isinstance(size, int | torch.SymInt) for size in (left, right)) or (type(left) is int and left < 0):
        return None
    return left + right


def whole_index(index: Any, value: torch.Tensor) -> tuple[Any, ...] | None:
    """The index with an entry for every axis of ``value``; None where one of them is a tensor, list or bool."""
    entries = index if isinstance(index, tuple | list) else (index,)
    numbers = [_numbers(entry) for entry in entries]
    if isinstance(index, list) or any(entry is NotImplemented for entry in numbers):
        return None
    named = sum(entry is not None and entry is not ... for entry in numbers)
    place = next((i for i, entry in enumerate(numbers) if entry is ...), len(numbers))
    filling = [slice(None)] * (value.dim() - named)
    sizes = iter(value.shape)
    return tuple(
        None if entry is None else _from_the_start(entry, next(sizes))
        for entry in (*numbers[:place], *filling, *numbers[place + 1 :])
    )


def _from_the_start(entry: Any, size: Any) -> Any:
    """An entry of an index, of an axis of ``size``, with numbers that count from the start; all of it as ``:``."""
    if not isinstance(size, int):
        return entry
    if not isinstance(entry, slice):
        return entry % size if type(entry) is int and size else entry
    if any(isinstance(bound, torch.SymInt) for bound in (entry.start, entry.stop, entry.step)):
        return entry
    first, last, step = entry.indices(size)
    return slice(None) if (first, last, step) == (0, size, 1) else slice(first, last, None if step == 1 else step)


def _numbers(entry: Any) -> Any:
    """An entry of an index with the traced numbers in it; NotImplemented where it is no plain one."""
    if entry is None or entry is ...:
        return entry
    if isinstance(entry, slice):
        bounds = [example(bound) for bound in (entry.start, entry.stop, entry.step)]
        plain = all(bound is None or type(bound) is int or isinstance(bound, torch.SymInt) for bound in bounds)
        # x[0:] is x[:], and aten writes the open end as the largest number
        if plain and bounds[0] in (None, 0) and bounds[2] in (None, 1) and bounds[1] in (None, _OPEN_END):
            return slice(None)
        return slice(*bounds) if plain else NotImplemented
    value = example(entry)
    return value if type(value) is int or isinstance(value, torch.SymInt) else NotImplemented


_OPEN_END = 2**63 - 1


def pieces(op: NodeOp) -> list[tuple[Any, ...]] | None:
    """For each tensor that chunk, split or unbind gives, the index of it in the input; None where it is unclear."""
    axis = op.dim(default=0)
    if axis is None or op.tensor is None or not isinstance(op.result, tuple | list):
        return None
    before = (slice(None),) * axis
    behind = (slice(None),) * (op.tensor.dim() - axis - 1)
    if op.word == "unbind":
        return [(*before, i, *behind) for i in range(len(op.result))]
    size = op.tensor.shape[axis]
    bounds = list(accumulate((piece.shape[axis] for piece in op.result), initial=0))
    if not statically_known_true(bounds[-1] == size):  # tensor_split may give places twice
        return None
    parts = [_from_the_start(slice(first, last), size) for first, last in pairwise(bounds)]
    return [(*before, part, *behind) for part in parts]


def writes(node: fx.Node) -> tuple[Any, ...]:
    """The arguments that ``node`` writes into: by its schema, a trailing underscore, Python's protocol or an option."""
    return read(node).written


def disturbs(node: fx.Node) -> bool:
    """Whether ``node`` may change what others compute: it writes to a tensor or sets a mode such as autocast."""
    if node.op in ("placeholder", "output", "get_attr"):
        return False
    higher_order = isinstance(node.target, torch._ops.HigherOrderOperator)
    return node.op == "call_module" or higher_order or bool(writes(node)) or node.is_impure()
