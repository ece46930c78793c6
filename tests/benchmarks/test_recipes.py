"""The benchmarks on a dense checkpoint, on a small untrained one: their figures are what they must be of any model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gate_forms, recipes, token_order
from examples.study.arms import build
from examples.study.settings import PRESETS
from sla_compile.common.token_orders import ORDERS

Rows = list[tuple[str, list[float]]]
"""The first cell and the numbers of the others, row by row."""

VIDEOS = ("--sparsity", "0.75", "--videos", "64", "--device", "cpu")


def save_checkpoint(folder: Path, size: tuple[int, int, int]) -> Path:
    """A model of one attention, which matters to its output: in a fresh model it does not."""
    settings = dataclasses.replace(PRESETS["smoke"], size=size, layers=1)
    torch.manual_seed(0)
    model = build(settings)
    for parameter in model.get_submodule("blocks.0.modulation").parameters():
        torch.nn.init.normal_(parameter)
    (folder / "settings.json").write_text(json.dumps({**settings.to_dict(), "of_another_version": 1}))
    torch.save(model.state_dict(), folder / "pretrained-0.pt")
    return folder / "pretrained-0.pt"


@pytest.fixture
def rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Rows]:
    """A function that runs a benchmark in this process, on a checkpoint of 4 blocks, and reads the table it prints."""
    checkpoint = save_checkpoint(tmp_path, (8, 16, 16))

    def run(main: Callable[[list[str]], None], *arguments: str) -> Rows:
        main(["--checkpoint", str(checkpoint), *arguments])
        lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        return [(title.strip(), [float(cell.strip(" %") or 0) for cell in cells]) for title, *cells in lines]

    return run


def test_recipes(rows: Callable[..., Rows]) -> None:
    table = rows(recipes.main, *VIDEOS, "--steps", "24", "--lr", "1e-3")
    names = ["dense", "gates of zero (sparse only)", "calibrate", "distill, attention", "distill, output"]
    assert [name for name, _ in table] == [*names, "calibrate, then distill, output"]
    assert all(math.isfinite(number) and number >= 0 for _, numbers in table for number in numbers)
    attention, output, loss, _ = zip(*(numbers for _, numbers in table), strict=True)
    assert attention[0] == output[0] == 0
    assert all(0 < error < 1 for error in (*attention[1:], *output[1:]))
    assert max(loss) < 1.1 * min(loss)  # attention is a part of this model

    _, zero, calibrated, near, far, both = attention
    halfway = (zero + calibrated) / 2
    assert calibrated < 0.9 * zero
    assert halfway < near < zero  # a few steps, from zero
    assert far > halfway  # from zero, too
    assert both < halfway  # from calibrated gates
    _, zero, calibrated, near, far, both = output
    assert far < near < zero  # what is trained to match the output does so
    assert both < calibrated < zero


def test_forms_of_gates_and_recipes_agree(rows: Callable[..., Rows]) -> None:
    forms = rows(gate_forms.main, *VIDEOS)
    assert len(forms) == 8
    assert all(sparsity == 75 for _, (sparsity, *_) in forms)
    held_out, each, seen = zip(*(numbers for _, (_, *numbers) in forms), strict=True)
    assert held_out == each  # of the one attention
    assert all(0 < share < 100 for share in (*held_out, *seen))
    for richer, form in ((1, 0), (5, 4), (7, 6), (3, 2), (5, 3), (4, 0), (5, 1)):
        assert seen[richer] > seen[form], (richer, form)

    errors = [numbers[0] for _, numbers in rows(recipes.main, *VIDEOS, "--steps", "1")]
    assert held_out[0] == pytest.approx(100 * (1 - errors[2] / errors[1]), abs=0.1)
    scaled = [numbers[0] for _, numbers in rows(recipes.main, *VIDEOS, "--steps", "1", "--sparse-scale")]
    assert scaled[1] == errors[1]
    assert held_out[4] == pytest.approx(100 * (1 - scaled[2] / scaled[1]), abs=0.1)


def test_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, written = save_checkpoint(tmp_path, (8, 16, 32)), tmp_path / "rows.json"
    token_order.main([str(checkpoint), "--json", str(written)])
    looked = json.loads(written.read_text())["rows"]
    keys = [(row["time"], row["order"], row["block"], row["topk"]) for row in looked]
    assert keys == list(itertools.product(token_order.TIMES, ORDERS, token_order.BLOCKS, token_order.TOPKS))
    found = dict(zip(keys, ((row["mass"], row["error"]) for row in looked), strict=True))
    for (_, _, block, topk), (mass, error) in found.items():
        share = max(1, int(topk * 128 / block)) * block / 128  # of the keys, that are critical
        if share == 1:
            assert mass == pytest.approx(1)
            assert error < 1e-5
        else:
            assert share < mass < 1
            assert 0 < error < 2
    assert len({found[0.5, kind, 16, 0.05] for kind in ORDERS}) == len(ORDERS)

    monkeypatch.setattr(token_order, "ORDERS", ("hilbert",))
    monkeypatch.setattr(token_order, "TOPKS", (0.1,))
    capsys.readouterr()
    token_order.main([str(checkpoint), "--pooled"])
    _, halves, whole = (line.split() for line in capsys.readouterr().out.splitlines())
    assert halves[:5] == ["topk", "10%", "block", "64", "hilbert:"]
    assert 0 < float(halves[5]) < 2
    assert float(whole[5]) == 0
