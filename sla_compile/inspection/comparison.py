"""``compare``: what a model loses and gains with sparse-linear attention, before anything in it is changed."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sla_compile.compat import current_frame, throw_away_compile
from sla_compile.compiler.preparation import unwrapped
from sla_compile.config import SLAConfig
from sla_compile.fitting.observer import Arguments, GatedCall, gated_calls, no_gated_call_message
from sla_compile.fitting.output_error import OutputError
from sla_compile.fitting.statistics import Statistics, statistics_of
from sla_compile.fitting.traced_calls import kept_traces
from sla_compile.gate import gates
from sla_compile.inspection.timing import digits, peak_bytes, run_time
from sla_compile.inspection.trial import best_gate, dense_copy, read_batches, trial_copy
from sla_compile.reporting.model_report import explain
from sla_compile.user_warnings import UntrainedGatesWarning

__all__ = ["ComparisonReport", "Errors", "Forward", "SiteComparison", "compare"]

_OUTPUT_BATCHES = 4
"""How many batches, the first ones, errors of the model's output are measured on."""


@dataclass(frozen=True)
class Errors:
    """||O - dense|| / ||dense|| with three gates."""

    sparse_only: float
    """With gates of zero: the sparse branch alone, but for ``linear="taylor"``, which has virtual keys then too."""
    now: float
    """With the gates that the model has; those of one without gates are zero."""
    fitted: float
    """With gates fitted to these batches by least squares: what ``calibrate`` comes to at best."""


@dataclass(frozen=True)
class SiteComparison:
    """The errors of one attention, on the dense model's inputs, over all tokens of the batches."""

    path: str
    """Module path of the gate."""
    calls: int
    errors: Errors


@dataclass(frozen=True)
class Forward:
    """A forward of the first batch without gradients, compiled."""

    milliseconds: float
    """Median of the repeats."""
    slowest: float
    peak_bytes: int | None
    """What it allocates at most beyond what is there before; None on a CPU, where torch does not count it."""


@dataclass(frozen=True, repr=False)
class ComparisonReport:
    """Errors, time and memory of a model with sparse-linear attention; prints as a table, ``save`` draws it."""

    model: str
    """Class of the model."""
    batches: int
    device: str
    output: Errors
    """Of every floating-point output of the model, on the first four batches."""
    sites: tuple[SiteComparison, ...]
    """In the order in which a forward calls them."""
    kept: dict[str, str]
    """Why each other attention stays dense, by the path of its owner."""
    dense: Forward | None = None
    """Compiled by ``inner``; None where nothing was timed."""
    sla: Forward | None = None
    """The same with sparse-linear attention."""
    inner: str | None = None

    @property
    def title(self) -> str:
        """One line: the error of the output, and the speed-up where it was measured."""
        line = (
            f"{self.model}: {len(self.sites)} attention(s) sparse-linear, {len(self.kept)} dense: output error "
            f"{self.output.now:.4f}, {self.output.fitted:.4f} with fitted gates"
        )
        if self.dense is None or self.sla is None:
            return line
        before, after = self.dense.milliseconds, self.sla.milliseconds
        return f"{line}; forward {digits(before)} -> {digits(after)} ms ({before / after:.2f}x)"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields."""
        return {**dataclasses.asdict(self), "sites": [dataclasses.asdict(site) for site in self.sites]}

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def figure(self) -> Any:
        """A ``matplotlib.figure.Figure``: errors by site, time, and memory where it was measured."""
        from sla_compile.inspection.figures import comparison_figure

        return comparison_figure(self)

    def save(self, path: str | Path) -> None:
        """Write the figure (.png, .svg, .pdf) or the data (.json) to ``path``; ValueError for another ending."""
        from sla_compile.inspection.figures import write

        write(path, {"figure": self.figure, "json": self.to_json})

    def __rich__(self) -> Any:
        from sla_compile.inspection.terminal import ComparisonView

        return ComparisonView(self)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import plain_text

        return plain_text(self.__rich__(), width=100)

    def __repr__(self) -> str:
        return f"<ComparisonReport of {self.model}: output error {self.output.now:.3g}>"


def compare(
    model: nn.Module,
    batches: Iterable[Any],
    config: SLAConfig | Mapping[str, Any] | None = None,
    *,
    max_batches: int | None = None,
    inner: str | None = "inductor",
    repeats: int = 5,
) -> ComparisonReport:
    """What ``model`` would lose and gain with sparse-linear attention; nothing in it changes.

    All runs are of copies that share every tensor with the model, in the mode (train or eval) it is in, without
    gradients. Errors come from runs that Inductor does not compile, time from compiled ones; what is compiled is thrown
    away.

    Args:
        model: any module, prepared, compiled, or neither.
        batches: an iterable of tuples of positional, or mappings of keyword, arguments of the model, on its device.
        config: an ``SLAConfig`` or a mapping of its fields; by default the settings of the model's gates.
        max_batches: how many batches to use at most; None: all of them. They are held in memory.
        inner: the backend that both forwards are timed with, such as "inductor" or "eager"; None: nothing is timed.
        repeats: how often each is run for its time, after two runs that are not counted; the two in turn.

    Raises:
        TypeError: ``model`` is no module, or a batch is neither a tuple nor a mapping.
        ValueError: a refused setting, no batch, a model that cannot be copied, no attention with a gate was reached, or
            numbers that are not finite.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}; accepted: an integer of at least 1")
    model = unwrapped(model)
    data = read_batches(batches, max_batches)
    student = trial_copy(model, data[0], config)
    with kept_traces(student):
        found = _measure(student, data)
        if not found:
            raise ValueError(no_gated_call_message(model, data[0], config))
        for path, site in found.items():
            if not site.is_finite():
                raise ValueError(f"{path}: attention, dense or sparse, is not finite on these batches")
        fitted = {path: best_gate(site) for path, site in found.items()}
        output = _output_errors(student, data[:_OUTPUT_BATCHES], fitted)
    sites = tuple(_site(path, site, fitted[path]) for path, site in found.items())
    settings = next(iter(gates(student).values())).model_config
    timed = (None, None) if inner is None else _time(dense_copy(model), student, data[0], settings, inner, repeats)
    return ComparisonReport(
        model=type(model).__name__,
        batches=len(data),
        device=str(next(iter(found.values())).dense_square.device),
        output=output,
        sites=sites,
        kept={s.path: f"{s.reason}: {s.value}" for s in explain(student, *data[0]).sites if not s.rewritten},
        dense=timed[0],
        sla=timed[1],
        inner=inner,
    )


@torch.no_grad()
def _measure(model: nn.Module, batches: Iterable[Arguments]) -> dict[str, Statistics]:
    """By gate path, what is summed at each gated attention of the dense model."""
    sites: dict[str, Statistics] = {}

    def observe(call: GatedCall) -> Tensor:
        if call.path not in sites:
            sites[call.path] = statistics_of(call.gate, call.dense.device)
        sites[call.path].add(call)
        return call.dense

    with gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
    return sites


def _site(path: str, site: Statistics, fitted: tuple[Tensor, ...]) -> SiteComparison:
    errors = Errors(site.sparse_only_error(), site.error(*site.gate.parameters()), site.error(*fitted))
    return SiteComparison(path, site.calls, errors)


def _output_errors(model: nn.Module, batches: Sequence[Arguments], fitted: Mapping[str, tuple[Tensor, ...]]) -> Errors:
    error = OutputError(model, batches)

    def with_gates(gate_of: Callable[[GatedCall], Iterable[Tensor]]) -> float:
        squared = error.of(lambda call: call.output_with_gate(*gate_of(call)))
        if not math.isfinite(squared):
            raise ValueError(f"{type(model).__name__}: its output is not finite on the first batches")
        return math.sqrt(squared)

    return Errors(
        sparse_only=with_gates(lambda call: [torch.zeros_like(x) for x in call.gate.parameters()]),
        now=with_gates(lambda call: call.gate.parameters()),
        fitted=with_gates(lambda call: (x.to(call.gate.dtype) for x in fitted[call.path])),
    )


def _time(
    dense: nn.Module, student: nn.Module, example: Arguments, config: SLAConfig, inner: str, repeats: int
) -> tuple[Forward, Forward]:
    """Both forwards, compiled by ``inner`` and run in turn; what is compiled is thrown away."""
    from torch._dynamo import lookup_backend

    from sla_compile.backend import sla  # imports Triton, by way of PyTorch's FLOP counter

    options = dataclasses.replace(config, inner=inner)

    def plain(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return gm.forward if inner == "eager" else lookup_backend(inner)(gm, list(inputs))

    with throw_away_compile() as frames, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UntrainedGatesWarning)

        def noting(backend: Callable[..., Any]) -> Callable[..., Any]:
            def compile_frame(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
                frames.extend([frame] if (frame := current_frame()) is not None else [])
                return backend(gm, inputs)

            return compile_frame

        gpus = {p.device for p in dense.parameters() if p.is_cuda}
        runs = [
            torch.compile(dense, backend=noting(plain), dynamic=False),
            torch.compile(student, backend=noting(lambda gm, inputs: sla(gm, inputs, options=options)), dynamic=False),
        ]
        times: list[list[float]] = [[], []]
        peaks: list[int | None] = [None, None]
        with torch.random.fork_rng(sorted(gpu.index for gpu in gpus)):
            calls = [partial(run, *example[0], **example[1]) for run in runs]
            for _ in range(2):
                for call in calls:
                    call()
            for _ in range(repeats):
                for i, call in enumerate(calls):
                    times[i].append(run_time(call))
            for i, call in enumerate(calls):
                peaks[i] = peak_bytes(call, gpus)
    before, after = (Forward(statistics.median(t), max(t), peak) for t, peak in zip(times, peaks, strict=True))
    return before, after
