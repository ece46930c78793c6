"""One attention call in normal form, whatever it was written as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sla_compile.passes.operands import Source, Step
from sla_compile.passes.segments import Segment

__all__ = ["AttentionCall", "ModuleCall", "Obstacle", "module_stack"]


@dataclass(frozen=True)
class ModuleCall:
    """One level of a node's module stack: ``identity`` is the module's id, ``call`` counts its calls."""

    identity: int
    call: int
    source: str


@dataclass(frozen=True)
class Obstacle:
    """Why an attention that was recognised cannot be given in normal form, the value, and what could be."""

    reason: str
    value: str
    accepted: str


@dataclass(frozen=True)
class AttentionCall:
    """One attention call in normal form. ``query`` ... ``enable_gqa`` are as scaled_dot_product_attention's.

    A rewrite applies ``restore`` to its output (B, H, N, D), which gives what ``node`` gave. ``node`` and then
    ``interior``, the other nodes of the call, last ones first, can go where nothing else uses them.
    """

    node: fx.Node
    module: fx.GraphModule
    stack: tuple[ModuleCall, ...]
    query: Source
    key: Source
    value: Source
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    pattern: str = "scaled_dot_product_attention"
    restore: tuple[Step, ...] = ()
    interior: tuple[fx.Node, ...] = ()
    merged_heads: bool = False
    """The batch axis of ``query`` may hold several heads, and its head axis is one."""
    mixed_heads: bool = False
    """Inputs, scores and output have their batch and heads in different orders, so which is which is not told."""
    mean_if_masked: bool = False
    """A row all of whose keys are masked gives the mean of all values, as scores filled with a finite number do."""
    segments: tuple[Segment, ...] = ()
    """Of packed samples: queries and keys of each. Empty: ``attn_mask`` says which key a query sees."""
    obstacle: Obstacle | None = None


def module_stack(node: fx.Node) -> tuple[ModuleCall, ...]:
    """The modules in whose ``forward`` Dynamo traced ``node``, outermost first."""
    levels = []
    for key, (source, _) in node.meta.get("nn_module_stack", {}).items():
        identity, _, call = str(key).partition("@")
        if identity.isdigit():
            levels.append(ModuleCall(int(identity), int(call or 0), source))
    return tuple(levels)
