"""Published diffusion transformers end to end on one GPU: a denoising forward and a training step, dense and SLA.

    python benchmarks/models.py --json models.json                                # every model of published.py
    python benchmarks/models.py --models "Wan2.1-14B 720p" "Flux 2048" --together 2 --json models.json
    python benchmarks/models.py --models "Wan2.1-1.3B 480p" --layers 30 --arms cuDNN SLA "SLA, tiles" floor
    python benchmarks/models.py --float8 --json float8.json                       # float8 linear layers of torchao
    python benchmarks/models.py --tiny                                            # a small one of each class, on a CPU

True configurations and sizes with random weights in bf16, and as many layers as the table says: times are of these,
nothing is extrapolated. A training step is forward and backward with activation checkpointing, no optimizer. Blocks are
compiled one by one. Dense attention is cuDNN's where it can be had, with flash to check that it is the faster one; the
floor is the model without self-attention, and attention's share what dense attention takes above it.

Every arm has a process and empty caches of its own (a cached graph would silently keep another arm's attention kernel).
The arms of a model, or of ``--together`` models, compile side by side, so that the time of a first call is that of a
busy machine (``--at-once 1``: of an idle one); then each is timed alone. Peak memory is of the timed calls. A model
that --json has, with as many layers, is not measured again, and an arm that fails is asked once more, alone.
``--seconds`` begins no models that would probably not end in time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

from benchmarks.model_arms import ARMS, BASES, USUAL, USUAL_FLOAT8, WHAT, serve
from benchmarks.published import FLOAT8, PUBLISHED, Published, tiny
from sla_compile.inspection.timing import Times, digits

Found = dict[str, dict[str, dict[str, Any]]]
"""Figures of a model by arm and call."""

_ONE_AT_A_TIME = Lock()
"""Arms that compile side by side answer in threads."""


class Run:
    """The arms of one model in their processes, and every figure so far."""

    def __init__(self, model: Published, options: argparse.Namespace, keep: Callable[[], None]) -> None:
        self.model, self.options, self.keep = model, options, keep
        self.started = time.perf_counter()
        self.found: Found = {arm: {} for arm in options.arms}
        self.ends: dict[str, Connection] = {}

    @contextlib.contextmanager
    def processes(self) -> Iterator[None]:
        """Within, the arms have their processes."""
        context = multiprocessing.get_context(self.options.start)
        if self.options.start == "forkserver":
            # Nothing of this checkout: the process that imports these is not told where it is.
            context.set_forkserver_preload(["torch._dynamo", "torch._functorch.aot_autograd", *_modules_of_models()])
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
            running = []
            for number, arm in enumerate(self.found):
                self.ends[arm], theirs = context.Pipe()
                arguments = (arm, self.model, self.options, str(Path(caches, str(number))), theirs)
                running.append(context.Process(target=serve, args=arguments))
                running[-1].start()
                theirs.close()
            try:
                yield
            finally:
                for end in self.ends.values():
                    end.close()
                for process in running:
                    process.join()

    def compile(self, arm: str) -> None:
        """The first call of everything that the arm is measured on."""
        training = ARMS[arm].training and not self.options.no_training
        for what in WHAT if training else WHAT[:1]:
            self._ask(arm, "first", what)

    def failed(self, arm: str) -> bool:
        """Whether a call of it did."""
        return any("failed" in found for found in self.found[arm].values())

    def time(self) -> None:
        """Time what was compiled, one after another."""
        for what in WHAT:
            for arm in self.found:
                if "first_s" in self.found[arm].get(what, {}):
                    self._ask(arm, "timed", what)

    def _ask(self, arm: str, method: str, what: str) -> None:
        """Have the arm do it, keep and print what it found."""
        try:
            self.ends[arm].send((method, what))
            answer = self.ends[arm].recv()
        except (EOFError, OSError):
            answer = {"failed": "its process ended"}
        before = {key: value for key, value in self.found[arm].get(what, {}).items() if key != "failed"}
        with _ONE_AT_A_TIME:
            self.found[arm][what] = before | answer
            self.keep()
        told = answer.get("failed") or (f"first call {answer['first_s']:.1f} s" if method == "first" else "")
        told = told or f"{Times.of(answer['ms'])} ms, {len(answer['ms'])} calls"
        print(f"[{time.perf_counter() - self.started:4.0f} s] {self.model.name}, {arm}, {what}: {told}", flush=True)


def _modules_of_models() -> list[str]:
    import diffusers

    return sorted({getattr(diffusers, model.of).__module__ for model in PUBLISHED.values()})


def measure(runs: list[Run], options: argparse.Namespace) -> None:
    """Every figure of every arm of these models, which compile together."""
    jobs = [(run, arm) for run in runs for arm in run.found]
    with contextlib.ExitStack() as processes:
        ended = [processes.enter_context(contextlib.ExitStack()) for _ in runs]
        for run, until in zip(runs, ended, strict=True):
            until.enter_context(run.processes())
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(lambda job: job[0].compile(job[1]), jobs))
        for run, arm in jobs:
            if run.failed(arm):
                run.compile(arm)  # the others may have taken its memory
                run.found[arm]["forward"]["again"] = True
        for run, until in zip(runs, ended, strict=True):
            if options.timing > 0:
                run.time()
            until.close()


def differences(found: Found) -> dict[str, float]:
    """||output - that without float8|| / ||that without float8|| of each arm in float8; takes the outputs out."""
    outputs = {arm: answers.get("forward", {}).pop("output", None) for arm, answers in found.items()}
    apart = {}
    for arm, other in (("float8", "cuDNN"), ("SLA, float8", "SLA")):
        if outputs.get(arm) is not None and outputs.get(other) is not None:
            mine, theirs = (torch.from_numpy(outputs[name]) for name in (arm, other))
            apart[arm] = float((mine - theirs).norm() / theirs.norm())
    return apart


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the models that --json does not have yet; all results."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    results: dict[str, Any] = {"torch": torch.__version__, "device": device, "rows": {}}
    file = Path(options.json) if options.json else None
    if file and file.exists():
        known = json.loads(file.read_text())
        if any(known[key] != results[key] for key in ("torch", "device")):
            raise SystemExit(f"--json: {file} is of {known['device']}, torch {known['torch']}; name another file")
        results = known

    def keep() -> None:
        if file:
            file.write_text(
                json.dumps(results, indent=1, default=lambda output: None)
            )  # outputs are compared and dropped

    models = [tiny(PUBLISHED[name]) if options.tiny else PUBLISHED[name] for name in options.models]
    if options.layers:
        models = [replace(model, layers=dict.fromkeys(model.layers, options.layers)) for model in models]
    models = [model for model in models if not complete(results["rows"].get(model.name), model, options.arms)]
    started, longest = time.perf_counter(), 0.0
    for at in range(0, len(models), options.together):
        group, began = models[at : at + options.together], time.perf_counter()
        if options.seconds is not None and began - started + longest > options.seconds:
            print(f"--seconds: left out, {', '.join(model.name for model in models[at:])}", flush=True)
            break
        runs = [Run(model, options, keep) for model in group]
        for run in runs:
            row = {"tokens": run.model.tokens, "layers": run.model.layers_in_words(), "differences": {}}
            results["rows"][run.model.name] = row | {"arms": run.found}
        measure(runs, options)
        for run in runs:
            results["rows"][run.model.name]["differences"] = differences(run.found)
        longest = max(longest, time.perf_counter() - began)
        keep()
    return results


def complete(row: dict[str, Any] | None, model: Published, arms: list[str]) -> bool:
    """Whether a row of a file of results is of this size of the model and has every arm."""
    if row is None or (row["tokens"], row["layers"]) != (model.tokens, model.layers_in_words()):
        return False
    return all("ms" in row["arms"].get(arm, {}).get("forward", {}) for arm in arms)


def tables(results: dict[str, Any]) -> Iterator[Any]:
    """What there is to print: a table of forwards, one of training steps, and lines on each model."""
    for what in WHAT:
        columns = "model|tokens|layers|arm|dense ms|by|ms|x|floor x|attention|peak GiB|first call s|sites"
        table = Table(title=f"{what}, bf16, batch 1; {results['device']}, torch {results['torch']}")
        for column in columns.split("|"):
            table.add_column(column, justify="left" if column in ("model", "arm", "by") else "right")
        for name, row in results["rows"].items():
            for arm in row["arms"]:
                if arm not in (*BASES, "floor") and (cells := arm_cells(row["arms"], arm, what)):
                    table.add_row(name, str(row["tokens"]), row["layers"], arm, *cells)
        if table.row_count:
            yield table
    for name, row in results["rows"].items():
        yield from (f"{name}: {line}" for line in notes(row["arms"], row["differences"]))


def fastest_dense(arms: Found, what: str) -> dict[str, Any] | None:
    """Figures of the fastest dense arm, and what computed its attention."""
    timed = [arms[name] for name in BASES if "ms" in arms.get(name, {}).get(what, {})]
    measured = [{"sdpa": answers["forward"].get("sdpa", {}), **answers[what]} for answers in timed]
    return min(measured, key=lambda found: Times.of(found["ms"]).median, default=None)


def arm_cells(arms: Found, arm: str, what: str) -> list[str]:
    """Cells of one row, from "dense ms" on; none where the arm is not measured on this call."""
    mine, floor = (arms.get(name, {}).get(what, {}) for name in (arm, "floor"))
    if "first_s" not in mine:
        return ["", "", "failed"] if "failed" in mine else []
    dense = fastest_dense(arms, what)
    kept, rewritten = (sum(mine.get(name, {}).values()) for name in ("kept", "rewritten"))
    first, peak, faster = [f"{mine['first_s']:.1f}"], [], ["", "", ""]
    if dense is not None:
        first = [f"{dense['first_s']:.1f}", *first]
        peak = [f"{found['peak_gib']:.1f}" for found in (dense, mine) if "peak_gib" in found]
    if dense is not None and "ms" in mine:
        before, after = Times.of(dense["ms"]).median, Times.of(mine["ms"]).median
        faster[0] = f"{before / after:.2f}" + ("" if before > after else " SLOWER")
        if "ms" in floor:
            rest = Times.of(floor["ms"]).median
            faster[1:] = [f"{before / rest:.2f}", f"{1 - rest / before:.0%}"]
    return [
        *(str(Times.of(dense["ms"])) if dense else "", ", ".join(dense.get("sdpa", {})) if dense else ""),
        *(str(Times.of(mine["ms"])) if "ms" in mine else "", *faster, " / ".join(peak), " / ".join(first)),
        f"{rewritten} of {rewritten + kept}" if "kept" in mine else "",
    ]


def notes(arms: Found, apart: dict[str, float]) -> Iterator[str]:
    """What was decided about each attention, graph breaks, failures, and how far float8 is from bf16."""
    for arm, answers in arms.items():
        for what, found in answers.items():
            if "failed" in found:
                yield f"{arm}, {what}: {found['failed']}"
            if "again" in found:
                yield f"{arm}: asked again, so that part of its first calls was compiled before"
            if what == "forward":
                yield from (f"{arm}: {count} rewritten, {why}" for why, count in found.get("rewritten", {}).items())
                yield from (f"{arm}: {count} kept dense, {why}" for why, count in found.get("kept", {}).items())
            yield from (f"{arm}, {what}: {count} graph breaks, {why}" for why, count in found.get("breaks", {}).items())
    for arm, difference in apart.items():
        yield f"{arm}: its output is {difference:.2%} from that without float8"
    timed: list[Any] = [arms.get(arm, {}).get("forward", {}).get("ms") for arm in USUAL_FLOAT8]
    if all(timed):
        dense, *saved = (Times.of(ms).median for ms in timed)
        sla, float8, both = (dense - ms for ms in saved)
        told = f"SLA saves {digits(sla)} ms, float8 {digits(float8)}, both {digits(both)}"
        yield f"{told}: {both / (sla + float8):.0%} of the sum"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(PUBLISHED), metavar="NAME", help=", ".join(PUBLISHED))
    add("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    add("--layers", type=int, help="so many, of each kind of layer")
    add("--together", type=int, default=1, help="models that compile at the same time: they share the GPU's memory")
    add("--at-once", type=int, default=16, help="arms that compile at the same time")
    add(
        "--timing",
        type=float,
        default=1.5,
        help="seconds of an arm's timing, three calls at least; 0: first calls only",
    )
    add("--seconds", type=float, help="begin no models that would probably end after these")
    add("--float8", action="store_true", help="arms with float8 linear layers, forward alone")
    add("--no-training", action="store_true", help="forward alone")
    add("--whole", action="store_true", help="compile the model as one")
    add("--json", help="write every figure to this file; what it has is not measured again")
    add("--tiny", action="store_true", help="a small model of each class on the CPU: to try this file")
    add("--inner", choices=("inductor", "eager"), help="what compiles; eager with --tiny, else inductor")
    add("--start", choices=("forkserver", "spawn"), help="how processes start; spawn on a GPU")
    options = parser.parse_args()
    of_each_class = {model.of: name for name, model in reversed(PUBLISHED.items())}
    every = [name for name in PUBLISHED if not options.tiny or name in of_each_class.values()]
    options.models = options.models or (list(FLOAT8) if options.float8 else every)
    options.arms = options.arms or list(USUAL_FLOAT8 if options.float8 else USUAL)
    options.no_training |= options.float8
    options.device = "cpu" if options.tiny else "cuda"
    options.inner = options.inner or ("eager" if options.tiny else "inductor")
    if options.tiny:
        options.timing = min(options.timing, 1e-3)
    # what is imported for a fork has CUDA going there
    options.start = options.start or ("forkserver" if options.tiny else "spawn")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    console = Console(width=190)
    for part in tables(measure_all(options)):
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


if __name__ == "__main__":
    main()
