"""The tuner that fills a user's file of launches, and its command."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sla_compile
from sla_compile.__main__ import main
from sla_compile.kernels.triton import launches, tuning
from sla_compile.kernels.triton import tiles as triton_tiles
from sla_compile.kernels.triton.launches import KERNELS, VARIABLE, Launch, merge, read
from sla_compile.kernels.triton.tiles import launch_for, shipped_launch
from sla_compile.kernels.triton.tuning import Outcome, Trials, Workload, candidates, tune
from tests.support.closeness import assert_close
from tests.support.launches import HALF, OURS, entry, on_device
from tests.support.paths import ROOT
from tests.support.triton_cases import Case

pytestmark = pytest.mark.usefixtures("nothing_read")

WORK = Workload(64, torch.bfloat16, tokens=128, heads=1)


class GPU:
    """Stands in for one: every kernel takes 10 ms, and what ``times``, ``failing`` and ``different`` say."""

    def __init__(self, times: dict[Launch, float] | None = None) -> None:
        self.times = times or {}
        self.failing: dict[Launch, str] = {}
        self.different: dict[Launch, float] = {}
        self.gone = False
        self.ran: list[dict[str, Launch]] = []

    def in_force(self, direction: str) -> dict[str, Launch]:
        kernels = [k for k in KERNELS if k == "states" or (k == "forward") == (direction == "forward")]
        return {kernel: launch_for(kernel, *HALF) for kernel in kernels}

    def run(self, direction: str) -> dict[str, torch.Tensor]:
        found = self.in_force(direction)
        self.ran.append(found)
        for launch in found.values():
            if self.gone or launch in self.failing:
                raise RuntimeError(self.failing.get(launch, "CUDA error: an illegal memory access"))
        off = [self.different[launch] for launch in found.values() if launch in self.different]
        return {"same": torch.ones(4), "out": torch.ones(4) * (1 + sum(off)), "empty": torch.ones(0)}

    def milliseconds(self, direction: str) -> float:
        return sum(self.times.get(launch, 10.0) for launch in self.in_force(direction).values())

    def tune(self, kernels: list[str], *choices: Launch) -> list[Outcome]:
        return tune(WORK, Trials(self.run, self.milliseconds), kernels, lambda kernel, work: choices)


A, B, C = (Launch(32, 32, 32, 4, stages) for stages in (1, 2, 3))


def test_the_fastest_is_chosen() -> None:
    gpu = GPU({A: 8.0, B: 6.0, C: 12.0})
    (outcome,) = gpu.tune(["forward"], A, B, C)
    shipped = shipped_launch("forward", 64, "half")
    assert outcome == Outcome(("forward", 64, "half"), shipped, 20.0, B, 16.0)
    assert not [found for found in gpu.ran if "gate" in found]  # nothing of the backward
    assert launch_for("forward", *HALF) == shipped  # nothing stays in force


def test_states_are_timed_in_both_directions() -> None:
    gpu = GPU({A: 8.0})
    (outcome,) = gpu.tune(["states"], A)
    assert (outcome.shipped_ms, outcome.best_ms) == (20.0 + 50.0, 18.0 + 48.0)
    assert ["gate" in found for found in gpu.ran] == [False, True] * 2


def test_kernels_are_tuned_one_after_another_with_the_others_held() -> None:
    gpu = GPU({A: 5.0, B: 5.0})
    choices = {"backward_query": [A], "gate": [B]}
    trials = Trials(gpu.run, gpu.milliseconds)
    first, second = tune(WORK, trials, choices, lambda kernel, work: choices[kernel])
    assert (first.best, first.shipped_ms, first.best_ms) == (A, 50.0, 45.0)
    assert (second.best, second.shipped_ms, second.best_ms) == (B, 45.0, 40.0)
    tried = [found["backward_query"] for found in gpu.ran if found["gate"] == B]
    assert tried == [A]
    assert {found["backward_key"] for found in gpu.ran} == {shipped_launch("backward_key", 64, "half")}


@pytest.mark.parametrize(("time", "chosen"), [(9.59, True), (9.61, False), (10.0, False)])
def test_less_than_two_percent_is_no_reason(time: float, chosen: bool) -> None:
    (outcome,) = GPU({A: time}).tune(["forward"], A)  # of 20 ms, with the states
    assert (outcome.best == A) is chosen
    assert outcome.best_ms == (10 + time if chosen else outcome.shipped_ms)


def test_a_time_that_is_not_seen_again_is_no_reason() -> None:
    times = {A: iter([5.0, 10.0])}
    gpu = GPU()
    launch = [shipped_launch("forward", 64, "half")]

    def milliseconds(direction: str) -> float:
        launch[0] = launch_for("forward", *HALF)
        return next(times[launch[0]]) if launch[0] in times else 10.0

    (outcome,) = tune(WORK, Trials(gpu.run, milliseconds), ["forward"], lambda kernel, work: [A])
    assert (outcome.best, outcome.best_ms) == (outcome.shipped, 10.0)


def test_what_fails_or_differs_is_dropped_and_told() -> None:
    gpu = GPU({A: 1.0, B: 2.0, C: 8.0})
    gpu.failing[A] = "\nout of resource: shared memory, Required: 300000\nmore"
    gpu.different[B] = 0.05
    gpu.different[C] = 0.01  # rounding
    (outcome,) = gpu.tune(["forward"], A, B, C)
    assert outcome.best == C
    assert outcome.dropped == [
        (A, "RuntimeError: out of resource: shared memory, Required: 300000"),
        (B, "ArithmeticError: out: relative error 5.0e-02; accepted: 2e-02"),
    ]
    gpu.different[C] = float("nan")
    (outcome,) = gpu.tune(["forward"], A, B, C)
    assert outcome.best == outcome.shipped
    assert [launch for launch, _ in outcome.dropped] == [A, B, C]


def test_a_gpu_that_gives_no_more_answers_ends_it() -> None:
    """After an illegal access every launch fails: what would be dropped then is no launch's fault."""
    gpu = GPU()
    gpu.failing[A] = "CUDA error: an illegal memory access"
    run = gpu.run

    def breaks(direction: str) -> dict[str, torch.Tensor]:
        try:
            return run(direction)
        except RuntimeError:
            gpu.gone = True
            raise

    with pytest.raises(RuntimeError, match="the shipped launch of forward, head dimension 64, half fails: Runtime"):
        tune(WORK, Trials(breaks, gpu.milliseconds), ["forward"], lambda kernel, work: [A, B])
    assert launches._tried is None


def test_a_user_s_file_is_no_part_of_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, (8, 9))
    file.write_text(json.dumps(entry()))
    gpu = GPU({OURS: 1.0})
    (outcome,) = gpu.tune(["forward"], A)
    assert outcome.shipped_ms == 20.0
    file.write_text("{")
    launches.from_environment.cache_clear()
    with launches.trying({}):
        assert launch_for("forward", *HALF) == outcome.shipped
        triton_tiles.check_supported(torch.zeros(1, 1, 1, 16), Case().attention_options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 128, 256])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_candidates_are_few_legal_and_different(block: int, head_dim: int, dtype: torch.dtype) -> None:
    work = Workload(head_dim, dtype, block=block)
    for kernel in KERNELS:
        found = candidates(kernel, work)
        assert 3 <= len(found) <= 24, (kernel, len(found))
        assert not [launches.mistakes(asdict(launch)) for launch in found if launches.mistakes(asdict(launch))]
        shipped = work.shipped(kernel)
        size = 64 if kernel == "gate" else block
        effective = [triton_tiles.clamped(launch, head_dim, size, size) for launch in (shipped, *found)]
        assert len({*effective}) == len(effective)
        unread = {"tile_q", "tile_k", "chunk"} - {*tuning._FIELDS[kernel]}
        assert all(getattr(launch, name) == getattr(shipped, name) for launch in found for name in unread)


INTERPRETED = """\
import torch
from tests.support.triton_cases import Case, check, inputs
from sla_compile.kernels.triton.launches import KERNELS, Launch, trying

cases = [
    Case(tokens=150, heads=1),
    Case(tokens=150, heads=1, causal=True, mask="bool", linear="all"),
    Case(tokens=150, heads=1, head_dim=40, block_q=32, linear="all"),
]
for launch in (Launch(32, 16, 16, 4, 1), Launch(16, 64, 32, 4, 1), Launch(256, 32, 256, 4, 1)):
    with trying({(kernel, 64, "single"): launch for kernel in KERNELS}):
        for case in cases:
            check(case, inputs(case, torch.float32, "cpu"), 1e-5, 1e-5)
"""


def test_legal_launches_compute_the_same() -> None:
    """Tiles that the shipped launches do not have, in the interpreter, against the definition."""
    from tests.kernels.triton.test_attention import why_not

    if reason := why_not():
        pytest.skip(reason)
    path = os.pathsep.join((str(Path(__file__).resolve().parent), str(ROOT)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GPU:
    """A GPU for the command line, on which one candidate of the forward is twice as fast."""
    pytest.importorskip("triton", reason="triton is not installed")
    found = GPU({Launch(64, 32, 64, 4, 3): 5.0})
    found.failing[Launch(64, 64, 64, 8, 3)] = "out of resource"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    on_device(monkeypatch, (8, 9))
    trials = Trials(found.run, found.milliseconds)
    monkeypatch.setattr(tuning, "on_gpu", lambda work: contextlib.nullcontext(trials))
    return found


def test_the_command_writes_the_file_and_a_table(
    gpu: GPU, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(str(file), "8.9", {("backward_key", 64, "half"): OURS, ("backward_key", 128, "half"): OURS})
    merge(str(file), "9.0", {("gate", 64, "single"): OURS})
    del gpu.failing[Launch(64, 64, 64, 8, 3)]  # the gate's shipped one
    gpu.failing[Launch(64, 64, 64, 2, 3)] = "out of resource"
    arguments = ["tune", str(file), "--head-dim", "40", "--dtype", "bfloat16", "--width", "200"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    found = Launch(64, 32, 64, 4, 3)
    assert read(str(file)) == {
        "8.9": {("forward", 64, "half"): found, ("backward_key", 128, "half"): OURS},  # the other was of no use
        "9.0": {("gate", 64, "single"): OURS},
    }
    assert [line.split()[1] for line in out.splitlines() if "half" in line and "│" in line] == [*KERNELS]
    (row,) = (line for line in out.splitlines() if "forward" in line and "15.000" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == [
        *("64", "half", "20.000", "15.000", "64x32, chunk 64, 4 warps, 3 stages")
    ]
    assert "dropped: forward 64 half, 64x64, chunk 64, 2 warps, 3 stages: RuntimeError: out of resource" in out
    assert f"{VARIABLE}={file}" in out
    launches.from_environment.cache_clear()
    assert launch_for("forward", *HALF) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "bfloat16", "float16"], "two of these share their launches"),
        (["--head-dim", "96", "128"], "two of these share their launches"),
        (["--head-dim", "300"], "got '300'; accepted: an integer from 16 to 256"),
        (["--tokens", "0"], "got '0'; accepted: an integer of at least 1"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--blocks", "48"], "invalid choice: 48"),
    ],
)
def test_mistakes_in_the_command(
    gpu: GPU, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "tune", str(tmp_path / "launches.json"), *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not [*tmp_path.iterdir()]
    assert not gpu.ran


def test_a_file_that_cannot_be_written_is_told_before_minutes_are_spent(
    gpu: GPU, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, content, message in (
        (tmp_path / "none" / "launches.json", None, "No such file or directory"),
        (tmp_path / "other.json", '{"mine": 1}', "other.json: the file has 'mine'; accepted: a compute capability"),
    ):
        if content is not None:
            path.write_text(content)
        code, out, err = run(capsys, "tune", str(path))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert not gpu.ran


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "tune", str(tmp_path / "launches.json"))
    assert (code, out) == (2, "")
    assert err.startswith("sla_compile: error: tune: ")
    assert ("no GPU is available" in err) is (importlib.util.find_spec("triton") is not None)
    assert not [*tmp_path.iterdir()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One kernel, two launches that run and one that fits no GPU; then what was found is in force."""
    from sla_compile.kernels.hopper import support as hopper
    from sla_compile.kernels.triton import forward as triton_forward

    usable = hopper.usable
    work = Workload(128, torch.bfloat16, tokens=2048, heads=2)
    shipped = shipped_launch("forward", 128, "half")
    runs = [replace(shipped, stages=2), replace(shipped, tile_q=32, tile_k=32, warps=2)]
    too_large = replace(shipped, stages=8)
    with tuning.on_gpu(work) as trials:
        (outcome,) = tune(work, trials, ["forward"], lambda kernel, work: [*runs, too_large])
    assert hopper.usable is usable
    assert [launch for launch, _ in outcome.dropped] == [too_large]
    assert "OutOfResources" in outcome.dropped[0][1]
    assert outcome.best in (shipped, *runs)
    assert 0 < outcome.best_ms <= outcome.shipped_ms
    # a launch that this Triton kernel has only from the file, where Gluon takes no call
    monkeypatch.setattr(hopper, "usable", lambda *_, **__: False)
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    q = torch.randn(1, 2, 300, 128, device="cuda", dtype=torch.bfloat16)
    gate = torch.randn(128, 128, device="cuda") * 0.1
    options: dict[str, Any] = {"topk": 0.3, "bottomk": 0.1, "linear": "marginal"}
    expected = sla_compile.sparse_linear_attention(q, q, q, gate, **options)
    merge(str(tmp_path / "launches.json"), capability, {outcome.key: runs[1]})
    monkeypatch.setenv(VARIABLE, str(tmp_path / "launches.json"))
    launches.from_environment.cache_clear()
    launched: list[int] = []
    kernel = triton_forward.attention_forward_kernel
    original = kernel.run

    def run(*arguments: Any, **keywords: Any) -> Any:
        launched.append(keywords["num_warps"])
        return original(*arguments, **keywords)

    monkeypatch.setattr(kernel, "run", run)
    actual = sla_compile.sparse_linear_attention(q, q, q, gate, **options)
    assert launched == [2]
    assert_close("out", actual, expected, 2e-2)
