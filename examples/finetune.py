"""Train a small video transformer dense, switch its attention to Sparse-Linear Attention, and fine-tune.

    python examples/finetune.py                 # the VideoDiT of video_dit.py
    python examples/finetune.py --model wan     # a small WanTransformer3DModel of diffusers
    python examples/finetune.py --resume        # go on from the last checkpoint

1. The model learns to denoise videos of moving shapes (flow matching) with dense attention.
2. ``sla_compile.prepare`` gives every attention its gate; the gates get a learning rate of their own.
3. The compiled model is fine-tuned to predict what its dense self predicted (``--loss teacher``, the default),
   or with the flow-matching loss alone (``--loss flow``).
4. The held-out loss is printed before and after, and with each branch switched off.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from progress import Steps
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from video_dit import VideoDiT, VideoDiTConfig, moving_shapes

import sla_compile

Batch = tuple[Tensor, Tensor, Tensor]
HELD_OUT_SEED = 1_000_000
console = Console()


class Wan(nn.Module):
    """A small WanTransformer3DModel of diffusers with the call of ``VideoDiT``."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import WanTransformer3DModel

        self.transformer = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            ffn_dim=256,
            num_layers=4,
            text_dim=32,
            freq_dim=64,
        )
        self.register_buffer("text", torch.zeros(1, 8, 32))  # no text: the videos have no captions

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        """video (B, C, T, H, W) and time (B), from 0 (data) to 1 (noise) -> velocity (B, C, T, H, W)."""
        text = self.text.expand(len(video), -1, -1)
        return self.transformer(video, time * 1000, text, return_dict=False)[0]


class Data:
    """Noisy videos of moving shapes; the batch of a seed is always the same, so that a run can be resumed."""

    def __init__(self, size: tuple[int, int, int], batch: int, device: torch.device) -> None:
        self.size, self.batch, self.device = size, batch, device

    def __call__(self, seed: int) -> Batch:
        """The noisy video, its time, and the velocity that flow matching wants: noise - data."""
        video = moving_shapes(self.batch, *self.size, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(video.shape, generator=generator)
        time = torch.rand(self.batch, generator=generator)
        t = time.view(-1, 1, 1, 1, 1)
        noisy, velocity = (1 - t) * video + t * noise, noise - video
        return noisy.to(self.device), time.to(self.device), velocity.to(self.device)

    def held_out(self, batches: int) -> list[Batch]:
        """Batches that training never sees."""
        return [self(HELD_OUT_SEED + i) for i in range(batches)]


class BranchOff(TorchFunctionMode):
    """Runs a prepared, uncompiled model as SLA with one branch switched off, to see what each contributes.

    The output of the op is the sum of its branches, so the linear branch alone is what is left of it when
    the sparse branch (the op without a gate) is taken away.
    """

    def __init__(self, model: nn.Module, branch: str) -> None:
        super().__init__()
        self.model, self.branch = model, branch
        self.gate: sla_compile.Gate | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Switch the branch off inside the ``with``."""
        hooks = []
        for path, gate in sla_compile.gates(self.model).items():
            owner = self.model.get_submodule(path.rpartition(".")[0])
            hooks.append(owner.register_forward_pre_hook(lambda *_, gate=gate: setattr(self, "gate", gate)))
            hooks.append(owner.register_forward_hook(lambda *_: setattr(self, "gate", None)))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        gate, kwargs = self.gate, kwargs or {}
        if func is not F.scaled_dot_product_attention or gate is None:
            return func(*args, **kwargs)
        q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
        settings = gate.config.kernel_options()
        sparse = sla_compile.sparse_linear_attention(q, k, v, **settings)
        if self.branch == "linear":
            return sparse
        return sla_compile.sparse_linear_attention(q, k, v, gate.weight, gate.bias, **settings) - sparse


@torch.no_grad()
def losses(call: nn.Module, batches: list[Batch], teacher: nn.Module) -> tuple[float, float]:
    """Held-out flow-matching loss, and mean squared distance from the teacher's velocity."""
    flow = distance = 0.0
    for noisy, time, velocity in batches:
        prediction = call(noisy, time)
        flow += F.mse_loss(prediction, velocity).item() / len(batches)
        distance += F.mse_loss(prediction, teacher(noisy, time)).item() / len(batches)
    return flow, distance


def save_checkpoint(path: Path, phase: str, step: int, optimizer: torch.optim.Optimizer, **models: Any) -> None:
    """Everything that ``--resume`` needs; gates are in the model's state_dict like any other parameter."""
    state = {name: value.state_dict() if value is not None else None for name, value in models.items()}
    temporary = path.with_suffix(".tmp")
    torch.save({"phase": phase, "step": step, "optimizer": optimizer.state_dict(), **state}, temporary)
    temporary.replace(path)


def train(
    label: str,
    call: nn.Module,
    target: Callable[[Batch], Tensor],
    data: Data,
    optimizer: torch.optim.Optimizer,
    steps: range,
    seed: int,
    checkpoint: Callable[[int], None],
    save_every: int,
) -> None:
    """Fit ``call`` to ``target`` on the batches of ``steps``."""
    rows = Steps(label, steps.start, steps.stop, console)
    for step in rows:
        for group in optimizer.param_groups:  # a warm-up, since Adam's first steps are long; then down to zero
            group["lr"] = group["peak_lr"] * min((step + 1) / 10, 1 - step / steps.stop)
        batch = data(seed + step)
        loss = F.mse_loss(call(batch[0], batch[1]), target(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rows.show(loss.item())
        if (step + 1) % save_every == 0 or step + 1 == steps.stop:
            checkpoint(step + 1)


def sla_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The gates start at zero in a trained model: a higher learning rate than the rest, no weight decay."""
    gates = list(sla_compile.gate_parameters(model))
    known = {id(parameter) for parameter in gates}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    for parameter in rest:
        parameter.requires_grad_(options.train == "all")
    return torch.optim.AdamW(
        [
            {"params": rest, "peak_lr": options.lr},
            {"params": gates, "peak_lr": options.gate_lr, "weight_decay": 0.0},
        ]
    )


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("dit", "wan"), default="dit")
    parser.add_argument("--size", type=int, nargs=3, default=(8, 24, 24), metavar=("T", "H", "W"))
    parser.add_argument("--batch", type=int, default=2, help="videos in a batch")
    parser.add_argument("--dense-steps", type=int, default=160, help="steps of dense training")
    parser.add_argument("--steps", type=int, default=60, help="steps of fine-tuning with SLA")
    parser.add_argument("--loss", choices=("teacher", "flow"), default="teacher", help="loss of the fine-tuning")
    parser.add_argument("--train", choices=("all", "gates"), default="all", help="what the fine-tuning trains")
    parser.add_argument("--dense-lr", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=2e-4, help="of the weights, in the fine-tuning")
    parser.add_argument("--gate-lr", type=float, default=1e-2, help="of the gates, in the fine-tuning")
    parser.add_argument("--topk", type=float, default=0.05, help="share of key blocks with exact attention")
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--held-out", type=int, default=8, help="batches of the held-out loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"), help="folder for checkpoints")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    options = parser.parse_args(given)
    if options.resume and not (options.output / "checkpoint.pt").exists():
        parser.error(f"--resume: there is no checkpoint.pt in {options.output}")
    return options


def main(given: list[str] | None = None) -> None:
    """Train dense, switch, fine-tune, compare."""
    options = arguments(given)
    device = torch.device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "checkpoint.pt"
    state = torch.load(path, map_location=device, weights_only=True) if options.resume else None

    torch.manual_seed(options.seed)
    model = (Wan() if options.model == "wan" else VideoDiT(VideoDiTConfig())).to(device)
    data = Data(tuple(options.size), options.batch, device)
    held_out = data.held_out(options.held_out)

    # 1. dense
    if state is None or state["phase"] == "dense":
        optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "peak_lr": options.dense_lr}])
        start = 0
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
        train(
            "dense training",
            model,
            lambda batch: batch[2],
            data,
            optimizer,
            range(start, options.dense_steps),
            options.seed,
            lambda step: save_checkpoint(path, "dense", step, optimizer, model=model, teacher=None),
            options.save_every,
        )
        state = None
    teacher = copy.deepcopy(model)  # the dense model, as it is now
    if state is not None:
        teacher.load_state_dict(state["teacher"])
    teacher.requires_grad_(False)

    # 2. gates first, then the optimizer
    config = sla_compile.SLAConfig(topk=options.topk, min_tokens=0, inner=options.inner)  # short videos too
    sla_compile.prepare(model, held_out[0][:2], config=config)
    optimizer = sla_optimizer(model, options)
    start = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    compiled = torch.compile(model, backend="sla", options={"inner": options.inner})
    table = Table("model", "flow-matching loss", "distance from dense", title="held-out videos")

    def row(name: str, call: nn.Module) -> None:
        flow, distance = losses(call, held_out, teacher)
        table.add_row(name, f"{flow:.4f}", f"{distance:.3g}")

    row("dense", teacher)
    row(f"SLA, after {start} steps", compiled)
    console.print(sla_compile.report(compiled))

    # 3. fine-tune
    def target(batch: Batch) -> Tensor:
        with torch.no_grad():
            return batch[2] if options.loss == "flow" else teacher(batch[0], batch[1])

    train(
        "SLA fine-tuning",
        compiled,
        target,
        data,
        optimizer,
        range(start, options.steps),
        options.seed + options.dense_steps,
        lambda step: save_checkpoint(path, "sla", step, optimizer, model=model, teacher=teacher),
        options.save_every,
    )
    sla_compile.save(model, options.output / "gates.safetensors")

    # 4. what each branch contributes
    row(f"SLA, after {options.steps} steps", compiled)
    for branch in ("linear", "sparse"):
        with BranchOff(model, branch).applied():
            row(f"  the same, {branch} branch off", model)
    console.print(table)


if __name__ == "__main__":
    main()
