"""The kernels of a rewritten graph are compiled before they are launched: the same ones, and only where that helps."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sla_compile.compiler import precompile as ahead
from sla_compile.compiler.precompile import calls_of
from sla_compile.compiler.sites import Site
from sla_compile.kernels.triton.compile_process import GPU, CompileJob, OpCall, TensorForm
from tests.support.capture import Caller, Capture
from tests.support.models import OPTIONS
from tests.support.paths import ROOT
from tests.support.triton_cases import Case, call_of, inputs, run_kernels

HOPPER = GPU((9, 0), 132)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What is logged from here on, with its traceback."""
    texts: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("sla_compile.compiler.precompile")
    handler.emit = lambda record: texts.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield texts
    logger.removeHandler(handler)
    logger.setLevel(before)


def job_of(case: Case, tensors: Sequence[torch.Tensor | None], *, backward: bool = True) -> CompileJob:
    """What the call of ``case`` on ``tensors`` is ahead of time."""
    forms = tuple(None if x is None else TensorForm.of(x) for x in call_of(case, tensors))
    return CompileJob(HOPPER, (OpCall(forms, case.attention_options, backward),))


def compiled(folder: Path) -> set[tuple[str, str]]:
    """Name and code of each kernel in a Triton cache."""
    return {(path.stem, path.read_text()) for path in folder.glob("*/*.ptx")}


def launch_for_hopper(monkeypatch: pytest.MonkeyPatch, *, gluon: bool) -> list[str]:
    """From now on launches of tensors on the CPU compile as an H100's do, and go no further; the kernels' names."""
    from sla_compile.kernels.hopper import support as hopper
    from tests.kernels.triton.test_compiles import compile_launches

    about = SimpleNamespace(multi_processor_count=HOPPER.multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(hopper, "usable", lambda *tensors, **settings: gluon)
    return compile_launches(monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is for Linux")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")
@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=200, heads=4, group=2, weight="per_head", gate_dtype=torch.float32),
        Case(tokens=200, head_dim=24, causal=True, mask="bool", weight="none"),  # which Gluon does not take
    ],
    ids=str,
)
def test_the_kernels_that_launches_compile(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of them and the same code, by a process of its own and by launches as the kernels' tests compile them."""
    tensors = inputs(case, torch.bfloat16, "cpu")
    thread = ahead.start(job_of(case, tensors), tmp_path / "ahead")
    assert thread is not None
    thread.join()
    assert not ahead._running
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "launched"))
    launched = launch_for_hopper(monkeypatch, gluon=not case.causal)
    run_kernels(case, tensors)
    assert {name for name, _ in compiled(tmp_path / "launched")} == {*launched}
    assert compiled(tmp_path / "ahead") == compiled(tmp_path / "launched")
    assert ahead.start(job_of(case, tensors), tmp_path / "ahead") is None  # a note says that it is done


FIND = """\
import sys
import triton
from concurrent.futures import Executor, Future
from sla_compile.kernels.triton.compile_process import CompileJob, compile_launches

class Here(Executor):
    def submit(self, task, *args, **kwargs):
        task(*args, **kwargs)
        done = Future()
        done.set_result(None)
        return done

triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: print(src.name, cache_hit)
compile_launches(CompileJob.from_json(sys.stdin.read()), Here())
"""
"""Compiles in its own process, and prints each kernel and whether Triton's cache had it."""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is for Linux")
def test_found_although_the_path_of_the_assembler_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inductor changes it in mid-process, where Triton goes on with the version that it found first."""
    from triton.backends.nvidia.compiler import get_ptxas, get_ptxas_version

    ptxas, version = get_ptxas(90), get_ptxas_version(90)
    other = tmp_path / "ptxas"
    answer = f"other, release {ptxas.version}, V0.0.1"
    other.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{answer}" && exit\nexec {ptxas.path} "$@"\n')
    other.chmod(0o755)
    case = Case(tokens=70, head_dim=16, weight="none", bias="none")
    job = job_of(case, inputs(case, torch.float32, "cpu"), backward=False)
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):  # Triton 3.8's for Hopper too
        monkeypatch.setenv(variable, str(other))
    thread = ahead.start(replace(job, gpu=replace(HOPPER, assembler=version)), tmp_path)
    assert thread is not None
    thread.join()
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", FIND], input=job.to_json(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert {"mean_kernel", "attention_forward_kernel"} <= found.keys()
    assert {*found.values()} == {"True"}, found


EXIT = """\
import sys
import time
from pathlib import Path
from sla_compile.compiler import precompile as ahead
from sla_compile.kernels.triton.compile_process import CompileJob

ahead.start(CompileJob.from_json(sys.stdin.read()), Path(sys.argv[1]))
time.sleep(0.5)
(process,) = ahead._running
print(process.pid)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="processes as Linux has them")
def test_the_process_ends_with_this_one(tmp_path: Path) -> None:
    """A program that ends before its kernels are compiled leaves nothing behind."""
    case = Case(tokens=300, head_dim=128, block_q=128, block_k=128)
    job = job_of(case, inputs(case, torch.bfloat16, "cpu")).to_json()
    done = subprocess.run(
        [sys.executable, "-c", EXIT, str(tmp_path)], input=job, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(int(done.stdout), 0)
    assert not [*tmp_path.glob("sla_*")]


def attend(x: torch.Tensor) -> torch.Tensor:
    q = x.unflatten(2, (2, 16)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q)


def rewritten(*, autocast: bool = False, dynamic: bool = False, **options: Any) -> list[Site]:
    """The sites of a small model's graph."""
    capture = Capture(topk=0.25, **options)
    model = torch.compile(nn.Sequential(Caller(attend)), backend=capture, dynamic=dynamic)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(torch.randn(1, 96, 32))
    assert capture.rewritten == 1
    return capture.sites


def test_calls_of_a_graph() -> None:
    """The forms of the tensors, in the dtype that autocast gives them, and the options."""
    calls = calls_of(rewritten(linear="marginal"))
    (call,) = calls[torch.device("cpu")]
    q, k, v, weight, bias, key_mask, sparsity, shift = call.inputs
    assert q == k == v == TensorForm((1, 2, 96, 16), (3072, 16, 32, 1), "float32")
    assert weight == TensorForm((16, 16), (16, 1), "float32")
    assert bias == TensorForm((16,), (1,), "float32")
    assert key_mask is sparsity is shift is None
    options = call.options
    assert (options.topk, options.scale, options.block_q) == (0.25, 0.25, OPTIONS["block_q"])
    (cast,) = calls_of(rewritten(linear="marginal", autocast=True))[torch.device("cpu")]
    assert q is not None
    assert weight is not None
    assert cast.inputs[0] == replace(q, dtype="bfloat16")
    assert cast.inputs[3] == replace(weight, dtype="bfloat16")  # its owner has no parameters to go by
    (virtual,) = calls_of(rewritten())[torch.device("cpu")]
    assert virtual.inputs[3:5] == (None, None)
    assert virtual.inputs[7] == TensorForm((2,), (1,), "float32")
    (scaled,) = calls_of(rewritten(linear="marginal", sparse_scale=True))[torch.device("cpu")]
    # divided by the scale of each head
    gate = (TensorForm((2, 16, 16), (256, 16, 1), "float32"), TensorForm((2, 16), (16, 1), "float32"))
    assert scaled == replace(call, inputs=(q, k, v, *gate, None, None, None))
    job = CompileJob(replace(HOPPER, assembler="ptxas 1.2"), (call, cast))
    assert CompileJob.from_json(job.to_json()) == job


def test_unknown_sizes_are_left_to_the_launch() -> None:
    assert calls_of(rewritten(dynamic=True)) == {}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[CompileJob]:
    """The jobs that are started from here on, nothing of them done; the sites of the CPU pass for those of a GPU."""
    jobs: list[CompileJob] = []
    monkeypatch.delenv("SLA_COMPILE_AHEAD", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ahead, "_asked", set())
    monkeypatch.setattr(ahead, "_gpu", lambda device: HOPPER)
    monkeypatch.setattr(ahead, "triton_cache_folder", lambda device: "nowhere")
    monkeypatch.setattr(ahead, "start", lambda given, folder: jobs.append(given))
    original = ahead.calls_of
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(
        ahead, "calls_of", lambda sites: {cuda: [c for calls in original(sites).values() for c in calls]}
    )
    return jobs


def test_the_gpu_that_is_answered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    about = SimpleNamespace(major=9, minor=0, multi_processor_count=132, warp_size=32)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert ahead._gpu(torch.device("cuda", 0)) == replace(HOPPER, assembler=compiler.get_ptxas_version(90))


def test_started_once_for_a_call(started: list[CompileJob]) -> None:
    sites = rewritten()
    ahead.compile_ahead([*sites, *sites])
    ahead.compile_ahead(sites)
    assert [len(job.calls) for job in started] == [1]


def test_not_started_on_a_cpu(started: list[CompileJob], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "calls_of", calls_of)
    ahead.compile_ahead(rewritten())
    assert started == []


@pytest.mark.parametrize(("variable", "value"), [("SLA_COMPILE_AHEAD", "0"), ("TRITON_INTERPRET", "1")])
def test_turned_off(variable: str, value: str, started: list[CompileJob], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    ahead.compile_ahead(rewritten())
    assert started == []


@pytest.mark.parametrize("training", [True, False])
def test_the_backend_starts_it(training: bool, started: list[CompileJob]) -> None:
    """With the kernels of the backward where there will be one."""
    options = {**OPTIONS, "inner": "eager"}
    model = torch.compile(nn.Sequential(Caller(attend)), backend="sla", options=options)
    with torch.set_grad_enabled(training):
        model(torch.randn(1, 96, 32))
    assert [call.backward for job in started for call in job.calls] == [training]


def test_an_error_is_only_logged(started: list[CompileJob], monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    def fails(*arguments: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(ahead, "start", fails)
    ahead.compile_ahead(rewritten())
    assert ["no more processes" in text for text in logged] == [True]


def test_a_process_that_fails_leaves_no_note(
    monkeypatch: pytest.MonkeyPatch, logged: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (call,) = calls_of(rewritten())[torch.device("cpu")]
    thread = ahead.start(CompileJob(HOPPER, (call,)), tmp_path)
    assert thread is not None
    thread.join()
    assert ["compiling ahead" in text for text in logged] == [True]
    assert not [*tmp_path.iterdir()]
    assert not ahead._running


FIRST_RUN = """\
import logging
import sys
import torch
import triton
from sla_compile.compiler import precompile as ahead
from tests.compiler.test_precompile import Model

logging.basicConfig()
logging.getLogger("sla_compile.compiler.precompile").setLevel(logging.DEBUG)  # why a kernel is not there
start = ahead.start
ahead.start = lambda job, folder: start(job, folder).join()  # all is there before the first launch
found = {}
def listen(*, src, cache_hit, **_):
    if getattr(src, "fn", None) is not None and src.fn.fn.__module__.startswith("sla_compile.kernels"):
        found[src.name] = cache_hit
triton.knobs.compilation.listener = listen
block = int(sys.argv[1])
model = Model().to("cuda", torch.bfloat16)
options = {"block_q": block, "block_k": block, "min_tokens": 0}
x = torch.randn(1, 1000, 256, device="cuda", dtype=torch.bfloat16)
torch.compile(model, backend="sla", options=options)(x).sum().backward()
torch.cuda.synchronize()
print(found)
assert len(found) >= 9 and all(found.values())
"""


class Model(nn.Module):
    """A projection, an attention with heads of 128, and another projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(256, 768), nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (2, 128)).transpose(1, 2) for y in self.qkv(x).chunk(3, 2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("block", [64, 128])
def test_the_first_run_on_a_gpu_finds_its_kernels(block: int, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    environment.pop("TRITON_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", FIRST_RUN, str(block)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_kernel_in_any_folder_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the note beside Triton's cache says was done is of these sources, those in folders too."""
    copy = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", copy)
    monkeypatch.setattr("sla_compile.kernels.__path__", [str(copy)])
    seen = []
    for changed in (None, "reference.py", "triton/forward.py", "hopper/states.py"):
        if changed is not None:
            (copy / changed).write_text((copy / changed).read_text() + "\n# changed\n")
        ahead._versions.cache_clear()
        seen.append(ahead._versions())
    ahead._versions.cache_clear()
    assert len(set(seen)) == 4
