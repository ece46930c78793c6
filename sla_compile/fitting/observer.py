"""Observe, and replace, the attention calls that have a gate while a prepared model runs.

A ``TorchFunctionMode`` receives every call of ``F.scaled_dot_product_attention``; temporary hooks tell which module
made it. Owner, call site and decision follow the rules that ``compiler.sites`` applies to a graph, so what is observed
is what ``backend="sla"`` would rewrite.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sla_compile.ops  # noqa: F401  registers sla::forward
from sla_compile.common.blocks import to_millionths
from sla_compile.compiler.call_sites import call_site, running_frames
from sla_compile.compiler.preparation import left_out_again, prepare
from sla_compile.compiler.site_numbers import number_calls
from sla_compile.compiler.sites import requirements
from sla_compile.config import SLAConfig
from sla_compile.fitting.ranks import total
from sla_compile.fitting.traced_calls import traced_calls
from sla_compile.gate import PREPARED, Gate, detach, gate_name, gates, model_config, own_gates
from sla_compile.gate_settings import CALLED
from sla_compile.memory import eager_runs_are_measured
from sla_compile.ops.reorder import reorder
from sla_compile.passes.attention_call import AttentionCall
from sla_compile.passes.decide import Rewrite, decide
from sla_compile.passes.find_attention import SDPA_TARGETS, attention_call
from sla_compile.passes.operands import Operand, after, example
from sla_compile.passes.parts import from_batch, of_queries, parts
from sla_compile.reporting.model_report import explain

__all__ = [
    "Arguments",
    "GatedCall",
    "as_batches",
    "batch_arguments",
    "gated_calls",
    "no_gated_call_message",
    "peek_first",
    "prepared_or_rolled_back",
]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a model."""

_KEPT_SHOWN = 3
"""How many attentions that stay dense an error explains."""


Topk = float | tuple[float, ...]
"""The topk of an attention, or of each of its heads."""


@dataclass(frozen=True)
class GatedCall:
    """One call of an attention that has a gate: its operands as the op takes them, and its dense output."""

    path: str
    """Module path of the gate."""
    gate: Gate
    query: Tensor
    """(B, H, N, D), its tokens in the order that ``decision`` gives the queries."""
    key: Tensor
    """(B, Hk, L, D), Hk dividing H; its tokens, as those of value and mask, in the order of the keys."""
    value: Tensor
    key_mask: Tensor | None
    decision: Rewrite
    dense: Tensor
    """(B, H, N, D), tokens in the model's order, as in every output below."""
    masked_queries: Tensor | None = None
    """(B or 1, 1, N or 1, 1), true for queries without a key: what they give does not depend on the gate."""

    @property
    def scale(self) -> float:
        return self.decision.scale

    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``sla::forward`` for this call: settings of the site, scale, key mask and so on."""
        tensors = {"key_mask": self.key_mask, "sparsity": self.gate.sparsity}
        return {**tensors, **self.gate.config.compiled_options(), **self.decision.options()}

    def branches(self) -> tuple[Tensor, Tensor | None]:
        """O^s and O^l, each (B, H, N, D), before the gate; O^l is None with ``linear="none"``."""
        has_linear = self.gate.config.linear != "none"
        dim = self.query.shape[3]
        # A weight of zero: the op's output is O^s, and it returns O^l all the same.
        sparse, linear = self._run_op(self.query.new_zeros(dim, dim) if has_linear else None, None)
        return sparse, linear if has_linear else None

    def output_with_gate(self, *values: Tensor) -> Tensor:
        """The output (B, H, N, D), in the dtype of ``dense``, with these as the gate's parameters, in their order."""
        return self._output(*values)

    def output_with_sparsity(self, topk: Topk, bottomk: float) -> Tensor:
        """The output (B, H, N, D) with the gate as it is, but this topk, at most 1 - bottomk, and bottomk."""
        shares: dict[str, Any] = {"sparsity": None, "topk": topk, "bottomk": bottomk}
        if isinstance(topk, tuple):
            by_head = [[to_millionths(own), to_millionths(bottomk)] for own in topk]
            sparsity = torch.tensor(by_head, device=self.query.device)
            shares = {"sparsity": sparsity, "topk": max(topk), "bottomk": 0.0}
        return self._output(*self.gate.parameters(), **shares)

    def _output(self, *values: Tensor, **changes: Any) -> Tensor:
        """The output as the rewritten graph computes it; ``changes`` replace entries of ``options()``."""
        if self.gate.shift is not None:
            (shift,) = values
            return self._filled(self._run_op(None, None, shift=shift, **changes)[0].to(self.dense.dtype))
        weight, bias, *scale = values
        if not scale:
            return self._filled(self._run_op(weight, bias, **changes)[0].to(self.dense.dtype))
        (log_scale,) = scale
        # exp(s) O^s + O^l W^T + b = exp(s) (O^s + O^l (exp(-s) W)^T + exp(-s) b), and the op has no scale.
        inverse = log_scale.neg().exp()[:, None]
        out, _ = self._run_op(weight * inverse[..., None], bias * inverse, **changes)
        return self._filled((out * log_scale.exp()[:, None, None]).to(self.dense.dtype))

    def _filled(self, out: Tensor) -> Tensor:
        return out if self.masked_queries is None else out.masked_fill(self.masked_queries, 0.0)

    def _run_op(self, weight: Tensor | None, bias: Tensor | None, **changes: Any) -> tuple[Tensor, Tensor]:
        """Output and O^l of ``sla::forward``, tokens back in the model's order."""
        out, linear, *_ = torch.ops.sla.forward.default(
            self.query, self.key, self.value, weight, bias, **{**self.options(), **changes}
        )
        if (placement := self.decision.order.queries) is None:
            return out, linear
        # without a linear branch, an empty tensor stands for it
        return tuple(reorder(x, placement, inverse=True) if x.dim() == 4 else x for x in (out, linear))  # type: ignore


Handler = Callable[[GatedCall], Tensor]
"""Takes a gated call and returns what the model gets as its output, (B, H, N, D)."""


@contextmanager
def gated_calls(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Within this context ``model`` runs eagerly, and each gated attention outputs what ``handler`` returns.

    A call that ``backend="sla"`` would keep dense, for its mask or its length say, does not reach ``handler``. Where a
    gate belongs to attention that is no call of ``F.scaled_dot_product_attention``, or may do, as one of a file, the
    model runs as it is traced.
    """
    if not all(gate.traced and gate.pattern == CALLED for gate in gates(model).values()):
        paths = {id(gate): path for path, gate in gates(model).items()}
        with traced_calls(model, partial(_traced, handler, paths)):
            yield
        return
    mode = _AttentionMode(model, handler)
    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(mode.begin, prepend=True))
            handles.append(module.register_forward_hook(mode.end, always_call=True))
        # Blocks that are compiled by themselves would run sparse, and the mode would not see their calls.
        with torch.compiler.set_stance("force_eager"), eager_runs_are_measured(), mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _traced(
    handler: Handler,
    paths: Mapping[int, str],
    gate: Gate,
    decision: Rewrite,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    masked: Tensor | None,
) -> Tensor:
    """What ``handler`` gives for an attention that was found in a graph, its tokens in the order of the queries."""
    placement = decision.order.queries
    over_keys = None if mask is None else mask[:, None, None]
    if over_keys is not None and over_keys.dtype != torch.bool:
        over_keys = over_keys.to(query.dtype)
    dense = F.scaled_dot_product_attention(
        query,
        key,
        value,
        over_keys,
        is_causal=decision.causal,
        scale=decision.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    dense = dense if placement is None else reorder(dense, placement, inverse=True)
    dense = dense if masked is None else dense.masked_fill(masked, 0.0)
    found = handler(GatedCall(paths[id(gate)], gate, query, key, value, mask, decision, dense, masked))
    return found if placement is None else reorder(found, placement)


class _AttentionMode(TorchFunctionMode):
    """Numbers attention calls within each module call, as ``sites.find_sites`` does within a graph."""

    def __init__(self, model: nn.Module, handler: Handler) -> None:
        super().__init__()
        self.paths = {id(gate): path for path, gate in gates(model).items()}
        self.handler = handler
        self.running: list[nn.Module] = []
        self.calls: list[list[tuple[int, str]]] = []
        """Of each running module, what ``number_calls`` takes for the calls so far."""

    def begin(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)
        self.calls.append([])

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()
        calls = self.calls.pop()
        if output is None or not calls:  # it is None where the forward raised
            return
        gated = own_gates(module).values()
        numbers = number_calls(module, calls).ordinals
        unseen = [gate for gate in gated if gate.ordinal not in numbers]
        if unseen and any(gate_name(number) not in own_gates(module) for number in numbers):
            paths = ", ".join(self.paths[id(gate)] for gate in gated)
            raise ValueError(
                f"{paths}: the owner called F.scaled_dot_product_attention {len(calls)} time(s), but has a gate for "
                f"its attention number {unseen[0].ordinal + 1}, so which call a gate belongs to is not known; "
                f"accepted: gates of these calls, as prepare makes them"
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in SDPA_TARGETS or not self.running:
            return output
        owner, calls = self.running[-1], self.calls[-1]
        if not own_gates(owner):
            return output
        calls.append((0, call_site(running_frames(sys._getframe(1)), self.running)))
        gate = own_gates(owner).get(gate_name(number_calls(owner, calls).ordinals[-1]))
        if gate is None:
            return output
        # The passes read tensors as they read the nodes of a graph, so a call can stand for a node.
        node = SimpleNamespace(args=args, kwargs=kwargs or {}, meta={})
        call = attention_call(cast(Any, node), cast(Any, None))
        decision = decide(dataclasses.replace(call, node=output), requirements(gate.config), gate.seen)
        if not isinstance(decision, Rewrite):
            return output
        dense = map(_value, of_queries(output, decision))
        found = [
            self._observed(gate, *part, its_own) for part, its_own in zip(parts(call, decision), dense, strict=True)
        ]
        return torch.cat(found, dim=2) if len(found) > 1 else _value(after(cast(Any, found[0]), *from_batch(decision)))

    def _observed(self, gate: Gate, call: AttentionCall, decision: Rewrite, dense: Tensor) -> Tensor:
        """What the handler gives for an attention that is one call of the op."""
        query, key, value = map(_value, decision.operands(call))
        mask = next((cast(Tensor, example(operand)) for operand in decision.masks()), None)
        masked = cast(Tensor | None, example(decision.masked_queries()))
        return self.handler(GatedCall(self.paths[id(gate)], gate, query, key, value, mask, decision, dense, masked))


def _value(source: Any) -> Tensor:
    """The tensor that an operand of an eager call is, with its gradient."""
    if not isinstance(source, Operand):
        return cast(Tensor, source)
    value: Any = source.source
    for step in source.steps:
        value = step(value)
    return cast(Tensor, value)


def batch_arguments(batch: Any, position: int) -> Arguments:
    """The arguments in ``batch``, number ``position`` of the batches; TypeError if it is no tuple, list or mapping."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise TypeError(
        f"batches: item {position} is a {type(batch).__name__}; accepted: a tuple of the model's positional "
        f"arguments, or a mapping of its keyword arguments"
    )


def as_batches(batches: Any) -> Iterable[Any]:
    """``batches``, or a list of it where it is one batch: a mapping, or a tuple that begins with a tensor.

    No batch of several is a tensor or a mapping's key, so that is no guess. TypeError for a tensor alone.
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            "batches: got a Tensor; accepted: an iterable of batches, or one batch: a tuple of the model's positional "
            "arguments, or a mapping of its keyword arguments"
        )
    is_tuple = isinstance(batches, tuple) and len(batches) > 0 and isinstance(batches[0], Tensor)
    return [batches] if is_tuple or isinstance(batches, Mapping) else batches


def peek_first(batches: Iterable[Any], count: int | None) -> tuple[Arguments, Iterator[Arguments]]:
    """The first batch; and the first ``count`` batches, that one included (None: all).

    Raises ValueError where there is none, or ``count``, a user's ``max_batches``, is less than 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"max_batches: got {count}; accepted: an integer of at least 1, or None")
    batches = as_batches(batches)
    stream = (batch_arguments(batch, i) for i, batch in enumerate(islice(batches, count)))
    first = next(stream, None)
    if first is None:
        raise ValueError("batches: empty; accepted: an iterable of at least one batch")
    return first, chain((first,), stream)


@contextmanager
def prepared_or_rolled_back(
    model: nn.Module, example: Arguments, config: SLAConfig | Mapping[str, Any] | None, *, again: bool = False
) -> Iterator[None]:
    """Prepare ``model`` if it has no gates or ``config`` is given; undone if an exception leaves the context.

    ``again`` says that the caller prepares it with ``example`` too. Raises ValueError, before anything is changed,
    where preparing it would take away a gate that ``example`` does not reach.
    """
    if gates(model) and (again or config is not None):
        _refuse_unreached(model, example)
    if gates(model) and config is None:
        yield
        return
    previous, had_gates = model_config(model), bool(gates(model))
    notes = [(module, module.__dict__[PREPARED]) for module in model.modules() if PREPARED in module.__dict__]
    prepare(model, *example, config=config)
    try:
        if not gates(model):
            raise ValueError(no_gated_call_message(model, example, config))
        yield
    except BaseException:
        if had_gates:
            prepare(model, *example, config=previous)
        else:
            detach(model)
            for module, note in notes:  # of settings that gave no gates
                module.__dict__[PREPARED] = note
        raise


def _refuse_unreached(model: nn.Module, example: Arguments) -> None:
    """Raise ValueError, on all ranks, where ``model`` prepared again with ``example`` as it is would lose a gate."""
    missed = left_out_again(model, *example)
    if not total(len(gates(model)) - len(missed)):
        raise ValueError(no_gated_call_message(model, example))
    if total(len(missed)):
        raise ValueError(
            f"{missed[0] if missed else 'another rank'}: its attention is not reached by the first batch, which the "
            f"model is prepared with again; accepted: a first batch that reaches every attention with a gate"
        )


def no_gated_call_message(
    model: nn.Module, example: Arguments, config: SLAConfig | Mapping[str, Any] | None = None
) -> str:
    """The text of an error that says why no attention of ``model`` would be rewritten for the arguments ``example``."""
    try:
        sites = explain(model, *example, config=config).sites
    except ValueError as error:  # of a model in fully_shard, which has no copy to trace
        return f"{type(model).__name__}: no attention with a gate was reached, and no trace says why: {error}"
    kept = [site for site in sites if not site.rewritten]
    reasons: Sequence[str] = [
        f"{site.path or 'the model itself'}: {site.reason}, {site.value} (accepted: {site.accepted})"
        for site in kept[:_KEPT_SHOWN]
    ]
    more = f"; and {len(kept) - _KEPT_SHOWN} more" if len(kept) > _KEPT_SHOWN else ""
    found = "; ".join(reasons) or "no attention was found"
    return f"{type(model).__name__}: no attention with a gate was reached: {found}{more}"
