"""Dense pre-training, small to large, in pieces: call it again until it says that it is done.

    python -m benchmarks.real_video.train --clips runs/real_video/clips --state runs/real_video/state \
        --weights runs/real_video/weights --seconds 560

``--state`` holds all that is needed to go on, of at most 1000 steps before after a kill; ``--weights`` the averaged
weights in bf16, in parts of less than 16 MB.
``--more 6000`` trains longer what is done: with a state of its own, a warm-up, and a rate that falls again.
``torchrun --nproc-per-node 2 -m benchmarks.real_video.train`` shares each batch out: the same training on more GPUs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.real_video.clips import load
from benchmarks.real_video.data import WHOLE, Windows
from benchmarks.real_video.losses import data_loss
from benchmarks.real_video.measuring import held_out_loss
from benchmarks.real_video.model import CONFIG, RotaryVideoDiT, fast_attention
from examples.study.video_dit import VideoDiTConfig

__all__ = ["FRAMES", "STAGES", "Stage", "learning_rate", "load_weights", "save_weights", "update"]

FRAMES, SEED, PART = 16, 0, 7_500_000


@dataclass(frozen=True)
class Stage:
    """Steps at one size of video."""

    side: int
    batch: int
    steps: int
    oversample: int
    lr: float


STAGES = (Stage(64, 16, 3000, 4, 1e-3), Stage(128, 4, 2900, 2, 8e-4))
"""4096 tokens, then 16,384."""

AVERAGED = 0.999
"""Of the moving average of the weights, kept at each step."""


def learning_rate(step: int, stages: Sequence[Stage], first: int = 0, warm_up: int = 200) -> float:
    """Of ``step``, counted over all stages: a warm-up from the ``first`` on, then each stage's; it falls to 2% over 60%
    of the last.
    """
    total = sum(stage.steps for stage in stages)
    last = stages[-1]
    begun, which = 0, last
    for stage in stages:
        if step < begun + stage.steps:
            which = stage
            break
        begun += stage.steps
    fall = min(1.0, (total - step) / (0.6 * last.steps))
    return which.lr * min(1.0, (step - first + 1) / warm_up) * max(0.02, fall)


def update(model: RotaryVideoDiT, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """One step on ``loss``, a scalar with a gradient; the loss without one."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def own_part(size: int) -> slice:
    """What this process trains on of a batch of ``size`` videos. Raises ValueError where others would have more."""
    if not dist.is_initialized():
        return WHOLE
    processes, rank = dist.get_world_size(), dist.get_rank()
    if size % processes:
        raise ValueError(f"a batch of {size} videos cannot be shared out evenly to {processes} processes")
    return slice(rank * size // processes, (rank + 1) * size // processes)


def on_all(end: bool) -> bool:
    """Whether any process is to end; the same in all."""
    if dist.is_initialized():
        found: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(found, end)
        end = any(found)
    return end


def save_weights(state: dict[str, Tensor], folder: Path) -> None:
    """Write a state dict in bf16, in parts of less than 16 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = torch.cat([value.detach().flatten().bfloat16().cpu() for value in state.values()])
    for number, part in enumerate(flat.split(PART)):
        torch.save(part.clone(), folder / f"weights-{number}.pt")


def load_weights(model: RotaryVideoDiT, folder: Path) -> RotaryVideoDiT:
    """Read what ``save_weights`` wrote into ``model``."""
    parts = sorted(folder.glob("weights-*.pt"))
    flat = torch.cat([torch.load(part, weights_only=True) for part in parts]).float()
    state = model.state_dict()
    values = flat.split([value.numel() for value in state.values()])
    model.load_state_dict({name: value.view(state[name].shape) for name, value in zip(state, values, strict=True)})
    return model


class Pretraining:
    """The state of a pre-training."""

    def __init__(self, config: VideoDiTConfig, device: torch.device, folder: Path) -> None:
        torch.manual_seed(SEED)
        self.file = folder / "state.pt"
        folder.mkdir(parents=True, exist_ok=True)
        self.model = RotaryVideoDiT(config).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.97), weight_decay=0.01, fused=device.type == "cuda"
        )
        self.step = 0
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if self.file.exists():
            state = torch.load(self.file, map_location=device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.average = state["step"], state["average"]

    def save(self) -> None:
        """Beside it first, so that a kill leaves the last one."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "step": self.step, "average": self.average}, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)

    def run(self, windows: Windows, stages: Sequence[Stage], first: int, deadline: float) -> bool:
        """Train until ``deadline`` (of ``time.monotonic``) or the end; whether it is the end."""
        total, begun = sum(stage.steps for stage in stages), 0
        values = list(self.model.state_dict().values())
        predicts = DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        for stage in stages:
            drawn = windows.resized((windows.size[0], stage.side), stage.batch, stage.oversample)
            part = own_part(stage.batch)
            looked, since = time.monotonic(), self.step
            while self.step < begun + stage.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.step, stages, first)
                loss = update(self.model, self.optimizer, data_loss(predicts, drawn(self.step, part)))
                self.step += 1
                done = self.step - first
                kept = min(AVERAGED, done / (done + 10))
                torch._foreach_lerp_(list(self.average.values()), values, 1 - kept)
                if self.step % 200 == 0:
                    value, now = loss.item(), time.monotonic()
                    rate = 1000 * (now - looked) / (self.step - since)
                    say(f"step {self.step}/{total} side {stage.side} loss {value:.4f} {rate:.0f} ms/step")
                    looked, since = now, self.step
                if self.step % 1000 == 0 and leads():
                    self.save()
                if self.step % 20 == 0 and on_all(time.monotonic() > deadline):
                    return False
            begun += stage.steps
        return True


def main() -> None:
    """Train for a while."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--begin", type=int, help="without a state: go on from the weights, at this step")
    parser.add_argument("--more", type=int, help="so many steps more at the last size, from the weights of a done one")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--cudnn", action="store_true", help="dense attention by cuDNN")
    parser.add_argument("--tiny", action="store_true", help="two small layers and a few steps, to try the script")
    options = parser.parse_args()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if not dist.is_torchelastic_launched():
        work(options, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives of objects go by it
    dist.init_process_group(device_id=device if device.type == "cuda" else None)
    try:
        work(options, device)
    finally:
        dist.destroy_process_group()


def leads() -> bool:
    """Whether this process is the one that speaks and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """A line, of one process."""
    if leads():
        print(text, flush=True)


def work(options: argparse.Namespace, device: torch.device) -> None:
    """What ``main`` does, once it knows what and where."""
    began = time.monotonic()
    config = TINY_CONFIG if options.tiny else CONFIG
    stages: tuple[Stage, ...] = TINY_STAGES if options.tiny else STAGES
    train, held_out = load(options.clips, device)
    say(f"{len(train)} clips, {len(held_out)} held out, {time.monotonic() - began:.0f} s")
    last, first = stages[-1], 0
    if options.more is not None:
        options.begin = first = sum(stage.steps for stage in stages)
        stages = (*stages, replace(last, steps=options.more))
    frames = TINY_FRAMES if options.tiny else FRAMES
    windows = Windows(train, (frames, last.side), last.batch, last.oversample)
    training = Pretraining(config, device, options.state)
    if options.begin is not None and not training.file.exists():
        load_weights(training.model, options.weights)
        training.average = {name: value.detach().clone() for name, value in training.model.state_dict().items()}
        training.step = options.begin
    say(f"{sum(p.numel() for p in training.model.parameters()) / 1e6:.1f} M parameters, step {training.step}")
    if device.type == "cuda":
        training.model.compile_blocks()
    with fast_attention() if options.cudnn else nullcontext():
        done = training.run(windows, stages, first, began + options.seconds)
    if leads():
        training.save()
        save_weights(training.average, options.weights)
    training.model.load_state_dict(training.average)
    measured = Windows(held_out, (frames, last.side), last.batch, last.oversample).held_out(2 if options.tiny else 16)
    losses = ", ".join(f"{loss:.5f}" for loss in held_out_loss(training.model, measured))
    say(f"{'done' if done else 'call again'}; held-out loss {losses}; {time.monotonic() - began:.0f} s")


TINY_CONFIG = VideoDiTConfig(patch=(1, 4, 4), heads=2, head_dim=16, layers=2, mlp_ratio=2)
TINY_FRAMES = 4
TINY_STAGES = (Stage(16, 2, 2, 2, 1e-3), Stage(32, 2, 2, 2, 8e-4))

if __name__ == "__main__":
    main()
