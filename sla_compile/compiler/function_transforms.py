"""Transforms of ``torch.func`` inside a compiled function: the op has no rule for them, so none may reach it."""

from __future__ import annotations

from torch import fx

from sla_compile.compat import is_transformed
from sla_compile.passes.attention_call import AttentionCall
from sla_compile.passes.decide import Keep
from sla_compile.passes.find_attention import Marker
from sla_compile.passes.operands import example

__all__ = ["kept_under_transform"]


def kept_under_transform(call: AttentionCall, marker: Marker | None, path: str) -> Keep | None:
    """The decision for ``call``, to be rewritten, where a transform reaches its tensors or its gate's; else None.

    Raises ValueError where it has a gate: dense, the gate would get no gradient, and nobody would know.
    """
    tensors = [call.query, call.key, call.value, call.attn_mask, *((marker.weight, marker.bias) if marker else ())]
    if not any(is_transformed(example(tensor)) for tensor in tensors if isinstance(tensor, fx.Node)):
        return None
    if marker is not None:
        raise ValueError(
            f"{path or 'the compiled module'}: it has a gate, but a transform of torch.func (grad, vjp, jvp, vmap) "
            f"inside the compiled function reaches its attention, and sparse-linear attention has no rule for that; "
            f"accepted: torch.autograd.grad in place of the transform, or this attention in exclude"
        )
    return Keep("a transform of torch.func reaches it", "grad, vjp, jvp or vmap", "torch.autograd.grad in its place")
