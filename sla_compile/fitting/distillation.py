"""``distill``: train the gates alone, to match the dense attention of each site or the dense model's output.

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
from sla_compile.fitting.calibration import SiteError, SiteStatistics, gather, mean_error, sites_dict
from sla_compile.fitting.observer import Arguments, call_arguments, nothing_gated, prepared_for
from sla_compile.gate import gates, model_config
from sla_compile.user_warnings import UntrainedGatesWarning

__all__ = ["LOSSES", "DistillationReport", "distill", "floating"]

LOSSES = ("attention", "output")
_MEASURED_BATCHES = 4

Progress = Callable[[int, float], None]


@dataclass(frozen=True, repr=False)
class DistillationReport:
    """The losses of a distillation and what it did to each site's attention error."""

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
) -> DistillationReport:
    """Train the gates of ``model``, and nothing else, against its own dense attention or output.

    AdamW without weight decay on float64 copies of the gates; a warm-up over a tenth of the steps (at most 10),
    then a cosine to zero. All else is frozen; every ``requires_grad`` and ``grad`` is afterwards as before,
    whatever happens. The model keeps its mode, train or eval. The same arguments give the same gates.

    - ``loss="attention"``: the sum over sites of ||O - dense||^2 / ||dense||^2 on the dense model's inputs, all
      in one pass. `calibrate` has this loss's minimum in closed form; this goes there a batch at a time.
    - ``loss="output"``: ||output - dense output||^2 / ||dense output||^2 over all floating-point tensors of the
      output. The student is the model compiled with ``backend="sla"``, the teacher the same model uncompiled.

    Args:
        model: any module, prepared, compiled, or neither; without gates it is prepared with the first batch.
        batches: tuples of positional, or mappings of keyword, arguments of the model, on its device. A list or
            a DataLoader is begun again when it ends; an iterator has to last. Errors are of the first four.
        steps: updates of the gates, one batch each.
        lr: the highest learning rate.
        loss: "attention" or "output".
        config: settings for ``prepare``; by default those the model has been prepared with.
        compile_options: ``options`` of ``torch.compile`` for the student; by default the ``inner`` and
            ``inductor`` that the model was prepared with.
        progress: called after each step with its number, from 0, and its loss.

    Raises:
        TypeError: ``model`` is no module, or a batch is neither a tuple nor a mapping.
        ValueError: no batch, an iterator that ends early, no gated attention, an output without floating-point
            tensors, a refused setting, or a loss that is not finite, with its step. As with any exception after
            the first step, the gates are then those of the last step whose loss was finite.
    """
    _check(steps, lr, loss, compile_options)
    model = unwrapped(model)
    held, source = _hold(batches, min(_MEASURED_BATCHES, steps))
    with torch.inference_mode(False), torch.enable_grad():
        with prepared_for(model, held[0], config):
            sites = _measure(model, held)
        before = {path: _error(statistics) for path, statistics in sites.items()}
        with _only_gates_trainable(model):
            copies = _Copies(model)
            output = _OutputLoss(model, copies, compile_options) if loss == "output" else None
            outputs: tuple[float | None, ...] = (output.error(held) if output else None,)
            losses = _train(
                output or _AttentionLoss(model, copies), copies, _cycled(source, steps), steps, lr, progress
            )
            outputs += (output.error(held) if output else None,)
    return _report(model, loss, losses, len(held), sites, before, outputs)


def _measure(model: nn.Module, held: list[Arguments]) -> dict[str, SiteStatistics]:
    _, sites = gather(model, held)
    if not sites:
        raise ValueError(nothing_gated(model, held[0]))
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


def _check(steps: int, lr: float, loss: str, compile_options: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: got {steps!r}; accepted: an integer of at least 1")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: got {lr}; accepted: a finite number above 0")
    if loss not in LOSSES:
        raise ValueError(f"loss: got {loss!r}; accepted: one of {LOSSES}")
    if compile_options is not None and loss != "output":
        raise ValueError(f"compile_options: got some with loss={loss!r}; accepted: only with loss='output'")


def _error(statistics: SiteStatistics) -> float:
    return statistics.error(*statistics.gate.parameters())


def _refuse_not_finite(sites: Mapping[str, SiteStatistics], where: str) -> None:
    for path, statistics in sites.items():
        if not statistics.finite():
            raise ValueError(f"{path}: attention, or a branch of it, is not finite {where}")


def _hold(batches: Iterable[Any], count: int) -> tuple[list[Arguments], Iterable[Any]]:
    """The first ``count`` batches, and the batches from the first on again."""
    iterator = iter(batches)
    first = list(islice(iterator, count))
    held = [call_arguments(batch, i) for i, batch in enumerate(first)]
    if not held:
        raise ValueError("batches: empty; accepted: an iterable of at least one batch")
    return held, chain(first, iterator) if iterator is batches else batches


def _cycled(batches: Iterable[Any], steps: int) -> Iterator[Arguments]:
    """``steps`` batches, from the first on again whenever they end."""
    done = 0
    while done < steps:
        start = done
        for batch in islice(batches, steps - done):
            yield call_arguments(batch, done)
            done += 1
        if done == start or (done < steps and isinstance(batches, Iterator)):
            raise ValueError(
                f"batches: ended after {done} of {steps} steps and cannot be iterated again; accepted: an "
                f"iterator that lasts for all steps, or a list (say), which is cycled"
            )


@contextmanager
def _only_gates_trainable(model: nn.Module) -> Iterator[None]:
    """Freeze all of ``model`` but its gates; afterwards every ``requires_grad`` is as before."""
    known = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    trained = {id(parameter) for gate in gates(model).values() for parameter in gate.parameters()}
    try:
        for parameter, _ in known:
            parameter.requires_grad_(id(parameter) in trained)
        yield
    finally:
        for parameter, wanted in known:
            parameter.requires_grad_(wanted)


class _Copies:
    """Float64 copies of all gates, which the optimizer moves: small steps would be lost in 16-bit gates."""

    def __init__(self, model: nn.Module) -> None:
        self.gates = gates(model)
        self.parameters = [p for gate in self.gates.values() for p in gate.parameters()]
        self.tensors = [p.detach().to(torch.float64, copy=True).requires_grad_() for p in self.parameters]
        copies = iter(self.tensors)
        self.of_gate = {path: [next(copies) for _ in gate.parameters()] for path, gate in self.gates.items()}

    @torch.no_grad()
    def store(self, values: Iterable[Tensor]) -> None:
        """Give the gates ``values``."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


class _AttentionLoss:
    """Attention errors of all sites, as functions of the copies."""

    def __init__(self, model: nn.Module, copies: _Copies) -> None:
        self.model, self.copies = model, copies

    def __call__(self, batch: Arguments, step: int) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradient with respect to the copies."""
        _, sites = gather(self.model, [batch])
        _refuse_not_finite(sites, f"at step {step}")
        terms = [statistics.relative_loss(*self.copies.of_gate[path]) for path, statistics in sites.items()]
        if not terms:
            raise ValueError(f"step {step}: {nothing_gated(self.model, batch)}")
        loss = torch.stack([term.to(terms[0].device) for term in terms]).sum()
        return loss.detach(), _gradients(loss, self.copies.tensors)


class _OutputLoss:
    """Distance of the compiled model's output from that of the model run eagerly, as a function of the gates."""

    def __init__(self, model: nn.Module, copies: _Copies, options: Mapping[str, Any] | SLAConfig | None) -> None:
        if options is None and (config := model_config(model)) is not None:
            options = {"inner": config.inner, **config.inductor}
        self.model, self.copies = model, copies
        self.student = torch.compile(model, backend="sla", options=cast(Any, options))

    def __call__(self, batch: Arguments, step: int) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradient with respect to the gates."""
        distance, norm = self._distance(batch)
        if not distance.requires_grad:
            raise ValueError(f"step {step}: {nothing_gated(self.model, batch)}")
        loss = distance / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return loss.detach(), _gradients(loss, self.copies.parameters)

    def error(self, batches: Iterable[Arguments]) -> float:
        """||output - dense output|| / ||dense output|| over ``batches``."""
        distance = norm = 0.0
        for batch in batches:  # with gradients as in training: without, it would be another compile
            pair = self._distance(batch)
            distance, norm = distance + pair[0].item(), norm + pair[1].item()
        return math.sqrt(distance / norm) if norm > 0 else math.sqrt(distance)

    def _distance(self, batch: Arguments) -> tuple[Tensor, Tensor]:
        args, kwargs = batch
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            wanted = list(floating(self.model(*args, **kwargs)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedGatesWarning)  # they are being trained
            got = list(floating(self.student(*args, **kwargs)))
        if not wanted or [t.shape for t in got] != [t.shape for t in wanted]:
            raise ValueError(
                f"{type(self.model).__name__}: its output has no floating-point tensors that compare with the dense "
                f"ones (shapes {[tuple(t.shape) for t in got]}, dense {[tuple(t.shape) for t in wanted]})"
            )
        pairs = [(_wide(g), _wide(w)) for g, w in zip(got, wanted, strict=True)]
        distance = torch.stack([(g - w).square().sum() for g, w in pairs]).sum()
        return distance, torch.stack([w.square().sum() for _, w in pairs]).sum()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def floating(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in ``output``: a tensor, or tuples, lists, mappings and dataclasses of them."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from floating(list(output.values()))
    elif isinstance(output, tuple | list):
        for part in output:
            yield from floating(part)
    elif dataclasses.is_dataclass(output):
        yield from floating([getattr(output, field.name) for field in dataclasses.fields(output)])


def _gradients(loss: Tensor, tensors: list[Any]) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def _train(
    objective: Callable[[Arguments, int], tuple[Tensor, list[Tensor]]],
    copies: _Copies,
    batches: Iterator[Arguments],
    steps: int,
    lr: float,
    progress: Progress | None,
) -> list[float]:
    """The loss at each step; an exception leaves the gates of the last finite loss."""
    optimizer = torch.optim.AdamW(copies.tensors, lr=lr, weight_decay=0.0)
    warm_up = max(1, min(10, steps // 10))
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
