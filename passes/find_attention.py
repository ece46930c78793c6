"""Find attention: every one in a graph, called or written out, in one normal form; and the markers.

Works on the torch-level graph that Dynamo hands to a backend, including the subgraphs of higher-order ops such
as activation checkpointing. Each node's ``nn_module_stack`` says which modules' ``forward`` it was traced in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sla_compile.passes.attention_call import AttentionCall, ModuleCall, Obstacle, module_stack
from sla_compile.passes.handwritten import scaled_matmul_softmax_matmul
from sla_compile.passes.key_head_copies import without_copies
from sla_compile.passes.library_calls import attention_inside_call

__all__ = [
    "IN_TRANSFORM",
    "AttentionCall",
    "Marker",
    "ModuleCall",
    "attention_call",
    "find_attention",
    "find_markers",
    "graphs",
]

IN_TRANSFORM = "inside a transform of torch.func"
"""The reason why an attention is kept that ``torch.func.grad``, say, would differentiate: the op has no rule for it."""

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
class Marker:
    """One call of ``sla::gate``: these are the gate's tensors for the owner's attention ``ordinal``."""

    node: fx.Node
    module: fx.GraphModule
    stack: tuple[ModuleCall, ...]
    """The calls in which it was traced, of the owner at the end, or of a child below it (``from_child``)."""
    weight: fx.Node | None
    bias: fx.Node | None
    sparsity: fx.Node | None
    log_scale: fx.Node | None
    shift: fx.Node | None
    ordinal: int
    settings: str
    from_child: bool


def graphs(root: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """``root`` and every graph module below it, each once."""
    for module in root.modules():
        if isinstance(module, fx.GraphModule):
            yield module


def find_attention(root: fx.GraphModule) -> list[AttentionCall]:
    """Every attention of ``root`` and its subgraphs, fused or written out, in graph order."""
    return [call for module in graphs(root) for call in _in_graph(module)]


def _in_graph(module: fx.GraphModule) -> Iterator[AttentionCall]:
    transforms: list[str] = []
    for node in module.graph.nodes:
        name = str(getattr(node.target, "__name__", ""))
        if name.endswith("_increment_nesting"):
            transforms.append(name.removesuffix("_increment_nesting").strip("_"))
        elif name.endswith("_decrement_nesting"):
            del transforms[-1:]
        elif (call := _attention(node, module)) is not None:
            where = Obstacle(IN_TRANSFORM, ", ".join(transforms), "a call outside of it")
            yield replace(call, obstacle=where) if transforms else call


def _attention(node: fx.Node, module: fx.GraphModule) -> AttentionCall | None:
    """The attention whose last node is ``node``, if it is one."""
    if node.op == "call_function" and node.target in SDPA_TARGETS:
        return without_copies(attention_call(node, module))
    call = attention_inside_call(node, module) or scaled_matmul_softmax_matmul(node, module)
    return None if call is None else without_copies(call)


def attention_call(node: fx.Node, module: fx.GraphModule) -> AttentionCall:
    """``node``, a call of scaled_dot_product_attention, in normal form."""
    arguments: dict[str, Any] = dict(_PARAMETERS)
    arguments.update(zip(arguments, node.args, strict=False))
    arguments.update(node.kwargs)
    return AttentionCall(node=node, module=module, stack=module_stack(node), **arguments)


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
    *tensors, ordinal, settings, from_child = node.args
    weight, bias, sparsity, log_scale, shift = map(_as_node, tensors)
    stack = module_stack(node)
    return Marker(
        node=node,
        module=module,
        stack=stack,
        weight=weight,
        bias=bias,
        sparsity=sparsity,
        log_scale=log_scale,
        shift=shift,
        ordinal=int(str(ordinal)),
        settings=str(settings),
        from_child=bool(from_child),
    )


def _as_node(argument: Any) -> fx.Node | None:
    if argument is not None and not isinstance(argument, fx.Node):
        raise TypeError(f"sla::gate takes graph nodes for its tensors, got {argument!r}")
    return argument
