"""The benchmark of several ranks runs on two processes with a small model."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from unittest import mock

from benchmarks import parallel
from benchmarks.parallel_arm import WHAT
from tests.support.processes import launch

TINY = (
    *("--model", "tiny", "--device", "cpu", "--inner", "eager", "--min-tokens", "0", "--attention", "dense", "sla 64"),
    *("--frames", "5", "--height", "128", "--width", "128", "--repeats", "1", "--arms", "alone", "all+memory+keep"),
)


def run(rank: int, port: int, folder: Path) -> None:
    """What torchrun starts on each rank; what it prints goes to a file."""
    os.environ.update(MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    arguments = ["parallel.py", *TINY, "--json", str(folder / "found.json")]
    argv = mock.patch.object(sys, "argv", arguments)
    with argv, (folder / f"{rank}.txt").open("w") as file, contextlib.redirect_stdout(file):
        parallel.main()


def test_one_rank_and_two(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch(run, port, tmp_path, ranks=2)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    named = [(row["attention"], row["arm"], row["ranks"], row["what"]) for row in rows]
    arms = (("alone", 1), ("all+memory+keep", 2))
    assert named == [(attention, *arm, what) for attention in ("dense", "sla 64") for arm in arms for what in WHAT]
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row.get("rewritten", 1) == 1
        if row["ranks"] == 2:
            assert row["difference"] < 1e-5
    assert rows[-1]["gates_equal"] is True
    assert "Wan2.1-tiny, 1 layers, replicated; cpu" in (tmp_path / "0.txt").read_text()
