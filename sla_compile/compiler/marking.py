"""Markers put into a graph that was traced before its owners had gates, in place of a second trace that has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from sla_compile.compat import Frame, traced_like
from sla_compile.compiler.sites import Site
from sla_compile.gate import Gate
from sla_compile.passes.decide import Rewrite
from sla_compile.passes.operands import example

__all__ = ["GATE_TENSOR", "mark_in_graph"]

_MARKED = ("weight", "bias", "sparsity", "log_scale", "shift")
"""The tensors of a gate, in the order in which `sla::gate` takes them."""

GATE_TENSOR = "sla_gate_tensor"
"""Key in the meta of a node that is a gate's tensor, as an attribute of its graph: the tensor's path in the model."""


def mark_in_graph(gm: fx.GraphModule, sites: Sequence[Site], frame: Frame) -> bool:
    """Mark the gate of each of ``sites`` that is to be rewritten and was traced without, as its owner's hook would.

    The gates' tensors become attributes of ``gm``: Dynamo guards on none of them. Returns False, and changes nothing,
    where it is not sure that a second trace would show each of these markers.
    """
    marked = [site for site in sites if isinstance(site.decision, Rewrite) and site.marker is None]
    if not all(_hook_was_passed(gm, site, frame) for site in marked):
        return False
    first = next((node for node in gm.graph.nodes if node.op != "placeholder"), None)
    tensors: dict[int, fx.Node] = {}
    with gm.graph.inserting_before(first):
        for site in marked:
            nodes = [_attribute(gm, name, site, tensors) for name in _MARKED]
            settings = "" if site.gate is None else site.gate.settings
            marker = gm.graph.call_function(torch.ops.sla.gate, (*nodes, site.ordinal, settings, False))
            marker.meta["nn_module_stack"] = dict(site.call.node.meta["nn_module_stack"])
    return True


def _hook_was_passed(gm: fx.GraphModule, site: Site, frame: Frame) -> bool:
    """Whether the call of the owner of ``site`` was traced here, in the way of torch that runs the owner's hooks."""
    owner = site.owner
    return (
        isinstance(site.gate, Gate)
        and site.call.module is gm
        and bool(site.call.stack)
        and owner is not None
        and owner is not frame.root_module()
        and type(owner).__call__ is nn.Module.__call__
        and type(owner)._call_impl is nn.Module._call_impl
        and owner._compiled_call_impl is None
    )


def _attribute(gm: fx.GraphModule, name: str, site: Site, known: dict[int, fx.Node]) -> fx.Node | None:
    """The node of this tensor of the gate of ``site``, made once; None where the gate has none of that name."""
    tensor = getattr(site.gate, name)
    if tensor is not None and id(tensor) not in known:
        attribute = f"{GATE_TENSOR}_{len(known)}"
        gm.register_parameter(attribute, tensor) if name != "sparsity" else gm.register_buffer(attribute, tensor)
        node = known[id(tensor)] = gm.graph.get_attr(attribute)
        node.meta["example_value"] = traced_like(tensor, example(site.call.query))
        node.meta[GATE_TENSOR] = f"{site.gate_path}.{name}"
    return known.get(id(tensor))
