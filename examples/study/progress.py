"""The progress bar of the examples: step, loss, seconds per step and time left."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Steps"]


class Steps:
    """Counts steps from ``start`` to ``stop`` behind a progress bar; give losses to ``show``."""

    def __init__(self, label: str, start: int, stop: int, console: Console) -> None:
        self.start, self.stop = start, stop
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[pace]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(label, total=stop, completed=start, loss="-", pace="")
        self.shown, self.steps = time.perf_counter(), 0

    def __iter__(self) -> Iterator[int]:
        with self.progress:
            self.shown = time.perf_counter()
            for step in range(self.start, self.stop):
                self.steps += 1
                yield step
                self.progress.update(self.task, completed=step + 1)

    def show(self, loss: float) -> None:
        """Show the loss of the step at hand, and how long a step has taken since the last call of this."""
        now = time.perf_counter()
        pace = (now - self.shown) / max(self.steps, 1)
        self.shown, self.steps = now, 0
        self.progress.update(self.task, loss=f"{loss:.4g}", pace=f"{pace:.3g} s/step")
