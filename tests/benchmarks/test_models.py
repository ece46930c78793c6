"""The benchmark of published models runs on small ones, keeps what it measured, and calls the true ones as they are."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.processes import FRESH

pytest.importorskip("diffusers")

from benchmarks import models
from benchmarks.published import PUBLISHED, Published

WAN = "Wan2.1-1.3B 480p"
MEASURED = ("cuDNN", "SLA", "floor", "SLA, an order for each head")
ON_META = [
    model
    for of, model in {model.of: model for model in PUBLISHED.values()}.items()
    if of not in ("HunyuanVideo15Transformer3DModel", "MochiTransformer3DModel")  # they read what a tensor holds
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that runs the benchmark in this process, its arms in others; what it prints and writes."""
    monkeypatch.setattr(models, "multiprocessing", SimpleNamespace(get_context=lambda _: FRESH))

    def run(*arguments: str) -> tuple[str, dict[str, Any]]:
        file = tmp_path / "models.json"
        monkeypatch.setattr(sys, "argv", ["models.py", "--tiny", *arguments, "--start", "spawn", "--json", str(file)])
        models.main()
        return capsys.readouterr().out, json.loads(file.read_text())

    return run


def test_every_figure_an_arm_that_fails_and_what_is_there_already(run: Any) -> None:
    output, found = run("--models", WAN, "--arms", *MEASURED, "float8")
    row = found["rows"][WAN]
    assert row["tokens"] == 72
    for arm in MEASURED:
        for what in ("forward", "training step"):
            assert len(row["arms"][arm][what]["ms"]) == 3
            assert row["arms"][arm][what]["first_s"] > 0
            assert row["arms"][arm][what]["breaks"] == {}
    assert list(row["arms"]["cuDNN"]["forward"]["sdpa"]) == ["flash"]  # a CPU has no cuDNN
    assert row["arms"]["floor"]["forward"]["sdpa"] == {"flash": 1}  # cross-attention
    sla = row["arms"]["SLA"]["forward"]
    assert sla["rewritten"] == {"self-attention: 72 tokens": 1}
    assert [why.partition(":")[0] for why in sla["kept"]] == ["cross-attention"]
    assert row["arms"]["float8"].keys() == {"forward"}  # no GPU, or no torchao
    assert output.count(row["arms"]["float8"]["forward"]["failed"]) == 3  # twice as it happened, and in the end
    assert f"{WAN}: SLA: 1 rewritten, self-attention: 72 tokens" in output

    again, same = run("--models", WAN, "--arms", *MEASURED)
    assert same == found
    assert "first call " not in again.partition("forward, bf16")[0]


def test_tables() -> None:
    def answer(ms: float, **more: Any) -> dict[str, Any]:
        return {"forward": {"ms": [ms] * 3, "first_s": 9.0, "peak_gib": 4.0, "breaks": {}, **more}}

    kept = {"cross-attention: 4 queries, 2 keys (accepted: x)": 2}
    arms = {
        "cuDNN": answer(100.0, sdpa={"cudnn": 4}),
        "flash": answer(120.0, sdpa={"flash": 4}),
        "SLA": answer(50.0, kept=kept, rewritten={"self-attention: 4 tokens": 2}),
        "float8": answer(80.0),
        "SLA, float8": answer(125.0, kept=kept, rewritten={}),
        "floor": answer(40.0),
    }
    cells = models.arm_cells(arms, "SLA", "forward")
    times = ["100 (100 to 100)", "cudnn", "50 (50 to 50)"]
    assert cells == [*times, "2.00", "2.50", "60%", "4.0 / 4.0", "9.0 / 9.0", "2 of 4"]
    assert models.arm_cells(arms, "SLA, float8", "forward")[3] == "0.80 SLOWER"
    assert models.arm_cells(arms, "SLA", "training step") == []
    told = list(models.notes(arms, {"float8": 0.01}))
    assert told[-2:] == [
        "float8: its output is 1.00% from that without float8",
        "SLA saves 50 ms, float8 20, both -25: -36% of the sum",
    ]
    failed = arms | {"flash": {"forward": {"failed": "OutOfMemoryError"}}, "SLA": {"forward": {"first_s": 9.0}}}
    assert list(models.notes(failed, {"float8": 0.01}))[::2] == [
        "flash, forward: OutOfMemoryError",
        "float8: its output is 1.00% from that without float8",
    ]


def test_a_row_of_another_size_is_measured_again() -> None:
    model = PUBLISHED[WAN]
    row = {"tokens": model.tokens, "layers": model.layers_in_words(), "arms": {"SLA": {"forward": {"ms": [1.0]}}}}
    assert models.complete(row, model, ["SLA"])
    assert not models.complete(row, model, ["SLA", "floor"])
    assert not models.complete(row, replace(model, layers=dict.fromkeys(model.layers, 1)), ["SLA"])
    assert not models.complete(None, model, ["SLA"])


@pytest.mark.parametrize("model", ON_META, ids=lambda model: model.of)
def test_a_call_of_the_true_size(model: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    original = F.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any) -> torch.Tensor:
        nonlocal longest
        longest = max(longest, query.shape[-2])
        return original(query, key, value, **arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    one_layer = replace(model, layers=dict.fromkeys(model.layers, 1))
    built = one_layer.build("meta")
    with torch.no_grad():
        built(**one_layer.example(built, "meta"))
    assert longest == model.tokens
    assert all(words.startswith("1 of ") for words in one_layer.layers_in_words().split(", "))
