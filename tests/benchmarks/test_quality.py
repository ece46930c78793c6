"""The quality benchmark runs in pieces, ends in time, and writes its table from what is there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import quality
from tests.support.paths import ROOT
from tests.support.processes import FRESH

SCRIPT = ROOT / "benchmarks" / "quality.py"


def test_in_pieces_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    two_seeds = (("dense", "calibrated-tuned"), (0.95,), 2)  # every arm, and these twice
    monkeypatch.setattr(quality, "ROUNDS", [two_seeds, *((arms, shares, 1) for arms, shares, _ in quality.ROUNDS)])
    monkeypatch.setattr(quality, "multiprocessing", SimpleNamespace(get_context=lambda _: FRESH))
    jobs = len(quality.jobs_for(range(2)))
    assert jobs == 32

    def run(*arguments: str) -> str:
        torch.compiler.reset()
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", "out", *arguments])
        quality.main()
        return capsys.readouterr().out

    smoke = ("--preset", "smoke", "--layers", "1", "--seeds", "2", "--device", "cpu")
    first = run(*smoke, "--seconds", "14", "--reserve", "10")
    counts = [int(n) for n in re.findall(rf"(\d+) of {jobs} arms done", first)]
    assert counts
    assert counts[0] < jobs
    assert "call again; the next is" in first
    before = json.loads((tmp_path / "out/results.json").read_text()) if counts[0] else {}
    assert "all is done" in run(*smoke, "--workers", "2")
    after = json.loads((tmp_path / "out/results.json").read_text())
    assert {key: after[key] for key in before} == before  # nothing is done twice
    assert len(after) == jobs + 1

    (tmp_path / "report").mkdir()
    run("--report", "--report-to", "report")
    text = (tmp_path / "report/quality.md").read_text()
    assert text.count("| SLA, calibrated, trained | 95% |") == 2
    assert text.count("| SLA, trained four times as long (one seed) | 95% |") == 1  # in a table of its own
    assert "**met**" in text or "**missed**" in text
    named = re.findall(r"\]\((\S+)\)", text)
    assert len(named) == 2
    for name in (*named, "quality.csv"):
        assert (tmp_path / "report" / name).stat().st_size > 1000


def test_a_divergence_is_told() -> None:
    row = {"seed": 0, "sparsity": 0.95, "before": 2.0, "after": 1.0}
    falls = [[10 * i + 10, 2.0 - i / 200] for i in range(200)]
    assert "no NaN and no divergence" in quality.stability([{**row, "losses": falls}])[0]
    rises = [*falls[:150], *([step, 5.0] for step, _ in falls[150:])]
    assert "**it diverged**" in quality.stability([{**row, "losses": rises}])[0]


def test_figures_are_those_of_the_rows() -> None:
    def rows(after: list[float], **more: float) -> list[dict[str, object]]:
        extra = {"before": 2.0, "frechet": 1.0, "step_ms": 3.0, **more}
        return [{"seed": seed, "after": value, **extra} for seed, value in enumerate(after)]

    groups = {
        ("dense", None): rows([1.0, 2.0]),
        ("sparse", 0.95): rows([1.06, 2.12]),
        ("sla", 0.95): rows([1.005, 2.03]),
        ("sla-tiles", 0.95): rows([1.01505, 2.03]),
        ("calibrated", 0.95): rows([1.0, 2.0], error_sparse=0.4, error_gated=0.1),
    }
    table = quality.main_table(groups, 4096, 64)
    assert "| SLA | 95% | 3 of 64 | 2.0000 | 1.5175 (1.0050 to 2.0300) | +1.00 (+0.50 to +1.50) |" in table[4]
    assert quality.variants(groups) == ["- SLA, tokens in tiles, beside SLA, 95%: +0.50 (+0.00 to +1.00)%."]
    lines = quality.bars(groups)
    assert "**missed**" not in lines[2]
    assert "**met**, 6.0 times (+6.00% to +1.00%)" in lines[1]
    assert "**met**, 75.0 (75.0 to 75.0)%" in lines[2]
