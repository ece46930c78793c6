"""Where the time of one call on a GPU goes: a trace of PyTorch's profiler, and what its kernels add up to."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Spans = list[tuple[float, float]]
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class Timeline:
    """Milliseconds of one call on one GPU, from its first kernel to the end of its last."""

    span: float
    compute: float
    """Some kernel other than NCCL's runs."""
    nccl: float
    """One of NCCL's runs; it waits for the other ranks in it."""
    exposed: float
    """One of NCCL's runs and no other: what is not hidden."""
    idle: float
    """Nothing runs: the host is late, or kernels are short."""
    exchanges: int
    """NCCL's kernels that send and receive, all-to-all among them."""
    exchange: float
    """All of these together."""
    longest: dict[str, float]
    """The kernels that take most, by name, all their runs together."""


def profile(call: Callable[[], Any], path: Path) -> None:
    """Run ``call`` once under PyTorch's profiler and write its trace to ``path``, a ``.json.gz``."""
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    # Of the host nothing: the profiler would slow it down, and launches might come too late for that alone.
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        call()
        if cuda:
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))


def timeline(path: Path, longest: int = 12) -> Timeline | None:
    """What the trace at ``path`` adds up to; None where it has no kernel of a GPU."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    kernels = [event for event in events if event.get("cat") in _ON_DEVICE and "dur" in event]
    if not kernels:
        return None
    of_nccl = [event for event in kernels if "nccl" in event["name"].lower()]
    sent = [event for event in of_nccl if "SendRecv" in event["name"] or "AllToAll" in event["name"]]
    everything, nccl = _union(_spans(kernels)), _union(_spans(of_nccl))
    compute = _union(_spans(event for event in kernels if "nccl" not in event["name"].lower()))
    span = everything[-1][1] - everything[0][0]
    by_name: Counter[str] = Counter()
    for event in kernels:
        by_name[event["name"]] += event["dur"]
    return Timeline(
        span / 1e3,
        _length(compute) / 1e3,
        _length(nccl) / 1e3,
        (_length(everything) - _length(compute)) / 1e3,
        (span - _length(everything)) / 1e3,
        len(sent),
        sum(event["dur"] for event in sent) / 1e3,
        {name: time / 1e3 for name, time in by_name.most_common(longest)},
    )


def _spans(events: Iterable[dict[str, Any]]) -> Spans:
    """Begin and end of each event in microseconds."""
    return [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in events]


def _union(spans: Spans) -> Spans:
    """What at least one of ``spans`` covers, as spans apart from each other, in order."""
    found: Spans = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)
