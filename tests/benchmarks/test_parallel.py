"""The benchmark of several ranks runs on two processes with a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

TINY = (
    *("--model", "tiny", "--device", "cpu", "--inner", "eager", "--min-tokens", "0", "--attention", "dense", "sla 64"),
    *("--frames", "5", "--height", "128", "--width", "128", "--repeats", "1"),
)


def test_one_rank_and_two(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(ROOT / "benchmarks" / "parallel.py")
    done = subprocess.run(
        [*launch, script, *TINY, "--json", str(tmp_path / "found.json")], capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    named = [(row["attention"], row["ranks"], row["what"]) for row in rows]
    whats = ("forward", "training step")
    assert named == [(arm, ranks, what) for arm in ("dense", "sla 64") for ranks in (1, 2) for what in whats]
    for row in rows:
        assert 0 < row["least_ms"] <= row["median_ms"] <= row["most_ms"]
        assert row.get("rewritten", 1) == 1
        if row["ranks"] == 2:
            assert row["difference"] < 1e-5
    assert rows[-1]["gates_equal"] is True
    assert "Wan2.1-tiny, 1 layers, replicated; cpu" in done.stdout
