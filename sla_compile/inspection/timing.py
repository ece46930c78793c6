"""How long calls take and what they allocate on a device: Triton's timer on a GPU, PyTorch's on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import timer

__all__ = ["Times", "digits", "peak_bytes", "run_time", "run_times", "time_in_turn"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call, over many."""

    median: float
    low: float
    """20th percentile."""
    high: float
    """80th percentile."""

    @classmethod
    def of(cls, milliseconds: list[float]) -> Times:
        """The median and percentiles of these; at least one."""
        fifths = statistics.quantiles(milliseconds, n=5, method="inclusive") if len(milliseconds) > 1 else milliseconds
        return cls(statistics.median(milliseconds), fifths[0], fifths[-1])

    def __str__(self) -> str:
        return f"{digits(self.median)} ({digits(self.low)} to {digits(self.high)})"


def digits(number: float) -> str:
    """``number`` to four digits, without an exponent where it is large."""
    return f"{number:.4g}" if number < 9999.5 else f"{number:.0f}"


def time_in_turn(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    seconds: float = 0.6,
    turns: int = 3,
    clock: Callable[[], float] = timer,
) -> dict[str, Times]:
    """Time each call for about ``seconds``, in ``turns``, so that a drift of the machine meets all alike.

    On a GPU by CUDA events on the current stream, the L2 cache flushed before each run, and the host may run ahead; on
    a CPU by ``clock`` and with as many threads as torch has now, short calls many at a time. What a first call compiles
    is not counted.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            samples[name] += _samples(call, device, seconds / turns, clock)
    return {name: Times.of(found) for name, found in samples.items()}


def run_time(call: Call) -> float:
    """Milliseconds of one run by the clock on the wall, from idle GPUs until they are idle again: for whole models."""
    _wait()
    started = time.perf_counter()
    call()
    _wait()
    return 1000 * (time.perf_counter() - started)


def run_times(call: Call, *, seconds: float, least: int = 3, most: int = 20) -> list[float]:
    """`run_time` of ``least`` runs, and of more, up to ``most``, for about ``seconds``."""
    found: list[float] = []
    while len(found) < least or (len(found) < most and sum(found) < 1000 * seconds):
        found.append(run_time(call))
    return found


def _wait() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _samples(call: Call, device: torch.device, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Milliseconds of runs of ``call``, after some that are not counted."""
    if device.type == "cuda":
        from triton.testing import do_bench

        found: list[float] = do_bench(call, warmup=int(200 * seconds), rep=int(1000 * seconds), return_mode="all")
        return found
    from torch.utils.benchmark import Timer

    timed = Timer("call()", timer=clock, globals={"call": call}, num_threads=torch.get_num_threads())
    return [1000 * time for time in timed.blocked_autorange(min_run_time=seconds).times]


def peak_bytes(call: Call, devices: Iterable[torch.device]) -> int | None:
    """What ``call`` allocates at most beyond what is there before, on these GPUs together; None where there is none."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return None
    before = {gpu: torch.cuda.memory_allocated(gpu) for gpu in gpus}
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    call()
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    return sum(torch.cuda.max_memory_allocated(gpu) - before[gpu] for gpu in gpus)
