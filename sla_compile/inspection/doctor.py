"""``doctor``: what this machine has, which kernels calls take on it, and whether they compute what they should."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sla_compile
from sla_compile.compat import mixed_reductions
from sla_compile.compiler.precompile import compile_calls
from sla_compile.inspection.kernel_paths import KernelPath, kernel_paths
from sla_compile.inspection.self_test import SelfTest, calls_to_compile, self_tests

__all__ = ["DoctorReport", "doctor"]

_PACKAGES = ("torch", "triton", "rich", "safetensors", "sympy", "diffusers", "matplotlib")
_COMPILERS = ("g++", "clang++", "c++")


@dataclass(frozen=True, repr=False)
class DoctorReport:
    """What `doctor` found on this machine; prints as tables, ``to_dict`` for tools."""

    versions: dict[str, str]
    """Of this package, Python, the system, the libraries, CUDA and its driver, the compiler; "missing" where none."""
    devices: tuple[str, ...]
    """Name, compute capability and memory of each GPU; without one, the CPU's cores and threads."""
    paths: tuple[KernelPath, ...]
    """Which kernels a call takes; on a GPU machine for the first GPU, and for the CPU."""
    tests: tuple[SelfTest, ...]
    """Forward and backward against the definition; empty where it was left out."""
    caches: dict[str, str]
    """Folder by name, with what is wrong with it after a colon; nothing where it can be written."""
    entry_point: bool
    """Whether ``torch.compile`` knows a backend "sla" without an import of this package."""
    gradients: str
    """Whether Inductor's gradients of a long video's modulation are right with its environment and config of now."""
    problems: tuple[str, ...]
    """What is wrong, one sentence each; empty where everything works."""
    seconds: float

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields, and ``healthy``."""
        lists = {
            "devices": list(self.devices),
            "paths": [dataclasses.asdict(path) for path in self.paths],
            "tests": [dataclasses.asdict(test) | {"passed": test.passed} for test in self.tests],
            "problems": list(self.problems),
        }
        return {**dataclasses.asdict(self), **lists, "healthy": self.healthy}

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> Any:
        from sla_compile.inspection.terminal import DoctorView

        return DoctorView(self)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import plain_text

        return plain_text(self.__rich__(), width=100)

    def __repr__(self) -> str:
        return f"<DoctorReport: {len(self.problems)} problem(s), {len(self.tests)} self-test(s)>"


def doctor(*, self_test: bool = True) -> DoctorReport:
    """What a report of a bug should hold: versions, devices, kernel paths, a self-test, entry point and caches.

    Takes a few seconds, more on a GPU, where kernels may have to be compiled first. Changes nothing but the
    compile caches.

    Args:
        self_test: run the op, forward and backward, against its definition in small shapes.
    """
    start = time.perf_counter()
    on_gpu = torch.cuda.is_available()
    devices = [torch.device("cpu"), *([torch.device("cuda", torch.cuda.current_device())] if on_gpu else [])]
    paths = [path for device in reversed(devices) for path in kernel_paths(device)]
    tests = [*_self_tests(devices)] if self_test else []
    caches = {name: _cache_state(folder) for name, folder in _cache_folders().items()}
    entry_point = "sla" in importlib.metadata.entry_points(group="torch_dynamo_backends").names
    versions = _versions()
    return DoctorReport(
        versions=versions,
        devices=tuple(_devices()),
        paths=tuple(paths),
        tests=tuple(tests),
        caches=caches,
        entry_point=entry_point,
        gradients=_gradients(),
        problems=tuple(_problems(versions, tests, caches, entry_point)),
        seconds=time.perf_counter() - start,
    )


def _self_tests(devices: Sequence[torch.device]) -> Iterator[SelfTest]:
    """The CPU's first, while the kernels of a GPU are compiled on all cores."""
    compiling = []
    with contextlib.suppress(Exception):  # what is broken shows in the tests themselves
        compiling = [compile_calls(device, calls_to_compile(device)) for device in devices if device.type == "cuda"]
    for device in devices:
        if device.type == "cuda":
            for thread in filter(None, compiling):
                thread.join()
        yield from self_tests(device)


def _problems(
    versions: dict[str, str], tests: list[SelfTest], caches: dict[str, str], entry_point: bool
) -> Iterator[str]:
    if not entry_point:
        yield (
            'torch.compile knows no backend "sla" before an import of sla_compile: the package is not installed in '
            "this environment (accepted: pip install, or that import)"
        )
    for test in tests:
        if not test.passed:
            wrong = test.message or f"relative error {test.error:.2g} of {test.worst}, accepted up to {test.budget:g}"
            yield f"self-test on {test.call}: {wrong}"
    for name, state in caches.items():
        folder, colon, wrong = state.partition(": ")
        if colon:
            yield f"the cache of {name} cannot be written: {folder}: {wrong}"
    if versions["C++ compiler"] == "missing":
        yield "no C++ compiler was found (CXX, g++, clang++, c++): Inductor needs one on the CPU"
    if torch.cuda.is_available() and versions["triton"] == "missing":
        yield "there is a GPU but no Triton: nothing of this package runs there"
    if torch.cuda.is_available() and mixed_reductions()[0]:
        yield f"gradients of modulation: {_gradients()} (accepted: 0, or that variable not set)"
    from sla_compile.kernels.triton.launches import VARIABLE, read

    if os.environ.get(VARIABLE):
        try:
            read(os.environ[VARIABLE])
        except ValueError as error:
            yield f"{VARIABLE}: {error}"


def _gradients() -> str:
    ours, others = mixed_reductions()
    if ours:
        return (
            "may be wrong on a GPU, in graphs of this backend too: TORCHINDUCTOR_MIX_ORDER_REDUCTION is set, so that "
            "mixed-order reductions stay on (pytorch#193061)"
        )
    if others:
        return 'right with backend="sla", which turns off mixed-order reductions; may be wrong with others on a GPU'
    return "right"


def _versions() -> dict[str, str]:
    found = {"sla_compile": sla_compile.__version__, "python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    found["torch"] = torch.__version__  # with the build's suffix
    found["CUDA of torch"] = torch.version.cuda or torch.version.hip or "none (a CPU build)"
    found["GPU driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    compilers = [os.environ.get("CXX", ""), *_COMPILERS]
    compiler = next((name for name in compilers if name and shutil.which(name)), "")
    found["C++ compiler"] = _first_line(compiler, "--version") if compiler else "missing"
    return found


def _first_line(*command: str) -> str:
    """The first line that ``command`` prints; "missing" where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "missing"
    return next(iter(done.stdout.splitlines()), "")


def _devices() -> Iterator[str]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        yield f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    machine = platform.machine()
    yield f"CPU {machine}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) of torch"


def _cache_folders() -> dict[str, Path]:
    """Where the compilers keep what they compiled, by their documented variables and defaults."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or ""
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")
    folders = {"Inductor": Path(inductor), "temporary files": Path(tempfile.gettempdir())}
    if sys.platform == "linux":
        folders["Triton"] = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return folders


def _cache_state(folder: Path) -> str:
    """The folder, or the nearest one above it that is there; and after a colon why nothing can be written in it."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place):
            return str(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
