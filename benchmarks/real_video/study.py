"""The arms on the pre-trained checkpoint: right after the switch, and fine-tuned. Call it again: what is done is kept.

    python -m benchmarks.real_video.study --clips runs/real_video/clips --weights runs/real_video/weights \
        --out runs/real_video/study --closed all --tune dense sparse sla --seeds 0 1 2 --seconds 560

In ``--out``: ``results.json``, a row for each arm and seed, pictures of the samples, and what was fitted of each arm of
the package: it is the same for all seeds, and may be taken to another number of tokens (``--frames 32 --fits ...``).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_video.arms import ARMS, CLOSED, AnyArm
from benchmarks.real_video.clips import load
from benchmarks.real_video.data import Batch, Windows, by_time
from benchmarks.real_video.losses import loss_of
from benchmarks.real_video.measuring import Sampler, feature_distance, held_out_loss, psnr, velocity_error
from benchmarks.real_video.model import CONFIG, RotaryVideoDiT, fast_attention
from benchmarks.real_video.train import FRAMES, STAGES, TINY_CONFIG, TINY_FRAMES, TINY_STAGES, load_weights, update

__all__ = ["Study"]

CALIBRATION_SEED, TUNING_SEED, SEED_STRIDE = 4_000_000, 5_000_000, 100_000


class Study:
    """The checkpoint, the data, and what is measured with them; results go to ``folder``."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        tiny = options.tiny
        stage, config = (TINY_STAGES[-1], TINY_CONFIG) if tiny else (STAGES[-1], CONFIG)
        frames = TINY_FRAMES if tiny else options.frames
        train, held_out = ([clip for clip in clips if len(clip) >= frames] for clips in load(options.clips, device))
        self.train = Windows(train, (frames, stage.side), stage.batch, stage.oversample)
        measured = Windows(held_out, (frames, stage.side), stage.batch, stage.oversample)
        self.held_out = by_time(measured.held_out(4 if tiny else options.held_out))
        self.sampler = Sampler(measured, 1 if tiny else 2, 2 if tiny else 24)
        self.calibration = [self.train(CALIBRATION_SEED + index) for index in range(2 if tiny else 4)]
        self.tokens = frames * (stage.side // config.patch[1]) * (stage.side // config.patch[2])
        self.steps, self.lr, self.gate_lr = options.steps, options.lr, options.gate_lr
        self.device, self.tiny, self.folder = device, tiny, options.out
        self.fits: Path = options.fits or options.out / "fits"
        self.samples_wanted = not options.no_samples
        self.dense_steps: list[int] = options.dense_steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base = load_weights(RotaryVideoDiT(config).to(device), options.weights).requires_grad_(False)
        self.dense = ARMS["dense"].put_into(self.fresh(), self.tokens, [], self.fits)
        self.file = self.folder / "results.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.wanted = self.sampler(self.dense)
        self.add("dense", {"loss": held_out_loss(self.dense, self.held_out)})
        self.picture("dense", self.wanted)
        self.picture("real", torch.cat(self.sampler.real))

    def fresh(self) -> RotaryVideoDiT:
        """The dense checkpoint."""
        return copy.deepcopy(self.base).requires_grad_(True)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a result."""
        self.results[key] = row
        self.file.write_text(json.dumps(self.results, indent=1))

    def arm(self, name: str) -> AnyArm:
        """An arm; with small blocks in a tiny study."""
        return ARMS[name].small() if self.tiny else ARMS[name]

    def measure(self, model: RotaryVideoDiT, sample: bool = True) -> dict[str, Any]:
        """Loss, and how far velocity and samples are from the dense checkpoint's, samples from the real videos too."""
        row: dict[str, Any] = {"loss": held_out_loss(model, self.held_out)}
        row["velocity"] = velocity_error(model, self.dense, self.held_out)
        if sample:
            videos = self.sampler(model)
            row |= {"psnr": psnr(videos, self.wanted), "psnr_real": psnr(videos, torch.cat(self.sampler.real))}
            row["features"] = feature_distance(self.dense, videos, self.wanted)
            self.samples = videos
        return row

    def closed(self, name: str) -> None:
        """An arm right after the switch."""
        began, arm = time.monotonic(), self.arm(name)
        model = self.switched(name, arm)
        row = self.measure(model, self.samples_wanted)
        for steps in self.dense_steps:
            videos = self.sampler(model, self.dense, steps)
            measured = [psnr(videos, self.wanted), feature_distance(self.dense, videos, self.wanted)]
            row.setdefault("dense_steps", {})[str(steps)] = measured
        row["seconds"] = time.monotonic() - began
        row |= {"budgets": arm.budgets(model), "orders": arm.orders(model)}
        self.add(name, row)
        if self.samples_wanted:
            self.picture(name, self.samples)
        self.say(name, row, "dense")

    def switched(self, name: str, arm: AnyArm) -> RotaryVideoDiT:
        """The checkpoint with the attention of an arm; what it is fine-tuned towards changes no fit."""
        kept = self.fits / name.split("+")[0]
        return arm.put_into(self.fresh(), self.tokens, self.fitted_on(arm), kept)

    def fitted_on(self, arm: AnyArm) -> list[Batch]:
        """Training batches; where the times are in parts, those of each part after the other."""
        if not arm.levels:
            return self.calibration
        parts = self.train.of_parts(arm.levels, 1 if self.tiny else 16 // arm.levels, CALIBRATION_SEED)
        return [batch for of_part in parts for batch in of_part]

    def batch(self, seed: int, step: int, levels: int) -> Batch:
        """The batch of a step; with ``levels`` the videos of as many steps are sorted by their times."""
        if not levels:
            return self.train(seed + step)
        place = step % levels
        if place == 0:
            self.sorted = by_time([self.train(seed + step + number) for number in range(levels)])
        return self.sorted[place]

    def tune(self, name: str, seed: int) -> None:
        """An arm, fine-tuned."""
        began, arm = time.monotonic(), self.arm(name)
        model = self.switched(name, arm)
        row: dict[str, Any] = {"before": held_out_loss(model, self.held_out)}
        row |= {"budgets": arm.budgets(model), "orders": arm.orders(model)}
        gates = arm.gates(model)
        known = {id(gate) for gate in gates}
        groups = [
            {
                "params": [p for p in model.parameters() if id(p) not in known],
                "peak": arm.rate * self.lr,
                "weight_decay": 0.01,
            }
        ]
        if gates:
            groups.append({"params": gates, "peak": self.gate_lr, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.97), fused=self.device.type == "cuda")
        warm_up, timed = max(1, self.steps // 10), time.monotonic()
        for step in range(self.steps):
            share = min(1.0, (step + 1) / warm_up) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / self.steps)))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            batch = self.batch(TUNING_SEED + SEED_STRIDE * seed, step, arm.levels)
            update(model, optimizer, loss_of(model, batch, arm.loss, self.dense))
            if step == 9:
                self._wait()
                timed = time.monotonic()
        self._wait()
        row["step_ms"] = 1000 * (time.monotonic() - timed) / max(1, self.steps - 10)
        row |= self.measure(model)
        row["seconds"] = time.monotonic() - began
        self.add(f"{name}/{seed}", row)
        if seed == 0:
            self.picture(f"{name}-tuned", self.samples)
        self.say(f"{name}/{seed}", row, f"dense/{seed}" if f"dense/{seed}" in self.results else "dense")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def say(self, key: str, row: dict[str, Any], against: str) -> None:
        """One line."""
        above = [100 * (a / b - 1) for a, b in zip(row["loss"], self.results[against]["loss"], strict=True)]
        shown = " ".join(f"{value:+.2f}" for value in above)
        samples = f"PSNR {row['psnr']:.2f} features {row['features']:.4f} " if "psnr" in row else ""
        print(f"{key:34s} {shown}  {samples}{row.get('step_ms', 0):.0f} ms/step {row['seconds']:.0f} s", flush=True)

    def picture(self, name: str, videos: Tensor) -> None:
        """Frames 1, 5, 10 and the last of the first samples, as a PNG."""
        from PIL import Image

        shown = videos[:4, :, [1, 5, 10, -1]] if videos.shape[2] > 10 else videos[:4]
        rows = shown.permute(0, 3, 2, 4, 1).flatten(0, 1).flatten(1, 2)
        pixels = ((rows + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
        Image.fromarray(pixels).save(self.folder / f"{re.sub('[^a-z0-9]+', '-', name.strip('%'))}.png")


def main() -> None:
    """Measure what is not measured yet, as long as there is time."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--closed", nargs="*", default=[], help="arms right after the switch, or all")
    parser.add_argument("--tune", nargs="*", default=[], help="arms to fine-tune")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STAGES[-1].steps // 10)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--gate-lr", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=32, help="batches")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--fits", type=Path, help="folder of the package's fits, made or taken; default: in --out")
    parser.add_argument("--no-samples", action="store_true", help="right after the switch, the loss alone")
    parser.add_argument("--dense-steps", nargs="*", type=int, default=[], help="sample with so many first steps dense")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--cudnn", action="store_true", help="dense attention by cuDNN")
    parser.add_argument("--tiny", action="store_true", help="the tiny checkpoint of train.py, to try the script")
    options = parser.parse_args()
    with fast_attention() if options.cudnn else nullcontext():
        work(options, began)


def work(options: argparse.Namespace, began: float) -> None:
    """What ``main`` does, once it knows what."""
    study = Study(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(
        f"{study.tokens} tokens, dense {study.results['dense']['loss']}, {time.monotonic() - began:.0f} s", flush=True
    )
    jobs = [(name, None) for name in (CLOSED if options.closed == ["all"] else options.closed)]
    jobs += [(name, seed) for seed in options.seeds for name in options.tune]
    for name, seed in jobs:
        key = name if seed is None else f"{name}/{seed}"
        if key in study.results and key != "dense":
            continue
        if time.monotonic() - began > options.seconds:
            print(f"call again; the next is {key}", flush=True)
            return
        try:
            study.closed(name) if seed is None else study.tune(name, seed)
        except (RuntimeError, ValueError) as error:  # the others are worth having
            print(f"{key} failed: {str(error)[:600]}", flush=True)
    print(f"all is done, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
