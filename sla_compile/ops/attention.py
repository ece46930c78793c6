"""The library ops ``sla::forward`` and ``sla::backward``, and `sparse_linear_attention` over them.

Importing this module registers the ops; a device's kernels are imported when an op first runs on it. Every
check stands in plain Python that Dynamo traces, and again inside the op for those who call that directly.
Axes: B batch, H heads, Hk heads of keys and values, Lq queries, Lk keys, D head dimension, Tm = ceil(Lq / block_q),
Tn = ceil(Lk / block_k).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sla_compile.ops.reorder  # noqa: F401  the library op beside these
from sla_compile.common.blocks import num_blocks
from sla_compile.common.kernel_interface import (
    AttentionInputs,
    ForwardResult,
    Kernels,
    has_linear_branch,
    kept_numbers,
    kept_rows,
)
from sla_compile.common.limits import TAYLOR
from sla_compile.common.options import AttentionOptions, BackwardOptions
from sla_compile.compat import has_tangent
from sla_compile.config_shares import default_bottomk
from sla_compile.memory import count_run
from sla_compile.ops.run_watchers import show_run
from sla_compile.ops.validation import (
    DEVICES,
    check,
    check_activations,
    check_types,
    effective_dtype,
)

__all__ = ["sparse_linear_attention"]


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    sparsity: Tensor | None = None,
    shift: Tensor | None = None,
    scale: float | None = None,
    topk: float = 0.05,
    bottomk: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    feature_map: str = "softmax",
    linear: str,
    causal: bool = False,
    always_critical: list[int] | None = None,
) -> Tensor:
    """Attention (B, H, Lq, D): exact on critical blocks, linear on marginal, none on negligible.

    O^s + O^l weight^T + bias (arXiv 2509.24006, section 4), or with ``linear="taylor"`` one softmax over critical keys
    and a virtual key for each marginal block; in q's dtype, a view of (B, Lq, H, D) memory. Differentiable once, in
    reverse mode, in q, k, v, weight, bias and shift. On CPU and CUDA; autocast casts q, k, v. Raises TypeError or
    ValueError for an argument that is not accepted.

    Args:
        q, k, v: (B, H, Lq, D) and twice (B, Hk, Lk, D), any strides, one dtype and device; D from 16 to 256;
            float32, float16 or bfloat16, on the CPU float64 too. Hk divides H: query head h has key head h // (H / Hk).
        weight: the gate, (D, D) shared by the heads or (H, D, D), any floating dtype; None: no linear branch.
        bias: (D) or (H, D), any floating dtype; None: zero.
        key_mask: (B, Lk) or (1, Lk), bool (true: attend) or additive, which gets no gradient: key j's weight is 0 or
            exp(b_j), and 64 or more below its row's largest is masked. A query without a key gets O^s = 0.
        sparsity: int64 (2,) or (H, 2): topk (at most the one below) and bottomk in millionths, read when it runs.
        shift: with "taylor", (H), any floating dtype: added to the logits of virtual keys; None: zero.
        scale: factor of the logits; None: 1 / sqrt(D).
        topk, bottomk: shares of a row's key blocks: critical, in (0, 1]; negligible, in [0, 1), None: as in SLAConfig.
        block_q, block_k: tokens in a block, a power of two from 16 to 256.
        feature_map: phi of the linear branch: "softmax" over the head axis, "elu" (elu(x) + 1) or "relu".
        linear: "taylor"; or a linear branch over the "marginal" blocks (paper), "all" (the authors' code) or "none".
        causal: key j for queries from j on; blocks on the diagonal are critical, shares are of those below it.
        always_critical: token ranges [start, stop, ...] of k, as in slices, whose blocks are critical besides.
    """
    tensors: dict[str, Any] = {"q": q, "k": k, "v": v, "weight": weight, "bias": bias, "key_mask": key_mask}
    tensors |= {"sparsity": sparsity, "shift": shift}
    options: dict[str, Any] = {"scale": scale, "topk": topk, "bottomk": bottomk, "block_q": block_q, "block_k": block_k}
    options |= {"feature_map": feature_map, "linear": linear, "causal": causal, "always_critical": always_critical}
    check_types(tensors, options)
    if scale is None:
        check_activations(q, k, v)
        options["scale"] = 1.0 / math.sqrt(q.shape[3])
    options["bottomk"] = default_bottomk(topk, linear) if bottomk is None else bottomk
    checked = {**options, "always_critical": tuple(always_critical or ())}
    check(AttentionInputs(**tensors), AttentionOptions(**checked))
    if not torch.compiler.is_compiling():
        _refuse_tangents(q, k, v, weight, bias, shift)
        _let_flops_be_counted()
    _refuse_mask_gradient(key_mask)
    return torch.ops.sla.forward.default(**tensors, **options)[0]  # type: ignore[no-any-return]


_NUM_INPUTS = 17  # of sla::forward


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError in forward mode, where the op would give a tangent of zero."""
    if has_tangent(*tensors):
        raise NotImplementedError(
            "sparse_linear_attention has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): "
            "differentiate it in reverse mode, or leave the attention dense"
        )


def _refuse_mask_gradient(key_mask: Tensor | None) -> None:
    """Raise ValueError for a mask that would get a gradient of zero."""
    if key_mask is not None and key_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("key_mask requires a gradient, accepted is a mask without one: sla computes none for it")


def _let_flops_be_counted() -> None:
    """Register the FLOP formulas where PyTorch's counter was imported after these ops."""
    if "torch.utils.flop_counter" in sys.modules:
        import sla_compile.ops.flops  # noqa: F401


def _kernels(q: Tensor) -> Kernels:
    """The kernels for q's device, imported at their first run."""
    if q.device.type == "cpu":
        from sla_compile.kernels.cpu import attention as cpu

        return cpu
    if q.device.type != "cuda":
        raise ValueError(f"q is on {q.device}, accepted are cpu and cuda: sla has no kernel for another device")
    if q.dtype == torch.float64:
        raise TypeError("q has dtype torch.float64 on cuda, accepted there are float32, float16 and bfloat16")
    from sla_compile.kernels.triton import attention as triton

    return triton


@torch.library.custom_op(
    "sla::forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor? bias, Tensor? key_mask, Tensor? sparsity, "
    "float scale, float topk, float bottomk, int block_q, int block_k, str feature_map, str linear, "
    "bool causal=False, int[]? always_critical=None, Tensor? shift=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    sparsity: Tensor | None,
    scale: float,
    topk: float,
    bottomk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
    causal: bool = False,
    always_critical: list[int] | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All of `ForwardResult`; its sums have no row where none is kept."""
    inputs = AttentionInputs(q, k, v, weight, bias, key_mask, sparsity, shift)
    options = AttentionOptions(
        scale=scale,
        topk=topk,
        bottomk=bottomk,
        block_q=block_q,
        block_k=block_k,
        feature_map=feature_map,
        linear=linear,
        causal=causal,
        always_critical=tuple(always_critical or ()),
    )
    check(inputs, options)
    _refuse_tangents(q, k, v, weight, bias, shift)  # functorch's do not come this far
    count_run()
    result = _kernels(q).forward(inputs, options)
    show_run(inputs, result)
    out, linear_out, lse, block_map, states, normalizers = result
    if states is None or normalizers is None:
        states, normalizers = _sums(q, 0)
    return out, linear_out, lse, block_map, states, normalizers


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    sparsity: Tensor | None,
    scale: float,
    topk: float,
    bottomk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
    causal: bool = False,
    always_critical: list[int] | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = AttentionOptions(
        scale=scale,
        topk=topk,
        bottomk=bottomk,
        block_q=block_q,
        block_k=block_k,
        feature_map=feature_map,
        linear=linear,
        causal=causal,
        always_critical=tuple(always_critical or ()),
    )
    check(AttentionInputs(q, k, v, weight, bias, key_mask, sparsity, shift), options)
    batch, heads, tokens, _ = q.shape
    if has_linear_branch(weight, options):
        linear_out = _token_major(q)
    elif q.device.type == "cuda":
        linear_out = q.new_empty(kept_numbers(q, options), dtype=torch.float32 if options.linear == TAYLOR else q.dtype)
    else:
        linear_out = q.new_empty(0)
    return (
        _token_major(q),
        linear_out,
        q.new_empty(batch, heads, tokens, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32),
        q.new_empty(batch, heads, num_blocks(tokens, block_q), num_blocks(k.shape[2], block_k), dtype=torch.int8),
        *_sums(q, kept_rows(q, weight, options) if q.device.type == "cuda" else 0),
    )


def _sums(q: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Empty sums of states and normalizers, as `ForwardResult` has them, of so many rows."""
    batch, heads, _, dim = q.shape
    state_dtype = torch.bfloat16 if q.element_size() == 2 else q.dtype
    states = q.new_empty(batch, heads, rows, dim, num_blocks(dim, 8) * 8, dtype=state_dtype)
    return states, q.new_empty(batch, heads, rows, dim, dtype=torch.float32)


def _token_major(q: Tensor) -> Tensor:
    """An empty (B, H, L, D) whose memory is (B, L, H, D), as models read attention's output."""
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


@torch.library.custom_op(
    "sla::backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor? bias, Tensor? key_mask, "
    "Tensor out, Tensor linear_out, Tensor lse, Tensor block_map, Tensor state_sums, Tensor normalizer_sums, "
    "float scale, int block_q, int block_k, str feature_map, str linear, bool causal=False, Tensor? shift=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    linear_out: Tensor,
    lse: Tensor,
    block_map: Tensor,
    state_sums: Tensor,
    normalizer_sums: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
    causal: bool = False,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dweight, dbias, dshift); shape (0,) for a gate tensor that is None."""
    inputs = AttentionInputs(q, k, v, weight, bias, key_mask, None, shift)
    result = ForwardResult(out, linear_out, lse, block_map, state_sums, normalizer_sums)
    options = BackwardOptions(
        scale=scale, block_q=block_q, block_k=block_k, feature_map=feature_map, linear=linear, causal=causal
    )
    return _kernels(q).backward(grad_out, inputs, result, options)


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    linear_out: Tensor,
    lse: Tensor,
    block_map: Tensor,
    state_sums: Tensor,
    normalizer_sums: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
    causal: bool = False,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate = (weight, bias, shift)
    dweight, dbias, dshift = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in gate)
    return _token_major(q), _token_major(k), _token_major(v), dweight, dbias, dshift


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, *others = output
    # autograd shows the inputs with the schema's defaults filled in
    *tensors, _, scale, _, _, block_q, block_k, feature_map, linear, causal, _, shift = inputs
    ctx.save_for_backward(*tensors, out, *others, shift)
    ctx.options = (scale, block_q, block_k, feature_map, linear, causal)
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * _NUM_INPUTS
    *tensors, shift = ctx.saved_tensors
    *gradients, dshift = torch.ops.sla.backward.default(grad_out, *tensors, *ctx.options, shift)
    every = (*gradients, *(None,) * (_NUM_INPUTS - 6), dshift)
    # arguments left at their defaults are not among those that may need one
    needed: tuple[bool, ...] = ctx.needs_input_grad
    needed += (False,) * (_NUM_INPUTS - len(needed))
    return tuple(g if wanted else None for g, wanted in zip(every, needed, strict=True))


def _refuse_double_backward(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "sparse_linear_attention is differentiable once: there is no double backward (create_graph=True)"
    )


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_refuse_double_backward)


def _autocast_forward(device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    """The op under autocast: q, k, v in its dtype, the gates as they are."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        activations = [x.to(effective_dtype(x)) for x in (q, k, v)]
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
for _device, _key in zip(DEVICES, ("AutocastCPU", "AutocastCUDA"), strict=True):
    _autocast_rules.impl("forward", _autocast_forward(_device), _key)  # type: ignore[no-untyped-call]
    _autocast_rules.impl("backward", _autocast_backward(_device), _key)  # type: ignore[no-untyped-call]
