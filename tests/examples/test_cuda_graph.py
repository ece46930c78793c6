"""Training steps replayed as CUDA graphs give the same training as steps that are called."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from rich.console import Console

from examples.study.cuda_graph import GraphedCallable
from examples.study.experiment import Experiment, Job
from examples.study.settings import PRESETS


def test_off_it_is_the_function() -> None:
    run = GraphedCallable(lambda x: x + 1, enabled=False)
    for value in range(6):
        assert run(torch.tensor(value)).item() == value + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_cannot_be_captured_is_called() -> None:
    run = GraphedCallable(lambda x: x + x.sum().item(), enabled=True)
    with pytest.warns(UserWarning, match="no CUDA graph"):
        found = [run(torch.full((2,), float(value), device="cuda"))[0].item() for value in range(8)]
    assert found == [3.0 * value for value in range(8)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arm", ["dense", "sla"])
def test_the_same_training(arm: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(PRESETS["smoke"], size=(32, 32, 32), head_dim=64, block=64, steps=30, dense_steps=20)
    rows = []
    for capture in (False, True):
        experiment = Experiment(
            settings, tmp_path / str(capture), torch.device("cuda"), Console(quiet=True), capture=capture
        )
        job = Job(arm, 0.9 if arm == "sla" else None, 0)
        experiment.run([job])
        (student,) = experiment.students.values()
        assert (student._velocity.graph is not None) == capture
        rows.append(experiment.results[job.key])
    for (step, once), (_, again) in zip(rows[0]["losses"], rows[1]["losses"], strict=True):
        assert again == pytest.approx(once, rel=5e-3), step
    assert rows[1]["after"] == pytest.approx(rows[0]["after"], rel=5e-3)
    assert rows[1]["after"] != rows[1]["before"]
