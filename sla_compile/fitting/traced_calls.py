"""Run a prepared model as Dynamo traces it, its gated attentions replaced by a function: however they are written.

`observer` sees calls of ``F.scaled_dot_product_attention`` as they are made, which costs no trace. Attention that is
written by hand, in ``nn.MultiheadAttention`` or behind a call of another library is no such call: it is found in the
graph, by the passes of ``backend="sla"`` itself, and the graph then runs as it is, with no compiler behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from sla_compile.compat import Frame, current_frame, throw_away_compile
from sla_compile.compiler.sites import Settings, find_sites
from sla_compile.gate import Gate, gates, mark_from_children, own_gates
from sla_compile.memory import eager_runs_are_measured
from sla_compile.passes.decide import Rewrite
from sla_compile.passes.rewrite import erase_markers, replace_by_function

__all__ = ["Replacement", "kept_traces", "traced_calls"]

Replacement = Callable[[Gate, Rewrite, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""Of a gate, what was decided of its attention, queries (B, H, N, D), keys, values and key mask (or None) as the op has
them, and masked queries (or None) in the model's order: its output (B, H, N, D), tokens in the order of the queries."""


_KEPT: dict[int, _Backend] = {}
"""The backends of the contexts of `kept_traces` that are open, by the ``id`` of their model."""


@contextmanager
def kept_traces(model: nn.Module) -> Iterator[None]:
    """Within this context, contexts of `traced_calls` for ``model`` share what Dynamo traced, until it ends."""
    if id(model) in _KEPT:
        yield
        return
    _KEPT[id(model)] = backend = _Backend()
    try:
        yield
    finally:
        del _KEPT[id(model)]
        with throw_away_compile() as frames:
            frames += backend.frames


@contextmanager
def traced_calls(model: nn.Module, replacement: Replacement) -> Iterator[None]:
    """Within this context calls of ``model`` are traced, and each gated attention gives what ``replacement`` does."""
    with kept_traces(model), ExitStack() as undo:
        backend = _KEPT[id(model)]
        backend.replacement, backend.gates = replacement, gates(model)
        undo.enter_context(throw_away_compile())  # which is told of no frame here, so that all are kept
        undo.enter_context(eager_runs_are_measured())
        for module in model.modules():  # blocks that are compiled by themselves are a part of the trace
            undo.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module._compiled_call_impl = None
            if own_gates(module) and mark_from_children(module):  # a graph may begin at any of them
                undo.callback(mark_from_children, module, False)
        own = model.__dict__.get("forward")
        # Not the whole call: hooks of the model are no part of what is traced.
        model.forward = torch.compile(model.forward, backend=backend, dynamic=False)
        undo.callback(_put_back, model, own)
        yield


def _put_back(model: nn.Module, own: Any) -> None:
    """Give ``model`` the forward that it had of its own, or that of its class."""
    if own is None:
        del model.__dict__["forward"]
    else:
        model.__dict__["forward"] = own


class _Backend:
    """A backend of Dynamo: replaces the attentions that have a gate, and runs what is left as it is."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        """All that it was called for."""
        self.replacement: Replacement | None = None
        self.gates: dict[str, Gate] = {}

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        frame = current_frame()
        if frame is None:
            return gm.forward
        self.frames.append(frame)
        found = find_sites(gm, Settings.of(None), frame)
        for site in found.sites:
            if isinstance(site.decision, Rewrite) and site.marker is not None:
                replace_by_function(site.call, site.decision, site.marker, self._function)
        erase_markers(found.markers)
        for module in {id(site.call.module): site.call.module for site in found.sites}.values():
            module.recompile()
        return gm.forward

    def _function(self, decision: Rewrite) -> Callable[..., Tensor]:
        def attention(
            of_gate: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, masked: Tensor | None
        ) -> Tensor:
            assert self.replacement is not None  # what is traced runs in `traced_calls` alone
            return self.replacement(self._gate(of_gate), decision, query, key, value, mask, masked)

        return attention

    def _gate(self, tensor: Tensor) -> Gate:
        """The gate whose parameter ``tensor`` is: a graph may serve several blocks, so only a run tells."""
        for gate in self.gates.values():
            if any(parameter is tensor for parameter in gate.parameters()):
                return gate
        raise ValueError(
            f"{', '.join(self.gates)}: a traced attention has a gate's {type(tensor).__name__} that is no parameter of "
            f"these gates; accepted: gates whose tensors are their parameters, not made of them by a wrapper"
        )
