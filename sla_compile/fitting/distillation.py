"""``distill``: train the gates alone, towards the dense attention of each site or the dense model's output.

No second copy of the model is needed: a prepared model that runs eagerly is the dense model, its own teacher.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from sla_compile.compiler.preparation import unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.calibration import SiteError, gather, mean_error, sites_dict
from sla_compile.fitting.observer import (
    Arguments,
    as_batches,
    batch_arguments,
    no_gated_call_message,
    prepared_or_rolled_back,
)
from sla_compile.fitting.output_error import at_least_float32, floating_tensors
from sla_compile.fitting.ranks import over_ranks, sum_tensors, total
from sla_compile.fitting.regression import SiteStatistics
from sla_compile.fitting.traced_calls import kept_traces
from sla_compile.gate import gates, model_config
from sla_compile.memory import eager_runs_are_measured
from sla_compile.sharded import fill, is_sharded, whole
from sla_compile.user_warnings import UntrainedGatesWarning

__all__ = ["LOSSES", "DistillationReport", "distill"]

LOSSES = ("attention", "output")
_MEASURED_BATCHES = 4
"""How many batches, the first ones, errors are measured on."""

_WARM_UP_SHARE, _MAX_WARM_UP = 10, 10
"""Warm-up of the learning rate: one in so many steps, and at most so many."""

Progress = Callable[[int, float], None]
"""Called after each step with its number, from 0, and its loss."""


@dataclass(frozen=True, repr=False)
class DistillationReport:
    """The losses of a distillation and what it did to each site's attention error; prints as a table."""

    model: str
    """Class of the model."""
    loss: str
    losses: tuple[float, ...]
    """The loss at each step, before the step's update."""
    measured_batches: int
    """How many batches, the first ones, the errors below are over."""
    sites: tuple[SiteError, ...]
    """Attention errors on the dense model's inputs, before and after."""
    output_before: float | None = None
    """||output - dense output|| / ||dense output|| before; None for loss="attention", which compiles nothing."""
    output_after: float | None = None
    """The same afterwards."""
    unreached: tuple[str, ...] = ()
    """Gates whose attention the measured batches did not reach."""

    @property
    def title(self) -> str:
        """One line: what was trained, and the output's error where it was measured."""
        line = f"{self.model}: gates distilled for {len(self.losses)} steps, loss={self.loss!r}"
        if self.output_before is None or self.output_after is None:
            return line
        return f"{line}, output error {self.output_before:.4f} -> {self.output_after:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields, for each site its ``closed`` too, and means over the sites."""
        lists = {"losses": list(self.losses), "unreached": list(self.unreached)}
        return {**dataclasses.asdict(self), **sites_dict(self.sites), **lists}

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> Any:
        from sla_compile.reporting.fit_tables import ErrorsView

        return ErrorsView(self.title, self.sites, self.unreached)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import plain_text

        return plain_text(self.__rich__(), width=100)

    def __repr__(self) -> str:
        before, after = mean_error(self.sites, "before"), mean_error(self.sites, "after")
        return f"<DistillationReport of {self.model}: mean attention error {before:.3g} -> {after:.3g}>"


def distill(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float = 1e-2,
    loss: str = "attention",
    config: SLAConfig | Mapping[str, Any] | None = None,
    compile_options: Mapping[str, Any] | SLAConfig | None = None,
    progress: Progress | None = None,
    group: Any = None,
) -> DistillationReport:
    """Train the gates of ``model``, and nothing else, against its own dense attention or output.

    The optimizer is AdamW without weight decay on float64 copies of the gates; the learning rate warms up over a tenth
    of the steps (at most 10) and follows a cosine to zero. All other parameters are frozen; afterwards, also after an
    exception, every ``requires_grad`` and ``grad`` is as before. The model keeps its mode, train or eval. The same
    arguments give the same gates.

    - ``loss="attention"``: the sum over sites of ||O - dense||^2 / ||dense||^2 on the dense model's inputs, all
      in one forward. `calibrate` computes this loss's minimum in closed form; this approaches it a batch at a time.
    - ``loss="output"``: ||output - dense output||^2 / ||dense output||^2 over all floating-point tensors of the
      output. The student is the model compiled with ``backend="sla"``, the teacher the same model uncompiled.

    Args:
        model: any module, prepared, compiled, or neither; without gates it is prepared with the first batch.
        batches: tuples of positional, or mappings of keyword, arguments of the model, on its device. A list or
            a DataLoader is started again when it ends; an iterator has to last. Errors are those on the first four.
        steps: updates of the gates, one batch each.
        lr: the highest learning rate.
        loss: "attention" or "output".
        config: settings for ``prepare``, with a first batch that reaches all gates; None: those it was prepared with.
        compile_options: ``options`` of ``torch.compile`` for the student; by default the ``inner`` and
            ``inductor`` that the model was prepared with.
        progress: called after each step with its number, from 0, and its loss.
        group: ranks with batches of their own, all to get the same gates; by default those of DDP or FSDP2.

    Raises:
        TypeError: ``model`` is no module, ``group`` no group, or a batch is neither a tuple nor a mapping.
        ValueError: no batch, an iterator that ends early, no gated attention, an output without floating-point
            tensors, a refused setting, or a loss that is not finite, with its step. After this, as after any
            exception from the first step on, the gates are those of the last step whose loss was finite.
    """
    _check_arguments(steps, lr, loss, compile_options)
    model = unwrapped(model)
    measured, source = _first_and_all(batches, min(_MEASURED_BATCHES, steps))
    with torch.inference_mode(False), torch.enable_grad(), over_ranks(model, group) as model:
        with prepared_or_rolled_back(model, measured[0], config):
            _refuse_gates(model, loss)
            sites = _gather_finite(model, measured)
        before = {path: _error(statistics) for path, statistics in sites.items()}
        with _only_gates_trainable(model), kept_traces(model):
            copies = _Float64Copies(model)
            output = _OutputLoss(model, copies, compile_options) if loss == "output" else None
            outputs: tuple[float | None, ...] = (output.error(measured) if output else None,)
            losses = _train(
                output or _AttentionLoss(model, copies), copies, _cycled(source, steps), steps, lr, progress
            )
            outputs += (output.error(measured) if output else None,)
    return _report(model, loss, losses, len(measured), sites, before, outputs)


def _refuse_gates(model: nn.Module, loss: str) -> None:
    for path, gate in gates(model).items():
        if gate.shift is not None:
            raise ValueError(
                f"{path}: got a gate for linear='taylor', one number for each head; accepted: gates with a "
                f"weight, as linear='marginal' has. calibrate finds the numbers, and training the model trains them"
            )
        if loss == "output" and is_sharded(gate.weight):  # outside its forward it has no gradient to ask for
            raise ValueError(f"loss: got 'output' with a gate that is sharded, {path}; accepted: 'attention'")


def _gather_finite(model: nn.Module, batches: list[Arguments]) -> dict[str, SiteStatistics]:
    """Statistics by gate path; ValueError if no gated attention is reached, or one is not finite."""
    _, sites = gather(model, batches)
    if not sites:
        raise ValueError(no_gated_call_message(model, batches[0]))
    _refuse_not_finite(sites, "on the first batches")
    return sites


def _report(
    model: nn.Module,
    loss: str,
    losses: list[float],
    measured: int,
    sites: Mapping[str, SiteStatistics],
    before: Mapping[str, float],
    outputs: tuple[float | None, ...],
) -> DistillationReport:
    errors = (
        SiteError(path, statistics.sparse_only_error(), before[path], _error(statistics), statistics.calls)
        for path, statistics in sites.items()
    )
    return DistillationReport(
        model=type(model).__name__,
        loss=loss,
        losses=tuple(losses),
        measured_batches=measured,
        sites=tuple(errors),
        output_before=outputs[0],
        output_after=outputs[-1],
        unreached=tuple(path for path in gates(model) if path not in sites),
    )


def _check_arguments(steps: int, lr: float, loss: str, compile_options: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: got {steps!r}; accepted: an integer of at least 1")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: got {lr}; accepted: a finite number above 0")
    if loss not in LOSSES:
        raise ValueError(f"loss: got {loss!r}; accepted: one of {LOSSES}")
    if compile_options is not None and loss != "output":
        raise ValueError(f"compile_options: got some with loss={loss!r}; accepted: only with loss='output'")


def _error(statistics: SiteStatistics) -> float:
    return statistics.error(*map(whole, statistics.gate.parameters()))


def _refuse_not_finite(sites: Mapping[str, SiteStatistics], where: str) -> None:
    for path, statistics in sites.items():
        if not statistics.is_finite():
            raise ValueError(f"{path}: attention, or a branch of it, is not finite {where}")


def _first_and_all(batches: Iterable[Any], count: int) -> tuple[list[Arguments], Iterable[Any]]:
    """The arguments in the first ``count`` batches; and all batches, those included, also where it is an iterator."""
    batches = as_batches(batches)
    iterator = iter(batches)
    first = list(islice(iterator, count))
    arguments = [batch_arguments(batch, i) for i, batch in enumerate(first)]
    if not arguments:
        raise ValueError("batches: empty; accepted: an iterable of at least one batch")
    return arguments, chain(first, iterator) if iterator is batches else batches


def _cycled(batches: Iterable[Any], steps: int) -> Iterator[Arguments]:
    """``steps`` batches, started again whenever they end; ValueError if they end early and cannot be."""
    done = 0
    while done < steps:
        start = done
        for batch in islice(batches, steps - done):
            yield batch_arguments(batch, done)
            done += 1
        if done == start or (done < steps and isinstance(batches, Iterator)):
            raise ValueError(
                f"batches: ended after {done} of {steps} steps and cannot be iterated again; accepted: an "
                f"iterator that lasts for all steps, or a list (say), which is cycled"
            )


@contextmanager
def _only_gates_trainable(model: nn.Module) -> Iterator[None]:
    """Within this context only the gates of ``model`` require gradients; afterwards all do that did before."""
    known = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    trained = {id(parameter) for gate in gates(model).values() for parameter in gate.parameters()}
    try:
        for parameter, _ in known:
            parameter.requires_grad_(id(parameter) in trained)
        yield
    finally:
        for parameter, wanted in known:
            parameter.requires_grad_(wanted)


class _Float64Copies:
    """Float64 copies of all gate parameters, for the optimizer: 16-bit gates would round small steps away."""

    def __init__(self, model: nn.Module) -> None:
        self.gates = gates(model)
        self.parameters = [p for gate in self.gates.values() for p in gate.parameters()]
        self.tensors = [whole(p.detach()).to(torch.float64, copy=True).requires_grad_() for p in self.parameters]
        copies = iter(self.tensors)
        self.of_gate = {path: [next(copies) for _ in gate.parameters()] for path, gate in self.gates.items()}

    @torch.no_grad()
    def store(self, values: Iterable[Tensor]) -> None:
        """Copy ``values`` into the gates' parameters, in their order."""
        for parameter, value in zip(self.parameters, values, strict=True):
            fill(parameter, value)


class _AttentionLoss:
    """The sum over sites of the attention's relative squared error, as a function of the copies."""

    def __init__(self, model: nn.Module, copies: _Float64Copies) -> None:
        self.model, self.copies = model, copies

    def __call__(self, batch: Arguments, step: int) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradient with respect to the copies."""
        _, sites = gather(self.model, [batch])
        _refuse_not_finite(sites, f"at step {step}")
        terms = [statistics.relative_loss(*self.copies.of_gate[path]) for path, statistics in sites.items()]
        if not terms:
            raise ValueError(f"step {step}: {no_gated_call_message(self.model, batch)}")
        loss = torch.stack([term.to(terms[0].device) for term in terms]).sum()
        return loss.detach(), _gradients(loss, self.copies.tensors)


class _OutputLoss:
    """Relative squared error of the compiled model's output, the eager model's being right; a function of the gates."""

    def __init__(self, model: nn.Module, copies: _Float64Copies, options: Mapping[str, Any] | SLAConfig | None) -> None:
        if options is None and (config := model_config(model)) is not None:
            options = {"inner": config.inner, **config.inductor}
        self.model, self.copies = model, copies
        self.student = torch.compile(model, backend="sla", options=cast(Any, options))

    def __call__(self, batch: Arguments, step: int) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradient with respect to the gates."""
        distance, norm = self._distance(batch)
        if not distance.requires_grad:
            raise ValueError(f"step {step}: {no_gated_call_message(self.model, batch)}")
        of_all = total(norm.item())
        loss = distance / max(of_all, torch.finfo(norm.dtype).tiny)
        gradients = [gradient.double() for gradient in _gradients(loss, self.copies.parameters)]
        sum_tensors(gradients)
        return torch.tensor(total(loss.item()), dtype=torch.float64), gradients

    def error(self, batches: Iterable[Arguments]) -> float:
        """||output - dense output|| / ||dense output|| over ``batches``."""
        distance = norm = 0.0
        for batch in batches:  # gradients enabled as in training: without, Dynamo would compile once more
            pair = self._distance(batch)
            distance, norm = distance + pair[0].item(), norm + pair[1].item()
        distance, norm = total(distance), total(norm)
        return math.sqrt(distance / norm) if norm > 0 else math.sqrt(distance)

    def _distance(self, batch: Arguments) -> tuple[Tensor, Tensor]:
        """||output - dense output||^2 and ||dense output||^2, each a 0-d tensor; only the first has a gradient."""
        args, kwargs = batch
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), eager_runs_are_measured():
            wanted = list(floating_tensors(self.model(*args, **kwargs)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedGatesWarning)  # they are being trained
            got = list(floating_tensors(self.student(*args, **kwargs)))
        if not wanted or [t.shape for t in got] != [t.shape for t in wanted]:
            raise ValueError(
                f"{type(self.model).__name__}: its output has no floating-point tensors that compare with the dense "
                f"ones (shapes {[tuple(t.shape) for t in got]}, dense {[tuple(t.shape) for t in wanted]})"
            )
        pairs = [(at_least_float32(g), at_least_float32(w)) for g, w in zip(got, wanted, strict=True)]
        distance = torch.stack([(g - w).square().sum() for g, w in pairs]).sum()
        return distance, torch.stack([w.square().sum() for _, w in pairs]).sum()


def _gradients(loss: Tensor, tensors: list[Any]) -> list[Tensor]:
    """The gradient of ``loss`` for each of ``tensors``; zeros for one that it does not depend on."""
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def _train(
    objective: Callable[[Arguments, int], tuple[Tensor, list[Tensor]]],
    copies: _Float64Copies,
    batches: Iterator[Arguments],
    steps: int,
    lr: float,
    progress: Progress | None,
) -> list[float]:
    """Train for ``steps`` and return the loss at each; after an exception the gates are those of the last finite loss.

    ``objective`` returns, for a batch and the number of the step, the loss and its gradients for ``copies.tensors``.
    """
    optimizer = torch.optim.AdamW(copies.tensors, lr=lr, weight_decay=0.0)
    warm_up = max(1, min(_MAX_WARM_UP, steps // _WARM_UP_SHARE))
    finite = [tensor.detach().clone() for tensor in copies.tensors]
    losses: list[float] = []
    try:
        for step, batch in enumerate(batches):
            loss, gradients = objective(batch, step)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(f"step {step}: the loss is {losses[-1]}, accepted is a finite one")
            finite = [tensor.detach().clone() for tensor in copies.tensors]
            if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
                raise ValueError(f"step {step}: the gradient of the gates is not finite")
            for tensor, gradient in zip(copies.tensors, gradients, strict=True):
                tensor.grad = gradient.to(tensor.dtype)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.step()
            copies.store(copies.tensors)
            if progress is not None:
                progress(step, losses[-1])
    except BaseException:
        copies.store(finite)
        raise
    return losses
