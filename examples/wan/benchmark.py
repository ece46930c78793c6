"""Time and memory of a training step of a Wan transformer with random weights: no checkpoint, no videos."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sla_compile
from benchmarks.published import WANS
from examples.wan.draws import Draw
from examples.wan.student import Student, dtype_of, settings_of
from sla_compile.inspection.timing import Times, run_time, run_times

__all__ = ["benchmark"]


def benchmark(options: Mapping[str, Any], console: Console) -> dict[str, dict[str, float]]:
    """Step by step: dense, SLA on the flow loss, SLA towards the teacher, each with its optimizer; printed too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = _student(options, device)
    draw = _draw(options, student)
    found: dict[str, dict[str, float]] = {}
    if options["dense"] and student.parameters():
        student.compile_dense()
        found["dense, flow loss"] = _measured(student, draw, "flow", options)
        torch.compiler.reset()
    student.prepare(draw, settings_of(options))
    student.switch()
    for loss in ("flow", "teacher"):
        found[f"SLA, {'flow loss' if loss == 'flow' else 'teacher'}"] = _measured(student, draw, loss, options)
    rewritten = sla_compile.report(student.model).totals.rewritten
    tokens = draw.noisy[0, 0].numel() // 4
    of = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    title = f"Wan {options['model']}, {tokens} tokens, {options['train']}, {rewritten} attentions SLA; {of}"
    table = Table("step", "ms", "peak GiB", "first step, s", title=f"{title}, torch {torch.__version__}")
    for name, row in found.items():
        table.add_row(name, f"{row['ms']:.1f}", f"{row.get('peak_gib', 0):.1f}", f"{row['first_s']:.1f}")
    console.print(table)
    return found


def _student(options: Mapping[str, Any], device: torch.device) -> Student:
    from diffusers import WanTransformer3DModel

    config = WANS[options["model"]] | ({"num_layers": options["layers"]} if options["layers"] else {})
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(patch_size=(1, 2, 2), text_dim=4096, freq_dim=256, **config)
    low = dtype_of(options, device)
    dtype = torch.float32 if options["train"] == "all" else low
    # as in a run: a teacher apart where all weights are trained
    teacher = copy.deepcopy(model).to(low).requires_grad_(False) if options["train"] == "all" else None
    how = {"dtype": low, "rank": options["rank"], "inner": options["inner"], "checkpointing": options["checkpointing"]}
    return Student(model.to(dtype).eval(), options["train"], **how, teacher=teacher)


def _draw(options: Mapping[str, Any], student: Student) -> Draw:
    shape = (options["batch"], 16, (options["frames"] - 1) // 4 + 1, options["height"] // 8, options["width"] // 8)
    random = {"device": student.device}
    return Draw(
        torch.randn(shape, **random),
        torch.full(shape[:1], 0.5, **random),
        torch.randn(shape[0], 512, 4096, **random),
        torch.randn(shape, **random),
    )


def _measured(student: Student, draw: Draw, loss: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Median milliseconds of a step, its peak memory, and the seconds of the first one, which compiles."""
    optimizer = student.optimizer(1e-5, 1e-5)

    def step() -> None:
        student.loss(draw, loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    first, _ = run_time(step), run_time(step)
    is_cuda, repeats = student.device.type == "cuda", options["repeats"]
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    found = {"ms": Times.of(run_times(step, seconds=0, least=repeats)).median, "first_s": first / 1000}
    return found | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if is_cuda else {})
