"""A training loop that can be killed at any moment and goes on where its last checkpoint was."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from examples.study.arms import Student
from examples.study.cuda_graph import GraphedCallable
from examples.study.progress import Steps
from sla_compile import RunCounters, gates

__all__ = ["OutOfTime", "Trainer", "TrainingState", "write"]

CHECK_EVERY = 10
"""Steps between reading the loss and the clock: reading a loss waits for the device."""


class OutOfTime(Exception):
    """The seconds given are used up; what is done is saved."""


@dataclass
class Trainer:
    """Trains one student after another; the state of the one at hand is in a file of ``folder``."""

    folder: Path
    console: Console
    deadline: float = math.inf
    """A value of ``time.monotonic()`` after which ``fit`` saves and raises OutOfTime."""
    save_every: int | None = None
    """Steps between checkpoints; None: only when the time is used up."""

    def fit(
        self,
        key: str,
        student: Student,
        optimizer: torch.optim.Optimizer,
        steps: int,
        draw: Callable[[int], tuple[Tensor, ...]],
        objective: Callable[..., Tensor],
    ) -> dict[str, Any]:
        """Minimise ``objective(*draw(step))`` over ``steps`` steps, from the checkpoint of ``key`` if there is one.

        Returns ``losses``, pairs of step and loss, and ``step_ms``. Raises FloatingPointError where a loss is not
        finite.
        """
        at = TrainingState(key)
        if self.running(key).exists():
            state = torch.load(self.running(key), map_location=student.device, weights_only=True)
            student.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            at = TrainingState(key, state["step"], state["losses"])

        def update(*drawn: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = objective(*drawn)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        run = GraphedCallable(update, student.graphed)
        # A graph replays what it captured, and counting each step would be in its time: each tenth step, where it runs.
        counters = RunCounters(student.model) if gates(student.model) and not student.graphed else None
        bar = Steps(key, at.step, steps, self.console)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"].fill_(group["peak_lr"] * rate(step, steps))
            at.step = step + 1
            checked = at.step % CHECK_EVERY == 0 or at.step == steps
            with counters if checked and counters is not None else contextlib.nullcontext():
                loss = run(*draw(step))
            if checked:
                bar.show(at.look(loss), counters)
                if at.step < steps and time.monotonic() > self.deadline:
                    self.save(at, student, optimizer)
                    raise OutOfTime
            if self.save_every is not None and at.step % self.save_every == 0:
                self.save(at, student, optimizer)
        optimizer.zero_grad()
        return {"losses": at.losses, "step_ms": at.milliseconds()}

    def running(self, key: str) -> Path:
        """The file with the state of the training ``key``."""
        return self.folder / f"running-{re.sub(r'[^a-z0-9]+', '-', key.lower())}.pt"

    def save(self, at: TrainingState, student: Student, optimizer: torch.optim.Optimizer) -> None:
        """Everything that ``fit`` needs to go on."""
        state = {"key": at.key, "step": at.step, "losses": at.losses}
        state |= {"model": student.model.state_dict(), "optimizer": optimizer.state_dict()}
        write(self.running(at.key), lambda path: torch.save(state, path))


@dataclass
class TrainingState:
    """How far a training is: the losses so far, and when each was read."""

    key: str
    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    looks: list[tuple[int, float]] = field(default_factory=list)

    def look(self, loss: Tensor) -> float:
        """Record the loss of this step, and return it as a number."""
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{self.key}: the loss is {value} at step {self.step}")
        self.losses.append([self.step, value])
        self.looks.append((self.step, time.monotonic()))
        return value

    def milliseconds(self) -> float:
        """Milliseconds per step, without the first steps, which compile; 0 after too few steps to tell."""
        if len(self.looks) < 3:
            return 0.0
        (first, began), (last, ended) = self.looks[1], self.looks[-1]
        return 1000 * (ended - began) / (last - first)


def rate(step: int, steps: int) -> float:
    """Learning rate at ``step`` as a share of its peak: a warm-up (Adam's first steps are long), then down to zero."""
    return min(1.0, (step + 1) / max(1, min(50, steps // 10)), 2 * (1 - step / steps))


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write ``path`` by ``save``, beside it first: a reader, or a restart, never finds half a file.

    Each process beside a name of its own: of several that write at once, none moves the file of another. What processes
    of this machine left that were killed as they wrote is removed.
    """
    machine = f"{path.name}.{platform.node()}"  # others may share the folder
    for left in path.parent.glob(f"{glob.escape(machine)}.*.tmp"):
        if not _is_running(left.suffixes[-2].removeprefix(".")):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{machine}.{os.getpid()}.tmp")
    save(temporary)
    temporary.replace(path)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)  # signals nothing
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True  # another user's
    return True
