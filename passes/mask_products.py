"""Boolean masks that are products of others: the parts, all of which are true where the mask is.

Followed back through the graph over ``&``, ``*`` and the like, negations, casts and views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sla_compile.passes.node_ops import VIEWS, NodeOp, is_number, read, tensor
from sla_compile.passes.operands import Operand, Source, Step, after, example
from sla_compile.passes.overwritten import overwritten

__all__ = ["factors"]

_AND = {"mul", "bitwise_and", "logical_and", "minimum"}
_OR = {"add", "bitwise_or", "logical_or", "maximum"}
_COPIES = {"clone", "contiguous", "detach"}
_MOVES = VIEWS | {"repeat", "repeat_interleave"}


def factors(source: Any, wanted: bool = True) -> list[Any]:
    """Tensors that broadcast to ``source`` and are all true (not zero) exactly where it is; ``wanted=False``: is not.

    One, itself or its negation, where it is no product or not provably one.
    """
    found = _factors(source, wanted)
    if found is not None:
        return found
    if isinstance(source, torch.Tensor):  # an eager call: its values are there
        return _factors_by_value(source) if wanted else [source.logical_not()]
    cast = [] if example(source).dtype == torch.bool else [Step("to", (torch.bool,))]
    return [after(source, *cast, *([] if wanted else [Step("logical_not")]))]


def _factors(source: Any, wanted: bool) -> list[Any] | None:
    """Those that the operation which made ``source`` tells; None where it tells none."""
    op = read(source)
    if not op.word or op.in_place or op.tensor is None or (isinstance(source, fx.Node) and overwritten(source)):
        return None
    other = op.arguments.get("other")
    if op.word == "logical_not" or (op.word == "bitwise_not" and op.tensor.dtype == torch.bool):
        return factors(op.input, not wanted)
    if op.word in _COPIES or (op.word == "to" and _keeps_truth(op)):
        return factors(op.input, wanted)
    if is_number(other):
        same = _compared(op.word, float(other)) if _zero_or_one(op.input) and other is not None else None
        return None if same is None else factors(op.input, wanted == same)
    if op.word in (_AND if wanted else _OR) and tensor(other) is not None and _by_truth(op):
        return [part for given in (op.input, other) for part in factors(given, wanted)]
    step = _step(source, op) if op.word in _MOVES else None
    if step is None:
        return None
    parts = factors(op.input, wanted)
    return None if len(parts) == 1 else [after(part, Step("expand_as", (op.input,)), step) for part in parts]


def _factors_by_value(mask: torch.Tensor) -> list[torch.Tensor]:
    """Of a tensor (..., queries, keys): one of queries and one of keys where it is their product."""
    if mask.dtype != torch.bool or mask.dim() < 2:
        return [mask]
    queries, keys = mask.any(-1, keepdim=True), mask.any(-2, keepdim=True)
    return [queries, keys] if torch.equal(queries & keys, mask) else [mask]


def _by_truth(op: NodeOp) -> bool:
    """Whether the truth of the result is that of the arguments: 2 & 1 is 0, 16 * 16 may be, and 1 + -1."""
    if op.word.startswith("logical"):
        return True
    return "alpha" not in op.arguments and all(_zero_or_one(op.arguments[name]) for name in ("input", "other"))


def _keeps_truth(op: NodeOp) -> bool:
    """Whether a cast leaves no number zero that was not."""
    return op.result.dtype in (torch.bool, op.tensor.dtype if op.tensor is not None else None) or _zero_or_one(op.input)


def _compared(word: str, number: Any) -> bool | None:
    """Whether 0 or 1, compared with ``number``, is true where it is 1 and false where it is 0; False: the reverse."""
    compare = getattr(torch.Tensor, word) if word in ("eq", "ne", "gt", "ge", "lt", "le") else None
    if compare is None:
        return None
    of_zero, of_one = compare(torch.tensor([0.0, 1.0]), number).tolist()
    return None if of_zero == of_one else bool(of_one)


def _zero_or_one(source: Any) -> bool:
    """Whether all elements are 0 or 1, provably: they were bool before they were numbers."""
    value = tensor(source)
    if value is None or value.dtype == torch.bool:
        return value is not None
    op = read(source)
    if op.in_place or (isinstance(source, fx.Node) and overwritten(source)):
        return False
    if op.word in _COPIES | _MOVES | {"to"}:
        return _zero_or_one(op.input)
    return op.word in _AND - {"logical_and"} and all(_zero_or_one(op.arguments.get(n)) for n in ("input", "other"))


_AS_COPIES: dict[Any, Any] = {
    **{same: same for same in ("reshape", "flatten", "unflatten", torch.reshape, torch.flatten, torch.unflatten)},
    "view": "reshape",
    **dict.fromkeys(("reshape_as", "view_as"), "reshape_as"),
    **dict.fromkeys((torch.ops.aten.view.default, torch.ops.aten.reshape.default), torch.ops.aten.reshape.default),
}
"""Regroupings, as they are called where the input may lie in memory in any way, expanded say."""


def _step(source: Source, op: NodeOp) -> Step | None:
    """The operation ``op`` that made ``source`` as a step from its input; None where it is called in another way."""
    if isinstance(source, Operand):
        step = source.steps[-1]
    elif source.args and source.args[0] is op.input:
        step = Step(source.target, tuple(source.args[1:]), tuple(source.kwargs.items()))
    else:
        return None
    if any(isinstance(value, fx.Node | list | tuple) for _, value in step.keywords):
        return None
    if op.word != "reshape":
        return step
    target = _AS_COPIES.get(step.target)
    return None if target is None else Step(target, step.arguments, step.keywords)
