"""Masks over keys: an attention mask that is the same for every query and every head, as (B or 1, keys).

Whether it is the same is proven, never assumed: by a size of 1, by a stride of 0 (an expand, which Dynamo guards on),
or by the operations that made the mask, followed back through the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.passes.attention_call import AttentionCall, Obstacle
from sla_compile.passes.node_ops import ELEMENTWISE, NodeOp, disturbs, read
from sla_compile.passes.operands import Source, Step, after, example, memory
from sla_compile.passes.view_axes import origins, same_size

__all__ = ["constant_along", "key_mask"]

Group = Any
"""How many neighbours along the axis are asked to be equal, a size; 0 for all of them."""

Needs = list[tuple[Any, int, Group]] | None
"""What has to be constant, along which axis (-1 the last) and in which groups, for a result to be; None: not known."""

ACCEPTED = "a mask over keys, the same for all queries and heads"


def key_mask(call: AttentionCall) -> Source | Obstacle:
    """The mask of ``call``, whose queries and keys are traced, as (B or 1, keys) bool or floating; or why not."""
    value = example(call.attn_mask)
    if not isinstance(value, torch.Tensor):
        return Obstacle("attention mask that is no tensor", str(value), ACCEPTED)
    text = f"a {str(value.dtype).removeprefix('torch.')} tensor ({', '.join(map(str, value.shape))})"
    batch, keys = example(call.query).shape[0], example(call.key).shape[2]
    dims = value.dim()
    fits = 1 <= dims <= 4 and statically_known_true(value.shape[-1] == keys)
    if not fits or not (value.dtype == torch.bool or value.is_floating_point()):
        return Obstacle("attention mask of another shape", text, f"bool or floating, of {keys} keys")
    output = example(call.node)
    if value.requires_grad and (not isinstance(output, torch.Tensor) or output.requires_grad):
        return Obstacle("attention mask that needs a gradient", text, "a mask without one")
    if dims == 4 and not any(statically_known_true(value.shape[0] == size) for size in (1, batch)):
        return Obstacle("attention mask of another shape", text, f"a mask of {batch} or 1 in the batch")
    for axis, reason in ((-2, "per-query attention mask"), (-3, "per-head attention mask")):
        if not constant_along(call.attn_mask, axis):
            return Obstacle(reason, text, ACCEPTED)
    first_query_and_head = [Step("select", (-2, 0)) for _ in range(min(dims - 1, 2))]
    batch_axis = [Step("unsqueeze", (0,))] if dims < 4 else []
    return after(call.attn_mask, *first_query_and_head, *batch_axis)


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
    if not op.word or op.in_place or (isinstance(source, fx.Node) and _written(source)):
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


def _written(node: fx.Node) -> bool:
    """Whether anything writes to the memory of ``node`` later, so that its making does not tell its values."""
    return _written_by_users(node, memory(example(node)))


def _written_by_users(node: fx.Node, written: int | None) -> bool:
    for user in node.users:
        if disturbs(user) or written is None:
            return True
        value = example(user)
        views = value if isinstance(value, tuple | list) else (value,)  # chunk and the like give several
        shared = any(isinstance(view, torch.Tensor) and memory(view) in (written, None) for view in views)
        if shared and _written_by_users(user, written):
            return True
    return False


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
