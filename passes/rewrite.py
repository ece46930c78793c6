"""Rewrite a graph: attention calls become ``sla::forward``, markers go."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from sla_compile.passes.decide import Rewrite
from sla_compile.passes.match import AttentionCall, Marker, attention_call

__all__ = ["REWRITTEN_FROM", "erase_markers", "replace_attention"]

REWRITTEN_FROM = "sla_rewritten_from"
"""Key in the meta of a node whose target was changed: the target it had."""


def replace_attention(
    call: AttentionCall, decision: Rewrite, marker: Marker, options: Mapping[str, Any]
) -> fx.Node:
    """Put ``sla::forward`` where ``call`` stands, with the gate of ``marker``; the node that gives its output.

    ``options`` are topk, bottomk, block_q, block_k, feature_map and linear. The graph is not recompiled.
    """
    graph = call.module.graph
    call = attention_call(call.node, call.module)  # an argument may be an attention that was replaced since
    with graph.inserting_before(call.node):
        results = graph.call_function(
            torch.ops.sla.forward.default,
            (call.query, call.key, call.value, marker.weight, marker.bias, decision.scale),
            dict(options),
        )
        output = graph.call_function(operator.getitem, (results, 0))
    for node in (results, output):
        node.meta = {key: value for key, value in call.node.meta.items() if key != "example_value"}
    if "example_value" in call.node.meta:
        output.meta["example_value"] = call.node.meta["example_value"]
    call.node.replace_all_uses_with(output)
    _allow_any_layout(output)
    graph.erase_node(call.node)
    return output


_LAYOUT_ONLY = frozenset({"transpose", "permute", "swapaxes", "swapdims", "movedim", "flatten", "unflatten"})


def _allow_any_layout(output: fx.Node) -> None:
    """Turn views of ``output`` into reshapes: they were legal in the layout that SDPA's own kernel returned."""
    for user in output.users:
        if user.op != "call_method":
            continue
        if user.target == "view" and not any(isinstance(a, torch.dtype) for a in user.args):
            user.meta[REWRITTEN_FROM] = user.target
            user.target = "reshape"
        if user.target in _LAYOUT_ONLY or user.target == "reshape":
            _allow_any_layout(user)


def erase_markers(markers: Iterable[Marker]) -> None:
    """Take the markers out and recompile the graphs that held them."""
    touched = {id(marker.module): marker.module for marker in markers}
    for marker in markers:
        marker.module.graph.erase_node(marker.node)
    for module in touched.values():
        module.graph.lint()
        module.recompile()
