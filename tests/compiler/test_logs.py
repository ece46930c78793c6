"""What a compile tells PyTorch's logs and structured traces."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

MODEL = """\
import logging, sys, torch
from tests.support.models import OPTIONS, Model, random_input

torch.set_default_dtype(torch.float64)
options = {**OPTIONS, "inner": "eager", "exclude": ("blocks.1.*",)}
for turn in sys.argv[1:]:
    if turn == "set_logs":
        torch._logging.set_logs(modules={"sla_compile": logging.INFO})
    torch._dynamo.reset()
    torch.compile(Model(), backend="sla", options=options)(random_input(64))
    print("-- next turn --", file=sys.stderr)
"""


def run(*turns: str, **environment: str) -> list[str]:
    """What a process prints to standard error that compiles a model of two blocks, one of them excluded, each turn."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-W", "ignore", "-c", MODEL, *turns]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stderr.split("-- next turn --")[:-1]


@pytest.fixture(scope="module")
def unasked_and_asked() -> list[str]:
    """Of one process: first without a word about logs, then after ``set_logs``."""
    return run("unasked", "set_logs")


@pytest.fixture(scope="module")
def by_environment(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What is logged, and the folder of a trace, where variables ask for both."""
    folder = tmp_path_factory.mktemp("trace")
    (text,) = run("once", TORCH_LOGS="+sla_compile", TORCH_TRACE=str(folder))
    return text, folder


REWRITTEN = "blocks.0.attention: rewritten, 2 x 2 heads x 64 tokens x 16, topk=0.3"
KEPT = "blocks.1.attention: kept dense, excluded by exclude pattern 'blocks.1.*'"


def test_torch_logs_show_each_site_and_with_a_plus_the_graph(by_environment: tuple[str, Path]) -> None:
    text, _ = by_environment
    assert REWRITTEN in text
    assert KEPT in text
    # the op's node has the name of its gate, which Inductor's code repeats beside its kernels
    assert "blocks_0_attention_sla = torch.ops.sla.forward.default(" in text


def test_set_logs_shows_the_sites_alone(unasked_and_asked: list[str]) -> None:
    _, text = unasked_and_asked
    assert REWRITTEN in text
    assert KEPT in text
    assert "torch.ops.sla.forward" not in text


def test_nothing_is_said_unasked(unasked_and_asked: list[str]) -> None:
    assert "rewritten" not in unasked_and_asked[0]


def test_a_trace_for_tlparse_has_sites_and_graph(by_environment: tuple[str, Path]) -> None:
    (file,) = by_environment[1].iterdir()
    content = file.read_bytes()
    lines = (gzip.decompress(content) if file.suffix == ".gz" else content).decode().splitlines()
    payloads: dict[str, str] = {}
    for number, line in enumerate(lines):
        if '"artifact": {"name": "sla_' in line:
            name = json.loads(line[line.index("{") :])["artifact"]["name"]
            following = lines[number + 1 :]
            end = next((i for i, text in enumerate(following) if not text.startswith("\t")), len(following))
            payloads[name] = "\n".join(text[1:] for text in following[:end])
    assert set(payloads) == {"sla_sites", "sla_rewritten_graph"}
    sites = json.loads(payloads["sla_sites"])
    assert [(site["path"], site["rewritten"]) for site in sites] == [
        ("blocks.0.attention", True),
        ("blocks.1.attention", False),
    ]
    assert "torch.ops.sla.forward.default(" in payloads["sla_rewritten_graph"]
