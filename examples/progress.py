"""The progress bar of the examples: step, loss, seconds per step and time left."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Steps"]


class Steps:
    """Counts steps from ``start`` to ``stop`` behind a progress bar; give each loss to ``show``."""

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

    def __iter__(self) -> Iterator[int]:
        with self.progress:
            for step in range(self.start, self.stop):
                began = time.perf_counter()
                yield step
                pace = f"{time.perf_counter() - began:.2f} s/step"
                self.progress.update(self.task, completed=step + 1, pace=pace)

    def show(self, loss: float) -> None:
        """Show the loss of the step at hand."""
        self.progress.update(self.task, loss=f"{loss:.4g}")
