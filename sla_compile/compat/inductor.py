"""Inductor: a lowering of our own, options under which its gradients are right, and where kernels are cached."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.torch_version import TorchVersion

__all__ = ["lower_gather", "mixed_reductions", "sound_options", "triton_cache_folder"]


def lower_gather(op: Any, table: Callable[..., torch.Tensor]) -> None:
    """Let Inductor inline ``op``, a gather of x (..., N, D) along N, into what reads and what makes x.

    ``table`` gives the order, (N) or for x (B, H, N, D) one of each head (H, N), for N, the device of x and the op's
    other arguments; it becomes a constant of the graph. In a backward the result is written out. Remove when a
    decomposition can have a tensor constant of its own.
    """
    import sympy
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V
    from torch._inductor.virtualized import ops as primitives
    from torch.utils._python_dispatch import _disable_current_modes

    fallback: Any = lowering.fallback_handler
    if op in lowering.lowerings:
        return

    def gather(x: Any, *arguments: Any) -> Any:
        *_, tokens, _dims = sizes = x.get_size()
        if not isinstance(tokens, int | sympy.Integer):
            return fallback(op, add_to_fallback_set=False)(x, *arguments)
        with _disable_current_modes():  # the table is a real tensor, whatever is traced around
            order = table(int(tokens), x.get_device(), *arguments)
        load, place = x.make_loader(), V.graph.add_tensor_constant(order).make_loader()

        def element(index: Any) -> Any:
            at = place([*index[1:-2], index[-2]] if order.dim() == 2 else [index[-2]])
            token = primitives.indirect_indexing(at, tokens, check=False, wrap_neg=False)
            return load([*index[:-2], token, index[-1]])

        gathered = ir.Pointwise.create(device=x.get_device(), dtype=x.get_dtype(), inner_fn=element, ranges=sizes)
        if V.graph.is_backward:  # shifts' and scales' gradients sum over tokens: not over what is looked up each time
            gathered.realize()
        return gathered

    lowering.register_lowering(op, type_promotion_kind=None)(gather)


def sound_options(version: str = torch.__version__) -> dict[str, bool]:
    """Inductor's options without which its backward of a modulated norm is wrong, where the user sets no other.

    Before torch 2.15 a reduction over tokens that is fused with one over channels does not write its result to a buffer
    that it shares: on GPUs, from about 16k tokens, gradients of a ``scale_shift_table``, or of modulation by one
    sample, are memory that nothing wrote (pytorch#193061). In 2.11 some have a wrong shape too (pytorch#178080).
    Remove when the oldest torch is 2.15. ``TORCHINDUCTOR_MIX_ORDER_REDUCTION`` in the environment is the user's word.
    """
    if "TORCHINDUCTOR_MIX_ORDER_REDUCTION" in os.environ or TorchVersion(version) >= "2.15":
        return {}
    return {"triton.mix_order_reduction": False}


def mixed_reductions(version: str = torch.__version__) -> tuple[bool, bool]:
    """Whether Inductor makes the wrong reductions of `sound_options` now: in this backend's graphs, and in others'.

    An option of a single compile is not seen. Remove with `sound_options`.
    """
    from torch._inductor import config

    on = TorchVersion(version) < "2.15" and bool(getattr(config.triton, "mix_order_reduction", False))
    return on and not sound_options(version), on


def triton_cache_folder(device: torch.device) -> str:
    """Where Triton caches on disk from now on: where Inductor has it cache, which it settles with its first kernel.

    A graph need not have one, and its attention's kernels would be looked for elsewhere. Remove when torch tells where.
    """
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    index = torch.cuda.current_device() if device.index is None else device.index
    return os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(index))
