"""Decide, for one attention call, whether Sparse-Linear Attention can stand in for it exactly as configured.

A decision is data: ``Rewrite``, or ``Keep`` with the reason, the value that decided and what is accepted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla_compile.passes.call import AttentionCall
from sla_compile.passes.operands import example as _example

__all__ = ["Decision", "Keep", "Requirements", "Rewrite", "Shape", "decide", "example_shape"]

Size = int | torch.SymInt

HEAD_DIMS = (16, 256)


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention call, of its queries; each may be symbolic."""

    batch: Size
    heads: Size
    tokens: Size
    head_dim: Size
    dtype: torch.dtype
    device: torch.device
    self_attention: bool = True

    @property
    def sizes(self) -> dict[str, Size]:
        """The four sizes by name."""
        return {
            "batch": self.batch,
            "heads": self.heads,
            "tokens": self.tokens,
            "head_dim": self.head_dim,
        }


@dataclass(frozen=True)
class Rewrite:
    """The call becomes Sparse-Linear Attention. ``condition`` is the guard that this added, if any."""

    shape: Shape
    scale: float
    condition: str | None = None


@dataclass(frozen=True)
class Keep:
    """The call stays dense: why, the value that decided, and what would be accepted."""

    reason: str
    value: str = ""
    accepted: str = ""

    def __str__(self) -> str:
        detail = f": {self.value}" if self.value else ""
        return f"{self.reason}{detail}" + (f" (accepted: {self.accepted})" if self.accepted else "")


Decision = Rewrite | Keep


@dataclass(frozen=True)
class Requirements:
    """What the caller knows and the passes must not: the threshold, dtypes that a device has kernels for, and
    whether each head has a gate of its own."""

    min_tokens: int
    dtypes: dict[str, tuple[torch.dtype, ...]]
    per_head: bool = False


def decide(call: AttentionCall, requirements: Requirements) -> Decision:
    """Rewrite or Keep for ``call``; adds no shape guard except where the number of tokens decides."""
    return (
        _refuse_form(call, requirements)
        or _refuse_tensors(call, requirements)
        or _refuse_lengths(call)
        or _by_tokens(call, requirements.min_tokens)
    )


def _refuse_form(call: AttentionCall, requirements: Requirements) -> Keep | None:
    if (obstacle := call.obstacle) is not None:
        return Keep(obstacle.reason, obstacle.value, obstacle.accepted)
    if call.attn_mask is not None:
        return Keep("attention mask", _describe(call.attn_mask), "attn_mask=None")
    if call.dropout_p != 0.0:
        return Keep("attention dropout", f"dropout_p={call.dropout_p}", "dropout_p=0.0")
    if call.is_causal is not False:
        return Keep("causal attention", f"is_causal={call.is_causal}", "is_causal=False")
    if call.enable_gqa is not False:
        return Keep("grouped-query attention", f"enable_gqa={call.enable_gqa}", "enable_gqa=False")
    scale = call.scale
    if scale is not None and (type(scale) not in (int, float) or not math.isfinite(scale)):
        return Keep("scale is not a fixed number", f"scale={_describe(scale)}", "a finite number or None")
    if call.merged_heads and requirements.per_head:
        return Keep("batch and heads are one axis", _describe(call.query), 'gate="shared", or (B, H, N, D) tensors')
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


def _refuse_lengths(call: AttentionCall) -> Keep | None:
    query, key, value = (_example(node) for node in (call.query, call.key, call.value))
    least, most = HEAD_DIMS
    if not isinstance(query.shape[1], int) or not isinstance(query.shape[3], int):
        return Keep("heads and head dimension must be fixed", _shape(query), "sizes that are not symbolic")
    if not least <= query.shape[-1] <= most:
        return Keep("head dimension out of range", str(query.shape[-1]), f"{least} to {most}")
    if not statically_known_true(query.shape[2] == key.shape[2]):
        got = f"{query.shape[2]} queries, {key.shape[2]} keys"
        return Keep("cross-attention", got, "as many queries as keys, provably")
    for name, tensor in (("key", key), ("value", value)):
        for axis, size in enumerate(query.shape):
            if not statically_known_true(tensor.shape[axis] == size):
                return Keep(f"query and {name} differ in shape", f"{_shape(query)}, {_shape(tensor)}", "equal")
    return None


def _by_tokens(call: AttentionCall, min_tokens: int) -> Decision:
    shape = example_shape(call)
    if shape is None:
        raise AssertionError("the shape was checked before")
    tokens = shape.tokens
    # A condition on a symbolic size becomes a guard of the graph: below it, the call has to be dense again.
    if not tokens >= min_tokens:
        return Keep("short sequence", f"{tokens} tokens", f"at least min_tokens={min_tokens}")
    known = isinstance(tokens, int) or min_tokens <= 1
    return Rewrite(
        shape=shape,
        scale=float(call.scale) if call.scale is not None else int(shape.head_dim) ** -0.5,
        condition=None if known else f"{tokens} >= {min_tokens}",
    )


def example_shape(call: AttentionCall) -> Shape | None:
    """The sizes of ``call`` as traced; None where its queries are not a traced tensor (B, H, N, D)."""
    query, key = _example(call.query), _example(call.key)
    if not isinstance(query, torch.Tensor) or query.dim() != 4:
        return None
    same = isinstance(key, torch.Tensor) and key.dim() == 4
    same = same and statically_known_true(query.shape[2] == key.shape[2])
    batch, heads, tokens, head_dim = query.shape
    return Shape(batch, heads, tokens, head_dim, _dtype(call), query.device, self_attention=same)


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
