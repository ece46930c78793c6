"""diffusers (0.36 to 0.42): its Ulysses attention as Dynamo can trace it, with gradients too.

It is an autograd function that keeps queries, keys and values on its ``ctx``, at which Dynamo breaks the graph before
any backend sees it. The same attention of diffusers' own pieces is traced in its place; run uncompiled, it is
diffusers' own. What diffusers spreads over ranks in another way is told to whoever compiles. Nothing here imports
diffusers.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["is_attention_dispatch", "trace_ulysses"]

_MODULE = "diffusers.models.attention_dispatch"
_FILE = "diffusers/models/attention_dispatch.py"
_EXCHANGE = "SeqAllToAllDim"
_DENSE = ("_native_attention_forward_op", "_cudnn_attention_forward_op", "_native_flash_attention_forward_op")
"""What calls PyTorch's own attention; another kernel of the user's choice is traced as it is written."""
_traced: set[int] = set()
_refusals: list[Callable[[str, str], None]] = []


def is_attention_dispatch(file: str) -> bool:
    """Whether ``file`` is that in which diffusers chooses a kernel and a form of parallelism, or its stand-in."""
    return file == __file__ or file.replace("\\", "/").endswith(_FILE)


def _refuse(ring: int, ulysses: int, anything: bool, heads: int) -> bool:
    """Called, not traced, where Dynamo traces an attention that is not spread by whole heads; the sizes say so."""
    seen = f"ring attention of diffusers (ring_degree={ring})" if ring > 1 else "ulysses_anything of diffusers"
    if ring == 1 and not anything:
        seen = f"Ulysses of diffusers with {heads} heads on {ulysses} ranks"
    accepted = f"ContextParallelConfig(ulysses_degree=P), where P divides the {heads} heads"
    if ring > 1:  # torch compiles nothing else that is refused here, by no backend
        accepted += ", or this attention in prepare's exclude"
    for refuse in _refusals:
        refuse(seen, accepted)
    return True


def trace_ulysses(refuse: Callable[[str, str], None]) -> bool:
    """Have Dynamo trace Ulysses attention where diffusers is imported; whether that is new.

    ``refuse`` is called, while Dynamo traces, with what was seen and what is accepted where diffusers spreads an
    attention in another way. If it returns, that is traced as diffusers has it. Remove when diffusers' function keeps
    its tensors by ``save_for_backward``.
    """
    dispatch: Any = sys.modules.get(_MODULE)
    original = getattr(dispatch, "_templated_context_parallel_attention", None)
    if not isinstance(original, types.FunctionType) or id(original) in _traced or not hasattr(dispatch, _EXCHANGE):
        return False
    _traced.add(id(original))
    _refusals[:] = [refuse]
    mark_as_called: Any = torch.compiler.assume_constant_result  # here, as it imports Dynamo
    mark_as_called(_refuse)
    # Another function object: Dynamo knows by identity what to trace something else for.
    as_written = types.FunctionType(original.__code__, original.__globals__, original.__name__, original.__defaults__)
    as_written.__kwdefaults__ = original.__kwdefaults__

    @torch.compiler.substitute_in_graph(original, skip_signature_check=True)
    def templated(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        *,
        forward_op: Any,
        backward_op: Any,
        _parallel_config: Any = None,
    ) -> Any:
        """(B, N/P, H, D) queries, keys and values to (B, N/P, H, D)."""
        # A name of a module is one that Dynamo can look up; what a closure holds is none.
        from diffusers.models.attention_dispatch import SeqAllToAllDim as exchange

        config = _parallel_config.context_parallel_config
        ring, ulysses, anything = config.ring_degree, config.ulysses_degree, config.ulysses_anything
        whole = ulysses > 1 and ring == 1 and not anything and query.shape[2] % ulysses == 0
        if not whole:
            _refuse(ring, ulysses, anything, query.shape[2])
        if not whole or is_causal or enable_gqa or return_lse or getattr(forward_op, "__name__", "") not in _DENSE:
            arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse
            operations = {"forward_op": forward_op, "backward_op": backward_op}
            return as_written(*arguments, **operations, _parallel_config=_parallel_config)
        group = config._ulysses_mesh.get_group()
        if attn_mask is not None and attn_mask.shape[-1] == key.shape[1]:
            attn_mask = torch.distributed._functional_collectives.all_gather_tensor(
                attn_mask.contiguous(), attn_mask.dim() - 1, group
            )
        query, key, value = (exchange.apply(group, x, 2, 1).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=False, scale=scale
        )
        return exchange.apply(group, out.transpose(1, 2), 1, 2)

    return True
