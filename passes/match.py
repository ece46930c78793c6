"""Find attention: every call of ``scaled_dot_product_attention`` in a graph, in one normal form, and the markers.

Works on the torch-level graph that Dynamo hands to a backend, including the subgraphs of higher-order ops such
as activation checkpointing. Each node's ``nn_module_stack`` says which modules' ``forward`` it was traced in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = [
    "AttentionCall",
    "Marker",
    "ModuleCall",
    "attention_call",
    "find_attention",
    "find_markers",
    "graphs",
]

# torch.nn.functional.scaled_dot_product_attention is this builtin; the others reach a graph by torch.ops.
SDPA_TARGETS: frozenset[Any] = frozenset(
    {
        torch.nn.functional.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)

# The signature of scaled_dot_product_attention, with its defaults.
_PARAMETERS: tuple[tuple[str, Any], ...] = (
    ("query", None),
    ("key", None),
    ("value", None),
    ("attn_mask", None),
    ("dropout_p", 0.0),
    ("is_causal", False),
    ("scale", None),
    ("enable_gqa", False),
)


@dataclass(frozen=True)
class ModuleCall:
    """One level of a node's module stack: ``identity`` is the module's id, ``call`` counts its calls."""

    identity: int
    call: int
    source: str


@dataclass(frozen=True)
class AttentionCall:
    """One attention call in normal form. ``query`` ... ``enable_gqa`` are its arguments, defaults filled in."""

    node: fx.Node
    module: fx.GraphModule
    stack: tuple[ModuleCall, ...]
    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: Any
    dropout_p: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any


@dataclass(frozen=True)
class Marker:
    """One call of ``sla::gate``: these are the gate's parameters for the owner's attention ``ordinal``."""

    node: fx.Node
    module: fx.GraphModule
    owner: tuple[ModuleCall, ...]
    weight: fx.Node
    bias: fx.Node
    ordinal: int
    settings: str
    from_child: bool


def graphs(root: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """``root`` and every graph module below it, each once."""
    for module in root.modules():
        if isinstance(module, fx.GraphModule):
            yield module


def find_attention(root: fx.GraphModule) -> list[AttentionCall]:
    """Every attention call of ``root`` and its subgraphs, in graph order."""
    return [
        attention_call(node, module)
        for module in graphs(root)
        for node in module.graph.nodes
        if node.op == "call_function" and node.target in SDPA_TARGETS
    ]


def attention_call(node: fx.Node, module: fx.GraphModule) -> AttentionCall:
    """``node``, a call of scaled_dot_product_attention, in normal form."""
    arguments: dict[str, Any] = dict(_PARAMETERS)
    arguments.update(zip(arguments, node.args, strict=False))
    arguments.update(node.kwargs)
    return AttentionCall(node=node, module=module, stack=_stack(node), **arguments)


def find_markers(root: fx.GraphModule) -> list[Marker]:
    """Every gate marker of ``root`` and its subgraphs, in graph order."""
    marker = torch.ops.sla.gate
    return [
        _marker(node, module)
        for module in graphs(root)
        for node in module.graph.nodes
        if node.op == "call_function" and node.target in (marker, marker.default)
    ]


def _marker(node: fx.Node, module: fx.GraphModule) -> Marker:
    weight, bias, ordinal, settings, from_child = node.args
    stack = _stack(node)
    return Marker(
        node=node,
        module=module,
        owner=stack[:-1] if from_child else stack,
        weight=_as_node(weight),
        bias=_as_node(bias),
        ordinal=int(str(ordinal)),
        settings=str(settings),
        from_child=bool(from_child),
    )


def _as_node(argument: Any) -> fx.Node:
    if not isinstance(argument, fx.Node):
        raise TypeError(f"sla::gate takes graph nodes for weight and bias, got {argument!r}")
    return argument


def _stack(node: fx.Node) -> tuple[ModuleCall, ...]:
    levels = []
    for key, (source, _) in node.meta.get("nn_module_stack", {}).items():
        identity, _, call = str(key).partition("@")
        if identity.isdigit():
            levels.append(ModuleCall(int(identity), int(call or 0), source))
    return tuple(levels)
