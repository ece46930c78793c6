"""The examples run, and show what they promise."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch._inductor.compile_fx

import sla_compile
from examples import finetune, quickstart
from examples.study.training import Trainer, TrainingState
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"
SMOKE = ("finetune.py", "--smoke", "--save-every", "2")
RESUMED = ("--arms", "dense", "sla", "calibrated-tuned")


class Interrupted(BaseException):
    """Ends a run in the middle of a training."""


def run_example(*command: str, folder: Path) -> str:
    """Output of ``examples/command``, run in ``folder``."""
    environment = {**os.environ, "COLUMNS": "120"}
    script = str(EXAMPLES / command[0])
    done = subprocess.run(
        [sys.executable, script, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_quickstart(output: str, folder: Path) -> None:
    losses = re.search(r"at each step:\n([\d. \n]+)\n", output)
    assert losses, output
    values = [float(number) for number in losses[1].split()]
    assert values[-1] < 0.9 * values[0]
    difference = re.search(r"the fine-tuned and the loaded model: ([\d.e+-]+)", output)
    assert difference, output
    assert float(difference[1]) < 1e-5
    assert "output of the model" in output  # the table of compare
    assert re.search(r"5\.0% critical|4\.\d% critical", output), output
    assert (folder / "runs/quickstart/gates.safetensors").is_file()


def run_quickstart(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """Output of ``python examples/quickstart.py`` in ``folder``, in this process, its comparison not compiled."""
    monkeypatch.setattr(sla_compile, "compare", partial(sla_compile.compare, inner=None))
    monkeypatch.chdir(folder)
    torch.compiler.reset()
    quickstart.main(["--steps", "8", "--device", "cpu", *arguments])
    torch.compiler.reset()
    return capsys.readouterr().out


@pytest.mark.slow
def test_quickstart_with_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one block, which Inductor compiles where it is rewritten and trained: the rest is a minute of C++ more."""
    diffusers = pytest.importorskip("diffusers")
    wan, compile_fx = diffusers.WanTransformer3DModel, torch._inductor.compile_fx.compile_fx

    def compile_trained(gm: torch.fx.GraphModule, *others: Any, **options: Any) -> Any:
        rewritten = any(node.target is torch.ops.sla.forward.default for node in gm.graph.nodes)
        return compile_fx(gm, *others, **options) if rewritten and torch.is_grad_enabled() else gm.forward

    monkeypatch.setattr(diffusers, "WanTransformer3DModel", lambda **sizes: wan(**{**sizes, "num_layers": 1}))
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_trained)
    output = run_quickstart(tmp_path, monkeypatch, capsys, "--latents", "4", "64", "64")
    assert "WanTransformer3DModel: 1 of 2 attentions are sparse-linear" in output
    assert "cross-attention" in output
    check_quickstart(output, tmp_path)


def test_quickstart_is_a_script(tmp_path: Path) -> None:
    assert "--latents" in run_example("quickstart.py", "--help", folder=tmp_path)


def test_quickstart_without_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, its graphs run as they are: what Inductor makes of them is seen with diffusers."""
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises ImportError
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda gm, *_, **__: gm.forward)
    output = run_quickstart(tmp_path, monkeypatch, capsys, "--latents", "4", "64", "64")
    assert "diffusers is not installed" in output
    assert "VideoDiT: 2 of 2 attentions are sparse-linear" in output
    check_quickstart(output, tmp_path)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What finetune.py found, by arm, without what differs from run to run."""
    found = json.loads((folder / "runs/finetune/results.json").read_text())
    return {key: {k: v for k, v in row.items() if k not in ("seconds", "step_ms")} for key, row in found.items()}


def test_finetune_smoke_runs_every_arm(tmp_path: Path) -> None:
    output = run_example(*SMOKE, folder=tmp_path)
    assert "2 of 2 attentions are sparse-linear" in output
    found = results(tmp_path)
    sparse = [f"{arm}/0.95/0" for arm in ("sparse", "all", "sla", "calibrated", "calibrated-tuned")]
    assert set(found) == {"real", "checkpoint/-/0", "dense/-/0", "linear/-/0", *sparse}
    after = {key: row["after"] for key, row in found.items() if key != "real"}
    assert len(set(after.values())) == len(after)  # each arm is something else
    for key, row in found.items():
        assert row["frechet"] > 0
        if key in ("checkpoint/-/0", "calibrated/0.95/0"):
            assert row["after"] == row["before"]
        elif key != "real":
            assert row["after"] < row["before"]
    start = found["sparse/0.95/0"]["before"]
    assert found["sla/0.95/0"]["before"] == pytest.approx(start, rel=1e-6)  # gates of zero
    folder = tmp_path / "runs/finetune"
    with (folder / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(after)
    gates = safetensors.torch.load_file(folder / "sla-0.95-0.gates.safetensors")
    assert len(gates) == 4
    assert all(gate.any() for gate in gates.values())
    pytest.importorskip("matplotlib")
    assert (folder / "results.png").stat().st_size > 10_000
    assert (folder / "samples.gif").read_bytes()[:4] == b"GIF8"
    assert (folder / "samples.txt").read_text().split("\n")[:-1] == list(found)[1:]


def finetune_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """What ``python examples/finetune.py`` does in ``folder``, in this process: importing torch takes longer."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))  # as in another process: nothing may follow from it
    torch.compiler.reset()
    finetune.main([*SMOKE[1:], *arguments])


def refused_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The error that ends the same with exit code 2, on one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        finetune_in(folder, monkeypatch, *arguments)
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What RESUMED finds when it is left alone."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as monkeypatch:
        finetune_in(folder, monkeypatch, *RESUMED)
    return results(folder)


@pytest.mark.parametrize(
    ("key", "saved"),
    [
        ("dense training, seed 0", []),
        ("SLA, calibrated, trained 95%, seed 0", ["dense/-/0", "sla/0.95/0"]),
    ],
)
def test_finetune_goes_on_after_a_kill(
    key: str,
    saved: list[str],
    uninterrupted: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = Trainer.save

    def save_and_end(self: Trainer, state: TrainingState, *others: Any) -> None:
        save(self, state, *others)
        if (state.key, state.step) == (key, 2):
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", save_and_end)
        with pytest.raises(Interrupted):
            finetune_in(tmp_path, patched, *RESUMED)
    if saved:
        assert [name for name in results(tmp_path) if name != "real"] == saved
    finetune_in(tmp_path, monkeypatch, *RESUMED, "--resume")
    assert results(tmp_path) == uninterrupted
    assert not list((tmp_path / "runs/finetune").glob("running*"))


def test_finetune_refuses_to_mix_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune_in(tmp_path, monkeypatch, "--arms", "checkpoint")
    for flags, message in (
        ((), "runs/finetune holds a run already: add --resume"),
        (("--resume", "--steps", "5"), "holds an experiment with other settings of steps"),
        (("--resume", "--sparsity", "1"), "--sparsity: got 1.0; accepted: shares from 0 to below 1"),
    ):
        assert message in refused_in(tmp_path, monkeypatch, capsys, "--arms", "checkpoint", *flags)


def test_finetune_says_where_there_is_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused_in(tmp_path, monkeypatch, capsys, "--resume")
    assert "there is no settings.json in runs/finetune" in message


def test_finetune_towards_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained alone, and the other target, change what comes out."""
    finetune_in(tmp_path, monkeypatch, "--arms", "sla", "--output", "all")
    finetune_in(tmp_path, monkeypatch, "--arms", "sla", "--output", "gates", "--train", "gates", "--loss", "teacher")
    weights = {name: torch.load(tmp_path / name / "sla-0.95-0.pt") for name in ("all", "gates")}
    dense = torch.load(tmp_path / "gates/pretrained-0.pt")
    assert all(torch.equal(weights["gates"][name], value) for name, value in dense.items())
    assert not all(torch.equal(weights["all"][name], value) for name, value in dense.items())


def test_finetune_of_wan_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks compiled one by one. That Inductor compiles a Wan is seen by the quickstart."""
    pytest.importorskip("diffusers")
    small = ("--size", "4", "16", "16")
    finetune_in(tmp_path, monkeypatch, "--model", "wan", *small, "--arms", "dense", "sla")
    output = capsys.readouterr().out
    assert re.search(r"4 of \d attentions are sparse-linear", output), output
    assert results(tmp_path)["dense/-/0"]["after"] < results(tmp_path)["dense/-/0"]["before"]
    assert (tmp_path / "runs/finetune/sla-0.95-0.gates.safetensors").is_file()
