"""Choose launches of the Triton kernels for the GPU at hand, by timing a few for each kernel.

One kernel after another, in the order of ``KERNELS``, the others held at the best found so far. A launch that fails, or
that computes something else than the shipped one, is dropped; the fastest takes the shipped one's place where it is at
least 2% faster twice. Times are those of the whole directions that a kernel is in, because its tiles also set what
others have to do. What is run and what a time is come from outside (`Trials`): a test needs no GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult, Gradients
from sla_compile.common.options import AttentionOptions

from .launches import KERNELS, Key, Launch, mistakes, trying
from .tiles import clamped, row_of, shipped_launch

__all__ = ["Outcome", "Trials", "Workload", "candidates", "on_gpu", "tune"]

SHARE = 0.98
"""Of the shipped launch's time, the most that another may take to be chosen."""

BUDGETS = {"half": 2e-2, "single": 1e-4}
"""Relative error against the shipped launch: sums in another order, rounded to bfloat16 on the way or not."""

_DIRECTIONS = {"states": ("forward", "backward"), "forward": ("forward",)}
_FIELDS = {
    "states": ("tile_k", "chunk"),
    "forward": ("tile_q", "tile_k", "chunk"),
    "linear_backward": ("tile_q", "chunk"),
    "backward_query": ("tile_q", "tile_k"),
    "backward_key": ("tile_q", "tile_k", "chunk"),
    "gate": ("tile_q", "chunk"),
}
"""The sizes that each kernel reads of its launch."""


@dataclass(frozen=True)
class Workload:
    """What is timed: self-attention of one batch row, blocks of ``block`` tokens, 5% critical and 10% negligible."""

    head_dim: int
    dtype: torch.dtype
    tokens: int = 16384
    heads: int = 12
    block: int = 64

    @property
    def precision(self) -> str:
        return "single" if self.dtype == torch.float32 else "half"

    def key(self, kernel: str) -> Key:
        return kernel, row_of(self.head_dim), self.precision

    def shipped(self, kernel: str) -> Launch:
        """The shipped launch of ``kernel`` for these blocks on the current device."""
        block = 64 if kernel == "gate" else self.block  # it has no blocks; its launcher says 64
        return shipped_launch(*self.key(kernel), block, block)


@dataclass(frozen=True)
class Trials:
    """What can be done with the launches in force; both take a direction, "forward" or "backward"."""

    run: Callable[[str], dict[str, torch.Tensor]]
    """The results by name. The inputs of a backward stay the same, whatever launches are in force."""
    milliseconds: Callable[[str], float]


@dataclass
class Outcome:
    """What was found for one kernel; milliseconds of the directions that it is in."""

    key: Key
    shipped: Launch
    shipped_ms: float
    best: Launch
    best_ms: float
    dropped: list[tuple[Launch, str]] = field(default_factory=list)
    """Launches that were not timed, and why."""


def candidates(kernel: str, work: Workload) -> list[Launch]:
    """Launches near the shipped one of ``kernel``: a size halved or doubled, warps too, or one stage more or less, and
    each size with each number of warps. Those that come to the same on this workload are there once."""
    shipped = work.shipped(kernel)
    halved_or_doubled = (0.5, 2)
    sizes = [
        replace(shipped, **{name: int(getattr(shipped, name) * factor)})
        for name in _FIELDS[kernel]
        for factor in halved_or_doubled
    ]
    made = [
        *(replace(shipped, stages=shipped.stages + step) for step in (-1, 1)),
        *sizes,
        *(replace(near, warps=int(near.warps * factor)) for near in (shipped, *sizes) for factor in halved_or_doubled),
    ]
    block = 64 if kernel == "gate" else work.block
    different = {clamped(shipped, work.head_dim, block, block)}
    kept = []
    for launch in made:
        effective = clamped(launch, work.head_dim, block, block)
        if not mistakes(asdict(launch)) and effective not in different:
            different.add(effective)
            kept.append(launch)
    return kept


def tune(
    work: Workload,
    trials: Trials,
    kernels: Iterable[str] = KERNELS,
    choose: Callable[[str, Workload], Sequence[Launch]] = candidates,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """The best launch of each of ``kernels`` among those of ``choose``. RuntimeError where a shipped launch fails."""
    held: dict[Key, Launch] = {}
    outcomes = []
    for kernel in kernels:
        outcome = _tune_kernel(work.key(kernel), work.shipped(kernel), choose(kernel, work), trials, held, progress)
        if outcome.best != outcome.shipped:
            held[outcome.key] = outcome.best
        outcomes.append(outcome)
    return outcomes


def _tune_kernel(
    key: Key,
    shipped: Launch,
    launches: Sequence[Launch],
    trials: Trials,
    held: dict[Key, Launch],
    progress: Callable[[str], None],
) -> Outcome:
    directions = _DIRECTIONS.get(key[0], ("backward",))

    def run(launch: Launch) -> list[dict[str, torch.Tensor]]:
        with trying({**held, key: launch}):
            return [trials.run(direction) for direction in directions]

    def milliseconds(launch: Launch) -> float:
        with trying({**held, key: launch}):
            return sum(trials.milliseconds(direction) for direction in directions)

    name = f"{key[0]}, head dimension {key[1]}, {key[2]}"
    progress(f"{name}: the shipped launch")
    expected = _results_of_shipped(run, shipped, name)
    outcome = Outcome(key, shipped, milliseconds(shipped), shipped, 0.0)
    times: dict[Launch, float] = {}
    for number, launch in enumerate(launches, 1):
        progress(f"{name}: {number} of {len(launches)}")
        try:
            _check_equal(run(launch), expected, BUDGETS[key[2]])
            times[launch] = milliseconds(launch)
        except Exception as error:
            outcome.dropped.append((launch, _reason(error)))
            _results_of_shipped(run, shipped, name)  # fails where the GPU gives no more answers
    outcome.best_ms = outcome.shipped_ms
    if times:
        best = min(times, key=lambda launch: times[launch])
        if times[best] <= SHARE * outcome.shipped_ms:
            again = milliseconds(shipped), milliseconds(best)  # the least of many times is low by chance too
            outcome.shipped_ms, outcome.best_ms = again
            if again[1] <= SHARE * again[0]:
                outcome.best = best
            else:
                outcome.best_ms = again[0]
    return outcome


def _results_of_shipped(
    run: Callable[[Launch], list[dict[str, torch.Tensor]]], shipped: Launch, name: str
) -> list[dict[str, torch.Tensor]]:
    try:
        return run(shipped)
    except Exception as error:
        raise RuntimeError(f"the shipped launch of {name} fails: {_reason(error)}") from error


def _check_equal(
    actual: Sequence[dict[str, torch.Tensor]], expected: Sequence[dict[str, torch.Tensor]], budget: float
) -> None:
    """Raise an ArithmeticError where the relative error of a result is over ``budget``, or none."""
    for results, others in zip(actual, expected, strict=True):
        for name, other in others.items():
            error = (results[name].float() - other.float()).norm().item() / (other.float().norm().item() or 1.0)
            if not error <= budget:
                raise ArithmeticError(f"{name}: relative error {error:.1e}; accepted: {budget:.0e}")


def _reason(error: Exception) -> str:
    """The kind of ``error`` and the first line of what it says."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:160]


@contextlib.contextmanager
def on_gpu(work: Workload) -> Iterator[Trials]:
    """Trials of ``work`` on the current GPU, all by the Triton kernels: under this, Hopper's Gluon kernels are off."""
    from triton.testing import do_bench

    from ..hopper import support as hopper
    from . import attention as triton_attention

    inputs, grad_out = _inputs(work)
    options = AttentionOptions(
        scale=work.head_dim**-0.5,
        topk=0.05,
        bottomk=0.10,
        block_q=work.block,
        block_k=work.block,
        feature_map="softmax",
        linear="marginal",
    )
    gluon: Any = hopper

    def forward() -> ForwardResult:
        return triton_attention.forward(inputs, options)

    def backward() -> Gradients:
        return triton_attention.backward(grad_out, inputs, saved, options)

    calls: dict[str, Callable[[], ForwardResult | Gradients]] = {"forward": forward, "backward": backward}

    def run(direction: str) -> dict[str, torch.Tensor]:
        results = calls[direction]()
        torch.cuda.synchronize()
        return {name: result for name, result in results._asdict().items() if result is not None}

    usable, gluon.usable = gluon.usable, lambda *operands, **about: False
    try:
        try:
            with trying({}):
                saved = forward()
        except Exception as error:
            raise RuntimeError(f"the shipped launches fail: {_reason(error)}") from error
        yield Trials(run, lambda direction: do_bench(calls[direction], warmup=20, rep=100, return_mode="median"))
    finally:
        gluon.usable = usable


def _inputs(work: Workload) -> tuple[AttentionInputs, torch.Tensor]:
    """The inputs, and a gradient of the output.

    Activations are multiples of 1/16: a block's sum is exact then, so that no launch gets other means, and with them
    other classes.
    """
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    shape = (1, work.tokens, work.heads, work.head_dim)
    q, k, v, grad_out = ((normal(*shape) * 16).round().div(16).to(work.dtype).transpose(1, 2) for _ in range(4))
    weight, bias = normal(work.head_dim, work.head_dim) * work.head_dim**-0.5, normal(work.head_dim)
    v += 0.5  # else the linear branch, a mean over many keys, is too small to be compared
    return AttentionInputs(q, k, v, weight.to(work.dtype), bias.to(work.dtype)), grad_out
