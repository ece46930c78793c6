"""A run of ``examples/wan_finetune.py train``: its stages, each left out where its files are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

import sla_compile
from examples.study.training import write
from examples.wan import Refused
from examples.wan.clips import Clip, clips_in
from examples.wan.draws import Draw, Draws, as_batches
from examples.wan.encoding import Cache, Encoded, VideoSize, check_checkpoint
from examples.wan.levels import Levels
from examples.wan.measuring import Report, Sampler, held_out, time_of_step
from examples.wan.student import Student, dtype_of, settings_of, transformer_of
from examples.wan.training import Schedule, Training

__all__ = ["Run"]

_FREE = ("save_every", "validate_every", "command", "run")
"""Settings that another start of a run may change."""
_TIMED = 5
"""Steps whose median is the time of a step."""


class Run:
    """The stages of a run with ``settings`` (those of the command line) in ``folder``."""

    def __init__(self, settings: Mapping[str, Any], folder: Path) -> None:
        from accelerate import Accelerator

        # autocast is the student's own: accelerate's would stay on the model that the pipeline gets
        self.accelerator = Accelerator(mixed_precision="no")
        if self.accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise Refused(
                f"accelerate is set to {self.accelerator.distributed_type.value}; accepted: one process, or several "
                f"with a model each (MULTI_GPU). For FSDP see docs/many-gpus.md"
            )
        self.is_main, self.folder = self.accelerator.is_main_process, folder
        self.settings = self._checked(settings)
        check_checkpoint(self.settings["checkpoint"])
        self.console = Console(quiet=not self.is_main)
        self.report = Report(folder / "report.json")

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings in JSON types; Refused where the folder has a run with others."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
        settings, path = dict(json.loads(json.dumps(plain))), self.folder / "settings.json"
        known = json.loads(path.read_text()) if path.exists() else settings
        if changed := sorted(key for key in settings if key not in _FREE and known.get(key) != settings[key]):
            raise Refused(
                f"--run: {self.folder} holds a run with other settings of {', '.join(changed)}; accepted: the same "
                f"settings, to go on with it, or another folder"
            )
        return settings

    def all(self) -> None:
        """Encode, fit, train, and tell."""
        if not (self.folder / "result").is_dir():
            self.encode()
            self.build()
            self.fit()
            self.train()
        self.console.print(self.report.table(f"{self.settings['checkpoint']}, {self.settings['topk']:.0%} critical"))
        command = f'generate --run {self.folder} --prompt "..." --output video.mp4'
        self.console.print(f"python examples/wan_finetune.py {command}", soft_wrap=True)

    def encode(self) -> None:
        """The cache, and the batches drawn from it."""
        settings, process = self.settings, self.accelerator
        clips = clips_in(Path(settings["videos"]), settings["caption"])
        size = VideoSize(settings["frames"], settings["height"], settings["width"], settings["fps"])
        self.cache = Cache(self.folder / "cache", settings["checkpoint"], size)
        captions = sorted({"", *(clip.caption for clip in clips)})
        mine = slice(process.process_index, None, process.num_processes)
        self.cache.fill(clips[mine], captions[mine], process.device, self.console)
        process.wait_for_everyone()
        training, held = self._split([clip for clip in clips if self.cache.usable(clip)])
        self.prompts = [self.cache.text(clip.caption) for clip in held[: settings["samples"]]]
        self.empty = self.cache.text("")
        self.draws = Draws(
            Encoded(self.cache, training),
            Encoded(self.cache, held),
            batch=settings["batch"],
            device=process.device,
            shift=self._shift(),
            seed=settings["seed"],
            empty=self.empty,
            drop=settings["drop_captions"],
            levels=settings["levels"],
        )
        self.console.print(f"{len(training)} videos to train on, {len(held)} held out")
        frames, height, width = self.draws.held_out[0][0].shape[1:]
        if (tokens := frames * height * width // 4) < settings["min_tokens"]:
            raise Refused(
                f"--min-tokens: got {settings['min_tokens']} for videos of {tokens} tokens, whose attention would stay "
                f"dense; accepted: at most {tokens}, or longer or larger videos"
            )
        if self.is_main:  # now that nothing speaks against them
            text = json.dumps(settings, indent=1)
            write(self.folder / "settings.json", lambda temporary: temporary.write_text(text))
        process.wait_for_everyone()

    def _split(self, clips: list[Clip]) -> tuple[list[Clip], list[Clip]]:
        """Those to train on and those held out, a share of them spread over the names."""
        if len(clips) < 2:
            raise Refused(
                f"--videos: {len(clips)} of {self.settings['videos']} have {self.settings['frames']} frames at "
                f"{self.settings['fps']:g} fps; accepted: at least 2, one of which is held out"
            )
        every = max(2, round(1 / max(self.settings["held_out"], 1e-6)))
        held = clips[::every] if len(clips) >= every else clips[:1]
        return [clip for clip in clips if clip not in held], held

    def _shift(self) -> float:
        from diffusers import UniPCMultistepScheduler

        if self.settings["shift"] is not None:
            return float(self.settings["shift"])
        config = UniPCMultistepScheduler.load_config(self.settings["checkpoint"], subfolder="scheduler")
        return float(config.get("flow_shift") or config.get("shift") or 3.0)

    def build(self) -> None:
        """The student, and a teacher where it cannot be its own."""
        settings, device = self.settings, self.accelerator.device
        low = dtype_of(settings, device)
        load = partial(transformer_of, settings["checkpoint"], None)
        everything = settings["train"] == "all"
        teacher = load(low).to(device).requires_grad_(False) if everything and settings["loss"] == "teacher" else None
        model = load(torch.float32 if everything else low).to(device)
        how = {
            "dtype": low,
            "rank": settings["rank"],
            "inner": settings["inner"],
            "checkpointing": settings["checkpointing"],
        }
        torch.manual_seed(settings["seed"])  # of the LoRA: the same on every process, and after a kill
        self.student = Student(model, settings["train"], **how, teacher=teacher)

    def fit(self) -> None:
        """Measure dense; switch; budgets and gates from a few batches."""
        fitted = self.folder / "fitted"
        if (fitted / "sla_gates.safetensors").is_file():
            self.student.load_gates(fitted)
            self.student.switch()
            return
        student, draws = self.student, self.draws.measuring(self.settings["measure"])
        measured = partial(held_out, student, draws, self.folder / "dense", self.accelerator)
        student.compile_dense()
        self._tell("dense", measured(dense=True) | self._time())
        torch.compiler.reset()  # the dense graphs are done with
        student.prepare(draws[0], settings_of(self.settings))
        student.switch()
        self._tell("switched", measured())
        rewritten = sla_compile.report(student.model).totals.rewritten
        self.console.print(f"{rewritten} of {len(student.model.blocks)} self-attentions are sparse-linear")
        if self.settings["fit"]:
            self._fit_gates()
        self._tell("calibrated", measured() | self._time())
        if self.is_main:
            student.save_gates(_made(fitted))
        self.accelerator.wait_for_everyone()

    def _fit_gates(self) -> None:
        """Token orders, topks and shifts or weights from a few batches."""
        student, process, settings = self.student, self.accelerator, self.settings
        rank, low, group = (
            process.process_index,
            student.dtype,
            None if process.num_processes == 1 else dist.group.WORLD,
        )
        given: dict[str, Any] = {"budget": settings["topk"], "group": group}
        by_time: dict[float, list[Any]] = {}
        if settings["levels"] > 1:
            draws = self.draws.fitting_by_level(max(1, settings["fit"] // settings["levels"]), rank)
            by_time = {time: as_batches(of_level, low) for time, of_level in draws.items()}
            batches = [batch for of_level in by_time.values() for batch in of_level]
        else:
            batches = as_batches(self.draws.fitting(settings["fit"], rank), low)
        if settings["orders"] != "none":
            with student.autocast(), self.console.status("choose_orders"):
                self.console.print(
                    sla_compile.choose_orders(student.model, batches, by=settings["orders"], group=group)
                )
        if by_time:
            with student.autocast(), self.console.status("allocate"):
                plan = sla_compile.allocate_by_time(student.model, by_time, **given)
            self.console.print(plan)
            student.follow(Levels(plan, self.draws.shift))
        else:
            with student.autocast(), self.console.status("allocate"):
                self.console.print(sla_compile.allocate(student.model, batches, **given).title)
        with student.autocast(), self.console.status("calibrate"):
            self.console.print(sla_compile.calibrate(student.model, batches, group=group).title)

    def _time(self) -> dict[str, float]:
        """Of a forward and backward on the data's velocity."""
        parameters = list(self.student.parameters().values())
        if not parameters:  # gates alone, before there are any
            return {}
        draw: Draw = self.draws.training(0)
        return time_of_step(lambda: self.student.loss(draw, "flow"), parameters, _TIMED)

    def train(self) -> None:
        """Fine-tune, with videos on the way; and the result."""
        settings = self.settings
        names = ("steps", "lr", "gate_lr", "accumulate", "anneal", "loss", "ema", "save_every")
        schedule = Schedule(**{name: settings[name] for name in names})
        training = Training(
            self.student, self.draws, schedule, self.folder / "running.pt", self.accelerator, self.console
        )
        if training.step == 0:
            self._sample("step-0")

        def look(step: int) -> None:
            if step % settings["validate_every"] == 0 and step < settings["steps"]:
                with training.averaged():
                    self._sample(f"step-{step}")

        milliseconds = training.run(look)
        with training.averaged():
            draws = self.draws.measuring(settings["measure"])
            row = held_out(self.student, draws, self.folder / "dense", self.accelerator)
            self._tell("trained", row | ({"training_step_ms": milliseconds} if milliseconds else {}))
            self._sample("result")
            if self.is_main:
                unfinished = _made(self.folder / "result.tmp")
                self.student.save_result(unfinished)
                unfinished.rename(self.folder / "result")
        self.accelerator.wait_for_everyone()

    def _tell(self, key: str, row: dict[str, float]) -> None:
        self.report.add(key, row, keep=self.is_main)
        self.console.print(f"{key}: " + ", ".join(f"{name} {value:.5g}" for name, value in row.items()))

    def _sample(self, name: str) -> None:
        if not self.prompts:
            return
        settings = self.settings
        sampler = Sampler(
            self.student,
            settings["checkpoint"],
            self.prompts,
            self.empty,
            self.draws.held_out[0][0].shape,
            self.folder / "validation",
            steps=settings["sampling_steps"],
            guidance=settings["guidance"],
            fps=settings["fps"],
            shift=settings["shift"],
            seed=settings["seed"],
        )
        for path in sampler.compare(name, self.accelerator):
            self.console.print(f"{path}: dense left, SLA right")
        self.accelerator.wait_for_everyone()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
