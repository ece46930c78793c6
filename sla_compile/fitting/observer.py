"""The attention calls that have a gate, seen while a prepared model runs eagerly; the model is not edited.

A ``TorchFunctionMode`` sees every call of ``F.scaled_dot_product_attention``; hooks, there only as long as the
mode is, tell whose call it is. Owner, ordinal and decision follow the rules that ``sites`` applies to a graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sla_compile.ops  # noqa: F401  the library op that gives the branches
from sla_compile.compiler.preparation import prepare
from sla_compile.compiler.sites import requirements
from sla_compile.config import SLAConfig
from sla_compile.gate import Gate, detach, gate_name, gates, model_config, own_gates
from sla_compile.ops.reorder import reorder
from sla_compile.passes.decide import Rewrite, decide
from sla_compile.passes.find_attention import SDPA_TARGETS, attention_call
from sla_compile.passes.operands import example
from sla_compile.reporting.model_report import explain

__all__ = ["GatedCall", "call_arguments", "first_of", "gated_calls", "nothing_gated", "prepared_for"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class GatedCall:
    """One call of an attention that has a gate: query, key, value and dense output (B, H, N, D).

    Keys and values have as many heads as the queries. ``decision`` says what the op has to be told of the call, and
    which order the tokens of query, key, value and key mask are in; those of every output are in the model's.
    """

    path: str
    """Module path of the gate."""
    gate: Gate
    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    decision: Rewrite
    dense: Tensor

    @property
    def scale(self) -> float:
        return self.decision.scale

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the op for this call: its settings, and scale, key mask and the like."""
        tensors = {"key_mask": self.key_mask, "sparsity": self.gate.sparsity}
        return {**tensors, **self.gate.config.compiled_options(), **self.decision.options()}

    def branches(self) -> tuple[Tensor, Tensor | None]:
        """O^s and O^l (B, H, N, D), before the gate; None for an O^l that the settings leave out."""
        branch = self.gate.config.linear != "none"
        dim = self.query.shape[3]
        sparse, linear = self._forward(self.query.new_zeros(dim, dim) if branch else None, None)
        return sparse, linear if branch else None

    def gated(self, weight: Tensor, bias: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """The output (B, H, N, D) of Sparse-Linear Attention with this gate, in the dtype of the dense one."""
        return self._scaled(weight, bias, log_scale)

    def at(self, topk: float, bottomk: float) -> Tensor:
        """The output (B, H, N, D) with the gate as it is, but with another topk and bottomk than its settings'."""
        return self._scaled(*self.gate.parameters(), sparsity=None, topk=topk, bottomk=bottomk)

    def _scaled(self, weight: Tensor, bias: Tensor, log_scale: Tensor | None = None, **changes: Any) -> Tensor:
        """The output as the rewritten graph computes it."""
        if log_scale is None:
            return self._forward(weight, bias, **changes)[0].to(self.dense.dtype)
        inverse = log_scale.neg().exp()[:, None]
        out, _ = self._forward(weight * inverse[..., None], bias * inverse, **changes)
        return (out * log_scale.exp()[:, None, None]).to(self.dense.dtype)

    def _forward(self, weight: Tensor | None, bias: Tensor | None, **changes: Any) -> tuple[Tensor, Tensor]:
        out, linear, _, _ = torch.ops.sla.forward.default(
            self.query, self.key, self.value, weight, bias, **{**self.options(), **changes}
        )
        if (placement := self.decision.order.queries) is None:
            return out, linear
        # without a linear branch, an empty tensor stands for it
        return tuple(reorder(x, placement, inverse=True) if x.dim() == 4 else x for x in (out, linear))  # type: ignore


Handler = Callable[[GatedCall], Tensor]


@contextmanager
def gated_calls(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Within this, ``model`` runs eagerly, and what ``handler`` returns stands in for each gated attention.

    A call that ``backend="sla"`` would keep dense, for its mask or its length, does not reach ``handler``.
    """
    mode = _AttentionMode(model, handler)
    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(mode.begin, prepend=True))
            handles.append(module.register_forward_hook(mode.end, always_call=True))
        # Blocks compiled by themselves would run sparse, and out of the mode's sight.
        with torch.compiler.set_stance("force_eager"), mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _AttentionMode(TorchFunctionMode):
    """Counts attention calls within each module call, as ``sites.find_sites`` does within a graph."""

    def __init__(self, model: nn.Module, handler: Handler) -> None:
        super().__init__()
        self.paths = {id(gate): path for path, gate in gates(model).items()}
        self.handler = handler
        self.running: list[nn.Module] = []
        self.counts: list[int] = []

    def begin(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)
        self.counts.append(0)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()
        seen = self.counts.pop()
        gated = own_gates(module).values()
        last = max((gate.ordinal for gate in gated), default=-1)
        if output is not None and 0 < seen <= last:  # output is None where the forward raised
            paths = ", ".join(self.paths[id(gate)] for gate in gated)
            raise ValueError(
                f"{paths}: the owner called F.scaled_dot_product_attention {seen} time(s), but has a gate for its "
                f"attention number {last + 1}, so which call a gate belongs to is not known; accepted: owners whose "
                f"every attention is such a call, none written by hand"
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in SDPA_TARGETS or not self.running:
            return output
        ordinal = self.counts[-1]
        self.counts[-1] += 1
        gate = own_gates(self.running[-1]).get(gate_name(ordinal))
        if gate is None:
            return output
        # Normal form and decision read tensors as they read the nodes of a graph.
        node = SimpleNamespace(args=args, kwargs=kwargs or {}, meta={})
        call = attention_call(cast(Any, node), cast(Any, None))
        decision = decide(dataclasses.replace(call, node=output), requirements(gate.config), gate.seen)
        if not isinstance(decision, Rewrite):
            return output
        query, key, value = (cast(Tensor, example(operand)) for operand in decision.operands(call))
        mask = next((cast(Tensor, example(operand)) for operand in decision.masks()), None)
        return self.handler(GatedCall(self.paths[id(gate)], gate, query, key, value, mask, decision, output))


def call_arguments(batch: Any, position: int) -> Arguments:
    """The positional and keyword arguments that ``batch``, the item ``position`` of the batches, stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise TypeError(
        f"batches: item {position} is a {type(batch).__name__}; accepted: a tuple of the model's positional "
        f"arguments, or a mapping of its keyword arguments"
    )


def first_of(batches: Iterable[Any], count: int | None) -> tuple[Arguments, Iterator[Arguments]]:
    """The first batch, and all (with that one) up to ``count``; ValueError where there is none."""
    stream = (call_arguments(batch, i) for i, batch in enumerate(islice(batches, count)))
    first = next(stream, None)
    if first is None:
        raise ValueError("batches: empty; accepted: an iterable of at least one batch")
    return first, chain((first,), stream)


@contextmanager
def prepared_for(model: nn.Module, example: Arguments, config: SLAConfig | Mapping[str, Any] | None) -> Iterator[None]:
    """Give ``model`` gates where it has none, or new settings; taken back if an exception leaves the block."""
    if gates(model) and config is None:
        yield
        return
    previous = model_config(model)
    prepare(model, *example, config=config)
    try:
        if not gates(model):
            raise ValueError(nothing_gated(model, example, config))
        yield
    except BaseException:
        if previous is not None:
            prepare(model, *example, config=previous)
        else:
            detach(model)
        raise


def nothing_gated(model: nn.Module, example: Arguments, config: SLAConfig | Mapping[str, Any] | None = None) -> str:
    """Why no attention of ``model`` is sparse-linear at ``example``, for an error."""
    sites = explain(model, *example, config=config).sites
    kept = [site for site in sites if not site.rewritten]
    reasons: Sequence[str] = [
        f"{site.path or 'the model itself'}: {site.reason}, {site.value} (accepted: {site.accepted})"
        for site in kept[:3]
    ]
    more = f"; and {len(kept) - 3} more" if len(kept) > 3 else ""
    found = "; ".join(reasons) or "no call of F.scaled_dot_product_attention was found"
    return f"{type(model).__name__}: no attention with a gate was reached: {found}{more}"
