"""``bench``: its arms compute what they say, wrong numbers are not timed, and what it prints and draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sla_compile
from sla_compile.__main__ import main
from sla_compile.inspection import benchmark, timing
from sla_compile.kernels import reference
from sla_compile.kernels.cpu import attention as cpu
from tests.support.closeness import relative_error
from tests.support.reports import assert_fits

SHAPE = (1, 2, 300, 16)
SMALL: dict[str, Any] = {"device": "cpu", "seconds": 1e-3}


def test_arms_times_and_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: dict[str, dict[str, Any]] = {}
    right = benchmark._timed
    monkeypatch.setattr(benchmark, "_timed", lambda calls, *rest: called.update(calls) or right(calls, *rest))
    before = torch.get_rng_state()
    report = sla_compile.bench(SHAPE, linear=("marginal", "taylor", "none"), config={"topk": 0.4}, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    names = ["dense", "SLA, linear marginal", "SLA, linear taylor", "SLA, linear none"]
    assert [arm.name for arm in report.arms] == list(called) == names
    assert (report.shape, report.dtype, report.settings["topk"]) == (SHAPE, "float32", 0.4)
    for arm in report.arms:
        for times in (arm.forward, arm.both):
            assert 0 < times.low <= times.median <= times.high
        assert (arm.forward_bytes, arm.both_bytes) == (None, None)
    assert report.speedup(report.arms[0], "both") == 1
    assert set(report.errors) == {"marginal", "taylor", "none"}
    assert max(report.errors.values()) < 1e-5

    q, k, v, upstream = benchmark._inputs(SHAPE, torch.float32, torch.device("cpu"))
    assert q.transpose(1, 2).is_contiguous()
    assert relative_error(called["dense"]["forward"](), F.scaled_dot_product_attention(q, k, v)) < 1e-6
    options: dict[str, Any] = {"topk": 0.4, "bottomk": 0.1}
    gate = torch.full((16, 16), 0.01), torch.full((16,), 0.01)
    leaves = [x.requires_grad_() for x in (q, k, v, *gate)]
    out = reference.sparse_linear_attention(*leaves, **options)
    assert relative_error(called["SLA, linear marginal"]["forward"](), out) < 1e-5
    gradients = torch.autograd.grad(out, leaves, upstream)
    for got, wanted in zip(called["SLA, linear marginal"]["both"](), gradients, strict=True):
        assert relative_error(got, wanted) < 1e-5

    assert_fits(report)
    report.save(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(report.to_json())
    pytest.importorskip("matplotlib")
    report.save(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_wrong_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.forward

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        return result._replace(out=result.out * 1.001)

    monkeypatch.setattr(cpu, "forward", wrong)
    monkeypatch.setattr(benchmark, "time_in_turn", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=r"linear 'taylor': relative error .* of out .* nothing was timed"):
        sla_compile.bench(SHAPE, linear=("taylor",), **SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (1, 2, 3)}, r"shape: got \(1, 2, 3\); accepted: four positive integers, B, H, N, D"),
        ({"shape": (1, 2, 300, 8)}, "head dimension"),
        ({"linear": ("some",)}, "SLAConfig.linear: got 'some'"),
        ({"config": {"topk": 2.0}}, "SLAConfig.topk: got 2.0"),
        ({"seconds": 0}, "seconds: got 0; accepted: a number above 0"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sla_compile.bench(**{"shape": SHAPE, **SMALL, **changes})


def test_times_are_medians_and_percentiles() -> None:
    times = timing.Times.of([float(n) for n in range(1, 102)])
    assert (times.median, times.low, times.high) == (51.0, 21.0, 81.0)
    assert str(timing.Times(12345.678, 0.123456, 9999.0)) == "12346 (0.1235 to 9999)"
    assert timing.Times.of([2.0]) == timing.Times(2.0, 2.0, 2.0)
    found = timing.time_in_turn({"a": lambda: sum(range(100))}, torch.device("cpu"), seconds=3e-3)
    assert found["a"].median > 0
    assert len(timing.run_times(lambda: None, seconds=0)) == 3
    assert len(timing.run_times(lambda: None, seconds=60, most=4)) == 4


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["bench", "--shape", *map(str, SHAPE), "--device", "cpu", "--seconds", "0.001"]
    assert main([*command, "--linear", "marginal", "taylor", "--width", "100"]) == 0
    out = capsys.readouterr().out
    assert "B1 H2 N300 D16 float32, topk 5%, blocks 64x64" in out
    assert "SLA, linear taylor" in out
    assert main([*command, "--config", "block_q=32", "--json", "--out", str(tmp_path / "b.json")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "b.json").read_text())
    assert main([*command, "--out", str(tmp_path / "b.doc")]) == 2
    assert "accepted: a name that ends in one of" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    report = sla_compile.bench((1, 2, 2048, 64), linear=("marginal", "taylor"), seconds=0.02)
    assert report.dtype == "bfloat16"
    assert report.arms[0].name == "dense"
    for arm in report.arms:
        assert arm.both_bytes is not None
        assert arm.forward_bytes is not None
        assert arm.both_bytes > arm.forward_bytes > 0
    assert_fits(report)
