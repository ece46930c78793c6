"""One node of Dynamo's graph read in any of its spellings: a method, a function, an operator; args or kwargs."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.passes.operands import example

__all__ = [
    "Axes",
    "Masked",
    "Product",
    "cast",
    "copied",
    "disturbs",
    "dropout",
    "in_place",
    "masked",
    "operation",
    "permutation",
    "product",
    "regrouped",
    "scaled",
    "softmax_axis",
    "tensor",
]

Axes = tuple[str, ...]
"""The names of a tensor's axes. Names of batch axes are numbers or letters of an einsum."""

_OPERATORS: dict[Any, str] = {
    operator.matmul: "matmul",
    operator.mul: "mul",
    operator.imul: "mul",
    operator.truediv: "div",
    operator.itruediv: "div",
    operator.add: "add",
    operator.iadd: "add",
}
_IN_PLACE = {operator.imul, operator.itruediv, operator.iadd}
_SYNONYMS = {"multiply": "mul", "divide": "div", "true_divide": "div", "swapaxes": "transpose", "swapdims": "transpose"}
_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_FUNCTIONS: dict[Any, str] = {
    getattr(holder, name): name
    for holder in (torch.special, torch.nn.functional, torch)
    for name in (
        *("matmul", "bmm", "baddbmm", "einsum", "softmax", "dropout", "masked_fill", "where", "add", "mul", "multiply"),
        *("div", "divide", "true_divide", "transpose", "swapaxes", "swapdims", "permute", "reshape", "flatten"),
        "unflatten",
    )
    if hasattr(holder, name)
}
# How x.mT reaches a graph from torch 2.15 on; before, it is a getattr.
_MATRIX_TRANSPOSE = {torch.ops.aten.mT, torch.ops.aten.mT.default}
_REGROUPING = {"reshape", "view", "flatten", "unflatten", "_unsafe_view"}


def operation(node: Any) -> str:
    """What ``node`` does, one word for all spellings of it; empty where that is not known here."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_method":
        name = str(node.target)
        name = name[:-1] if name.endswith("_") else name
    elif node.op == "call_function":
        if node.target in _MATRIX_TRANSPOSE or (node.target is getattr and node.args[1:] == ("mT",)):
            return "mT"
        name = _OPERATORS.get(node.target) or _FUNCTIONS.get(node.target, "")
    else:
        return ""
    return _SYNONYMS.get(name, name)


class _Arguments(dict[str, Any]):
    """Arguments by name; None where one is not given."""

    def __missing__(self, name: str) -> Any:
        return None


def _bound(node: fx.Node, *names: str) -> _Arguments:
    """The arguments of ``node`` by name."""
    return _Arguments({**dict(zip(names, node.args, strict=False)), **node.kwargs})


def tensor(argument: Any) -> torch.Tensor | None:
    """The traced tensor of a node; None where it is something else."""
    value = example(argument) if isinstance(argument, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def in_place(node: fx.Node) -> bool:
    """Whether ``node`` writes into its first argument."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.target in _IN_PLACE or _asked_in_place(node)


def _asked_in_place(node: fx.Node) -> bool:
    """Whether a function of torch.nn.functional is given ``inplace=True``."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != torch.nn.functional.__name__:
        return False
    names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    return bool(_bound(node, *names).get("inplace"))


def disturbs(node: fx.Node) -> bool:
    """Whether ``node`` may change what others compute: it writes to a tensor or sets a mode such as autocast."""
    if node.op == "call_module" or in_place(node) or node.is_impure():
        return node.op not in ("placeholder", "output")
    if node.op != "call_function":
        return False
    target: Any = node.target
    name = getattr(target, "__name__", "")
    ends_so = name.endswith("_") and not name.endswith("__") and target not in (operator.and_, operator.or_)
    if ends_so or "out" in node.kwargs or target is operator.setitem:
        return True
    schema = getattr(target, "_schema", None)
    mutable = schema is not None and schema.is_mutable
    return mutable or isinstance(target, torch._ops.HigherOrderOperator)


@dataclass(frozen=True)
class Product:
    """A product of two tensors over one axis, each axis named. ``addend`` and ``factor`` are of baddbmm."""

    left: fx.Node
    right: fx.Node
    left_axes: Axes
    right_axes: Axes
    out_axes: Axes
    factor: float = 1.0
    addend: fx.Node | None = None
    addend_factor: float = 0.0

    def contracted(self) -> str | None:
        """The axis that is summed over, where there is one, and each side has one axis of its own."""
        left, right, out = set(self.left_axes), set(self.right_axes), set(self.out_axes)
        sizes = [len(axes) for axes in (self.left_axes, self.right_axes, self.out_axes)]
        summed = left & right - out
        own = (left - right, right - left)
        plain = sizes == [len(left), len(right), len(out)] and out == (left | right) - summed
        return next(iter(summed)) if plain and len(summed) == 1 and len(own[0]) == len(own[1]) == 1 else None


def product(node: fx.Node) -> Product | None:
    """``node`` as a product: matmul, bmm, baddbmm or einsum of two tensors of at least three axes."""
    name = operation(node)
    if name == "einsum":
        return _einsum(node)
    if name in ("matmul", "bmm"):
        arguments = _bound(node, "input", "other" if name == "matmul" else "mat2")
        left, right = arguments["input"], arguments["other" if name == "matmul" else "mat2"]
        more: dict[str, Any] = {}
    elif name == "baddbmm":
        arguments = _bound(node, "input", "batch1", "batch2")
        left, right = arguments["batch1"], arguments["batch2"]
        factor, addend_factor = arguments.get("alpha", 1), arguments.get("beta", 1)
        if not _number(factor) or not _number(addend_factor):
            return None
        more = {"factor": float(factor), "addend": arguments["input"], "addend_factor": float(addend_factor)}
    else:
        return None
    shapes = tensor(left), tensor(right)
    if shapes[0] is None or shapes[1] is None or not 3 <= shapes[0].dim() == shapes[1].dim():
        return None
    batch = tuple(str(i) for i in range(shapes[0].dim() - 2))
    return Product(left, right, (*batch, "r", "s"), (*batch, "s", "c"), (*batch, "r", "c"), **more)


def _einsum(node: fx.Node) -> Product | None:
    given: list[Any] = list(node.args) or [""]
    equation, operands = given[0], given[1:]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    inputs, arrow, out = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    ranks = [value.dim() for operand in operands if (value := tensor(operand)) is not None]
    if not arrow or not len(terms) == len(operands) == len(ranks) == 2:
        return None
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    if hidden[0] != hidden[1] or any(hidden[0] and "..." not in term for term in (*terms, out)):
        return None

    def axes(term: str) -> Axes:
        before, dots, rest = term.partition("...")
        return (*before, *(str(i) for i in range(hidden[0] if dots else 0)), *rest)

    left, right = operands
    return Product(left, right, axes(terms[0]), axes(terms[1]), axes(out))


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def scaled(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """(x, factor) where ``node`` is x times or through something; a factor that is no number is given as it is."""
    name = operation(node)
    if name not in ("mul", "div") or len(node.args) + len(node.kwargs) != 2:
        return None
    arguments = _bound(node, "input", "other")
    left, right = arguments["input"], arguments["other"]
    if tensor(left) is not None and _number(right):
        factor = right if name == "mul" else 1.0 / right if right else None
        return None if factor is None else (left, factor)
    if name == "mul" and tensor(right) is not None and _number(left):
        return right, left
    return (left, right) if isinstance(left, fx.Node) else None


@dataclass(frozen=True)
class Masked:
    """Scores with a mask: ``fill`` for a mask whose True is forbidden, else ``mask`` was added."""

    source: fx.Node
    mask: fx.Node
    fill: float | None = None
    keeps: bool = False
    """With ``fill``, that the mask's True is what takes part."""


def masked(node: fx.Node) -> list[Masked]:
    """The ways to read ``node`` as scores with a mask: a sum may be read either way round."""
    name = operation(node)
    if name == "add" and len(node.args) + len(node.kwargs) == 2:
        arguments = _bound(node, "input", "other")
        pair = arguments["input"], arguments["other"]
        if tensor(pair[0]) is None or tensor(pair[1]) is None:
            return []
        ways = [pair] if in_place(node) else [pair, pair[::-1]]
        return [Masked(source, mask) for source, mask in ways]
    if name == "masked_fill":
        arguments = _bound(node, "input", "mask", "value")
        return _filled(arguments["input"], arguments["mask"], arguments["value"], keeps=False)
    if name == "where" and len(node.args) == 3:
        if node.op == "call_method":
            source, mask, fill = node.args
            return _filled(source, mask, fill, keeps=True)
        mask, first, second = node.args
        return _filled(first, mask, second, keeps=True) or _filled(second, mask, first, keeps=False)
    return []


def _filled(source: Any, mask: Any, fill: Any, *, keeps: bool) -> list[Masked]:
    # Anything this low leaves no weight to a key, unless the whole row is masked.
    low = type(fill) in (int, float) and fill <= -1e4
    readable = low and tensor(source) is not None and tensor(mask) is not None
    return [Masked(source, mask, float(fill), keeps)] if readable else []


def softmax_axis(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(input, axis) where ``node`` is a softmax; the axis counts from 0."""
    if operation(node) != "softmax":
        return None
    arguments = _bound(node, "input", "dim")
    source, axis = arguments["input"], arguments["dim"]
    value = tensor(source)
    if value is None or type(axis) is not int:
        return None
    return source, axis % value.dim()


def dropout(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(input, probability) where ``node`` is a dropout; 0 where it is not in training."""
    if operation(node) != "dropout":
        return None
    arguments = _bound(node, "input", "p", "training" if node.target is torch.nn.functional.dropout else "train")
    training = arguments.get("training", arguments.get("train", True))
    source, probability = arguments["input"], arguments.get("p", 0.5)
    if not isinstance(source, fx.Node) or not _number(probability) or not isinstance(training, bool):
        return None
    return source, float(probability) if training else 0.0


def cast(node: fx.Node) -> fx.Node | None:
    """The input where ``node`` only changes a floating dtype to another (or the same)."""
    name = operation(node)
    if name not in (*_CASTS, "to", "type", "type_as") or in_place(node) or not node.args:
        return None
    source: Any = node.args[0]
    before, result = tensor(source), tensor(node)
    if before is None or result is None or before.device != result.device:
        return None
    plain = before.is_floating_point() and result.is_floating_point() and "memory_format" not in node.kwargs
    return source if plain else None


def copied(node: fx.Node) -> fx.Node | None:
    """The input where ``node`` only makes it contiguous."""
    return node.all_input_nodes[0] if operation(node) == "contiguous" else None


def permutation(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """(input, order) where ``node`` permutes axes: its axis ``a`` is the input's axis ``order[a]``."""
    name = operation(node)
    source: Any = node.args[0] if node.args else None
    value = tensor(source)
    if value is None or name not in ("transpose", "permute", "mT") or in_place(node):
        return None
    count = value.dim()
    order = list(range(count))
    if name == "permute":
        given: Any = node.kwargs.get("dims", node.args[1:])
        given = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
        order = [axis % count for axis in given]
    else:
        axes: list[Any] = [*node.args[1:], *node.kwargs.values()] if name == "transpose" else [-2, -1]
        if len(axes) != 2 or not all(type(axis) is int for axis in axes):
            return None
        first, second = axes
        order[first], order[second] = order[second], order[first]
    return source, tuple(order)


def regrouped(node: fx.Node) -> fx.Node | None:
    """The input where ``node`` only regroups the axes before the last two, such as (B, H) to (B*H)."""
    if operation(node) not in _REGROUPING or not node.args:
        return None
    source: Any = node.args[0]
    before, result = tensor(source), tensor(node)
    if before is None or result is None or min(before.dim(), result.dim()) < 3:
        return None
    if before.dtype != result.dtype:
        return None
    same = all(statically_known_true(before.shape[axis] == result.shape[axis]) for axis in (-2, -1))
    return source if same else None
