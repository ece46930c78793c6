"""Dense training, then each arm from the same checkpoint: resumable after a kill at any moment, and in pieces.

A folder holds all of it: ``settings.json``, ``results.json`` (a row for each arm that is done), ``pretrained-S.pt``
of each seed S, ``features.pt``, ``samples.pt`` and, in the middle of a training, ``running-NAME.pt``. Each file is
written beside itself and moved into place.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import sla_compile
from examples.study.arms import ARMS, Student, build
from examples.study.frechet import FeatureNet, Moments, distance, moments, train_features
from examples.study.settings import Settings
from examples.study.training import OutOfTime, Trainer, write
from examples.study.videos import Data

__all__ = ["Experiment", "Job", "jobs_of"]

NOISE_SEED, CALIBRATION_SEED = 3_000_000, 4_000_000
SEED_STRIDE = 10_000_000
"""Between the batches of one seed and of the next."""


@dataclass(frozen=True)
class Job:
    """An arm, at a sparsity where it has one, from the checkpoint of a seed."""

    arm: str
    sparsity: float | None
    seed: int

    @property
    def key(self) -> str:
        """Its key in ``results.json``."""
        return f"{self.arm}/{'-' if self.sparsity is None else format(self.sparsity, 'g')}/{self.seed}"

    @property
    def label(self) -> str:
        """Its name in what is printed."""
        share = "" if self.sparsity is None else f" {self.sparsity:.0%}"
        return f"{ARMS[self.arm].title}{share}, seed {self.seed}"


def jobs_of(arms: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int]) -> list[Job]:
    """Every arm at every sparsity it has, seeds innermost, so that compiled code is used again."""
    sparse = [arm for arm in arms if ARMS[arm].sparse]
    pairs: list[tuple[str, float | None]] = [(arm, None) for arm in arms if not ARMS[arm].sparse]
    pairs += [(arm, sparsity) for sparsity in sparsities for arm in sparse]
    return [Job(arm, sparsity, seed) for arm, sparsity in pairs for seed in seeds]


class Experiment:
    """The arms of ``settings`` in ``folder``; what is there already is used.

    seconds: raise ``OutOfTime`` after about as many.
    save_every: steps between checkpoints within a training; None: only when the time is used up.
    keep: leave the weights of each trained arm in the folder, and print what was compiled.
    capture: replay training steps as CUDA graphs, on a GPU.
    lock: held while a file that others write too is changed.

    Raises ValueError where the folder is another experiment's.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        device: torch.device,
        console: Console,
        *,
        seconds: float = math.inf,
        save_every: int | None = None,
        keep: bool = False,
        capture: bool = True,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.settings, self.folder, self.device, self.console = settings, folder, device, console
        self.deadline = time.monotonic() + seconds
        self.trainer = Trainer(folder, console, self.deadline, save_every)
        self.keep, self.reported, self.capture = keep, False, capture
        self.lock = lock or nullcontext()
        folder.mkdir(parents=True, exist_ok=True)
        known = self._json("settings.json", settings.to_dict())
        if known != settings.to_dict():
            changed = {name for name, value in settings.to_dict().items() if known.get(name) != value}
            raise ValueError(
                f"{folder}: holds an experiment with other settings of {', '.join(sorted(changed))}; accepted: the "
                f"same settings, or another folder"
            )
        write(folder / "settings.json", lambda path: path.write_text(json.dumps(known, indent=1)))
        self.results: dict[str, dict[str, Any]] = self._json("results.json", {})
        """A row for each arm that is done, by its key; and what is known of real videos."""
        self.data = Data(settings.size, settings.batch, device, settings.shift)
        self.held_out = self.data.held_out(settings.held_out)
        self.noise = list(self.data.noise(settings.sampled, seed=NOISE_SEED))
        self.students: dict[tuple[Any, ...], Student] = {}
        self.checkpoints: dict[int, dict[str, Tensor]] = {}
        self.looks: tuple[FeatureNet, Moments] | None = None

    def _json(self, name: str, default: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / name
        return dict(json.loads(path.read_text())) if path.exists() else default

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs that have no result yet. Raises OutOfTime, or FloatingPointError where a loss is not finite."""
        missing = [job for job in jobs if job.key not in self.results]
        if not missing:
            return
        for seed in sorted({job.seed for job in missing}):
            self.pretrain(seed)
        self.learn_features()
        for job in missing:
            if time.monotonic() > self.deadline:
                raise OutOfTime
            row = self._job(job)
            self._add_result(job.key, row)
            self.trainer.running(job.label).unlink(missing_ok=True)
            step = f"{row['step_ms']:.1f} ms/step, " if row["step_ms"] else ""  # too few steps to tell
            self.console.print(
                f"{job.label}: held-out loss {row['before']:.5f} -> {row['after']:.5f}, Fréchet {row['frechet']:.4f}, "
                f"{step}{row['seconds']:.1f} s"
            )

    def _add_result(self, key: str, row: dict[str, Any]) -> None:
        with self.lock:
            self.results = {**self._json("results.json", {}), key: row}
            write(self.folder / "results.json", lambda path: path.write_text(json.dumps(self.results, indent=1)))

    def pretrain(self, seed: int) -> None:
        """Train the dense model of ``seed``, unless its checkpoint is there."""
        if seed in self.checkpoints:
            return
        path = self.folder / f"pretrained-{seed}.pt"
        if not path.exists():
            settings = self.settings
            began = time.monotonic()
            student = self._student("dense", None)
            torch.manual_seed(seed)
            student.reset(build(settings).state_dict())
            optimizer = student.optimizer(settings.dense_lr, settings.dense_lr, "all")
            label = f"dense training, seed {seed}"
            self.trainer.fit(
                label,
                student,
                optimizer,
                settings.dense_steps,
                lambda step: self.data.draw(seed * SEED_STRIDE + step),
                self._objective(student, None),
            )
            write(path, lambda path: torch.save(student.model.state_dict(), path))
            self.trainer.running(label).unlink(missing_ok=True)
            loss, seconds = self._loss(student)["after"], time.monotonic() - began
            self.console.print(f"{label}: held-out loss {loss:.5f}, {seconds:.1f} s")
        self.checkpoints[seed] = torch.load(path, map_location=self.device, weights_only=True)

    def _job(self, job: Job) -> dict[str, Any]:
        """Reset, calibrate, train and measure."""
        arm, settings, began = ARMS[job.arm], self.settings, time.monotonic()
        student = self._student(job.arm, job.sparsity)
        student.reset(self.checkpoints[job.seed])
        optimizer = student.optimizer(settings.lr, settings.gate_lr, settings.train)
        if arm.calibrated:
            with student.autocast():
                batches = [self.data(CALIBRATION_SEED + 1000 * job.seed + i)[:2] for i in range(settings.calibration)]
                sla_compile.calibrate(student.model, batches)
        before = self._loss(student)["after"]
        if arm.sparse and not student.rewritten():
            raise RuntimeError(f"{job.label}: not every attention was rewritten:\n{sla_compile.report(student.model)}")
        if self.keep and arm.sparse and not self.reported:
            self.reported = True
            self.console.print(sla_compile.report(student.model))
        row: dict[str, Any] = {"before": before, "step_ms": 0.0, "losses": []}
        if arm.trained:
            row |= self.trainer.fit(
                job.label,
                student,
                optimizer,
                arm.longer * settings.steps,
                lambda step: self.data.draw(job.seed * SEED_STRIDE + settings.dense_steps + step),
                self._objective(student, job.seed if settings.loss == "teacher" else None),
            )
        row |= self._loss(student)
        row |= self._attention_errors(student) if arm.sparse and not arm.trained else {}
        samples = self._samples(student)
        features, reference = self.learn_features()
        row["frechet"] = distance(moments(features, samples), reference)
        self._keep_samples(job, samples[0][:1])
        if self.keep and arm.trained:
            self._keep_weights(job, student)
        name = {"arm": job.arm, "title": arm.title, "sparsity": job.sparsity, "seed": job.seed}
        return {**name, **row, "seconds": time.monotonic() - began}

    def _student(self, arm: str, sparsity: float | None) -> Student:
        """The compiled model of an arm. Only one is held at a time, so that Dynamo's cache stays short."""
        spec = ARMS[arm]
        key = (*spec.kind, sparsity)
        if key not in self.students:
            if time.monotonic() > self.deadline - self._compile_seconds():
                raise OutOfTime
            self.students.clear()
            torch.compiler.reset()
            gc.collect()  # the last one's memory
            self.students[key] = Student(self.settings, spec, sparsity, self.device, capture=self.capture)
        return self.students[key]

    def _compile_seconds(self) -> float:
        return 30.0 if self.settings.inner == "inductor" else 0.0

    def _objective(self, student: Student, teacher: int | None) -> Callable[..., Tensor]:
        """The loss as a function of what ``Data.draw`` returns.

        The target is the velocity of the data, or that of the dense checkpoint of seed ``teacher``.
        """
        if teacher is None:

            def to_data(*drawn: Tensor) -> Tensor:
                noisy, time, velocity = self.data.noisy(*drawn)
                return F.mse_loss(student(noisy, time), velocity)

            return to_data
        dense = build(self.settings).to(self.device)
        dense.load_state_dict(self.checkpoints[teacher])

        def to_teacher(*drawn: Tensor) -> Tensor:
            noisy, time, _ = self.data.noisy(*drawn)
            with torch.no_grad(), student.autocast():
                velocity = dense(noisy, time).float()
            return F.mse_loss(student(noisy, time), velocity)

        return to_teacher

    def _loss(self, student: Student) -> dict[str, Any]:
        """The held-out loss, and the loss in each quarter of the times, from least noise to most."""
        losses = [
            F.mse_loss(student.velocity(noisy, time), velocity, reduction="none").flatten(1).mean(1)
            for noisy, time, velocity in self.held_out
        ]
        by_time = torch.cat(losses)[torch.cat([time for _, time, _ in self.held_out]).argsort()]
        return {"after": by_time.mean().item(), "by_time": [part.mean().item() for part in by_time.chunk(4)]}

    def _attention_errors(self, student: Student) -> dict[str, float]:
        """||O - dense|| / ||dense|| on held-out batches, mean over sites: sparse branch alone, and with the gate.

        ``dense`` is dense attention with the same weights. Training does not aim at it, so only untrained arms are
        measured this way.
        """
        with torch.no_grad(), student.autocast():
            measured = [batch[:2] for batch in self.held_out[: self.settings.measured]]
            errors = [site.errors for site in sla_compile.compare(student.model, measured, inner=None).sites]
        sparse, gated = [error.sparse_only for error in errors], [error.now for error in errors]
        return {"error_sparse": sum(sparse) / len(sparse), "error_gated": sum(gated) / len(gated)}

    def _samples(self, student: Student) -> list[Tensor]:
        """Videos sampled by Euler's method, from the same noise in every arm."""
        uniform = torch.linspace(1, 0, self.settings.sampling_steps + 1).tolist()
        times = [self.settings.shift * u / (1 + (self.settings.shift - 1) * u) for u in uniform]
        videos = []
        for video in self.noise:
            for now, then in pairwise(times):
                time = torch.full((len(video),), now, device=self.device)
                video = video + (then - now) * student.velocity(video, time)
            videos.append(video)
        return videos

    def _keep_samples(self, job: Job, videos: Tensor) -> None:
        path = self.folder / "samples.pt"
        with self.lock:
            samples = torch.load(path, weights_only=True) if path.exists() else {}
            samples[job.key] = ((videos.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
            write(path, lambda path: torch.save(samples, path))

    def _keep_weights(self, job: Job, student: Student) -> None:
        name = job.key.replace("/-", "").replace("/", "-")
        write(self.folder / f"{name}.pt", lambda path: torch.save(student.model.state_dict(), path))
        if ARMS[job.arm].sparse:
            sla_compile.save(student.model, self.folder / f"{name}.gates.safetensors")

    def learn_features(self) -> tuple[FeatureNet, Moments]:
        """The network of the Fréchet distance, trained once, and the real videos that samples are compared with."""
        if self.looks is not None:
            return self.looks
        path = self.folder / "features.pt"
        if not path.exists():
            net = train_features(self.data, self.settings.feature_steps)
            write(path, lambda path: torch.save(net.state_dict(), path))
        features = FeatureNet().to(self.device).requires_grad_(False)
        features.load_state_dict(torch.load(path, map_location=self.device, weights_only=True))
        reference = moments(features, self.data.videos(self.settings.real, seed=0))
        real = moments(features, self.data.videos(self.settings.sampled, seed=1))
        self._add_result("real", {"frechet": distance(real, reference)})
        self.looks = features, reference
        return self.looks
