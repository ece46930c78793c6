"""A video with what a run found, through the diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from examples.wan import Refused
from examples.wan.clips import save_video
from examples.wan.encoding import check_checkpoint
from examples.wan.student import dtype_of, load_result, transformer_of

__all__ = ["generate", "with_shift"]


def generate(options: Mapping[str, Any], console: Console) -> Path:
    """Make the video of ``options["prompt"]``, at the size the run was trained at; returns the path written."""
    from diffusers import AutoencoderKLWan, WanPipeline

    folder = Path(options["run"])
    if not (folder / "settings.json").is_file():
        raise Refused(f"--run: no settings.json in {str(folder)!r}; accepted: the --run of a training")
    if not options["dense"] and not (folder / "result").is_dir():
        raise Refused(f"--run: {str(folder)!r} has no result yet; accepted: a training that has ended, or --dense")
    run = json.loads((folder / "settings.json").read_text())
    checkpoint, result = options["checkpoint"] or run["checkpoint"], None if options["dense"] else folder / "result"
    check_checkpoint(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype_of(run, device)
    vae = AutoencoderKLWan.from_pretrained(checkpoint, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(
        checkpoint, vae=vae, transformer=transformer_of(checkpoint, result, dtype), torch_dtype=dtype
    )
    if result is not None:
        load_result(pipe, result, inner=run["inner"])
    with_shift(pipe, run["shift"])
    if options["offload"]:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    video = pipe(
        prompt=options["prompt"],
        negative_prompt=options["negative_prompt"],
        height=run["height"],
        width=run["width"],
        num_frames=run["frames"],
        num_inference_steps=options["sampling_steps"],
        guidance_scale=options["guidance"],
        generator=torch.Generator().manual_seed(options["seed"]),
    ).frames[0]
    path = save_video(np.asarray(video), Path(options["output"]), run["fps"])
    console.print(f"{path} is written")
    return path


def with_shift(pipe: Any, shift: float | None) -> Any:
    """The pipeline with its sampler's times shifted by ``shift``; None: as the checkpoint has them."""
    if shift is not None:
        name = "flow_shift" if "flow_shift" in pipe.scheduler.config else "shift"
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{name: shift})
    return pipe
