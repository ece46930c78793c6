"""One video transformer through sla-compile: compile, inspect, compare, fine-tune, save and load.

    python examples/quickstart.py

Takes about a minute on two CPU cores. On a GPU it runs the Triton kernels, under bfloat16 autocast, at the
sizes of Wan2.1-1.3B's attention. The weights are random, so the losses say that training works and nothing
about the quality of a video; examples/finetune.py trains a model first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

import sla_compile
from examples.study.progress import Steps

Inputs = Callable[[Tensor, Tensor], dict[str, Any]]
"""The arguments of a model for latents at a noise level."""
console = Console()


def build_wan(device: torch.device) -> tuple[nn.Module, Inputs]:
    """diffusers' own Wan transformer, small and with random weights, and its arguments."""
    from diffusers import WanTransformer3DModel

    heads, head_dim, layers = (12, 128, 4) if device.type == "cuda" else (2, 64, 2)
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        ffn_dim=8960 if device.type == "cuda" else 256,
        num_layers=layers,
        text_dim=128,
        freq_dim=64,
    )
    for block in model.blocks:  # fresh from its constructor, attention is all but switched off by adaLN, and even
        nn.init.normal_(block.scale_shift_table, std=0.5)
        block.attn1.to_k.load_state_dict(block.attn1.to_q.state_dict())  # tokens attend to what is like them
        nn.init.constant_(block.attn1.norm_q.weight, 2.0)
    text = torch.randn(1, 64, 128, device=device)

    def inputs(latents: Tensor, noise_level: Tensor) -> dict[str, Any]:
        conditions = {"timestep": noise_level * 1000, "encoder_hidden_states": text}
        return {"hidden_states": latents, **conditions, "return_dict": False}

    return model.to(device), inputs


def build_video_dit(device: torch.device) -> tuple[nn.Module, Inputs]:
    """The transformer of examples/study/video_dit.py, for when diffusers is not installed."""
    from examples.study.video_dit import VideoDiT, VideoDiTConfig

    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(channels=16, heads=2, head_dim=64, layers=2))
    for block in model.get_submodule("blocks").children():  # fresh from its constructor, each is the identity
        nn.init.normal_(block.get_parameter("modulation.bias"), std=0.5)
        for name in ("attn.qkv.weight", "attn.qkv.bias"):
            query, key, _ = block.get_parameter(name).detach().chunk(3)
            key.copy_(query)  # tokens attend to what is like them
        nn.init.constant_(block.get_parameter("attn.norm_q.weight"), 2.0)
    return model.to(device), lambda latents, noise_level: {"video": latents, "time": noise_level}


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def velocity(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """What ``model``, compiled or not, predicts."""
    with autocast(inputs[next(iter(inputs))].device):
        output = model(**inputs)
    return output[0] if isinstance(output, tuple) else output


def sample(shape: tuple[int, ...], seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Flow matching's input, (1 - t) data + t noise at a random t; the data is random and smooth, as videos are."""
    generator = torch.Generator().manual_seed(seed)
    noise_level = torch.rand(1, generator=generator)
    coarse = torch.randn(*shape[:2], *(max(1, size // 8) for size in shape[2:]), generator=generator)
    data = F.interpolate(coarse, size=shape[2:], mode="trilinear")
    noise = torch.randn(shape, generator=generator)
    return ((1 - noise_level) * data + noise_level * noise).to(like), noise_level.to(like.device)


def fine_tune(model: nn.Module, call: Callable[[], Tensor], target: Tensor, steps: int) -> list[float]:
    """Fit ``call``, which runs ``model``, to ``target``; returns the relative squared distance at each step."""
    gates = list(sla_compile.gate_parameters(model))  # zero so far: they get a higher learning rate
    weights = [p for name, p in model.named_parameters() if ".sla." not in name]
    rate = 1e-5 if target.is_cuda else 6e-5  # the wider model of the GPU needs smaller steps
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": rate}, {"params": gates, "lr": 3 * rate}], weight_decay=0.0
    )
    # a warm-up, since Adam's first steps are long, and then down to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 5, 1 - step / steps))
    losses = []
    bar = Steps("fine-tune", 0, steps, console)
    with sla_compile.RunCounters(model) as counters:  # what its attentions do while it trains
        for _ in bar:
            loss = F.mse_loss(call().float(), target) / target.square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.show(losses[-1], counters)
    return losses


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--latents", type=int, nargs=3, metavar=("T", "H", "W"), help="size of the latent video")
    parser.add_argument("--steps", type=int, default=16, help="fine-tuning steps")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for the gates")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Run every step and print what came out."""
    options = arguments(given)
    device = torch.device(options.device)
    shape = (1, 16, *(options.latents or ((21, 60, 104) if device.type == "cuda" else (5, 64, 64))))

    try:
        import diffusers

        build, name = build_wan, f"diffusers {diffusers.__version__} WanTransformer3DModel"
    except ImportError:
        build, name = build_video_dit, "the VideoDiT of examples/study/video_dit.py (diffusers is not installed)"
    model, inputs_of = build(device)
    inputs = inputs_of(*sample(shape, seed=0, like=next(model.parameters())))
    console.print(f"[bold]Model[/] {name}, random weights, latents {tuple(shape)} on {device}")

    console.rule("1. compile")
    teacher = build(device)[0].requires_grad_(False)  # the same weights, to stay dense
    compiled = torch.compile(model, backend="sla")  # this is all there is to it
    with torch.no_grad():
        velocity(compiled, inputs)

    console.rule("2. inspect")
    console.print(sla_compile.report(model))
    if not sla_compile.gates(model):
        raise SystemExit("nothing was rewritten, for the reasons above: choose larger --latents")

    console.rule("3. compare with dense attention")
    with autocast(device):
        console.print(sla_compile.compare(model, [inputs]))

    console.rule("4. fine-tune against the dense model")
    with torch.no_grad():
        target = velocity(teacher, inputs).float()
    # on one sample: with random weights there is nothing to learn that holds for others
    losses = fine_tune(model, lambda: velocity(compiled, inputs), target, options.steps)
    console.print("relative squared distance from the dense model's velocity, at each step:")
    console.print(" ".join(f"{loss:.4f}" for loss in losses))

    console.rule("5. save and load")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "gates.safetensors"
    sla_compile.save(model, path)
    weights_only = {name: value for name, value in model.state_dict().items() if ".sla." not in name}
    torch.save(weights_only, options.output / "weights.pt")

    fresh = build(device)[0]
    fresh.load_state_dict(torch.load(options.output / "weights.pt"))
    sla_compile.load(fresh, path)  # gives the fresh model its gates
    with torch.no_grad():
        tuned_output = velocity(compiled, inputs)
        loaded_output = velocity(torch.compile(fresh, backend="sla"), inputs)
    difference = (loaded_output - tuned_output).abs().max().item()
    console.print(f"{len(sla_compile.gates(fresh))} gates, {path.stat().st_size} bytes in {path}")
    console.print(f"largest difference between the fine-tuned and the loaded model: {difference:.1e}")


if __name__ == "__main__":
    main()
