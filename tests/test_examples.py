"""The examples run, and show what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = (
    *("--size", "4", "16", "16", "--held-out", "1", "--gate-lr", "0.1"),
    *("--dense-steps", "4", "--steps", "4", "--save-every", "2"),
)

# finetune.py, ended right after the checkpoint of a phase's step
INTERRUPTED = """\
import sys
phase, step, folder, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, folder)
import finetune
save = finetune.save_checkpoint
def save_and_end(path, saved_phase, saved_step, optimizer, **models):
    save(path, saved_phase, saved_step, optimizer, **models)
    if (saved_phase, saved_step) == (phase, int(step)):
        sys.exit(0)
finetune.save_checkpoint = save_and_end
finetune.main()
"""


def run_example(*command: str, folder: Path, blocked: str = "") -> str:
    """Output of ``examples/command``, run in ``folder``, where the module ``blocked`` cannot be imported."""
    environment = {**os.environ, "COLUMNS": "120"}
    if blocked:
        (folder / "blocked").mkdir()
        (folder / "blocked" / f"{blocked}.py").write_text("raise ImportError('blocked by the test')\n")
        environment["PYTHONPATH"] = str(folder / "blocked")
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
    assert "times" in output
    assert (folder / "runs/quickstart/gates.safetensors").is_file()


@pytest.mark.slow
def test_quickstart_with_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    output = run_example("quickstart.py", folder=tmp_path)
    assert "WanTransformer3DModel: 2 of 4 attentions are sparse-linear" in output
    assert "cross-attention" in output
    check_quickstart(output, tmp_path)


@pytest.mark.slow
def test_quickstart_without_diffusers(tmp_path: Path) -> None:
    output = run_example("quickstart.py", folder=tmp_path, blocked="diffusers")
    assert "diffusers is not installed" in output
    assert "VideoDiT: 2 of 2 attentions are sparse-linear" in output
    check_quickstart(output, tmp_path)


def held_out(output: str) -> dict[str, tuple[float, float]]:
    """Rows of the table that finetune.py prints last: losses by name."""
    found = re.findall(r"│ (.+?)\s*│ ([\d.e+-]+)\s*│ ([\d.e+-]+)\s*│", output)
    return {name.strip(): (float(flow), float(distance)) for name, flow, distance in found}


def test_finetune_and_resume(tmp_path: Path) -> None:
    straight = held_out(run_example("finetune.py", *TINY, "--inner", "eager", folder=tmp_path))
    assert straight["dense"][1] == 0
    branches = [straight[f"the same, {branch} branch off"] for branch in ("linear", "sparse")]
    assert straight["SLA, after 4 steps"] not in branches

    for phase in ("dense", "sla"):
        folder = tmp_path / phase
        folder.mkdir()
        command = [sys.executable, "-c", INTERRUPTED, phase, "2", str(EXAMPLES), *TINY, "--inner", "eager"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
        output = run_example("finetune.py", *TINY, "--inner", "eager", "--resume", folder=folder)
        assert held_out(output)["SLA, after 4 steps"] == straight["SLA, after 4 steps"], phase
        assert ("SLA, after 2 steps" in output) == (phase == "sla")


@pytest.mark.slow
def test_finetune_of_wan_compiled(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    output = run_example("finetune.py", *TINY, "--model", "wan", folder=tmp_path)
    assert "4 of 8 attentions are sparse-linear" in output
    assert len(held_out(output)) == 5
    assert (tmp_path / "runs/finetune/gates.safetensors").is_file()


def test_finetune_says_where_there_is_nothing_to_resume(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune.py"), "--resume"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "there is no checkpoint.pt in runs/finetune" in done.stderr
