"""What the ops accept: every check of ``sla::forward``'s arguments, in plain Python that Dynamo traces.

Axes: B batch, H heads, Lq queries, Lk keys, D head dimension.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sla_compile.common.kernel_interface import AttentionInputs
from sla_compile.common.limits import (
    BLOCK_SIZES,
    FEATURE_MAPS,
    FLOATING_DTYPES,
    LINEAR_BRANCHES,
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    TAYLOR,
)
from sla_compile.common.options import AttentionOptions

__all__ = ["DEVICES", "check", "check_activations", "check_types", "effective_dtype"]

DEVICES = ("cpu", "cuda")
_AXES = "(batch, heads, tokens, head dimension)"
_ROUNDING = 1e-12
"""By how much topk + bottomk, sums of rounded decimals, may exceed 1."""


def check_types(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument of a type that the op's schema does not take."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in "qkv"):
            raise TypeError(f"{name} is {type(tensor).__name__}, accepted is a torch.Tensor")
    for name in ("scale", "topk", "bottomk"):
        number = options[name]
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            if name in ("scale", "bottomk") and number is None:
                continue
            raise TypeError(f"{name}={number!r}, accepted is a number")
    for name in ("block_q", "block_k"):
        block = options[name]
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"{name}={block!r}, accepted is an int, one of {BLOCK_SIZES}")
    for name in ("feature_map", "linear"):
        if not isinstance(options[name], str):
            raise TypeError(f"{name}={options[name]!r}, accepted is a str")
    if not isinstance(options["causal"], bool):
        raise TypeError(f"causal={options['causal']!r}, accepted is a bool")
    ranges = options["always_critical"]
    if ranges is not None:
        whole = isinstance(ranges, (list, tuple))
        if not whole or not all(isinstance(i, int) and not isinstance(i, bool) for i in ranges):
            raise TypeError(f"always_critical={ranges!r}, accepted is a list of ints [start, stop, start, stop, ...]")


def check(inputs: AttentionInputs, options: AttentionOptions) -> None:
    """Raise ValueError or TypeError for arguments that no kernel accepts."""
    _check_options(options)
    q, k, v, weight, bias, key_mask, sparsity, shift = inputs
    check_activations(q, k, v)
    if options.causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"causal=True with {q.shape[2]} queries and {k.shape[2]} keys, accepted is one number of tokens in q and k"
        )
    _check_ranges(options.always_critical)
    heads, dim = q.shape[1], q.shape[3]
    for name, gate, shared in (("weight", weight, (dim, dim)), ("bias", bias, (dim,))):
        if gate is not None:
            _check_gate(name, gate, shared, (heads, *shared), q.device)
            if options.linear == TAYLOR:
                raise ValueError(f"{name} is given with linear='taylor', accepted there is shift alone")
    if shift is not None:
        if options.linear != TAYLOR:
            raise ValueError(f"shift is given with linear={options.linear!r}, accepted is linear='taylor'")
        _check_gate("shift", shift, (heads,), (heads,), q.device)
    if key_mask is not None:
        _check_key_mask(key_mask, k)
    if sparsity is not None:
        _check_sparsity(sparsity, heads, q.device)


def _check_options(options: AttentionOptions) -> None:
    """Raise ValueError for the first option out of its range; ``always_critical`` is left to `_check_ranges`."""
    scale, topk, bottomk = options.scale, options.topk, options.bottomk
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale={scale}, accepted is a finite number")
    if not 0 < topk <= 1:
        raise ValueError(f"topk={topk}, accepted is 0 < topk <= 1")
    if not 0 <= bottomk < 1:
        raise ValueError(f"bottomk={bottomk}, accepted is 0 <= bottomk < 1")
    if topk + bottomk > 1 + _ROUNDING:
        raise ValueError(f"topk={topk} and bottomk={bottomk} add up to {topk + bottomk}, accepted is at most 1")
    for name, block in (("block_q", options.block_q), ("block_k", options.block_k)):
        if block not in BLOCK_SIZES:
            raise ValueError(f"{name}={block}, accepted is one of {BLOCK_SIZES}")
    _check_name("feature_map", options.feature_map, FEATURE_MAPS)
    _check_name("linear", options.linear, LINEAR_BRANCHES)


def _check_name(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{argument}={value!r}, accepted is one of {known}; nearest is {nearest!r}")


def check_activations(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError or TypeError for q, k and v that do not belong together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, accepted are four axes {_AXES}")
        if x.dtype not in FLOATING_DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}, accepted are {', '.join(map(str, FLOATING_DTYPES))}")
        if x.shape[2] < 1:
            raise ValueError(f"{name} has no tokens, accepted is at least one")
    for name, x in (("k", k), ("v", v)):
        if effective_dtype(x) != effective_dtype(q):
            raise TypeError(f"{name} has dtype {x.dtype}, accepted is that of q, {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, accepted is the device of q, {q.device}")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]) or (k.shape[1] != q.shape[1] and not _is_grouped(q, k)):
        raise ValueError(
            f"k has shape {tuple(k.shape)}, accepted is that of q, {tuple(q.shape)}, but for the number of tokens, and "
            "for heads of which each serves as many query heads as any other"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}, accepted is that of k, {tuple(k.shape)}")
    if not MIN_HEAD_DIM <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"head dimension {q.shape[3]}, accepted is {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")


def _is_grouped(q: Tensor, k: Tensor) -> bool:
    """Whether each key head can serve as many query heads as any other."""
    return k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0


def effective_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or that which autocast gives it; float64 stays, as in torch's own rules."""
    device = x.device.type
    eligible = device in DEVICES and x.is_floating_point() and x.dtype != torch.float64
    if eligible and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _check_gate(
    name: str, gate: Tensor, shared: tuple[int, ...], per_head: tuple[int, ...], device: torch.device
) -> None:
    if gate.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name} has dtype {gate.dtype}, accepted are {', '.join(map(str, FLOATING_DTYPES))}")
    if gate.device != device:
        raise ValueError(f"{name} is on {gate.device}, accepted is the device of q, {device}")
    if tuple(gate.shape) != (shared if gate.dim() == len(shared) else per_head):
        accepted = f"are {shared} or {per_head}" if shared != per_head else f"is {shared}"
        raise ValueError(f"{name} has shape {tuple(gate.shape)}, accepted {accepted}")


def _check_key_mask(key_mask: Tensor, k: Tensor) -> None:
    if key_mask.dtype != torch.bool and key_mask.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"key_mask has dtype {key_mask.dtype}, accepted are torch.bool (true: attend) and, to be added to the "
            f"logits, {', '.join(map(str, FLOATING_DTYPES))}"
        )
    if key_mask.device != k.device:
        raise ValueError(f"key_mask is on {key_mask.device}, accepted is the device of q, {k.device}")
    batch, keys = k.shape[0], k.shape[2]
    if key_mask.dim() != 2 or key_mask.shape[1] != keys or (key_mask.shape[0] != 1 and key_mask.shape[0] != batch):
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)}, accepted are {(batch, keys)} or {(1, keys)}, (batch, keys)"
        )


def _check_sparsity(sparsity: Tensor, heads: int, device: torch.device) -> None:
    if sparsity.dtype != torch.int64:
        raise TypeError(f"sparsity has dtype {sparsity.dtype}, accepted is torch.int64, [topk, bottomk] in millionths")
    if sparsity.device != device:
        raise ValueError(f"sparsity is on {sparsity.device}, accepted is the device of q, {device}")
    if tuple(sparsity.shape) not in ((2,), (heads, 2)):
        raise ValueError(
            f"sparsity has shape {tuple(sparsity.shape)}, accepted are (2,), [topk, bottomk] in millionths, and "
            f"{(heads, 2)}, these of each head"
        )


def _check_ranges(ranges: tuple[int, ...]) -> None:
    if len(ranges) % 2:
        raise ValueError(
            f"always_critical={[*ranges]}, accepted is an even number of tokens [start, stop, start, stop, ...]"
        )
    for start, stop in zip(ranges[::2], ranges[1::2], strict=True):
        # from the front to the end: their order depends on the number of tokens
        if start >= stop and not (start >= 0 and stop < 0):
            raise ValueError(f"always_critical has the range {start} to {stop}, accepted is start < stop")
