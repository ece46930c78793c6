"""The arms of examples/finetune.py for several seeds: mean and spread, and whether SLA keeps a dense model's quality.

    python benchmarks/quality.py --out runs/quality --seconds 540 --workers 3    # again, until it says that all is done
    python benchmarks/quality.py --out runs/quality --report    # writes benchmarks/quality.md, .csv, .png, .gif

It stops by itself in time, with what is done in ``--out``, and goes on from there. The most telling arms come first.
``--workers`` processes share the device: while one compiles, another trains.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

from examples.study.arms import ARMS, MAIN
from examples.study.experiment import Experiment, Job, jobs_of
from examples.study.pictures import aggregate, save_csv, save_plot, save_samples
from examples.study.settings import PRESETS, Settings
from examples.study.training import OutOfTime
from sla_compile import UntrainedGatesWarning
from sla_compile.common.blocks import num_blocks, num_critical

HERE = Path(__file__).resolve().parent


ROUNDS: tuple[tuple[tuple[str, ...], tuple[float, ...], int], ...] = (
    (MAIN, (0.95,), 99),
    (("sla-scaled", "calibrated-scaled", "calibrated-tuned-scaled"), (0.95,), 99),
    (("dense-long", "sla-long", "sparse-long"), (0.95,), 99),
    (("sla-tiles", "sparse-tiles"), (0.95,), 99),
    (("sparse", "sla"), (0.90, 0.80), 99),
    (("calibrated-tiles",), (0.95,), 99),
    (("sla-wide",), (0.95, 0.90), 99),
    (("calibrated", "sparse-wide"), (0.90,), 99),
    (("calibrated",), (0.80,), 99),
    (("all", "calibrated-tuned"), (0.90, 0.80), 99),
)
"""Arms, sparsities and the most seeds, in the order in which they are run."""

Row = Mapping[str, Any]
Groups = Mapping[tuple[str, float | None], Sequence[Row]]


def jobs_for(seeds: Sequence[int]) -> list[Job]:
    """All jobs in their order, each once."""
    return list(dict.fromkeys(job for arms, shares, most in ROUNDS for job in jobs_of(arms, shares, seeds[:most])))


def settings_of(options: argparse.Namespace) -> Settings:
    """The preset, and what the command line changes in it."""
    names = ("layers", "dense_steps", "steps", "batch", "lr", "gate_lr", "dense_lr", "inner")
    given = {name: getattr(options, name) for name in names}
    return dataclasses.replace(PRESETS[options.preset], **{name: v for name, v in given.items() if v is not None})


def measure(options: argparse.Namespace, began: float, console: Console) -> None:
    """Do as much as the seconds allow."""
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "command": " ".join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "workers": options.workers,
    }
    (options.out / "machine.json").write_text(json.dumps(machine, indent=1))
    jobs = jobs_for(range(options.seeds))
    missing = [job for job in jobs if job.key not in results_in(options.out)]
    ends = began + options.seconds - options.reserve
    if options.workers == 1:
        work(missing, experiment_of(options, ends, console))
    elif missing:
        share(missing, options, ends, console)
    results = results_in(options.out)
    missing = [job for job in jobs if job.key not in results]
    state = "all is done" if not missing else f"{len(missing)} left, call again; the next is {missing[0].label}"
    console.print(f"{len(jobs) - len(missing)} of {len(jobs)} arms done in {time.time() - began:.0f} s: {state}")


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows that are there, by the keys of their jobs."""
    path = folder / "results.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def experiment_of(options: argparse.Namespace, ends: float, console: Console, lock: Any = None) -> Experiment:
    """The experiment in the folder ``--out``, until ``time.time()`` is ``ends``."""
    warnings.filterwarnings("ignore", category=UntrainedGatesWarning)  # training them is next
    device, seconds = torch.device(options.device), ends - time.time()
    settings, graphs = settings_of(options), not options.no_graphs
    return Experiment(settings, options.out, device, console, seconds=seconds, capture=graphs, lock=lock)


def work(jobs: Sequence[Job], experiment: Experiment) -> None:
    """Run ``jobs`` as far as the time goes."""
    with contextlib.suppress(OutOfTime):
        experiment.run(jobs)


_mine: list[Experiment] = []
"""The experiment of this process, where it is one of several workers."""


def _begin(options: argparse.Namespace, ends: float, lock: Any) -> None:
    torch.set_num_threads(threads_of(options.workers))
    _mine.append(experiment_of(options, ends, Console(width=140, force_terminal=False), lock))


def _ready(seed: int | None) -> None:
    """The dense training of ``seed``; for None, the network of the Fréchet distance."""
    with contextlib.suppress(OutOfTime):
        if seed is None:
            _mine[0].learn_features()
        else:
            _mine[0].pretrain(seed)


def _work(jobs: Sequence[Job]) -> None:
    work(jobs, _mine[0])


def threads_of(workers: int) -> int:
    """For each of them."""
    return max(1, (os.cpu_count() or 1) // workers)


def share(jobs: Sequence[Job], options: argparse.Namespace, ends: float, console: Console) -> None:
    """Let workers take the jobs, those that share a compilation at a time, once what every job needs is there."""
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, str(threads_of(options.workers)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, spawn, _begin, (options, ends, spawn.Lock())) as pool:
        list(pool.map(_ready, [*sorted({job.seed for job in jobs}), None]))
        groups = [list(group) for _, group in groupby(jobs, key=lambda job: (ARMS[job.arm].kind, job.sparsity))]
        running = [pool.submit(_work, group) for group in groups]
    for group, future in zip(groups, running, strict=True):
        if (error := future.exception()) is not None:  # the other arms are none the worse for it
            console.print(f"{group[0].label}, or what came after it: {type(error).__name__}: {error}")


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean, and least to most."""
    mean, least, most = (format(f(values), form) for f in (statistics.fmean, min, max))
    return f"{mean} ({least} to {most})"


def paired(rows: Sequence[Row], base: Sequence[Row], value: Callable[[Row, Row], float]) -> list[float]:
    """``value`` of each row and of the base row of its seed."""
    of_seed = {row["seed"]: row for row in base}
    return [value(row, of_seed[row["seed"]]) for row in rows if row["seed"] in of_seed]


def excess(row: Row, base: Row) -> float:
    """How much larger the held-out loss is, in percent."""
    return 100 * (float(row["after"]) / float(base["after"]) - 1)


def main_table(groups: Groups, tokens: int, block: int, base: str = "dense") -> list[str]:
    """Every arm: losses, how far above those of the arm ``base``, Frechet distance, time."""
    dense = groups.get((base, None), [])
    lines = [
        "| arm | sparsity | critical blocks of a row | loss before | loss after | above dense, % | Fréchet | ms/step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (arm, share), rows in groups.items():
        critical = "all" if ARMS[arm].attention == "dense" else "none"
        if share is not None:
            blocks = num_blocks(tokens, block * ARMS[arm].wide)
            critical = f"{num_critical(round(1 - share, 6), blocks)} of {blocks}"
        times = [row["step_ms"] for row in rows if row["step_ms"]]
        above = paired(rows, dense, excess)
        cells = [
            f"{ARMS[arm].title}{'' if len(rows) > 1 else ' (one seed)'}",
            "-" if share is None else f"{share:.0%}",
            critical,
            f"{statistics.fmean(row['before'] for row in rows):.4f}",
            spread([row["after"] for row in rows]),
            spread(above, "+.2f") if above else "-",
            spread([row["frechet"] for row in rows], ".3f"),
            f"{statistics.median(times):.1f}" if times else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def excess_of_quarter(row: Row, base: Row, quarter: int) -> float:
    """By how many percent the loss is above the base's in one quarter of the held-out times."""
    return float(100 * (row["by_time"][quarter] / base["by_time"][quarter] - 1))


def time_table(groups: Groups) -> list[str]:
    """How much the loss is above the dense one's in each quarter of the held-out times."""
    dense = groups.get(("dense", None), [])
    lines = ["| arm | sparsity | least noise | 2nd quarter | 3rd quarter | most noise |", "| --- " * 6 + "|"]
    for (arm, share), rows in groups.items():
        parts = [paired(rows, dense, partial(excess_of_quarter, quarter=quarter)) for quarter in range(4)]
        if arm != "dense" and all(parts):
            means = [f"{statistics.fmean(part):+.2f}" for part in parts]
            lines.append(f"| {' | '.join([ARMS[arm].title, '-' if share is None else f'{share:.0%}', *means])} |")
    return lines


def bars(groups: Groups) -> list[str]:
    """What was hoped for, at 95% sparsity, and what came out."""
    dense, sparse = groups.get(("dense", None), []), groups.get(("sparse", 0.95), [])
    lines = []
    for arm in ("sla", "calibrated-tuned"):
        rows, title = groups.get((arm, 0.95), []), ARMS[arm].title
        above = paired(rows, dense, excess)
        if not above or not sparse:
            continue
        met = "met" if statistics.fmean(above) <= 1 else "missed"
        lines.append(f"- {title} within 1% of dense: **{met}**, {spread(above, '+.2f')}%.")
        far, near = statistics.fmean(paired(sparse, dense, excess)), statistics.fmean(above)
        if near <= 0:
            text = f"**met**: it is not above dense at all; sparse only is {far:+.2f}%"
        else:
            text = f"**{'met' if far / near >= 5 else 'missed'}**, {far / near:.1f} times ({far:+.2f}% to {near:+.2f}%)"
        lines.append(f"- {title} at least 5 times closer to dense than sparse only: {text}.")
    for arm, how in (("calibrated", ""), ("calibrated-scaled", ", with a scaled sparse branch,")):
        for share in (0.95, 0.90, 0.80):
            rows = groups.get((arm, share), [])
            closed = [100 * (1 - row["error_gated"] / row["error_sparse"]) for row in rows]
            if closed:
                met = "met" if statistics.fmean(closed) >= 50 else "missed"
                lines.append(
                    f"- Calibration alone{how} closes half of sparse only's attention error on held-out videos, "
                    f"{share:.0%}: **{met}**, {spread(closed, '.1f')}%."
                )
    return lines


def variants(groups: Groups) -> list[str]:
    """How much the held-out loss of a variant is above that of the arm that it varies, seed by seed."""
    lines = []
    for (arm, share), rows in groups.items():
        varied = arm.removesuffix("-wide").removesuffix("-tiles").removesuffix("-scaled")
        if varied != arm and (above := paired(rows, groups.get((varied, share), []), excess)):
            lines.append(f"- {ARMS[arm].title}, beside {ARMS[varied].title}, {share:.0%}: {spread(above, '+.2f')}%.")
    return lines


def longer_training(groups: Groups, settings: Settings) -> list[str]:
    """The table of the arms that are trained longer, and how the losses of SLA went."""
    if not groups:
        return []
    rows = [row for (arm, _), rows in groups.items() if arm == "sla-long" for row in rows]
    table = main_table(groups, settings.tokens, settings.block, "dense-long")
    return ["Trained longer, with autocast to bf16 on a GPU:", "", *table, "", *stability(rows), ""]


def stability(rows: Sequence[Row]) -> list[str]:
    """How the losses of the long training went: whether they stayed finite, and fell."""
    lines = []
    for row in rows:
        losses = [loss for _, loss in row["losses"]]
        size = max(1, len(losses) // 10)
        tenths = [statistics.fmean(losses[i : i + size]) for i in range(0, size * (len(losses) // size), size)]
        calm = all(math.isfinite(loss) for loss in losses) and max(tenths) <= 1.1 * tenths[0]
        shown = ", ".join(f"{mean:.4f}" for mean in tenths)
        lines += [
            f"Seed {row['seed']}, {row['sparsity']:.0%}, {row['losses'][-1][0]} steps: "
            f"{'no NaN and no divergence' if calm else '**it diverged**'}; largest noted loss {max(losses):.4f}, "
            f"held-out loss {row['before']:.4f} -> {row['after']:.4f}. Mean training loss of each tenth:",
            f"{shown}.",
        ]
    return lines


def what_was_done(settings: Settings, real: float, workers: int) -> list[str]:
    """The settings, in sentences."""
    grid = "x".join(map(str, settings.grid))
    sentences = (
        f"A video transformer of {settings.layers} layers, {settings.heads} heads of {settings.head_dim}.",
        f"Procedural videos of {' x '.join(map(str, settings.size))} pixels: {grid} = {settings.tokens} tokens.",
        f"Blocks of {settings.block} tokens, {settings.bottomk:.0%} of them negligible.",
        f"Dense training for {settings.dense_steps} steps of {settings.batch} videos.",
        f"From that checkpoint, {settings.steps} steps of flow matching for each arm that is trained,",
        f"at the same learning rates ({settings.lr:g}, gates {settings.gate_lr:g}) on the same batches.",
        f"Held-out loss on the same {settings.held_out * settings.batch} videos, noise and times.",
        f"Fréchet distance of {settings.sampled * settings.batch} samples from the same noise",
        f"({settings.sampling_steps} Euler steps), on the features of a network trained on such videos;",
        f"as many real videos have {real:.3f}.",
        "Mean (least to most) over seeds.",
        '"Above dense" compares, seed by seed, with the dense model trained on for as many steps.',
        *([f"{workers} trainings shared the device, so step times are no measure of the arms."] * (workers > 1)),
    )
    return textwrap.wrap(" ".join(sentences), 118)


def report(options: argparse.Namespace) -> None:
    """Write the table and the pictures of what is in ``--out``."""
    results = results_in(options.out)
    settings = json.loads((options.out / "settings.json").read_text())
    machine = json.loads((options.out / "machine.json").read_text())
    known = Settings.from_dict(settings)
    samples = torch.load(options.out / "samples.pt", weights_only=True)
    shown = {job.key: samples[job.key] for job in jobs_of(MAIN, [0.95], [0]) if job.key in samples}
    compared = {key: row for key, row in results.items() if "arm" in row and ARMS[row["arm"]].longer == 1}
    groups = aggregate(compared)
    long = aggregate({key: row for key, row in results.items() if "arm" in row and key not in compared})
    varied = variants(groups)
    seeds = sorted({row["seed"] for rows in groups.values() for row in rows})
    text = [
        "# Quality after the switch",
        "",
        f"{machine['device']}, torch {machine['torch']}; {len(seeds)} seeds. One run, in pieces, of",
        "",
        f"    {machine['command']}",
        "",
        *([*textwrap.wrap(options.note, 118), ""] if options.note else []),
        *what_was_done(known, results["real"]["frechet"], machine["workers"]),
        "",
        *main_table(groups, known.tokens, known.block),
        "",
        "What was hoped for at 95% sparsity:",
        "",
        *bars(groups),
        "",
        *(["Held-out loss of variants above that of what they vary:", "", *varied, ""] if varied else []),
        "Held-out loss above dense, %, in each quarter of the times of flow matching (means over seeds):",
        "",
        *time_table(groups),
        "",
        *longer_training(long, known),
        "![held-out loss and Fréchet distance against sparsity](quality.png)",
        "",
        "Samples of the first seed at 95% sparsity, from the same noise; in reading order:",
        "; ".join(ARMS[key.split("/")[0]].title for key in shown) + ".",
        "",
        "![samples](quality_samples.gif)",
        "",
    ]
    folder = options.report_to
    (folder / "quality.md").write_text("\n".join(text))
    save_csv(results, folder / "quality.csv")
    save_plot(compared, folder / "quality.png")
    save_samples(shown, folder, "quality_samples", scale=1)


def main() -> None:
    """Measure, or report what was measured."""
    began = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results: gone on with where it has some")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop by then")
    parser.add_argument("--reserve", type=float, default=10.0, help="seconds of these to end in")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel by itself on a GPU")
    parser.add_argument("--preset", choices=list(PRESETS), default="gpu")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dense-steps", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dense-lr", type=float)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--gate-lr", type=float)
    parser.add_argument("--inner", choices=("inductor", "eager"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", action="store_true", help="write the table and the pictures instead")
    parser.add_argument("--note", default="", help="what to say of the run at the head of the report")
    parser.add_argument("--report-to", type=Path, default=HERE, help="folder of the table and the pictures")
    options = parser.parse_args()
    if options.report:
        report(options)
    else:
        measure(options, began, Console(width=140))


if __name__ == "__main__":
    main()
