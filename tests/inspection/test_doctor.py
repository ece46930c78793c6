"""``doctor``: what it says of this machine, and that it says when something is wrong."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config

import sla_compile
from sla_compile.__main__ import main
from sla_compile.common.kernel_interface import AttentionInputs
from sla_compile.common.options import AttentionOptions
from sla_compile.compat import mixed_reductions
from sla_compile.inspection import doctor as module
from sla_compile.inspection.kernel_paths import CallKind, kernel_path
from sla_compile.inspection.self_test import SelfTest, calls_to_compile, self_tests
from sla_compile.kernels.cpu import attention as cpu
from sla_compile.kernels.hopper import support
from sla_compile.kernels.triton.compile_process import OpCall, TensorForm
from tests.support.reports import assert_fits

CPU = torch.device("cpu")


def test_this_machine_is_healthy() -> None:
    report = sla_compile.doctor()
    assert report.problems == ()
    assert report.healthy
    assert report.versions["torch"] == torch.__version__
    tested = [(test.dtype, test.linear, test.mask) for test in report.tests if test.device == "cpu"]
    dtypes = "float32", "float16", "bfloat16", "float64"
    assert tested == list(itertools.product(dtypes, ("marginal", "taylor"), ("none", "keys", "causal")))
    assert {path.path for path in report.paths if path.device == "cpu"} == {"cpu"}
    data = json.loads(report.to_json())
    assert data["healthy"] is True
    assert len(data["paths"]) == len(report.paths)


@pytest.mark.parametrize(
    ("variable", "config", "version", "said", "problem"),
    [
        (None, True, "2.14.0", 'right with backend="sla"', False),
        (None, False, "2.14.0", "right", False),
        ("1", True, "2.14.0", "may be wrong on a GPU, in graphs of this backend too", True),
        ("0", True, "2.14.0", "may be wrong on a GPU, in graphs of this backend too", True),  # set again in Python
        ("0", False, "2.14.0", "right", False),
        ("1", True, "2.15.0", "right", False),
    ],
)
def test_wrong_gradients_of_inductor_are_told(
    variable: str | None, config: bool, version: str, said: str, problem: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_MIX_ORDER_REDUCTION", raising=False)
    if variable is not None:
        monkeypatch.setenv("TORCHINDUCTOR_MIX_ORDER_REDUCTION", variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "mixed_reductions", partial(mixed_reductions, version))
    with torch._inductor.config.patch("triton.mix_order_reduction", config):
        assert module._gradients().startswith(said)
        versions = {"C++ compiler": "a", "triton": "3"}
        found = [*module._problems(versions, [], {}, entry_point=True)]
    assert [text.partition(":")[0] for text in found] == (["gradients of modulation"] if problem else [])


def test_the_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    sla_compile.doctor()
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.forward

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        return result._replace(out=result.out * 1.001)

    monkeypatch.setattr(cpu, "forward", wrong)
    found = {(test.dtype, test.linear, test.passed) for test in self_tests(CPU, ("none",))}
    for linear in ("marginal", "taylor"):
        assert ("float32", linear, False) in found
        assert ("bfloat16", linear, True) in found  # its own rounding is larger


def test_what_is_compiled_ahead_is_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[OpCall] = []
    forward = cpu.forward

    def recorded(inputs: AttentionInputs, options: AttentionOptions) -> Any:
        calls.append(OpCall(tuple(None if x is None else TensorForm.of(x) for x in inputs), options, backward=True))
        return forward(inputs, options)

    monkeypatch.setattr(cpu, "forward", recorded)
    assert all(test.passed for test in self_tests(CPU))
    assert calls == calls_to_compile(CPU)


def test_kernels_of_a_gpu_are_compiled_beside_the_tests_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Compiling:
        def __init__(self, *_: Any) -> None:
            happened.append("started")

        def join(self) -> None:
            happened.append("compiled")

    def tests(device: torch.device) -> list[SelfTest]:
        happened.append(f"tests on {device}")
        return []

    monkeypatch.setattr(module, "calls_to_compile", lambda device: [])
    monkeypatch.setattr(module, "compile_calls", Compiling)
    monkeypatch.setattr(module, "self_tests", tests)
    assert [*module._self_tests([CPU, torch.device("cuda", 0)])] == []
    assert happened == ["started", "tests on cpu", "compiled", "tests on cuda:0"]


def test_a_compiler_that_fails_ahead_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ImportError("no triton")

    monkeypatch.setattr(module, "calls_to_compile", fail)
    tested: list[str] = []
    monkeypatch.setattr(module, "self_tests", lambda device: [*map(tested.append, [str(device)])][:0])
    assert [*module._self_tests([CPU, torch.device("cuda", 0)])] == []
    assert tested == ["cpu", "cuda:0"]


def test_what_raises_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(cpu, "forward", broken)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: importlib.metadata.EntryPoints())
    monkeypatch.setattr(module, "_cache_state", lambda folder: f"{folder}: Permission denied")
    monkeypatch.setenv("SLA_COMPILE_LAUNCHES", str(tmp_path / "missing.json"))
    report = sla_compile.doctor()
    text = "\n".join(report.problems)
    assert "self-test on cpu, float32, linear taylor, mask none: RuntimeError: no kernel image" in text
    assert 'torch.compile knows no backend "sla"' in text
    assert "the cache of Inductor cannot be written: " in text
    assert "Permission denied" in text
    assert "SLA_COMPILE_LAUNCHES: " in text
    assert not report.healthy
    assert "problem: self-test" in str(report)


def test_reasons_come_from_the_choosing_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's real conditions, on tensors that only say they are on a GPU."""
    monkeypatch.setattr(support, "available", lambda device: True)
    from sla_compile.inspection import kernel_paths as paths

    def on_gpu(device: torch.device, kind: CallKind) -> Any:
        x = torch.empty(1, 1, 256, kind.head_dim, dtype=kind.dtype)
        # `usable` reads these alone
        return SimpleNamespace(
            is_cuda=True, numel=x.numel, dtype=x.dtype, shape=x.shape, stride=x.stride, device=SimpleNamespace(index=0)
        )

    monkeypatch.setattr(paths, "_empty", on_gpu)
    monkeypatch.setattr("sla_compile.kernels.triton.tiles.vector_readable", lambda x: x)
    half = CallKind(torch.float16)
    assert paths._takes_gluon(CPU, half)

    def why(**changes: Any) -> str:
        kind = CallKind(**{"dtype": torch.bfloat16, **changes})
        assert not paths._takes_gluon(CPU, kind)
        return paths._why_not_gluon(CPU, kind)

    assert why(dtype=torch.float32) == "dtype float32"
    assert why(mask="causal", head_dim=256, block_q=32) == "head_dim 256, block_q 32"
    assert why(mask="causal", head_dim=256) == "head_dim 256"  # of virtual keys
    assert all(paths._takes_gluon(CPU, CallKind(torch.bfloat16, mask=mask)) for mask in ("keys", "causal"))
    assert why(block_k=256) == "block_k 256"


def test_a_path_on_the_cpu() -> None:
    path = kernel_path(CPU, CallKind(torch.float64, head_dim=100, mask="causal", block_q=16, block_k=256))
    assert (path.path, path.reason, path.dtype) == ("cpu", "", "float64")


def test_it_fits_every_terminal() -> None:
    assert_fits(module.doctor())


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--no-self-test"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tests"] == []
    assert main(["doctor", "--width", "100"]) == 0
    out = capsys.readouterr().out
    assert "no problem found" in out
    assert "self-test: output and gradients" in out
