"""Gates that a graph marks, though it holds no attention that could use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from sla_compile.compat import Frame
from sla_compile.compiler.sites import Site, owner_call
from sla_compile.gate import Gate, gate_name, own_gates
from sla_compile.passes.attention_call import module_stack
from sla_compile.passes.find_attention import Marker, graphs
from sla_compile.passes.node_ops import read

__all__ = ["UnusedGate", "unused_gates"]


@dataclass(frozen=True)
class UnusedGate:
    """A gate whose owner was traced whole and computes something, but no attention that is known."""

    gate: Gate
    owner: nn.Module
    reason: str = "no attention that is known in its owner's part of the graph"
    accepted: str = "one of the forms in docs/kept-dense.md"


def unused_gates(
    gm: fx.GraphModule, sites: Sequence[Site], markers: Sequence[Marker], frame: Frame
) -> list[UnusedGate]:
    """The gates that ``markers`` name in vain; before the markers are erased.

    An owner that skips its attention, as caches of attention outputs let it, computes nothing and is left out. So is
    one at which Dynamo started: a frame that continues it may hold the attention.
    """
    served = {id(site.owner) for site in sites}
    found = {}
    busy: set[int] | None = None
    for marker in markers:
        call = owner_call(marker, frame)
        owner = frame.module(call[-1].identity) if call else None
        if owner is None or id(owner) in served or owner is frame.root_module():
            continue
        gate = own_gates(owner).get(gate_name(marker.ordinal))
        busy = _busy_modules(gm) if busy is None else busy
        if gate is not None and id(owner) in busy:
            found[id(gate)] = UnusedGate(gate, owner)
    return list(found.values())


def _busy_modules(gm: fx.GraphModule) -> set[int]:
    """The ids of the modules in whose forward a product of matrices was traced."""
    return {
        call.identity
        for graph in graphs(gm)
        for node in graph.graph.nodes
        if read(node).word in PRODUCTS
        for call in module_stack(node)
    }


PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"})
