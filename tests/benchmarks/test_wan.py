"""The benchmark of Wan end to end runs on a small model, and keeps what it measured when an arm fails."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import wan
from tests.support.processes import FRESH

TINY = (
    *("--model", "tiny", "--device", "cpu", "--inner", "eager", "--min-tokens", "0"),
    *("--frames", "5", "--height", "64", "--width", "64"),
)
FLASH, CUDNN, SLA, FLOOR = (
    "inductor, flash SDPA",
    "inductor, cuDNN SDPA",
    "sla, blocks 64x64, tiles",
    "no self-attention (floor)",
)


@dataclass
class Benchmark:
    """Runs it in this process, its arms in processes that have imported torch."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> tuple[str, dict[str, Any]]:
        """What it prints and writes."""
        self.monkeypatch.setattr(wan, "multiprocessing", SimpleNamespace(get_context=lambda _: FRESH))
        self.monkeypatch.setattr(sys, "argv", ["wan.py", *TINY, *arguments, "--json", str(self.folder / "wan.json")])
        wan.main()
        return self.capsys.readouterr().out, json.loads((self.folder / "wan.json").read_text())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Benchmark:
    pytest.importorskip("diffusers")
    return Benchmark(tmp_path, monkeypatch, capsys)


def test_every_figure_of_every_arm_and_an_arm_that_fails(run: Benchmark) -> None:
    output, found = run("--regional", "--repeats", "3", "--arms", FLASH, CUDNN, SLA, FLOOR)
    arms = found["arms"]
    assert list(arms) == [FLASH, CUDNN, SLA, FLOOR]
    assert arms[CUDNN].keys() == {"forward"}  # a CPU has no cuDNN: it is not asked again
    assert arms[CUDNN]["forward"].keys() == {"failed"}
    for arm in (FLASH, SLA, FLOOR):
        for what in ("forward", "training step"):
            figures = arms[arm][what]
            assert 0 < figures["least_ms"] <= figures["median_ms"] <= figures["most_ms"]
            assert figures["first_s"] > 0
            assert figures.get("rewritten") == (1 if arm == SLA else None)
    assert output.count("failed") == 2  # as it happened, and in the table of forwards
    assert output.index("Wan2.1-tiny, 1 layers, bf16, forward") < output.index("training step; cpu")


def test_compile_times_only(run: Benchmark) -> None:
    output, found = run("--repeats", "0", "--no-training", "--layers", "2", "--arms", SLA)
    assert found["arms"][SLA]["forward"].keys() == {"first_s", "rewritten"}
    assert found["arms"][SLA]["forward"]["rewritten"] == 2
    assert found["options"]["layers"] == 2
    assert "training step" not in output
