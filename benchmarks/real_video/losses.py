"""What an arm is fine-tuned towards: the data's velocity, or what the dense checkpoint makes of the same noise.

Axes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.real_video.data import Batch, flow_loss
from benchmarks.real_video.measuring import autocast
from benchmarks.real_video.model import RotaryVideoDiT

__all__ = ["LOSSES", "Loss", "data_loss", "loss_of"]

Loss = Literal["flow", "teacher", "mixed", "features"]

LOSSES: Mapping[Loss, str] = {
    "teacher": "teacher's velocity",
    "mixed": "half data's, half teacher's velocity",
    "features": "teacher's velocity and blocks",
}
"""Those towards the dense checkpoint, as the tables have them."""

FEATURES = 0.05
"""Weight of the blocks' relative squared error beside the velocity's squared error."""


def loss_of(model: RotaryVideoDiT, batch: Batch, loss: Loss, teacher: RotaryVideoDiT) -> Tensor:
    """The mean loss of ``batch``, a scalar with a gradient.

    "mixed" is "flow" with the mean of the data's and the teacher's velocity as target; "features" is "teacher" and
    ``FEATURES`` times the mean over blocks of |x - x_teacher|^2 / |x_teacher|^2, x (B, N, C) what a block gives.
    """
    if loss == "flow":
        return data_loss(model, batch)
    video, time, velocity = batch
    with torch.no_grad():
        dense, wanted = _velocity_and_blocks(teacher, video, time)
    mine, found = _velocity_and_blocks(model, video, time)
    target = (dense + velocity) / 2 if loss == "mixed" else dense
    total = flow_loss(mine, target).mean()
    return total + FEATURES * _apart(found, wanted) if loss == "features" else total


def data_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean flow loss of ``batch``, a scalar with a gradient; ``model`` is called as a `RotaryVideoDiT` is."""
    video, time, velocity = batch
    with autocast(video.device):
        predicted = model(video, time)
    return flow_loss(predicted, velocity).mean()


def _velocity_and_blocks(model: RotaryVideoDiT, video: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The velocity, float32, and what each block gives."""
    found = []
    with autocast(video.device):
        x, embedding, turn = model.enter(video, time)
        for block in model.blocks:
            x = block(x, embedding, turn)
            found.append(x)
        return model.leave(x, video, time).float(), found


def _apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    parts = [(x - y).float().square().sum() / y.float().square().sum() for x, y in zip(found, wanted, strict=True)]
    return torch.stack(parts).mean()
