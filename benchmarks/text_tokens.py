"""What ``always_critical="text"`` does to quality, at an equal number of critical blocks in all.

    python -m benchmarks.text_tokens                    # trains a small joint model first, minutes on a CPU
    python -m benchmarks.text_tokens --clips runs/real_video/clips --weights runs/real_video/weights

The first looks at a video DiT of joint attention that is trained here: 32 tokens in front of the video's 1024 carry the
72 numbers that the procedural videos of examples/ are made from, as a caption would. All frames are noisy. The second
looks at the model of the study on real video (real_video.md), 4096 tokens: its first frame, 256 clean tokens in front,
is what every other token goes by.

Of each form the rows of a table have as many critical blocks: chosen by scores alone, or the prefix's and the rest
chosen. Told are the relative error of the output against dense, and the flow loss above the dense model's, of what is
not the prefix. Above the table: how much of the dense attention's mass of the video's queries is on the prefix, layer
by layer, and how many of the prefix's blocks are chosen by scores anyway.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

import sla_compile
from examples.study.video_dit import VideoDiT, VideoDiTConfig, denoised, waves
from examples.study.videos import PARAMETERS, Data
from sla_compile.fitting.observer import GatedCall, gated_calls

Batch = tuple[tuple[Tensor, ...], Tensor]
"""The model's arguments, and the velocity (B, C, T, H, W) that flow matching wants."""

FORMS: dict[str, dict[str, Any]] = {
    "`none`": {"linear": "none"},
    "`marginal`, `sparse_scale`, calibrated": {"linear": "marginal", "sparse_scale": True},
    "`taylor`": {"linear": "taylor"},
    "`taylor`, calibrated": {"linear": "taylor"},
}


class CaptionedDiT(VideoDiT):
    """A ``VideoDiT`` whose sequence begins with ``texts`` tokens that carry numbers; they are not read out."""

    def __init__(self, config: VideoDiTConfig, numbers: int = PARAMETERS, texts: int = 32) -> None:
        super().__init__(config)
        self.texts, self.each = texts, math.ceil(numbers / texts)
        self.caption = nn.Linear(self.each, config.width)
        self.names = nn.Parameter(torch.randn(texts, config.width))

    def forward(self, video: Tensor, time: Tensor, numbers: Tensor) -> Tensor:  # type: ignore[override]
        """video (B, C, T, H, W), time (B), numbers (B, P), 0 to 1 -> velocity, as video."""
        x = self.embed(video)
        grid = x.shape[2:]
        x = x.flatten(2).mT + self.positions(grid, x.device)
        padded = F.pad(numbers, (0, self.texts * self.each - numbers.shape[1]), value=0.5)
        told = self.caption(4 * padded.unflatten(1, (self.texts, self.each)) - 2) + self.names
        x = torch.cat([told, x], dim=1)
        embedding = self.time(waves(time * 1000, self.config.width))
        for block in self.blocks:
            x = block(x, embedding)
        patches = self.head(self.norm(x[:, self.texts :])).unflatten(1, grid).unflatten(-1, (-1, *self.config.patch))
        # (B, T', H', W', C, pt, ph, pw) -> (B, C, T', pt, H', ph, W', pw)
        return denoised(patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(video.shape), video, time)


@dataclass
class Case:
    """A dense model with a prefix, and what is measured on it."""

    title: str
    model: nn.Module
    grid: tuple[int, int, int]
    """Of the tokens behind the prefix."""
    prefix: int
    """Tokens."""
    block: int
    fit: Sequence[Batch]
    held: Sequence[Batch]
    totals: tuple[int, ...]
    """Critical blocks of a row in all."""
    shown: slice = field(default_factory=lambda: slice(None))
    """The frames whose velocity counts."""

    def settings(self, total: int, forced: bool, **form: Any) -> dict[str, Any]:
        """Those for ``total`` critical blocks, with those of the prefix among them if ``forced``."""
        blocks = math.ceil((self.prefix + math.prod(self.grid)) / self.block)
        free = total - forced * self.prefix // self.block
        config = {"block_q": self.block, "block_k": self.block, "min_tokens": 0, "grid": self.grid}
        config |= {"grid_start": self.prefix, "topk": min(1.0, (free + 1e-3) / blocks), "bottomk": 0.0}
        return config | ({"always_critical": "text"} if forced else {}) | form


def captioned(data: Data, seed: int) -> Batch:
    """A training batch with its caption."""
    numbers, uniform, noise = data.draw(seed)
    video, time, velocity = data.noisy(numbers, uniform, noise)
    return (video, time, numbers), velocity


def train(model: nn.Module, stages: Sequence[tuple[Data, int]], rate: float, say: Callable[[str], None]) -> nn.Module:
    """Train on the flow loss: of each stage its data and its steps; the rate falls to nothing over all of them."""
    total, step = sum(steps for _, steps in stages), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.97), weight_decay=0.01)
    for data, steps in stages:
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 30, 1.5 * (total - step) / total)
            args, velocity = captioned(data, step)
            loss = F.mse_loss(model(*args), velocity)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0:
                say(f"step {step}/{total} loss {loss.item():.4f}")
    return model.eval().requires_grad_(False)


def captioned_case(say: Callable[[str], None], tiny: bool = False) -> Case:
    """The small model, trained: few frames first."""
    torch.manual_seed(0)
    heads, layers, frames, side = (2, 1, 4, 16) if tiny else (4, 4, 16, 32)
    config = VideoDiTConfig(patch=(1, 4, 4), heads=heads, head_dim=32, layers=layers, mlp_ratio=4)
    device = torch.device("cpu")
    short, long = (Data((part, side, side), 2 * frames // part, device) for part in (frames // 4, frames))
    model = CaptionedDiT(config)
    train(model, [(short, 2 if tiny else 700), (long, 2 if tiny else 150)], 1.5e-3, say)
    held = [captioned(long, 2_000_000 + index) for index in range(1 if tiny else 8)]
    model.eval()
    with torch.no_grad():
        right = loss_of(model, held)
        wrong = loss_of(model, [((video, time, numbers.flip(0)), v) for (video, time, numbers), v in held])
    say(f"held-out loss {right:.4f}, with the other video's caption {wrong:.4f}")
    grid = (frames, side // 4, side // 4)
    fit = [captioned(long, 4_000_000 + index) for index in range(1 if tiny else 6)]
    return Case("a caption of 32 tokens", model, grid, 32, 16, fit, held, (3, 6))


def study_case(clips: Path, weights: Path) -> Case:
    """The study's model at 4096 tokens; its first frame is the prefix."""
    from benchmarks.real_video.clips import decode, split
    from benchmarks.real_video.data import Windows
    from benchmarks.real_video.model import RotaryVideoDiT
    from benchmarks.real_video.train import load_weights

    train_names, held_names = split([path.name for path in clips.glob("*.mp4")])
    fit, held = (
        Windows([decode(clips / name) for name in names], (16, 64), 2, 4) for names in (train_names[::16], held_names)
    )
    model = load_weights(RotaryVideoDiT(), weights).eval().requires_grad_(False)
    fitting = [((video, time), velocity) for video, time, velocity in (fit(4_000_000 + index) for index in range(3))]
    measured = [((video, time), velocity) for video, time, velocity in held.held_out(4)]
    return Case("a first frame of 256 tokens", model, (15, 16, 16), 256, 64, fitting, measured, (6, 12), slice(1, None))


def loss_of(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean flow loss."""
    return sum(F.mse_loss(model(*args), velocity).item() for args, velocity in batches) / len(batches)


def looked_at(case: Case, total: int) -> tuple[list[float], float, float]:
    """Of the video's queries: the dense mass on the prefix, by layer, on average over heads; and the share of the
    prefix's blocks that are among ``total`` chosen by scores, and by expected mass."""
    model = copy.deepcopy(case.model)
    sla_compile.prepare(model, case.held[0][0], config=case.settings(total, False, linear="none"))
    mass, chosen = [], {"none": [0.0], "taylor": [0.0]}
    blocks = case.prefix // case.block

    def look(call: GatedCall) -> Tensor:
        queries, keys = call.query[:1, :, case.prefix :], call.key[:1]
        logits = queries @ keys.mT * call.scale
        mass.append(float(logits.softmax(dim=-1)[..., : case.prefix].sum(dim=-1).mean()))
        for linear, found in chosen.items():
            options = {**call.options(), "linear": linear}
            block_map = torch.ops.sla.forward.default(call.query, call.key, call.value, None, None, **options)[3]
            found.append(float((block_map[:, :, blocks:, :blocks] == 1).float().mean()))
        return call.dense

    with gated_calls(model, look):
        model(*case.held[0][0])
    shares = [sum(found) / (len(found) - 1) for found in chosen.values()]
    return mass, shares[0], shares[1]


@torch.no_grad()
def compared(case: Case, forms: Mapping[str, dict[str, Any]], say: Callable[[str], None]) -> Table:
    """The table of a case: each of ``forms``, settings by title."""
    dense = [case.model(*args)[:, :, case.shown] for args, _ in case.held]
    wanted = [velocity[:, :, case.shown] for _, velocity in case.held]
    base = sum(F.mse_loss(out, velocity).item() for out, velocity in zip(dense, wanted, strict=True))
    mass, by_score, by_mass = looked_at(case, case.totals[-1])
    tokens = case.prefix + math.prod(case.grid)
    table = Table(
        title=f"{case.title} of {tokens}, {case.prefix // case.block} of {tokens // case.block} blocks; mass on it "
        f"{', '.join(f'{share:.0%}' for share in mass)}; of {case.totals[-1]} blocks chosen by scores {by_score:.0%} "
        f"of its are among them, by expected mass {by_mass:.0%}",
        box=box.MARKDOWN,
    )
    for name in ("form", "critical", "of the prefix", "output error", "loss above dense"):
        table.add_column(name, justify="left" if name == "form" else "right", no_wrap=True)
    for total in case.totals:
        for title, form in forms.items():
            for forced in (False, True):
                model = copy.deepcopy(case.model)
                calls = [args for args, _ in case.fit]
                sla_compile.prepare(model, calls[0], config=case.settings(total, forced, **form))
                if title.endswith("calibrated"):
                    sla_compile.calibrate(model, calls)
                torch.compiler.reset()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", sla_compile.UntrainedGatesWarning)
                    compiled = torch.compile(model, backend="sla", options={"inner": "eager"}, dynamic=False)
                    outs = [compiled(*args)[:, :, case.shown] for args, _ in case.held]
                error = torch.cat([a - b for a, b in zip(outs, dense, strict=True)]).norm() / torch.cat(dense).norm()
                loss = sum(F.mse_loss(out, velocity).item() for out, velocity in zip(outs, wanted, strict=True))
                kept = "all" if forced else "chosen"
                table.add_row(title, str(total), kept, f"{error:.4f}", f"{loss / base - 1:+.2%}")
                say(f"{title} {total} {kept} {error:.4f} {loss / base - 1:+.2%}")
    return table


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--linear", nargs="+", default=["none", "marginal", "taylor"], help="the forms")
    parser.add_argument("--tiny", action="store_true", help="small and hardly trained, to try the script")
    options = parser.parse_args(given)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    case = captioned_case(say, options.tiny) if options.clips is None else study_case(options.clips, options.weights)
    forms = {title: form for title, form in FORMS.items() if form["linear"] in options.linear}
    Console(width=160).print(compared(case, forms, say))


if __name__ == "__main__":
    main()
