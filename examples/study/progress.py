"""The progress bar of the examples: step, loss, what attention did, seconds per step and time left."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sla_compile import RunCounters

__all__ = ["Steps"]


class Steps:
    """Counts steps from ``start`` to ``stop`` behind a progress bar; give losses to ``show``."""

    def __init__(self, label: str, start: int, stop: int, console: Console) -> None:
        self.start, self.stop = start, stop
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}{task.fields[attention]}  {task.fields[pace]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(label, total=stop, completed=start, loss="-", attention="", pace="")
        self.shown, self.steps = time.perf_counter(), 0

    def __iter__(self) -> Iterator[int]:
        with self.progress:
            self.shown = time.perf_counter()
            for step in range(self.start, self.stop):
                self.steps += 1
                yield step
                self.progress.update(self.task, completed=step + 1)

    def show(self, loss: float, counters: RunCounters | None = None) -> None:
        """Show the loss of the step at hand, what ``counters`` count, and how long a step took since the last call."""
        now = time.perf_counter()
        pace = (now - self.shown) / max(self.steps, 1)
        self.shown, self.steps = now, 0
        attention = "" if counters is None else f"  {in_words(counters)}"
        self.progress.update(self.task, loss=f"{loss:.4g}", attention=attention, pace=f"{pace:.3g} s/step")


def in_words(counters: RunCounters) -> str:
    """What the attentions of a model did, in a few words; reading the counters waits for the device."""
    counts = list(counters.read().values())
    ran = [site for site in counts if site["calls"]]
    if len(ran) < len(counts):
        return f"{len(counts) - len(ran)} of {len(counts)} attentions run dense"
    wrong = sum(site["non_finite"] for site in ran)
    if wrong:
        return f"{wrong:,} numbers not finite"
    return f"{100 * sum(site['critical_share'] for site in ran) / len(ran):.1f}% critical"
