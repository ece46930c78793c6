"""From a dense video transformer to a sparse-linear one: train it dense, switch its attention, fine-tune, compare.

    python examples/finetune.py                     # every arm; sizes for the GPU if there is one, else for the CPU
    python examples/finetune.py --resume            # go on after an interruption at any moment
    python examples/finetune.py --smoke             # everything once, in seconds, at sizes that mean nothing
    python examples/finetune.py --arms dense sla --sparsity 0.9
    python examples/finetune.py --model wan         # a small WanTransformer3DModel of diffusers

1. The model learns to denoise procedural videos (flow matching) with dense attention.
2. Each arm starts from that checkpoint with its own attention: dense, sparse only, linear only, sparse + linear over
   all keys, SLA, SLA calibrated without training, SLA calibrated and trained. Steps, learning rates and data are the
   same in each; gates have a learning rate of their own.
3. Each is measured on the same held-out videos, noise and times, and by samples from the same noise.

Results are printed, and left in the output folder: results.csv, results.png, samples.png and samples.gif.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

from examples.study.arms import ARMS, MAIN
from examples.study.experiment import Experiment, jobs_of
from examples.study.pictures import aggregate, save_csv, save_plot, save_samples
from examples.study.settings import PRESETS, Settings
from sla_compile import UntrainedGatesWarning

SHARED = ("size", "batch", "dense_steps", "steps", "dense_lr", "lr", "gate_lr", "loss", "train", "inner", "held_out")


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), help="sizes and steps (default: by device)")
    parser.add_argument("--smoke", action="store_const", dest="preset", const="smoke", help="the preset smoke")
    parser.add_argument("--model", choices=("dit", "wan"), default="dit")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all but variants")
    parser.add_argument("--sparsity", type=float, nargs="+", help="default: 0.95, on a GPU 0.8 0.9 0.95")
    parser.add_argument("--size", type=int, nargs=3, metavar=("T", "H", "W"), help="frames, height, width")
    parser.add_argument("--batch", type=int, help="videos in a batch")
    parser.add_argument("--dense-steps", type=int, help="steps of dense training")
    parser.add_argument("--steps", type=int, help="steps of fine-tuning")
    parser.add_argument("--loss", choices=("flow", "teacher"), help="the fine-tuning fits the data or the dense model")
    parser.add_argument("--train", choices=("all", "gates"), help="what the fine-tuning trains")
    parser.add_argument("--dense-lr", type=float)
    parser.add_argument("--lr", type=float, help="of the weights, in the fine-tuning")
    parser.add_argument("--gate-lr", type=float, help="of the gates, in the fine-tuning")
    parser.add_argument("--inner", choices=("inductor", "eager"), help="what compiles the blocks")
    parser.add_argument("--held-out", type=int, help="batches of the held-out loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"), help="folder for everything")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --output")
    options = parser.parse_args(given)
    started = (options.output / "settings.json").exists()
    if options.resume and not started:
        parser.error(f"--resume: there is no settings.json in {options.output}")
    if started and not options.resume:
        parser.error(f"{options.output} holds a run already: add --resume to go on with it, or choose another --output")
    for sparsity in options.sparsity or ():
        if not 0 <= sparsity < 1:
            parser.error(f"--sparsity: got {sparsity}; accepted: shares from 0 to below 1")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """The preset, and what the command line changes in it."""
    preset = options.preset or ("gpu" if torch.device(options.device).type == "cuda" else "cpu")
    changes: dict[str, Any] = {"model": options.model}
    if options.model == "wan" and preset != "smoke":
        changes["size"] = (8, 24, 24)  # its patches are small: 1152 tokens
    for name in SHARED:
        if (value := getattr(options, name)) is not None:
            changes[name] = tuple(value) if name == "size" else value
    return dataclasses.replace(PRESETS[preset], **changes)


def table_of(results: dict[str, dict[str, Any]], settings: Settings) -> Table:
    """The results for the terminal."""
    title = f"held-out videos of {settings.tokens} tokens; real videos have a Fréchet distance of"
    table = Table(title=f"{title} {results['real']['frechet']:.3f}")
    columns = ("arm", "sparsity", "loss before", "loss after", "Fréchet", "attention error", "ms/step")
    for column in columns:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for (arm, sparsity), rows in aggregate(results).items():
        for row in rows:
            errors = "-"
            if "error_sparse" in row:
                errors = f"{row['error_gated']:.3f} (sparse alone {row['error_sparse']:.3f})"
            table.add_row(
                ARMS[arm].title,
                "-" if sparsity is None else f"{sparsity:.0%}",
                f"{row['before']:.5f}",
                f"{row['after']:.5f}",
                f"{row['frechet']:.3f}",
                errors,
                f"{row['step_ms']:.1f}" if row["step_ms"] else "-",
            )
    return table


def save_pictures(experiment: Experiment, console: Console) -> None:
    """CSV, plot and samples in the experiment's folder."""
    folder = experiment.folder
    save_csv(experiment.results, folder / "results.csv")
    try:
        save_plot(experiment.results, folder / "results.png")
        samples = torch.load(folder / "samples.pt", weights_only=True)
        save_samples(samples, folder)
        (folder / "samples.txt").write_text("\n".join(samples) + "\n")  # what is where, in reading order
    except ImportError as error:
        console.print(f"no pictures, since {error.name} is missing: pip install 'sla-compile[bench]'")
    console.print(f"results.csv and pictures are in {folder}")


def main(given: list[str] | None = None) -> None:
    """Train dense, then every arm; compare."""
    warnings.filterwarnings("ignore", category=UntrainedGatesWarning)  # training them is next
    console = Console()
    options = arguments(given)
    settings = settings_of(options)
    device = torch.device(options.device)
    arms = options.arms or [name for name in MAIN if options.model == "dit" or name != "linear"]
    sparsities = options.sparsity or ([0.80, 0.90, 0.95] if device.type == "cuda" else [0.95])
    try:
        experiment = Experiment(settings, options.output, device, console, save_every=options.save_every, keep=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    experiment.run(jobs_of(arms, sparsities, [options.seed]))
    console.print(table_of(experiment.results, settings))
    save_pictures(experiment, console)


if __name__ == "__main__":
    main()
