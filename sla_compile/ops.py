"""The library ops ``sla::forward`` and ``sla::backward``, and `sparse_linear_attention` over them.

Importing this module registers the ops; a device's kernels are imported when an op first runs on it. Every
check stands in plain Python that Dynamo traces, and again inside the op for those who call that directly.
Axes: B batch, H heads, N tokens, D head dimension, Tm = ceil(N / block_q), Tn = ceil(N / block_k).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sla_compile.blocks import num_blocks, num_critical, num_negligible

__all__ = ["FEATURE_MAPS", "LINEAR_BRANCHES", "sparse_linear_attention"]

FEATURE_MAPS = ("softmax", "elu", "relu")
LINEAR_BRANCHES = ("marginal", "all", "none")
_BLOCKS = (16, 32, 64, 128, 256)
_HEAD_DIMS = (16, 256)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DEVICES = ("cpu", "cuda")
_AXES = "(batch, heads, tokens, head dimension)"


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    topk: float = 0.05,
    bottomk: float = 0.10,
    block_q: int = 64,
    block_k: int = 64,
    feature_map: str = "softmax",
    linear: str = "marginal",
) -> Tensor:
    """Self-attention (B, H, N, D): exact on critical blocks, linear on marginal, none on negligible.

    The output is O^s + O^l weight^T + bias (arXiv 2509.24006, section 4), in q's dtype, a view of
    (B, N, H, D) memory. Differentiable once in all five tensors. On CPU and CUDA; autocast casts q, k, v.

    Args:
        q, k, v: (B, H, N, D) of one shape, dtype and device, any strides; D from 16 to 256; float32, float16
            or bfloat16, on the CPU float64 too.
        weight: the gate, (D, D) shared by the heads or (H, D, D), any floating dtype; None: no linear branch.
        bias: (D) or (H, D), any floating dtype; None: zero.
        scale: factor of the logits; None: 1 / sqrt(D).
        topk: share of a row's key blocks that is critical, in (0, 1]; at least one block is.
        bottomk: share that is negligible, in [0, 1); topk + bottomk <= 1.
        block_q, block_k: tokens in a block, a power of two from 16 to 256.
        feature_map: phi of the linear branch: "softmax" over the head axis, "elu" (elu(x) + 1) or "relu".
        linear: key blocks that the linear branch sums: "marginal" (the paper), "all" (the authors' released
            code) or "none" (no linear branch).

    Raises:
        TypeError: an argument of the wrong type, or a dtype that is not accepted.
        ValueError: a value or shape that is not accepted.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name in "qkv"):
            raise TypeError(f"{name} is {type(tensor).__name__}, accepted is a torch.Tensor")
    for name, number in (("scale", scale), ("topk", topk), ("bottomk", bottomk)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            if name == "scale" and number is None:
                continue
            raise TypeError(f"{name}={number!r}, accepted is a number")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"{name}={block!r}, accepted is an int, one of {_BLOCKS}")
    for name, word in (("feature_map", feature_map), ("linear", linear)):
        if not isinstance(word, str):
            raise TypeError(f"{name}={word!r}, accepted is a str")
    if scale is None:
        _check_activations(q, k, v)
        scale = 1.0 / math.sqrt(q.shape[3])
    _check(q, k, v, weight, bias, scale, topk, bottomk, block_q, block_k, feature_map, linear)
    out, _, _, _ = torch.ops.sla.forward.default(
        q, k, v, weight, bias, scale, topk, bottomk, block_q, block_k, feature_map, linear
    )
    return out  # type: ignore[no-any-return]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    topk: float,
    bottomk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
) -> None:
    """Raise ValueError or TypeError for arguments that no kernel accepts."""
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale={scale}, accepted is a finite number")
    if not 0 < topk <= 1:
        raise ValueError(f"topk={topk}, accepted is 0 < topk <= 1")
    if not 0 <= bottomk < 1:
        raise ValueError(f"bottomk={bottomk}, accepted is 0 <= bottomk < 1")
    if topk + bottomk > 1 + 1e-12:
        raise ValueError(
            f"topk={topk} and bottomk={bottomk} add up to {topk + bottomk}, accepted is at most 1"
        )
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block not in _BLOCKS:
            raise ValueError(f"{name}={block}, accepted is one of {_BLOCKS}")
    _check_name("feature_map", feature_map, FEATURE_MAPS)
    _check_name("linear", linear, LINEAR_BRANCHES)
    _check_activations(q, k, v)
    heads, dim = q.shape[1], q.shape[3]
    for name, gate, shared in (("weight", weight, (dim, dim)), ("bias", bias, (dim,))):
        if gate is not None:
            _check_gate(name, gate, shared, (heads, *shared), q.device)


def _check_name(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{argument}={value!r}, accepted is one of {known}; nearest is {nearest!r}")


def _check_activations(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, accepted are four axes {_AXES}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}, accepted are {', '.join(map(str, _DTYPES))}")
    for name, x in (("k", k), ("v", v)):
        if _effective_dtype(x) != _effective_dtype(q):
            raise TypeError(f"{name} has dtype {x.dtype}, accepted is that of q, {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, accepted is the device of q, {q.device}")
        if x.shape != q.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, accepted is that of q, {tuple(q.shape)}: this is "
                "self-attention with as many key heads as query heads"
            )
    if not _HEAD_DIMS[0] <= q.shape[3] <= _HEAD_DIMS[1]:
        raise ValueError(f"head dimension {q.shape[3]}, accepted is {_HEAD_DIMS[0]} to {_HEAD_DIMS[1]}")
    if q.shape[2] < 1:
        raise ValueError("q has no tokens, accepted is at least one")


def _effective_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or that which autocast gives it; float64 stays, as in torch's own rules."""
    device = x.device.type
    eligible = device in _DEVICES and x.is_floating_point() and x.dtype != torch.float64
    if eligible and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _check_gate(
    name: str, gate: Tensor, shared: tuple[int, ...], per_head: tuple[int, ...], device: torch.device
) -> None:
    if gate.dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {gate.dtype}, accepted are {', '.join(map(str, _DTYPES))}")
    if gate.device != device:
        raise ValueError(f"{name} is on {gate.device}, accepted is the device of q, {device}")
    if tuple(gate.shape) != (shared if gate.dim() == len(shared) else per_head):
        raise ValueError(f"{name} has shape {tuple(gate.shape)}, accepted are {shared} or {per_head}")


def _kernels(q: Tensor) -> ModuleType:
    """The kernels for q's device, imported at their first run."""
    if q.device.type == "cpu":
        return import_module("sla_compile.kernels.cpu")
    if q.device.type != "cuda":
        raise ValueError(
            f"q is on {q.device}, accepted are cpu and cuda: sla has no kernel for another device"
        )
    if q.dtype == torch.float64:
        raise TypeError("q has dtype torch.float64 on cuda, accepted there are float32, float16 and bfloat16")
    return import_module("sla_compile.kernels.triton_attention")


def _counts(tokens: Any, topk: float, bottomk: float, block_k: int) -> tuple[Any, Any]:
    """Critical and negligible key blocks in a row."""
    key_blocks = num_blocks(tokens, block_k)
    critical = num_critical(topk, key_blocks)
    return critical, num_negligible(bottomk, critical, key_blocks)


@torch.library.custom_op(
    "sla::forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor? bias, float scale, float topk, "
    "float bottomk, int block_q, int block_k, str feature_map, str linear) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    topk: float,
    bottomk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out and linear_out (B, H, N, D), lse (B, H, N), block_map (B, H, Tm, Tn)."""
    _check(q, k, v, weight, bias, scale, topk, bottomk, block_q, block_k, feature_map, linear)
    critical, negligible = _counts(q.shape[2], topk, bottomk, block_k)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _kernels(q).forward(
        q,
        k,
        v,
        weight,
        bias,
        scale=scale,
        critical=critical,
        negligible=negligible,
        block_q=block_q,
        block_k=block_k,
        feature_map=feature_map,
        linear=linear,
    )
    return result


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    topk: float,
    bottomk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(q, k, v, weight, bias, scale, topk, bottomk, block_q, block_k, feature_map, linear)
    batch, heads, tokens, _ = q.shape
    branch = weight is not None and linear != "none"
    return (
        _token_major(q),
        _token_major(q) if branch else q.new_empty(0),
        q.new_empty(batch, heads, tokens, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32),
        q.new_empty(batch, heads, num_blocks(tokens, block_q), num_blocks(tokens, block_k), dtype=torch.int8),
    )


def _token_major(q: Tensor) -> Tensor:
    """An empty (B, H, N, D) whose memory is (B, N, H, D), as models read attention's output."""
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


@torch.library.custom_op(
    "sla::backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor? bias, Tensor out, "
    "Tensor linear_out, Tensor lse, Tensor block_map, float scale, int block_q, int block_k, "
    "str feature_map, str linear) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    linear_out: Tensor,
    lse: Tensor,
    block_map: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dweight, dbias); shape (0,) for a gate tensor that is None."""
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _kernels(q).backward(
        grad_out,
        q,
        k,
        v,
        weight,
        bias,
        out,
        linear_out,
        lse,
        block_map,
        scale=scale,
        block_q=block_q,
        block_k=block_k,
        feature_map=feature_map,
        linear=linear,
    )
    return result


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dweight = q.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return _token_major(q), _token_major(q), _token_major(q), dweight, dbias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, linear_out, lse, block_map = output
    ctx.save_for_backward(*inputs[:5], out, linear_out, lse, block_map)
    scale, _, _, *rest = inputs[5:]
    ctx.options = (scale, *rest)
    ctx.mark_non_differentiable(linear_out, lse, block_map)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 12
    gradients = torch.ops.sla.backward.default(grad_out, *ctx.saved_tensors, *ctx.options)
    wanted = (g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, *(None,) * 7)


def _refuse_double_backward(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "sparse_linear_attention is differentiable once: there is no double backward (create_graph=True)"
    )


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_refuse_double_backward)


def _autocast_forward(device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    """The op under autocast: q, k, v in its dtype, the gates as they are."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        activations = [x.to(_effective_dtype(x)) for x in (q, k, v)]
        with torch.autocast(device_type, enabled=False):
            result: tuple[Tensor, ...] = torch.ops.sla.forward.default(*activations, *rest)
        return result

    return forward


def _autocast_backward(device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    """A backward called inside autocast: the kernels choose their own dtypes."""

    def backward(*args: Any) -> tuple[Tensor, ...]:
        with torch.autocast(device_type, enabled=False):
            result: tuple[Tensor, ...] = torch.ops.sla.backward.default(*args)
        return result

    return backward


# kept alive: the registrations end with it
_autocast_rules = torch.library.Library("sla", "FRAGMENT")  # type: ignore[no-untyped-call]
for _device, _key in zip(_DEVICES, ("AutocastCPU", "AutocastCUDA"), strict=True):
    _autocast_rules.impl("forward", _autocast_forward(_device), _key)  # type: ignore[no-untyped-call]
    _autocast_rules.impl("backward", _autocast_backward(_device), _key)  # type: ignore[no-untyped-call]
