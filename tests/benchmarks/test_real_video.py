"""The experiment on real video: its forms, budgets and kernels, and both scripts from end to end, on small data."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.real_video import report, study, train
from benchmarks.real_video.arms import ARMS, Arm
from benchmarks.real_video.clips import segments, split
from benchmarks.real_video.data import Windows, by_time, part_middles, shifted, unshifted
from benchmarks.real_video.fitting import allocate, calibrate, head_errors, install, walk
from benchmarks.real_video.forms import Budget, Form, FormSpec
from benchmarks.real_video.listed_attention import Routing, dense_reference, listed_attention
from benchmarks.real_video.model import RotaryVideoDiT, tile_order
from benchmarks.real_video.package_arms import PackageArm
from sla_compile.kernels.reference import sparse_linear_attention
from tests.support.interpreter import speed_up_interpreter
from tests.support.paths import ROOT

HEADS, TOKENS, WIDTH, BLOCK = 2, 128, 8, 16


def heads(seed: int = 0, block_noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose keys and values differ between blocks, and within a block by ``block_noise``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, HEADS, TOKENS // BLOCK, BLOCK, WIDTH)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    k, v = (x.mean(3, keepdim=True) * 3 + block_noise * (x - x.mean(3, keepdim=True)) for x in (k, v))
    return q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)


def form(spec: FormSpec, count: int = 2) -> Form:
    return Form(dataclasses.replace(spec, block=BLOCK), Budget(count), HEADS, WIDTH)


def clips(*_: object) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(0, 256, (20, 3, 40, 56), generator=generator, dtype=torch.uint8) for _ in range(3)]
    return made[:2], made[2:]


def shaken(model: RotaryVideoDiT) -> RotaryVideoDiT:
    """What starts at zero, at random."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_clip_ends_at_a_cut_and_moves() -> None:
    moves, rests = [5.0] * 29, [0.1] * 29
    assert segments([*moves, 60.0, *rests, 60.0, *moves[:10]]) == [(0, 30)]
    names = [f"scene{number}-{part}.s0.mp4" for number in range(20) for part in (1, 2)]
    kept, held_out = split(names)
    assert len(held_out) == 4  # both clips of two sources
    assert not {name.split("-")[0] for name in kept} & {name.split("-")[0] for name in held_out}


@pytest.mark.parametrize("linear", ["none", "marginal"])
def test_the_papers_form_is_its_definition(linear: str) -> None:
    q, k, v = heads()
    mine = form(FormSpec("linear", gated=linear == "marginal"))
    weight, bias = torch.randn(WIDTH, WIDTH), torch.randn(1, WIDTH)
    if linear == "marginal":
        mine.load_state_dict({**mine.state_dict(), "weight": weight, "bias": bias})
    gate = (weight, bias[0]) if linear == "marginal" else ()
    wanted = sparse_linear_attention(q, k, v, *gate, topk=2 / 8, block_q=BLOCK, block_k=BLOCK, linear=linear)
    torch.testing.assert_close(mine(q, k, v), wanted, atol=1e-4, rtol=1e-4)


def test_virtual_keys_are_exact_where_blocks_are_constant() -> None:
    q, k, v = heads(block_noise=0.0)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(form(FormSpec("virtual", variance=True, slope="row"))(q, k, v), dense)
    assert (form(FormSpec())(q, k, v) - dense).norm() > 0.3 * dense.norm()


def test_each_part_of_the_virtual_keys_brings_them_nearer() -> None:
    q, k, v = heads()
    k = k + 0.5 * v  # what the slope is for
    dense = F.scaled_dot_product_attention(q, k, v)
    specs = [
        FormSpec(),
        FormSpec("virtual"),
        FormSpec("virtual", variance=True, slope="global"),
        FormSpec("virtual", variance=True, slope="row"),
        FormSpec("virtual", variance=True, slope="row", splits=4),
    ]
    errors = [((form(spec)(q, k, v) - dense).norm() / dense.norm()).item() for spec in specs]
    assert errors == sorted(errors, reverse=True), errors


def test_the_slope_is_the_derivative_of_the_exact_block() -> None:
    """For keys that differ little within a block, the first order leaves an error of second order."""
    missed = []
    for noise in (0.02, 0.01):
        q, k, v = heads(block_noise=noise)
        v = heads(seed=1)[2]
        dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        states = form(FormSpec("virtual", slope="row")).double()
        # one query a block, so that the state of the row is the query's own
        q = q.unflatten(2, (-1, BLOCK))[:, :, :, :1].expand(-1, -1, -1, BLOCK, -1).flatten(2, 3).double()
        dense = F.scaled_dot_product_attention(q, k.double(), v.double())
        missed.append((states(q, k.double(), v.double()) - dense).norm().item())
    assert missed[1] < 0.3 * missed[0], missed


@pytest.mark.parametrize(
    "name", ["sla-cal", "sla-scale-cal", "sla-scale-head-cal", "mix-cal", "virtual-row-shift", "mass-gate"]
)
def test_calibration_brings_every_attention_nearer(name: str) -> None:
    torch.manual_seed(0)
    windows = Windows(clips()[0], (4, 16), 2)
    model = shaken(RotaryVideoDiT(dataclasses.replace(train.TINY_CONFIG, head_dim=WIDTH)))
    arm = ARMS[name]
    assert isinstance(arm, Arm)
    spec = arm.spec
    assert spec is not None
    # without w virtual keys weigh too little, so that there is a shift to find
    install(model, dataclasses.replace(spec, block=8, variance=not spec.shifted), [Budget(2)] * 2)
    batches = [windows(0)]

    def errors() -> list[float]:
        found = []
        with torch.no_grad():
            for block, one in walk(model, batches):
                assert isinstance(block.form, Form)
                wanted = [F.scaled_dot_product_attention(*each) for each in one]
                found.append(head_errors(block.form, one, wanted).sum().item())
        return found

    before = errors()
    calibrate(model, batches)
    assert all(new < old for new, old in zip(errors(), before, strict=True))


def test_budgets_are_kept_and_spent_where_errors_fall() -> None:
    errors = torch.tensor([[10.0, 5.0, 4.0], [3.0, 2.9, 2.8], [8.0, 7.9, 1.0]])
    assert allocate(errors, (1, 2, 4), 7) == [2, 1, 4]
    assert allocate(errors, (1, 2, 4), 3) == [1, 1, 1]


def test_batches_of_like_times_hold_the_same_videos() -> None:
    batches = Windows(clips()[0], (4, 16), 2).held_out(4)
    sorted_ones = by_time(batches)
    times = torch.cat([time for _, time, _ in sorted_ones])
    assert times.tolist() == sorted(torch.cat([time for _, time, _ in batches]).tolist())
    assert [time.shape for _, time, _ in sorted_ones] == [(2,)] * 4
    place = torch.cat([time for _, time, _ in batches]).argsort()[0]
    for mine, theirs in zip(sorted_ones[0], batches[place // 2], strict=True):
        assert torch.equal(mine[0], theirs[place % 2])
    assert [(times < border).sum() for border in (0.5, 0.75, 0.9)] == [2, 4, 6]
    torch.testing.assert_close(unshifted(shifted(times)), times)
    (first, second), (_, noisier) = Windows(clips()[0], (4, 16), 2).of_parts(2, 2, seed=0)
    torch.testing.assert_close(unshifted(torch.cat([first[1], second[1]])), torch.tensor([1, 5, 3, 7]) / 16)
    torch.testing.assert_close(unshifted(noisier[1]), torch.tensor([11, 15]) / 16)
    assert torch.equal(noisier[2], second[2])  # the same noise and video


def test_tiles_change_nothing_of_a_dense_model() -> None:
    windows = Windows(clips()[0], (4, 16), 2)
    model = shaken(RotaryVideoDiT(train.TINY_CONFIG))
    video, time, _ = windows(0)
    with torch.no_grad():
        raster = model(video, time)
        model.tile = (2, 2, 2)
        torch.testing.assert_close(model(video, time), raster, atol=1e-4, rtol=1e-4)
    assert tile_order((2, 2, 2), (2, 1, 1), "cpu").tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_the_kernels_interpreted() -> None:
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_kernels() -> None:
    """Output, share and every gradient against the whole attention map."""
    speed_up_interpreter()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    keys, values = (torch.randn(1, 2, 32, 16, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 2, 4, 32).masked_fill(torch.rand(1, 2, 4, 32) < 0.3, -torch.inf).requires_grad_()
    critical = torch.rand(1, 2, 4, 4) < 0.4
    critical[..., 0] = True
    arguments = (q, k, v, keys, values, bias)
    found = []
    for attend in (listed_attention, dense_reference):
        out, share = attend(q, k, v, Routing(critical), (keys, values, bias))
        loss = (out * out.detach().roll(1, 2)).sum() + share.square().sum()
        found.append((out, share, *torch.autograd.grad(loss, arguments)))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)


def test_processes_share_a_batch_and_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows(clips()[0], (4, 16), 4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert train.on_all(True)
        assert not train.on_all(False)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        parts = []
        for rank in (0, 1):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            parts.append(windows(0, train.own_part(4)))
        for whole, *shared in zip(windows(0), *parts, strict=True):
            assert torch.equal(whole, torch.cat(shared))
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)
        with pytest.raises(ValueError, match="a batch of 4 videos cannot be shared out evenly to 3 processes"):
            train.own_part(4)
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


def test_from_pretraining_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (train, study):
        monkeypatch.setattr(module, "load", clips)
    weights, out = str(tmp_path / "weights"), tmp_path / "out"
    common = ["--clips", "none", "--weights", weights, "--tiny"]
    monkeypatch.setattr(sys, "argv", ["train", *common, "--state", str(tmp_path / "state")])
    train.main()
    state = torch.load(tmp_path / "state/state.pt", weights_only=True)
    assert state["step"] == 4
    train.main()  # nothing is left to do, and the state is as it was
    again = torch.load(tmp_path / "state/state.pt", weights_only=True)
    assert all(torch.equal(again["model"][name], value) for name, value in state["model"].items())
    shared = ["--clips", "none", "--weights", str(tmp_path / "shared"), "--tiny", "--state", str(tmp_path / "shared")]
    monkeypatch.setattr(sys, "argv", ["train", *shared])
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    train.main()  # by processes, here one
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: False)
    again = torch.load(tmp_path / "shared/state.pt", weights_only=True)
    for name, value in state["model"].items():
        torch.testing.assert_close(again["model"][name], value)
    longer = ["--state", str(tmp_path / "longer"), "--more", "3"]
    monkeypatch.setattr(sys, "argv", ["train", *common, *longer])
    train.main()
    trained = torch.load(tmp_path / "longer/state.pt", weights_only=True)
    assert trained["step"] == 7
    assert not all(torch.equal(trained["average"][name], value) for name, value in state["average"].items())
    fit = PackageArm._fit
    mine, theirs, levels = "mass-gate-heads", "package-taylor-heads-cal", "package-taylor-levels-headordered-cal"
    fitted: list[str] = []

    def counted(arm: PackageArm, *given: Any) -> None:
        fitted.append(arm.title)
        fit(arm, *given)

    monkeypatch.setattr(PackageArm, "_fit", counted)
    tasks = ["--closed", "sparse", mine, theirs, levels, "--steps", "2", "--dense-steps", "1", "2"]
    tasks += ["--tune", "dense", f"{mine}+features", theirs, f"{levels}+teacher"]
    monkeypatch.setattr(sys, "argv", ["study", *common, "--out", str(out), "--fits", str(tmp_path / "fits"), *tasks])
    study.main()
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {
        "dense",
        "sparse",
        mine,
        theirs,
        levels,
        "dense/0",
        f"{mine}+features/0",
        f"{theirs}/0",
        f"{levels}+teacher/0",
    }
    counts = [sum(layer[0]) for layer in results[mine]["budgets"]]
    assert sum(counts) <= 2 * 2 * 2  # layers, heads, 15% of 16 blocks
    topks = torch.tensor(results[theirs]["budgets"])
    assert topks.shape == (2, 2)
    assert (16 * topks).int().clamp(min=1).sum() <= 2 * 2 * 2
    assert {path.name for path in (tmp_path / "fits").iterdir()} == {theirs, levels}
    assert len(fitted) == 2, "what was fitted for --closed is taken for --tune"
    assert results[f"{levels}+teacher/0"]["before"] == pytest.approx(results[levels]["loss"])
    found = results[f"{levels}+teacher/0"]["budgets"]
    assert found == results[levels]["budgets"]
    assert [level["time"] for level in found] == list(part_middles(4))
    assert sum(level["critical"] for level in found) <= 4 * 2 / 16  # 15% of 16 blocks
    assert len(results[f"{levels}+teacher/0"]["orders"]) == 2
    assert results[theirs]["orders"] == []
    errors = results[f"{levels}+teacher/0"]["velocity"]
    assert len(errors) == 5
    assert min(errors[1:]) < errors[0] < max(errors[1:])
    of_steps = results["sparse"]["dense_steps"]
    assert of_steps["2"][1] == 0 < of_steps["1"][1], "all of its two steps are the dense model's"
    table = "\n".join(report.tables(results))
    assert "| sparse only | 95% | 1 |" in table
    assert "| virtual keys, w, S of the row, ranked by mass, gate, spread over heads | 95% |" in table
    assert (out / "mass-gate-heads-features-tuned.png").exists()


if __name__ == "__main__":
    check_kernels()
