"""Keys and values that a model copies for each query head, as they were before: the kernels need no copies.

Models repeat each head in place (``repeat_interleave``), or give the heads an axis of size 1, expand or repeat that,
and merge the two (``repeat_kv`` of transformers); a single head is expanded as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.passes.attention_call import AttentionCall
from sla_compile.passes.node_ops import NodeOp, disturbs, read
from sla_compile.passes.operands import Operand, Source, Step, after, example

__all__ = ["without_copies"]


def without_copies(call: AttentionCall) -> AttentionCall:
    """``call`` with one head of keys and values for each group of query heads that has copies of it; itself where keys
    and values are no copies, or not in groups of one size."""
    if call.enable_gqa is not False or call.merged_heads or call.mixed_heads:
        return call
    query, key, value = (example(side) for side in (call.query, call.key, call.value))
    if not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (query, key, value)):
        return call
    heads = [x.shape[1] for x in (query, key, value)]
    if any(type(size) is not int or size != heads[0] for size in heads):
        return call
    sources = [_before(side, 1) for side in (call.key, call.value)]
    if any(source is None or _is_written_after(source, call.node) for source in sources):
        return call
    of_keys, of_values = (example(source).shape[1] for source in sources)
    if of_keys != of_values:
        return call
    key_source, value_source = sources
    return replace(call, key=key_source, value=value_source, enable_gqa=True)  # type: ignore[arg-type]


def _before(side: Any, axis: int) -> Source | None:
    """What ``side``, of four axes, holds copies of, one after the other along ``axis``; None where it is no copy."""
    op = read(side)
    if op.tensor is None or not isinstance(op.result, torch.Tensor):
        return None
    if op.word == "permute" and "dims" in op.arguments:
        source = _before(op.input, op.arguments["dims"][axis])
        return None if source is None else after(source, Step("permute", (op.arguments["dims"],)))
    if op.word == "repeat_interleave":
        fits = op.dim() == axis and type(op.arguments.get("repeats")) is int
        return op.input if fits and _same(op.tensor.shape, op.result.shape, but=axis) else None
    if op.word in ("expand", "repeat"):
        return op.input if _only_copies(op, axis) else None
    shape = tuple(op.tensor.shape)
    if op.word != "reshape" or len(shape) != 5 or not all(type(size) is int for size in shape[axis : axis + 2]):
        return None
    merged = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    copies = read(op.input)
    if not _same(merged, op.result.shape) or not _only_copies(copies, axis + 1):
        return None
    return after(copies.input, Step("squeeze", (axis + 1,)))


def _only_copies(op: NodeOp, axis: int) -> bool:
    """Whether ``op`` does nothing but to make several of a single entry along ``axis``."""
    if op.word not in ("expand", "repeat") or op.tensor is None or not isinstance(op.result, torch.Tensor):
        return False
    return (
        op.tensor.dim() == op.result.dim()
        and op.tensor.shape[axis] == 1
        and _same(op.tensor.shape, op.result.shape, but=axis)
    )


def _same(left: Iterable[Any], right: Iterable[Any], but: int | None = None) -> bool:
    sizes = list(zip(left, right, strict=False))
    return all(i == but or statically_known_true(a == b) for i, (a, b) in enumerate(sizes))


def _is_written_after(source: Any, end: fx.Node) -> bool:
    """Whether something may write into ``source`` before ``end``: a copy would not have seen it."""
    node = source.source if isinstance(source, Operand) else source
    between = takewhile(lambda other: other is not end, _following(node))
    return any(disturbs(other) for other in between)


def _following(node: fx.Node) -> Iterable[fx.Node]:
    while node.next.op != "root":
        node = node.next
        yield node
