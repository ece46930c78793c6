"""Training that is killed goes on from its last checkpoint as if never stopped; a killed save leaves a whole file."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sla_compile
from examples.study.training import write
from tests.support.models import OPTIONS, Model, random_input, randomize_gates
from tests.support.processes import FRESH

STEPS, KILLED_AT = 6, 4

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a fork of a process with threads

fork = multiprocessing.get_context("fork")


def prepared() -> nn.Module:
    torch.manual_seed(0)
    return sla_compile.prepare(Model().double(), (random_input(),), config={**OPTIONS, "max_topk": 1.0})


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in sla_compile.gate_parameters(model):
            parameter.fill_(value)


def values(model: nn.Module) -> set[float]:
    return {value for p in sla_compile.gate_parameters(model) for value in p.detach().unique().tolist()}


def killed(context: Any, target: Any, *args: Any) -> None:
    """Run ``target`` in a process that must end by SIGKILL."""
    process = context.Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, process.exitcode


def save_until(model: nn.Module, path: Path, moment: str) -> None:
    """Save, and be killed at ``moment``."""

    def die(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "half written":
        write = os.write

        class Half:
            """A file whose write gets half of its way."""

            def __init__(self, handle: Any) -> None:
                self.handle = handle

            def __enter__(self) -> Half:
                return self

            def __exit__(self, *_: Any) -> None:
                self.handle.close()

            def write(self, content: bytes) -> None:
                write(self.handle.fileno(), content[: len(content) // 2])
                die()

        real_open = open
        sla_compile.checkpoints.places.open = lambda *args: Half(real_open(*args))
    else:
        setattr(os, {"before fsync": "fsync", "before replace": "replace"}[moment], die)
    sla_compile.save(model, path)


@pytest.mark.parametrize("moment", ["half written", "before fsync", "before replace"])
def test_killed_in_the_middle_of_a_save(moment: str, tmp_path: Path) -> None:
    model, path = prepared(), tmp_path / "gates.safetensors"
    fill(model, 1.0)
    sla_compile.save(model, path)
    content = path.read_bytes()
    fill(model, 2.0)
    killed(fork, save_until, model, path, moment)
    assert path.read_bytes() == content
    fill(model, 3.0)
    assert values(sla_compile.load(model, path)) == {1.0}
    sla_compile.save(model, path)


def save_forever(model: nn.Module, path: Path) -> None:
    value = 1.0
    while True:
        fill(model, value)
        sla_compile.save(model, path)
        value += 1.0


def test_killed_at_any_moment(tmp_path: Path) -> None:
    model, path = prepared(), tmp_path / "gates.safetensors"
    fill(model, 0.5)
    sla_compile.save(model, path)
    found = []
    for i in range(12):
        process = fork.Process(target=save_forever, args=(model, path))
        process.start()
        time.sleep(0.05 + 0.0037 * i)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        found.append(values(sla_compile.load(model, path)))
    assert all(len(value) == 1 for value in found), found
    assert found[-1] != {0.5}, "no save was finished, so nothing is tested"


def train(folder: Path, first: int, last: int, killed_at: int | None = None) -> list[torch.Tensor]:
    """Steps from ``first`` on, resumed from ``folder`` where it is not 0; a checkpoint after each step."""
    warnings.simplefilter("ignore")
    torch._dynamo.reset()
    model = prepared()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if first:
        sla_compile.load(model, folder / f"gates-{first}.safetensors")
        rest = torch.load(folder / f"rest-{first}.pt")
        model.load_state_dict(rest["model"])
        optimizer.load_state_dict(rest["optimizer"])
    run = torch.compile(model, backend="sla", options={"inner": "aot_eager"})
    schedule = list(sla_compile.anneal(1.0, 0.2, STEPS))
    for step in range(first, last):
        # What the run does next is in the step and the files, not in the process.
        x = torch.randn(1, 100, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        sla_compile.set_sparsity(model, topk=schedule[step], bottomk=0.0)
        run(x).square().mean().backward()
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        sla_compile.save(model, folder / f"gates-{step + 1}.safetensors")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / f"rest-{step + 1}.pt")
    return [p.detach().clone() for p in model.parameters()]


def test_resume_after_a_kill(tmp_path: Path) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    expected = train(tmp_path / "whole", 0, STEPS)
    # autograd does not run in a fork of a process that has used it
    killed(FRESH, train, tmp_path / "killed", 0, STEPS, KILLED_AT)
    assert not (tmp_path / "killed" / f"gates-{KILLED_AT + 1}.safetensors").exists()
    resumed = train(tmp_path / "killed", KILLED_AT, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))
    last = f"gates-{STEPS}.safetensors"
    one, two = (load_file(tmp_path / folder / last) for folder in ("killed", "whole"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resume_of_another_model_is_refused(tmp_path: Path) -> None:
    model, path = prepared(), tmp_path / "gates.safetensors"
    randomize_gates(model)
    sla_compile.save(model, path)
    other = sla_compile.prepare(Model(blocks=3).double(), (random_input(),), config={**OPTIONS, "max_topk": 1.0})
    with pytest.raises(ValueError, match=r"blocks\.2\.attention\.sla: missing in the file"):
        sla_compile.load(other, path)
    other = sla_compile.prepare(Model().double(), (random_input(),), config={**OPTIONS, "block_k": 32})
    with pytest.raises(ValueError, match=r"block_k is 16 in the file, 32 in the model; max_topk is 1\.0 in the file"):
        sla_compile.load(other, path)


def test_what_killed_processes_left_beside_a_file_is_removed(tmp_path: Path) -> None:
    gone = fork.Process(target=int)
    gone.start()
    gone.join()
    here, file = platform.node(), tmp_path / "losses.json"
    kept = {f"losses.json.{here}.{os.getppid()}.tmp", f"losses.json.elsewhere.{gone.pid}.tmp", "other.json.tmp"}
    for name in {f"losses.json.{here}.{gone.pid}.tmp", *kept}:
        (tmp_path / name).touch()
    write(file, lambda temporary: temporary.write_text("[]"))
    assert {path.name for path in tmp_path.iterdir()} == {"losses.json", *kept}
    assert file.read_text() == "[]"
