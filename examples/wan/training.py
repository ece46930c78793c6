"""The fine-tuning itself: steps over several GPUs, an average of what is trained, and checkpoints to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sla_compile
from examples.study.progress import Steps
from examples.study.training import rate, write
from examples.wan.draws import Draws
from examples.wan.student import Student

__all__ = ["Schedule", "Training"]

_LOOK_EVERY = 10
"""Steps between reading the loss, which waits for the device."""
_WARM = 2
"""Steps that a time for a step leaves out: they compile."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int
    lr: float
    gate_lr: float
    accumulate: int
    """Batches of a step on each GPU."""
    anneal: int
    """Steps in which the critical blocks go from max_topk to the budget; 0: there from the first step on."""
    loss: str
    """"teacher" or "flow"."""
    ema: float
    """Decay of the average of what is trained; 0: none."""
    save_every: int


@dataclass
class Training:
    """Trains ``student``; its state is in ``path``, and a run that finds one there goes on from it."""

    student: Student
    draws: Draws
    schedule: Schedule
    path: Path
    accelerator: Any
    console: Any
    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    """Pairs of step and loss."""

    def __post_init__(self) -> None:
        from diffusers.training_utils import EMAModel

        self.budgets = {
            path: gate.sparsity[..., 0].clone()
            for path, gate in sla_compile.gates(self.student.model).items()
            if gate.sparsity is not None
        }
        """The topks, in millionths, that annealing ends at."""
        parameters = self.student.parameters()
        self.ema: Any = None
        if self.schedule.ema:
            self.ema = EMAModel(parameters.values(), decay=self.schedule.ema)
        optimizer = self.student.optimizer(self.schedule.lr, self.schedule.gate_lr)
        if self.path.exists():
            self._load(optimizer)
        self.model, self.optimizer = self.accelerator.prepare(self.student.model, optimizer)

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        state = torch.load(self.path, map_location=self.student.device, weights_only=True)
        self.step, self.losses = state["step"], state["losses"]
        with torch.no_grad():
            for name, parameter in self.student.parameters().items():
                parameter.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def save(self) -> None:
        """Everything that a run needs to go on, on the first process."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "losses": self.losses,
            "trained": {name: parameter.detach() for name, parameter in self.student.parameters().items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, lambda path: torch.save(state, path))

    def run(self, after_step: Callable[[int], None] = lambda step: None) -> float:
        """Every step that is left; ``after_step`` gets the count of steps done. Returns milliseconds per step.

        Raises FloatingPointError where a loss is not finite.
        """
        schedule = self.schedule
        bar = Steps("fine-tuning", self.step, schedule.steps, self.console)
        times: list[float] = []
        for step in bar:
            began = time.perf_counter()
            loss = self._update(step)
            self.step = step + 1
            if self.step % _LOOK_EVERY == 0 or self.step == schedule.steps or len(times) < _WARM + _LOOK_EVERY:
                bar.show(self._look(loss))  # waits for the device, so that these steps can be timed
                times.append(time.perf_counter() - began)
            if self.step % schedule.save_every == 0 or self.step == schedule.steps:
                self.save()
            after_step(self.step)
        usual = sorted(times[_WARM : _WARM + _LOOK_EVERY])
        return 1000 * usual[len(usual) // 2] if usual else 0.0

    def _update(self, step: int) -> Tensor:
        schedule, world = self.schedule, self.accelerator.num_processes
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate(step, schedule.steps)
        self._anneal(step)
        total = torch.zeros((), device=self.student.device)
        for part in range(schedule.accumulate):
            draw = self.draws.training((step * schedule.accumulate + part) * world + self.accelerator.process_index)
            is_last = part == schedule.accumulate - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss = self.student.loss(draw, schedule.loss, self.model) / schedule.accumulate
                self.accelerator.backward(loss)
            total += loss.detach()
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.student.parameters().values())
        return total

    def _anneal(self, step: int) -> None:
        """Critical blocks for ``step``: geometrically from max_topk to each head's own topk."""
        if step > self.schedule.anneal or not self.schedule.anneal:
            return
        share = step / self.schedule.anneal
        for path, gate in sla_compile.gates(self.student.model).items():
            if gate.sparsity is not None and gate.config.max_topk is not None:
                budget = self.budgets[path].double()
                topk = (1e6 * gate.config.max_topk) ** (1 - share) * budget**share
                gate.sparsity[..., 0].copy_(topk.round().long())  # no recompilation: the graph reads the buffer

    def _look(self, loss: Tensor) -> float:
        value = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(value):
            raise FloatingPointError(f"fine-tuning: the loss is {value} at step {self.step}")
        if self.step % _LOOK_EVERY == 0 or self.step == self.schedule.steps:
            self.losses.append([self.step, value])
        return value

    def averaged(self) -> Any:
        """A context in which the model holds the average of what is trained, if there is one."""
        return nullcontext() if self.ema is None else _Averaged(self.ema, list(self.student.parameters().values()))


class _Averaged:
    def __init__(self, ema: Any, parameters: list[Any]) -> None:
        self.ema, self.parameters = ema, parameters

    def __enter__(self) -> None:
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)

    def __exit__(self, *_: Any) -> None:
        self.ema.restore(self.parameters)
