"""Fine-tune a Wan text-to-video model with sparse-linear attention, on a folder of videos.

    python examples/wan_finetune.py train --checkpoint Wan-AI/Wan2.1-T2V-1.3B-Diffusers --videos clips --run runs/wan
    python examples/wan_finetune.py generate --run runs/wan --prompt "a red kite over a beach" --output kite.mp4
    accelerate launch --num_processes 8 examples/wan_finetune.py train ...    # several GPUs
    python examples/wan_finetune.py benchmark --model 1.3B                   # a step's time and memory, no weights

Videos have their captions in a .txt beside each, or in metadata.csv or metadata.jsonl (columns file_name, caption).
What is found in --run is not done again, so the same command goes on after a kill at any moment:

1. cache/: latents and text embeddings, made once by the pipeline's own VAE and text encoder, which then go;
2. dense/: what the dense model gives on videos held out;
3. fitted/: gates from a few batches, with no training: a token order for each layer, a topk for each head and level of
   noise, then calibrate;
4. running.pt: the fine-tuning of LoRA and gates (or gates alone, or all weights) towards the dense model's velocity;
5. result/: gates, with a LoRA or all weights; report.json; validation/: videos, dense left and SLA right.

Needs: pip install -e ".[wan]"
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

from examples.wan import Refused
from examples.wan.student import TRAINED, settings_of
from sla_compile import SLAConfig, UntrainedGatesWarning

RATES = {"lora": 1e-4, "gates": 1e-4, "all": 1e-5}
"""Learning rates of the weights."""
COUNTS = (
    "frames",
    "height",
    "width",
    "fps",
    "batch",
    "rank",
    "accumulate",
    "save_every",
    "validate_every",
    "measure",
    "levels",
)
"""Options that are above 0."""


def setting(text: str) -> tuple[str, Any]:
    """``key=value`` with the value in JSON, or as it is."""
    key, is_there, value = text.partition("=")
    if not is_there:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: KEY=VALUE, a setting of docs/settings.md")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What the student is, for ``train`` and ``benchmark``."""
    parser.add_argument("--train", choices=TRAINED, default="lora", help="what is trained, beside the gates")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="keep all activations")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--batch", type=int, default=1, help="videos of a batch, on each GPU")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--linear", choices=("taylor", "marginal", "all", "none"), default="taylor", help="its form")
    parser.add_argument("--topk", type=float, default=0.05, help="share of the blocks that is critical, in all")
    parser.add_argument("--max-topk", type=float, default=0.25, help="the most a head may get, and annealing's start")
    parser.add_argument("--topk-by", choices=("head", "site"), default="head", help="what has a topk of its own")
    parser.add_argument("--block", type=int, default=128, help="tokens of a block")
    parser.add_argument("--min-tokens", type=int, default=4096, help="attention over fewer tokens stays dense")
    parser.add_argument("--sla", type=setting, nargs="+", default=[], metavar="KEY=VALUE", help="more of SLAConfig")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Data and schedule."""
    parser.add_argument("--checkpoint", required=True, help="of diffusers: a name on the hub or a folder")
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos with captions")
    parser.add_argument("--caption", help="for videos that have none")
    parser.add_argument("--fps", type=float, default=16.0, help="frames a second that are taken of a video")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step, on each GPU")
    parser.add_argument("--lr", type=float, help=f"default: {RATES}")
    parser.add_argument("--gate-lr", type=float, default=5e-4)
    parser.add_argument(
        "--loss", choices=("teacher", "flow"), default="teacher", help="towards the dense model or data"
    )
    parser.add_argument(
        "--fit",
        type=int,
        default=8,
        help="batches for choose_orders, allocate and calibrate, on each GPU; 0: none of them",
    )
    parser.add_argument(
        "--orders", choices=("site", "head", "none"), default="head", help="a token order for each head, or layer"
    )
    parser.add_argument("--levels", type=int, default=4, help="parts of the sampler's times with topks of their own")
    parser.add_argument("--anneal", type=int, default=0, help="steps from max-topk down to each head's topk")
    parser.add_argument("--ema", type=float, default=0.99, help="decay of the average that is the result; 0: none")
    parser.add_argument("--drop-captions", type=float, default=0.1, help="share without caption, for guidance")
    parser.add_argument("--shift", type=float, help="of the times; default: the checkpoint's scheduler's, or 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the videos (one at least) not trained on")
    parser.add_argument("--measure", type=int, default=8, help="batches of the held-out loss")
    parser.add_argument("--samples", type=int, default=2, help="captions held out that videos are made of; 0: none")
    parser.add_argument("--sampling-steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--validate-every", type=int, default=500, help="steps between videos")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="everything, or what is left of it")
    add_training_options(train)
    add_model_options(train)
    generate = commands.add_parser("generate", help="a video with the result, through the diffusers pipeline")
    for each in (train, generate):
        each.add_argument("--run", type=Path, required=True, help="folder for everything")
    generate.add_argument("--checkpoint", help="default: the run's")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--negative-prompt", default="")
    generate.add_argument("--output", type=Path, default=Path("video.mp4"))
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--sampling-steps", type=int, default=50)
    generate.add_argument("--guidance", type=float, default=5.0)
    generate.add_argument("--dense", action="store_true", help="the checkpoint as it is, to compare")
    generate.add_argument("--offload", action="store_true", help="each part on the GPU only while it runs")
    steps = commands.add_parser("benchmark", help="time and memory of a step, with random weights")
    add_model_options(steps)
    steps.add_argument("--model", choices=("1.3B", "14B", "tiny"), default="1.3B")
    steps.add_argument("--layers", type=int, help="fewer layers than the model has")
    steps.add_argument("--repeats", type=int, default=5)
    steps.add_argument("--no-dense", dest="dense", action="store_false", help="without the dense step")
    options = parser.parse_args(given)
    if options.command != "generate":
        check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error where a number is out of range, or numbers do not go together."""
    for name in COUNTS:
        if (value := getattr(options, name, 1)) <= 0:
            parser.error(f"--{name.replace('_', '-')}: got {value}; accepted: above 0")
    if options.frames % 4 != 1:
        parser.error(f"--frames: got {options.frames}; accepted: 4 k + 1, as the VAE takes them")
    for name in ("height", "width"):
        if getattr(options, name) % 16:
            parser.error(f"--{name}: got {getattr(options, name)}; accepted: multiples of 16")
    if options.topk_by == "head" and options.max_topk <= options.topk:
        parser.error(
            f"--max-topk: got {options.max_topk}; accepted: more than --topk {options.topk}, or --topk-by site"
        )
    try:
        SLAConfig.from_options(settings_of(vars(options)))
    except ValueError as error:
        parser.error(f"--topk, --max-topk, --block, --min-tokens or --sla: {error}")
    if options.command == "train":
        if options.steps < 0:
            parser.error(f"--steps: got {options.steps}; accepted: 0 (fitted alone) or more")
        if options.anneal and options.levels > 1:
            parser.error(f"--anneal: got {options.anneal} with --levels {options.levels}; accepted: with --levels 1")
        options.lr = RATES[options.train] if options.lr is None else options.lr


def main(given: Sequence[str] | None = None) -> None:
    """One of the commands."""
    warnings.filterwarnings("ignore", category=UntrainedGatesWarning)  # measured so once, then fitted and trained
    options = arguments(given)
    console = Console()
    try:
        if options.command == "benchmark":
            from examples.wan.benchmark import benchmark

            benchmark(vars(options), console)
        elif options.command == "generate":
            from examples.wan.generating import generate

            generate(vars(options), console)
        else:
            from examples.wan.run import Run

            Run(vars(options), options.run).all()
    except Refused as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
