"""An attention mask as a mask over keys, the same for every query and every head, and a mask over queries.

Whether it is the same is proven, never assumed: by a size of 1, by a stride of 0 (an expand, which Dynamo guards on),
or by the operations that made the mask, followed back through the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.passes.attention_call import AttentionCall, Obstacle
from sla_compile.passes.mask_products import factors
from sla_compile.passes.node_ops import ELEMENTWISE, NodeOp, read
from sla_compile.passes.operands import Operand, Source, Step, after, example
from sla_compile.passes.overwritten import overwritten, overwritten_before
from sla_compile.passes.segments import MOST_SEGMENTS, Segment, segments
from sla_compile.passes.view_axes import origins, same_size

__all__ = ["Masks", "constant_along", "split_mask"]

Group = Any
"""How many neighbours along the axis are asked to be equal, a size; 0 for all of them."""

Needs = list[tuple[Any, int, Group]] | None
"""What has to be constant, along which axis (-1 the last) and in which groups, for a result to be; None: not known."""

ACCEPTED = (
    "a mask over keys, the same for all queries and heads, or a bool product of one with one over queries; or one made "
    f"of constants, by which at most {MOST_SEGMENTS} runs of queries each see one range of keys"
)


@dataclass(frozen=True)
class Masks:
    """A mask as that of keys and that of queries, which let a query see a key where both do. None: all."""

    keys: Source | None = None
    """(B or 1, keys), bool or floating."""
    queries: Source | None = None
    """(B or 1, queries or 1) bool. A query that it masks sees no key."""
    segments: tuple[Segment, ...] = ()
    """Runs of queries with the keys that each sees, in place of both. Empty: all queries see the same keys."""


def split_mask(call: AttentionCall) -> Masks | Obstacle:
    """The mask of ``call``, whose queries and keys are traced, as masks of keys and of queries; or why not."""
    value = example(call.attn_mask)
    if not isinstance(value, torch.Tensor):
        return Obstacle("attention mask that is no tensor", str(value), ACCEPTED)
    text = f"a {str(value.dtype).removeprefix('torch.')} tensor ({', '.join(map(str, value.shape))})"
    batch, keys = example(call.query).shape[0], example(call.key).shape[2]
    dims = value.dim()
    over_keys = 1 <= dims <= 4 and statically_known_true(value.shape[-1] == keys)
    over_queries = value.dtype == torch.bool and 2 <= dims <= 4 and same_size(value.shape[-1], 1)
    if not (over_keys or over_queries) or not (value.dtype == torch.bool or value.is_floating_point()):
        return Obstacle("attention mask of another shape", text, f"bool or floating, of {keys} keys")
    output = example(call.node)
    if value.requires_grad and (not isinstance(output, torch.Tensor) or output.requires_grad):
        return Obstacle("attention mask that needs a gradient", text, "a mask without one")
    if dims == 4 and not any(statically_known_true(value.shape[0] == size) for size in (1, batch)):
        return Obstacle("attention mask of another shape", text, f"a mask of {batch} or 1 in the batch")
    if over_keys and constant_along(call.attn_mask, -2):
        if constant_along(call.attn_mask, -3):
            return Masks(_first(call.attn_mask, -2))
        return Obstacle("per-head attention mask", text, ACCEPTED)
    if value.dtype != torch.bool:
        if _is_product(call.attn_mask):  # which shifts the scores of some queries, by 1 say, and masks nothing
            return Obstacle("product of masks that is added to the scores", text, "a bool one")
        return _in_segments(call, text)
    masks = _split(factors(call.attn_mask), keys, call.node)
    return _in_segments(call, text) if masks is None else masks


def _in_segments(call: AttentionCall, text: str) -> Masks | Obstacle:
    """A mask that is another one for other queries, called ``text``, where that is so for runs of them."""
    found = segments(call.attn_mask, example(call.query).shape[2], example(call.key).shape[2], call.node)
    if isinstance(found, str):
        return Obstacle("per-query attention mask", f"{text}: {found}", ACCEPTED)
    return Masks(segments=found)


def _is_product(source: Any) -> bool:
    """Whether it is a number for each query times a number for each key."""
    while (op := read(source)).word in ("to", "contiguous", "clone", "detach"):
        source = op.input
    sides = [op.arguments.get(name) for name in ("input", "other")]
    return op.word == "mul" and any(constant_along(a, -1) and constant_along(b, -2) for a, b in (sides, sides[::-1]))


def _split(parts: list[Any], keys: Any, end: fx.Node) -> Masks | None:
    """The masks of keys and of queries that ``parts`` are; None where one is neither, or changed before ``end``."""
    found: dict[int, list[Source]] = {-2: [], -1: []}
    for part in parts:
        node = part.source if isinstance(part, Operand) else part
        if isinstance(node, fx.Node) and overwritten_before(node, end):
            return None
        over_keys = same_size(example(part).shape[-1], keys) and constant_along(part, -2)
        axis = -2 if over_keys else -1
        if not constant_along(part, axis) or not constant_along(part, -3):
            return None
        found[axis].append(_first(part, axis))
    both = [reduce(lambda a, b: after(a, Step("logical_and", (b,))), side) if side else None for side in found.values()]
    return Masks(both[0], both[1])


def _first(source: Source, axis: int) -> Source:
    """Of a mask that is the same all along ``axis``, -2 or -1, and for all heads: (B or 1, size of the other)."""
    dims = example(source).dim()
    steps = [Step("select", (axis, 0))] if dims > 1 else []
    steps += [Step("select", (-2, 0))] if dims > 2 else []
    return after(source, *steps, *([Step("unsqueeze", (0,))] if dims < 4 else []))


def constant_along(source: Any, axis: int, group: Group = 0) -> bool:
    """Whether the tensor ``source`` provably has the same values all along ``axis``, or within each ``group`` there.

    ``axis`` counts from the end, -1 the last, so that broadcasting lines it up.
    """
    value = example(source)
    if not isinstance(value, torch.Tensor):  # a number; None is not known
        return not isinstance(source, fx.Node) or isinstance(value, int | float | torch.SymInt | torch.SymFloat)
    if -axis > value.dim() or statically_known_true(value.shape[axis] == 1):
        return True
    if statically_known_true(value.stride(axis) == 0):
        return True
    if isinstance(source, torch.Tensor):  # an eager call: its values are there
        return bool((value == value.narrow(axis, 0, 1)).all())
    needs = _needs(source, axis, group)
    return needs is not None and all(constant_along(*need) for need in needs)


_FILLED = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}


def _needs(source: Source, axis: int, group: Group) -> Needs:
    """What ``source`` needs of the arguments of the operation that made it, to be constant along ``axis``."""
    op = read(source)
    if not op.word or op.in_place or (isinstance(source, fx.Node) and overwritten(source)):
        return None
    if op.word in _FILLED:
        return []
    if op.word in ELEMENTWISE:
        return [(given, axis, group) for given in op.read_from]
    if op.word == "cat":
        return _of_parts(op, axis, group)
    if op.tensor is None:
        return None
    if op.word in ("repeat", "repeat_interleave"):
        return _repeated(op, op.tensor, axis, group)
    found = origins(op)
    origin = None if found is None else found[axis]
    if origin is None:
        return None
    if origin.axis is None:
        return []
    before = origin.axis - op.tensor.dim()
    if origin.fastest is not None:  # as heads from batch and heads: each group is one position of the slower factor
        return None if group else [(op.input, before, origin.fastest)]
    if origin.part is not None and group:
        return None
    return [(op.input, before, 0 if origin.repeated else group)]


def _repeated(op: NodeOp, value: torch.Tensor, axis: int, group: Group) -> Needs:
    """Of a repetition of ``value``: the same along an axis that it leaves alone, or that is constant anyway."""
    shape = op.result.shape
    if op.word == "repeat_interleave":
        count, dim = example(op.arguments.get("repeats")), op.dim()
        if dim is None:  # of all axes, flattened
            return None
        same = dim == axis % len(shape)
        if same and isinstance(count, int | torch.SymInt) and group and same_size(count, group):
            return []
        return [(op.input, axis, 0 if same else group)]
    kept = -axis <= value.dim() and same_size(shape[axis], value.shape[axis])
    return [(op.input, axis, group if kept else 0)]


def _of_parts(op: NodeOp, axis: int, group: Group) -> Needs:
    """Of a concatenation, along another axis than the one that grows."""
    parts, dim = op.arguments.get("tensors"), op.arguments.get("dim", 0)
    dims = op.result.dim()
    if not isinstance(parts, list | tuple) or type(dim) is not int or dim % dims == axis % dims:
        return None
    return [(part, axis, group) for part in parts]
