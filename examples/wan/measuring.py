"""What the switch cost and the fine-tuning brought: held-out loss, error of the output, speed, videos side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.study.training import write
from examples.wan.clips import save_video, side_by_side
from examples.wan.draws import Draw
from examples.wan.generating import with_shift
from examples.wan.student import Student
from sla_compile.inspection.timing import Times, run_times

__all__ = ["Report", "Sampler", "held_out", "time_of_step"]


@torch.no_grad()
def held_out(
    student: Student, draws: Sequence[Draw], folder: Path, accelerator: Any, *, dense: bool = False
) -> dict[str, float]:
    """``loss`` to the data's velocity, and ``error``: ||v - dense v|| / ||dense v||, over ``draws``.

    ``dense``: of the dense model itself, which has to be asked first: its velocities are kept in ``folder``, as a
    training of all weights leaves no dense model. Processes share the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sums = torch.zeros(3, device=student.device, dtype=torch.float64)
    for number in range(accelerator.process_index, len(draws), accelerator.num_processes):
        draw, path = draws[number], folder / f"velocity-{number}.safetensors"
        if not path.exists():
            kept = {"velocity": student.dense_velocity(draw).cpu()}
            write(path, lambda temporary, kept=kept: save_file(kept, temporary))  # type: ignore[misc]
        expected = load_file(path)["velocity"].to(student.device)
        found = expected if dense else student.velocity(draw)
        parts = (F.mse_loss(found, draw.velocity), (found - expected).square().sum(), expected.square().sum())
        sums += torch.stack(parts).double()
    loss, distance, square = accelerator.reduce(sums, "sum").tolist()
    return {"loss": loss / len(draws), "error": (distance / square) ** 0.5}


def time_of_step(loss: Callable[[], Tensor], parameters: Sequence[Tensor], repeats: int) -> dict[str, float]:
    """Median ``ms`` of a forward and backward after two to warm up, and their ``peak_gib`` on a GPU."""

    def step() -> None:
        loss().backward()
        for parameter in parameters:
            parameter.grad = None

    run_times(step, seconds=0, least=2)
    is_cuda = parameters[0].device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    found = {"ms": Times.of(run_times(step, seconds=0, least=repeats)).median}
    return found | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if is_cuda else {})


class Report:
    """The figures of a run, in ``path`` as they are found, so that a run that goes on has those of before."""

    ROWS: ClassVar = {
        "dense": "dense",
        "switched": "SLA, switched",
        "calibrated": "SLA, calibrated",
        "trained": "SLA, fine-tuned",
    }

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = dict(json.loads(path.read_text())) if path.exists() else {}

    def add(self, key: str, values: dict[str, Any], *, keep: bool) -> None:
        """Add figures; ``keep``: write them, on one of several processes."""
        self.found[key] = self.found.get(key, {}) | values
        if keep:
            write(self.path, lambda path: path.write_text(json.dumps(self.found, indent=1)))

    def table(self, title: str) -> Table:
        """Loss and error dense, right after the switch, calibrated and trained; and the time of a step."""
        table = Table(title=title)
        names = ("attention", "held-out loss", "above dense", "output error", "ms/step", "peak GiB")
        for name in names:
            table.add_column(name, justify="left" if name == names[0] else "right", no_wrap=name == names[0])
        dense = self.found.get("dense", {}).get("loss")
        for key, name in self.ROWS.items():
            if row := self.found.get(key):
                above = f"{row['loss'] / dense - 1:+.1%}" if dense and "loss" in row and key != "dense" else ""
                cells = [f"{row[of]:{form}}" if of in row else "" for of, form in _FORMS.items()]
                table.add_row(name, cells[0], above, *cells[1:])
        return table


_FORMS = {"loss": ".5f", "error": ".4f", "ms": ".1f", "peak_gib": ".1f"}


class Sampler:
    """Videos of ``prompts`` (embeddings (L, D)) through the diffusers pipeline, from the same noise each time."""

    def __init__(
        self,
        student: Student,
        checkpoint: str,
        prompts: Sequence[Tensor],
        empty: Tensor,
        latent: tuple[int, ...],
        folder: Path,
        *,
        steps: int,
        guidance: float,
        fps: float,
        shift: float | None,
        seed: int,
    ) -> None:
        self.student, self.checkpoint, self.prompts, self.empty = student, checkpoint, prompts, empty
        self.latent, self.folder, self.fps, self.seed = latent, folder, fps, seed
        self.steps, self.guidance, self.shift = steps, guidance, shift

    def compare(self, name: str, accelerator: Any) -> list[Path]:
        """``folder/name-N``, dense left and SLA right, of each prompt; this process's part of them."""
        from diffusers import AutoencoderKLWan, WanPipeline

        paths = []
        device = self.student.device
        vae = AutoencoderKLWan.from_pretrained(self.checkpoint, subfolder="vae", torch_dtype=torch.float32).to(device)
        parts = {"text_encoder": None, "tokenizer": None, "transformer": self.student.model, "vae": vae}
        pipe = with_shift(WanPipeline.from_pretrained(self.checkpoint, **parts), self.shift)
        pipe.set_progress_bar_config(disable=True)
        for number in range(accelerator.process_index, len(self.prompts), accelerator.num_processes):
            kept = self.folder / f"dense-{number}.npy"
            if not kept.exists():  # it never changes
                kept.parent.mkdir(parents=True, exist_ok=True)
                with self.student.dense():
                    np.save(kept, self._sample(pipe, number).astype(np.float16))
            videos = [np.load(kept).astype(np.float32), self._sample(pipe, number)]
            paths.append(save_video(side_by_side(videos), self.folder / f"{name}-{number}.mp4", self.fps))
        return paths

    @torch.no_grad()
    def _sample(self, pipe: Any, number: int) -> np.ndarray:
        """A video (T, H, W, 3) in [0, 1]."""
        model = self.student.model
        noise = torch.randn(1, *self.latent, generator=torch.Generator().manual_seed(self.seed + number))
        text, empty = (x[None].to(model.device) for x in (self.prompts[number], self.empty))
        with self.student.autocast():
            video = pipe(
                prompt_embeds=text,
                negative_prompt_embeds=empty,
                latents=noise.to(model.device),
                height=self.latent[2] * pipe.vae_scale_factor_spatial,
                width=self.latent[3] * pipe.vae_scale_factor_spatial,
                num_frames=(self.latent[1] - 1) * pipe.vae_scale_factor_temporal + 1,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
            ).frames[0]
        return np.asarray(video)
