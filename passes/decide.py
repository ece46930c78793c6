"""Decide, for one attention call, whether Sparse-Linear Attention can stand in for it exactly as configured.

A decision is data: ``Rewrite``, or ``Keep`` with the reason, the value that decided and what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.common.limits import MAX_HEAD_DIM, MIN_HEAD_DIM
from sla_compile.passes.attention_call import AttentionCall, Obstacle
from sla_compile.passes.cross_attention import of_different_tensors
from sla_compile.passes.key_masks import Masks, split_mask
from sla_compile.passes.operands import Source, Step, after
from sla_compile.passes.operands import example as _example
from sla_compile.passes.profitability import (
    SkippablePairs,
    UnknownRange,
    default_min_tokens,
    forced_tokens,
    token_ranges,
)
from sla_compile.passes.segments import Segment
from sla_compile.passes.tensor_parallel import SAME_HEADS, Exchanged, HeadShards, exchanged, sharding
from sla_compile.passes.token_order import (
    AS_IN_THE_MODEL,
    AS_IT_IS,
    Grid,
    TokenOrder,
    Wanted,
    grids_of,
    ordered,
    ordered_mask,
    outside_grid,
    token_order,
)
from sla_compile.passes.view_axes import split_off

__all__ = ["Decision", "Keep", "Requirements", "Rewrite", "Shape", "decide", "example_shape"]

Size = int | torch.SymInt


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention call; each may be symbolic. ``keys`` is None where they are as many as the queries, and
    ``key_heads`` where keys have as many heads."""

    batch: Size
    heads: Size
    tokens: Size
    head_dim: Size
    dtype: torch.dtype
    device: torch.device
    keys: Size | None = None
    key_heads: int | None = None

    @property
    def sizes(self) -> dict[str, Size]:
        """The sizes by name."""
        sizes = {"batch": self.batch, "heads": self.heads, "tokens": self.tokens, "head_dim": self.head_dim}
        others = (("key_tokens", self.keys), ("key_heads", self.key_heads))
        return sizes | {name: size for name, size in others if size is not None}


@dataclass(frozen=True)
class Rewrite:
    """The call becomes Sparse-Linear Attention. ``condition`` is the guard that this added, if any."""

    shape: Shape
    scale: float
    condition: str | None = None
    key_mask: Source | None = None
    """(B or 1, keys), bool or added to the logits."""
    query_mask: Source | None = None
    """(B or 1, queries or 1) bool. Queries that it masks have no keys: dense attention gives 0 there."""
    causal: bool = False
    group: int = 1
    """Query heads to one head of keys and values."""
    always_critical: tuple[int, ...] = ()
    """start, stop, start, stop, ... of key tokens in ``order``, by the rules of slices."""
    order: TokenOrder = AS_IT_IS
    shards: HeadShards | Exchanged | None = None
    """Where each rank has a part of the heads."""
    segments: tuple[Segment, ...] = ()
    """Runs of queries that each see another range of keys: see ``passes.parts``."""
    mean_if_masked: bool = False
    """A query all of whose keys are masked, by boolean masks, gives the mean of all values."""

    def operands(self, call: AttentionCall) -> tuple[Source, Source, Source]:
        """Queries, keys and values, their tokens in ``order``.

        Keys and values have as many heads as queries have where ranks cannot have whole heads of fewer.
        """
        shards = self.shards if isinstance(self.shards, HeadShards) and self.shards.distributed else None
        apart = shards is not None and shards.unequal(int(self.shape.heads) // self.group)
        steps = self.for_each_query_head() if apart else ()
        key, value = (after(ordered(source, self.order.keys), *steps) for source in (call.key, call.value))
        return ordered(self.without_masked(call.query), self.order.queries), key, value

    def for_each_query_head(self) -> tuple[Step, ...]:
        """The steps that give (B, H, ...) each query head's of what is of key heads."""
        return (Step("repeat_interleave", (self.group, 1)),) if self.group > 1 else ()

    def without_masked(self, source: Any) -> Any:
        """``source`` (B, H, N, D), in the model's order, with 0 for masked queries.

        Of queries: the mean of a block, times a positive factor, is then that of the others, so that these alone
        rank its keys.
        """
        masked = self.masked_queries()
        return source if masked is None else after(source, Step("masked_fill", (masked, 0.0)))

    def masked_queries(self) -> Source | None:
        """(B or 1, 1, queries or 1, 1), true for those that have no keys."""
        steps = Step("logical_not"), Step("unsqueeze", (1,)), Step("unsqueeze", (-1,))
        return None if self.query_mask is None else after(self.query_mask, *steps)

    def masks(self) -> tuple[Source, ...]:
        """The key mask, its tokens in ``order``, where there is one."""
        return () if self.key_mask is None else (ordered_mask(self.key_mask, self.order.keys),)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the op that this decides; only those that are not at their defaults."""
        found: dict[str, Any] = {"scale": self.scale}
        if self.causal:
            found["causal"] = True
        if self.always_critical:
            found["always_critical"] = list(self.always_critical)
        return found


@dataclass(frozen=True)
class Keep:
    """The call stays dense: why, the value that decided, and what would be accepted."""

    reason: str
    value: str = ""
    accepted: str = ""
    condition: str | None = None
    """The guard that this added, if any."""
    by_settings: bool = False
    """True where the settings say so, such as ``min_tokens`` or ``exclude``, and not the form of the attention."""

    def __str__(self) -> str:
        detail = f": {self.value}" if self.value else ""
        return f"{self.reason}{detail}" + (f" (accepted: {self.accepted})" if self.accepted else "")


Decision = Rewrite | Keep


@dataclass(frozen=True)
class Requirements:
    """What the caller knows and the passes must not: settings of the site, dtypes that a device has kernels for, and
    whether each head has a gate of its own (``per_head``) or a number in one (``by_head``)."""

    min_tokens: int | None
    """None: what is the default on the device of the call."""
    dtypes: dict[str, tuple[torch.dtype, ...]]
    per_head: bool = False
    by_head: bool = False
    cross_attention: bool = False
    always_critical: tuple[tuple[int, int | None], ...] | str = ()
    """Ranges of key tokens; or "text", those outside the grid of ``order``."""
    order: Wanted = AS_IN_THE_MODEL


def decide(call: AttentionCall, requirements: Requirements, seen: Sequence[Grid | None] = (None, None)) -> Decision:
    """Rewrite or Keep for ``call``; adds no shape guard except where the number of tokens decides, as the last step.

    ``seen`` are the grids that the tokens of its queries and of its keys are known to be, two for each size.
    """
    refused = (
        _refuse_obstacle(call)
        or _refuse_tensors(call, requirements)
        or _refuse_lengths(call, requirements.cross_attention)
        or _refuse_sharded(call)
    )
    if refused is not None:
        return refused
    shape = example_shape(call)
    if shape is None:
        raise AssertionError("the shape was checked before")
    causal = call.is_causal is True
    grids = grids_of(seen, shape.tokens, shape.tokens if shape.keys is None else shape.keys)
    ranges = _ranges(call, requirements, shape, grids[1])
    if isinstance(ranges, Keep):
        alone = _pairs(requirements.min_tokens, shape, causal, 0)
        return Keep("short sequence", alone.value, alone.accepted, by_settings=True) if alone.known_short else ranges
    named, masked = ranges, call.attn_mask is not None
    order, ranges = token_order(requirements.order, call.query, call.key, causal, grids, masked=masked, ranges=named)
    forced = forced_tokens(ranges)
    pairs = _pairs(requirements.min_tokens, shape, causal, forced)
    if pairs.known_short:
        return Keep("short sequence", pairs.value, pairs.accepted, by_settings=True)
    refused = _refuse_form(call, requirements) or _refuse_causal(call, shape)
    if refused is not None:
        return refused
    masks = split_mask(call) if call.attn_mask is not None else Masks(segments=call.segments)
    if isinstance(masks, Obstacle):
        return Keep(masks.reason, masks.value, masks.accepted)
    if pairs.known_late:
        return Keep("the number of tokens is known only at run time", pairs.value, "min_tokens=0")
    # A condition on a symbolic size becomes a guard of the graph: below it, the call has to be dense again.
    if not pairs.enough:
        return Keep("short sequence", pairs.value, pairs.accepted, pairs.condition(enough=False), by_settings=True)
    whole = Rewrite(
        shape=shape,
        scale=float(call.scale) if call.scale is not None else int(shape.head_dim) ** -0.5,
        condition=pairs.condition(enough=True),
        key_mask=masks.keys,
        query_mask=masks.queries,
        causal=causal,
        group=int(shape.heads) // int(_example(call.key).shape[1]),
        always_critical=ranges,
        order=order,
        shards=_shards(call),
        mean_if_masked=call.mean_if_masked,
    )
    return _in_segments(whole, masks.segments, named, pairs) if masks.segments else whole


def _in_segments(
    whole: Rewrite, segments: tuple[Segment, ...], ranges: tuple[int, ...], pairs: SkippablePairs
) -> Decision:
    """``whole`` where its mask makes ``segments``; ``ranges`` are those that are critical, in the model's order."""
    if segments == (Segment(0, pairs.tokens, 0, pairs.tokens if pairs.keys is None else pairs.keys),):
        return whole
    each = sum(segment.pairs for segment in segments) // len(segments)
    if each < pairs.min_tokens**2:
        value = f"{pairs.value}, {len(segments)} runs of queries with {each} pairs of tokens on average"
        accepted = f"min_tokens={pairs.min_tokens} squared pairs for a run, on average"
        return Keep("short sequence", value, accepted, by_settings=True)
    order = whole.order
    if (order.queries, order.keys) != (None, None):
        order = TokenOrder(obstacle="queries that see different ranges of keys need the model's own order")
    return replace(whole, segments=segments, always_critical=ranges, order=order)


def _ranges(call: AttentionCall, requirements: Requirements, shape: Shape, seen: Grid | None) -> tuple[int, ...] | Keep:
    """``always_critical`` as start, stop, start, stop, ... of the keys, of which ``seen`` is the grid."""
    wanted = requirements.always_critical
    if isinstance(wanted, str):
        outside = outside_grid(requirements.order, call.key, seen)
        if isinstance(outside, str):
            accepted = "a grid among the keys (grid=, grid_start=), or ranges of tokens"
            return Keep(f"which tokens are text is not known, for always_critical={wanted!r}", outside, accepted)
        wanted = outside
    try:
        return token_ranges(wanted, shape.tokens if shape.keys is None else shape.keys)
    except UnknownRange as error:
        accepted = "both numbers of a range from one end, or dynamic=False"
        return Keep("always_critical has a range of unknown size", str(error), accepted)


def _pairs(min_tokens: int | None, shape: Shape, causal: bool, forced: int) -> SkippablePairs:
    device = shape.device.type
    least, default_on = (default_min_tokens(device), device) if min_tokens is None else (min_tokens, "")
    return SkippablePairs(shape.tokens, shape.keys, causal, forced, least, default_on)


def _refuse_obstacle(call: AttentionCall) -> Keep | None:
    obstacle = call.obstacle
    return None if obstacle is None else Keep(obstacle.reason, obstacle.value, obstacle.accepted)


def _shards(call: AttentionCall) -> HeadShards | Exchanged | None:
    found = sharding(call.query)
    return found if isinstance(found, HeadShards) else exchanged((call.query, call.key, call.value))


def _refuse_sharded(call: AttentionCall) -> Keep | None:
    """Where each rank has another part of an attention than some of its heads."""
    found = {name: sharding(getattr(call, name)) for name in ("query", "key", "value")}
    for name, how in found.items():
        if isinstance(how, Obstacle):
            return Keep(how.reason, f"the {name} is of {how.value}", how.accepted)
    if len(set(found.values())) > 1:
        whole = ", ".join(name for name, how in found.items() if how is None)
        return Keep("tensor parallelism", f"another part of the heads of the {whole or 'key'}", SAME_HEADS)
    return None


def _refuse_form(call: AttentionCall, requirements: Requirements) -> Keep | None:
    if call.dropout_p != 0.0:
        return Keep("attention dropout", f"dropout_p={call.dropout_p}", "dropout_p=0.0")
    for name in ("is_causal", "enable_gqa"):
        if type(getattr(call, name)) is not bool:
            return Keep(f"{name} is not fixed", _describe(getattr(call, name)), "True or False")
    scale = call.scale
    if scale is not None and (type(scale) not in (int, float) or not math.isfinite(scale)):
        return Keep("scale is not a fixed number", f"scale={_describe(scale)}", "a finite number or None")
    return _refuse_heads(call, requirements.per_head) if requirements.per_head or requirements.by_head else None


def _refuse_heads(call: AttentionCall, per_head: bool) -> Keep | None:
    """Where the second axis of (B, H, N, D) is another than the heads; of a gate for each head also where it may be."""
    accepted = '(B, H, N, D) tensors, or settings that heads share (linear="marginal", gate="shared")'
    if call.merged_heads:  # of which a number is one for all
        return Keep("batch and heads are one axis", _describe(call.query), accepted) if per_head else None
    told = {split_off(side, (0, 1), beside=None if per_head else 3) for side in (call.query, call.key, call.value)}
    if 0 in told:
        return Keep("heads are where the batch should be", _describe(call.query), accepted)
    if per_head and call.mixed_heads and 1 not in told:
        return Keep("batch and heads are in different orders", _describe(call.query), accepted)
    return None


def _refuse_causal(call: AttentionCall, shape: Shape) -> Keep | None:
    if call.is_causal and shape.keys is not None:
        return Keep("causal cross-attention", f"{shape.tokens} queries, {shape.keys} keys", "as many queries as keys")
    if call.is_causal and call.attn_mask is not None:
        return Keep("causal attention with a mask", _describe(call.attn_mask), "one of the two")
    return None


def _refuse_tensors(call: AttentionCall, requirements: Requirements) -> Keep | None:
    values = {name: _example(getattr(call, name)) for name in ("query", "key", "value")}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            return Keep(f"the shape of the {name} is unknown", str(value), "a traced tensor")
        if value.dim() != 4:
            return Keep(f"{name} has {value.dim()} dimensions", _shape(value), "(B, H, N, D)")
    device, dtype = values["query"].device, _dtype(call)
    known = requirements.dtypes.get(device.type)
    if known is None:
        return Keep("no kernels for this device", device.type, ", ".join(requirements.dtypes))
    if dtype not in known:
        return Keep(f"no kernels for this dtype on {device.type}", _name(dtype), ", ".join(map(_name, known)))
    return None


def _refuse_lengths(call: AttentionCall, cross_attention: bool) -> Keep | None:
    query, key, value = (_example(node) for node in (call.query, call.key, call.value))
    if not isinstance(query.shape[1], int) or not isinstance(query.shape[3], int):
        return Keep("heads and head dimension must be fixed", _shape(query), "sizes that are not symbolic")
    if not MIN_HEAD_DIM <= query.shape[-1] <= MAX_HEAD_DIM:
        return Keep("head dimension out of range", str(query.shape[-1]), f"{MIN_HEAD_DIM} to {MAX_HEAD_DIM}")
    if not cross_attention and not statically_known_true(query.shape[2] == key.shape[2]):
        got = f"{query.shape[2]} queries, {key.shape[2]} keys"
        return Keep(
            "cross-attention", got, "as many queries as keys, provably, or cross_attention=True", by_settings=True
        )
    if not cross_attention and of_different_tensors(call.query, call.key):
        got = f"{query.shape[2]} queries, as many keys of other tokens"
        accepted = "queries and keys of the same tokens, or cross_attention=True"
        return Keep("cross-attention", got, accepted, by_settings=True)
    heads = key.shape[1]
    grouped = call.enable_gqa is True and isinstance(heads, int) and heads > 0 and query.shape[1] % heads == 0
    wanted = (query.shape[0], heads if grouped else query.shape[1], key.shape[2], query.shape[3])
    for name, tensor in (("key", key), ("value", value)):
        for axis, size in enumerate(wanted):
            if not statically_known_true(tensor.shape[axis] == size):
                return Keep(f"query and {name} differ in shape", f"{_shape(query)}, {_shape(tensor)}", "equal")
    return None


def example_shape(call: AttentionCall) -> Shape | None:
    """The sizes of ``call`` as traced; None where its queries are not a traced tensor (B, H, N, D)."""
    query, key = _example(call.query), _example(call.key)
    if not isinstance(query, torch.Tensor) or query.dim() != 4:
        return None
    (batch, heads, tokens, head_dim), kind = query.shape, (_dtype(call), query.device)
    if not isinstance(key, torch.Tensor) or key.dim() != 4:
        return Shape(batch, heads, tokens, head_dim, *kind)
    keys = None if statically_known_true(tokens == key.shape[2]) else key.shape[2]
    of_keys = key.shape[1]
    grouped = type(heads) is type(of_keys) is int and 0 < of_keys < heads and heads % of_keys == 0
    return Shape(batch, heads, tokens, head_dim, *kind, keys, of_keys if grouped else None)


def _dtype(call: AttentionCall) -> torch.dtype:
    """The dtype attention runs in: its output's, since autocast may cast queries, keys and values on the way."""
    output = _example(call.node)
    dtype: torch.dtype = (output if isinstance(output, torch.Tensor) else _example(call.query)).dtype
    return dtype


def _describe(argument: Any) -> str:
    value = _example(argument)
    if isinstance(value, torch.Tensor):
        return f"a {_name(value.dtype)} tensor {_shape(value)}"
    return str(value)


def _shape(tensor: torch.Tensor) -> str:
    return "(" + ", ".join(str(size) for size in tensor.shape) + ")"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
