"""Calls on packed samples, (T, H, D) with the places where each begins, and calls of FlexAttention.

``cu_seqlens`` has to be made of constants by the graph, a run alone knows others. Each sample is then an attention.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import fx

from sla_compile.passes.attention_call import AttentionCall, Obstacle, module_stack
from sla_compile.passes.call_arguments import HARMLESS, arguments_of, is_default, only_output, parameters_of
from sla_compile.passes.known_values import known_values
from sla_compile.passes.operands import Step, after, example
from sla_compile.passes.segments import MOST_SEGMENTS, Segment

__all__ = ["flash_attn_varlen", "flex_attention", "varlen_attn"]

_REASON = "packed samples"


def flash_attn_varlen(node: fx.Node, module: fx.GraphModule) -> AttentionCall | None:
    """flash-attn's function, without the attention's weights as a second result."""
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    return _packed(
        node, module, node, names, ("dropout_p", "softmax_scale", "causal"), ("max_seqlen_q", "max_seqlen_k")
    )


def varlen_attn(node: fx.Node, module: fx.GraphModule) -> AttentionCall | None:
    """The op inside ``torch.nn.attention.varlen.varlen_attn``, of whose results the output alone is read."""
    alone = only_output(node)
    if alone is None:
        return None
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k")
    harmless = ("max_q", "max_k", "enable_gqa")
    return _packed(node, module, alone[0], names, ("dropout_p", "scale", "is_causal"), harmless, alone[1])


def flex_attention(node: fx.Node, module: fx.GraphModule) -> AttentionCall | None:
    """FlexAttention, which is listed and never read: its lists of blocks are inputs of the graph as a rule."""
    obstacle = Obstacle(
        "FlexAttention",
        "its block mask and its score_mod are not read",
        "F.scaled_dot_product_attention, with a mask that the graph makes of constants",
    )
    query, key, value = node.args[:3]
    return AttentionCall(node, module, module_stack(node), query, key, value, obstacle=obstacle)  # type: ignore[arg-type]


def _packed(
    node: fx.Node,
    module: fx.GraphModule,
    output: fx.Node,
    names: tuple[str, ...],
    options: tuple[str, str, str],
    harmless: tuple[str, ...],
    interior: tuple[fx.Node, ...] = (),
) -> AttentionCall | None:
    """A call on tensors (T, H, D); ``names`` are its parameters for them and for where samples begin among them."""
    parameters, given = parameters_of(node.target), arguments_of(node.target, node)
    if parameters is None or given is None or not {*names} <= {*parameters}:
        return None
    pattern = str(getattr(node.target, "__name__", node.target))
    known = {*names, *options, *harmless, *HARMLESS}
    odd = [name for name, value in given.items() if name not in known and not is_default(value, parameters[name])]
    if list(given.get("window_size") or ()) == [-1, -1]:  # no window
        odd = [name for name in odd if name != "window_size"]
    found: tuple[Segment, ...] | Obstacle
    if odd:
        text = ", ".join(f"{name}={given[name]}" for name in odd)
        found = Obstacle(f"an option of {pattern}", text, "its default")
    elif given.get(options[2]) not in (None, False):
        found = Obstacle(_REASON, "causal attention of each", "causal=False, or a call for each sample")
    else:
        found = _samples(node, *(given[name] for name in names))
    steps = Step("unsqueeze", (0,)), Step("transpose", (1, 2))
    tensors = [given[name] for name in names[:3]]
    traced = all(isinstance(value := example(one), torch.Tensor) and value.dim() == 3 for one in tensors)
    query, key, value = (after(one, *steps) if traced else one for one in tensors)
    return AttentionCall(
        output,
        module,
        module_stack(node),
        query,
        key,
        value,
        dropout_p=given.get(options[0], 0.0),
        scale=given.get(options[1]),
        enable_gqa=True,
        pattern=pattern,
        restore=(Step("transpose", (1, 2)), Step("squeeze", (0,))),
        interior=interior,
        segments=() if isinstance(found, Obstacle) else found,
        obstacle=found if isinstance(found, Obstacle) else None,
    )


def _samples(
    node: fx.Node, query: Any, key: Any, value: Any, of_queries: Any, of_keys: Any
) -> tuple[Segment, ...] | Obstacle:
    """The samples that ``cu_seqlens`` of queries and of keys name, which have to be all tokens."""
    bounds = [known_values(places, node) for places in (of_queries, of_queries if of_keys is None else of_keys)]
    accepted = f"cu_seqlens that the graph makes of constants, of at most {MOST_SEGMENTS} samples, or a call for each"
    if bounds[0] is None or bounds[1] is None:
        return Obstacle(_REASON, "cu_seqlens that a run alone knows", accepted)
    queries, keys = (places.whole().tolist() for places in bounds if places is not None)
    values = [example(one) for one in (query, key, value)]
    if not all(isinstance(one, torch.Tensor) and one.dim() == 3 for one in values):
        return Obstacle(_REASON, "tensors of other dimensions", "(T, H, D)")
    tokens = values[0].shape[0], values[1].shape[0]
    text = f"cu_seqlens {queries} of {tokens[0]} queries, {keys} of {tokens[1]} keys"
    if len(queries) != len(keys) or [queries[:1], keys[:1]] != [[0], [0]]:
        return Obstacle(_REASON, text, accepted)
    found = [Segment(*of_query, *of_key) for of_query, of_key in zip(pairwise(queries), pairwise(keys), strict=True)]
    found = [one for one in found if (one.first, one.start) != (one.last, one.stop)]
    whole = all(one.first < one.last and one.start < one.stop for one in found)
    ends = (queries[-1], keys[-1]) == tokens
    return tuple(found) if whole and ends and 0 < len(found) <= MOST_SEGMENTS else Obstacle(_REASON, text, accepted)
