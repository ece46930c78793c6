"""What the target of a call alone tells: its word, the names of its parameters, and whether it writes into them.

One word stands for all spellings. Methods, functions of torch, operators of Python and aten ops are told apart here.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

__all__ = ["KEYWORDS", "Spelling", "spelling_of"]

_SYNONYMS = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "truediv": "div",
    "subtract": "sub",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "bmm": "matmul",
    "mm": "matmul",
    "linalg_matmul": "matmul",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "numpy_T": "T",
    "matrix_H": "mH",
    "H": "mH",
    "adjoint": "mH",
    "split_with_sizes": "split",
    "unsafe_split": "split",
    "unsafe_chunk": "chunk",
    "unsafe_split_with_sizes": "split",
    "expand_as": "expand",
    "broadcast_to": "expand",
    **dict.fromkeys(
        ("float", "double", "half", "bfloat16", "bool", "int", "long", "type", "type_as", "_to_copy"), "to"
    ),
    **dict.fromkeys(("view", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "ravel"), "reshape"),
}

_BINARY = (
    *("add", "sub", "mul", "div", "matmul", "floor_divide", "remainder", "pow", "minimum", "maximum"),
    *("eq", "ne", "gt", "ge", "lt", "le", "bitwise_and", "bitwise_or", "bitwise_xor"),
    *("logical_and", "logical_or", "logical_xor"),
)
_PARAMETERS: dict[str, tuple[str, ...]] = {
    word: tuple(names.split())
    for word, names in {
        **dict.fromkeys(_BINARY, "input other"),
        "transpose": "input dim0 dim1",
        "permute": "input *dims",
        "movedim": "input source destination",
        "unsqueeze": "input dim",
        "squeeze": "input dim",
        "select": "input dim index",
        "narrow": "input dim start length",
        "slice": "input dim start end step",
        "getitem": "input index",
        "setitem": "input index value",
        "chunk": "input chunks dim",
        "split": "input split_size dim",
        "tensor_split": "input indices_or_sections dim",
        "unbind": "input dim",
        "cat": "tensors dim",
        "repeat": "input *repeats",
        "roll": "input shifts dims",
        "flip": "input *dims",
        "index_select": "input dim index",
        "repeat_interleave": "input repeats dim",
        "masked_fill": "input mask value",
        "where": "condition input other",
        "baddbmm": "input batch1 batch2",
        "einsum": "equation *operands",
        "softmax": "input dim",
        "dropout": "input p training inplace",
        "linear": "input weight bias",
        "scaled_dot_product_attention": "query key value",
    }.items()
}
"""Names of the positional arguments; one with a star takes the rest, as a tuple. Others have ``input`` and a number."""

# Keywords that mean a parameter above: of aten, of NumPy, of a variant.
KEYWORDS = {"self": "input", "tensor": "input", "a": "input", "x": "input", "x1": "input", "x2": "other"}
KEYWORDS |= {"axis": "dim", "axis0": "dim0", "axis1": "dim1", "mat2": "other", "train": "training"}

# Where torch keeps the functions that act on tensors; a function from elsewhere may only be called the same.
_FUNCTIONS_OF = {"torch", "torch.functional", "torch.nn.functional", "torch._tensor", "torch._C._nn"}
_FUNCTIONS_OF |= {"torch._C._special", "torch._C._linalg", "torch._C._TensorBase"}

# Python's protocol: __iadd__ and the like, derived from the functions of the module ``operator``.
_IN_PLACE_OPERATORS = {
    name for name in vars(operator) if name[0] == "i" and ({name[1:], f"{name[1:]}_"} & vars(operator).keys())
}
_IN_PLACE_OPERATORS |= {"setitem", "delitem"}
_ARITHMETIC = {name[1:] for name in _IN_PLACE_OPERATORS if name[0] == "i"}
_PROTOCOL = _ARITHMETIC | {"getitem", "neg", "pos", "abs", "invert", "eq", "ne", "gt", "ge", "lt", "le"}


@dataclass(frozen=True)
class Spelling:
    """What a call's target alone tells."""

    word: str
    parameters: tuple[str, ...]
    in_place: bool = False
    swapped: bool = False
    """The first two arguments change places: ``x.__rsub__(y)``."""
    mutable: tuple[str, ...] = ()
    """Parameters that its schema says it writes into."""


@lru_cache(maxsize=2048)
def spelling_of(target: Any) -> Spelling:
    """The spelling that ``target``, a method's name or what a node calls, is."""
    if isinstance(target, str):
        return _method(target)
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _op(target)
    name, module = getattr(target, "__name__", str(target)), getattr(target, "__module__", None) or ""
    if module == operator.__name__ or module == "_operator":
        word = name.removesuffix("_")
        word, in_place = (word.removeprefix("i"), True) if name in _IN_PLACE_OPERATORS else (word, False)
        word = name if name in ("setitem", "delitem") else word
        return _spelled(word, in_place=in_place)
    if hasattr(target, "__objclass__") and issubclass(torch.Tensor, target.__objclass__):  # torch.Tensor.mul
        return _method(name)
    in_place = name.endswith("_") and not name.endswith("__")
    if module in _FUNCTIONS_OF and not isinstance(target, torch._ops.HigherOrderOperator):
        found = _spelled(name.removesuffix("_").removeprefix("special_"), in_place=in_place)
    else:
        found = Spelling(f"{module.partition('.')[0]}.{name}", ("input",), in_place)
    names = _parameters(target)
    return found if names is None else replace(found, parameters=names)


def _spelled(name: str, **more: Any) -> Spelling:
    word = _SYNONYMS.get(name, name)
    if name == "rsub":
        return Spelling("sub", _PARAMETERS["sub"], **{**more, "swapped": True})
    return Spelling(word, _PARAMETERS.get(word, ("input",)), **more)


def _method(name: str) -> Spelling:
    inner = name[2:-2] if name.startswith("__") and name.endswith("__") else ""
    if inner in _IN_PLACE_OPERATORS:
        return _spelled(inner if inner in ("setitem", "delitem") else inner[1:], in_place=True)
    if inner[:1] == "r" and inner[1:] in _ARITHMETIC:
        return _spelled(inner[1:], swapped=True)
    if inner:
        return _spelled(inner if inner in _PROTOCOL else name)
    found = _spelled(name.removesuffix("_"), in_place=name.endswith("_"))
    return replace(found, parameters=("input", "condition", "other")) if found.word == "where" else found


def _op(target: Any) -> Spelling:
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    namespace, _, name = packet._qualified_op_name.partition("::")
    word = name.removesuffix("_") if namespace == "aten" else f"{namespace}::{name}"
    if isinstance(target, torch._ops.OpOverloadPacket):
        schemas = [getattr(target, overload)._schema for overload in target.overloads()]  # type: ignore[no-untyped-call]
        in_place = all(schema.is_mutable for schema in schemas)
        return replace(_spelled(word), in_place=in_place)
    arguments = target._schema.arguments
    mutable = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    spelling = _spelled(word)
    names = tuple(KEYWORDS.get(argument.name, argument.name) for argument in arguments)
    if spelling.word == "einsum":
        names = ("equation", "*operands")
    return replace(spelling, parameters=names, mutable=tuple(KEYWORDS.get(name, name) for name in mutable))


def _parameters(function: Any) -> tuple[str, ...] | None:
    """The names of what a function written in Python takes; None where it does not say them one by one."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        return None
    return tuple(KEYWORDS.get(parameter.name, parameter.name) for parameter in parameters)
