"""The process that compiles a call's kernels before the call launches them, with no GPU in use.

    python -m sla_compile.kernels.triton.compile_process   # with a CompileJob, as JSON, on its standard input

Which kernels, and how specialised, is not written down a second time: the launchers of ``attention.py`` run here on
meta tensors, which have shapes, strides and types but no memory, and a launch is Triton's warm-up, which binds the
arguments as a launch does and ends at the compiler. Each compile is a fork: its front end, which is Python, takes 6% of
the time in Triton and a fifth in Gluon. That is safe here, where there are no threads and no CUDA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sla_compile.common.kernel_interface import AttentionInputs
from sla_compile.common.options import AttentionOptions

__all__ = ["GPU", "CompileJob", "OpCall", "TensorForm", "compile_launches"]


@dataclass(frozen=True)
class GPU:
    """What the kernels and their compiler ask about a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    warp_size: int = 32
    assembler: str = ""
    """The version of ptxas in the caller's keys of Triton's cache; a process keeps the first that it finds."""


@dataclass(frozen=True)
class TensorForm:
    """A tensor without its memory, which begins at a multiple of 16 bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    """The name of a torch dtype, as "bfloat16"."""

    @classmethod
    def of(cls, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> TensorForm:
        """``tensor``'s form, in ``dtype`` where one is given."""
        name = str(dtype or tensor.dtype).removeprefix("torch.")
        return cls(tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), name)

    def tensor(self) -> torch.Tensor:
        """A tensor of this form, on meta."""
        return torch.empty_strided(self.shape, self.strides, dtype=getattr(torch, self.dtype), device="meta")


@dataclass(frozen=True)
class OpCall:
    """One call of ``sla::forward`` with its options, and of ``sla::backward`` after it where that will follow."""

    inputs: tuple[TensorForm | None, ...]
    """Of each field of `AttentionInputs`, in order."""
    options: AttentionOptions
    backward: bool

    def run(self) -> None:
        """Run the launchers on tensors of these forms; the gradient of the output is laid out as the output."""
        from . import attention

        tensors: Any = (None if form is None else form.tensor() for form in self.inputs)
        inputs = AttentionInputs(*tensors)
        result = attention.forward(inputs, self.options)
        if self.backward:
            attention.backward(torch.empty_like(result.out), inputs, result, self.options)


@dataclass(frozen=True)
class CompileJob:
    """Calls whose kernels are to be compiled, and for which GPU."""

    gpu: GPU
    calls: tuple[OpCall, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CompileJob:
        data = json.loads(text)
        gpu = GPU(**{**data["gpu"], "capability": tuple(data["gpu"]["capability"])})
        return cls(gpu, tuple(_call(call) for call in data["calls"]))


def _call(data: dict[str, Any]) -> OpCall:
    options = {**data["options"], "always_critical": tuple(data["options"]["always_critical"])}
    return OpCall(tuple(map(_form, data["inputs"])), AttentionOptions(**options), data["backward"])


def _form(data: dict[str, Any] | None) -> TensorForm | None:
    return None if data is None else TensorForm(tuple(data["shape"]), tuple(data["strides"]), data["dtype"])


_is_cuda: Any = torch.Tensor.is_cuda


class _OnGPU(TorchFunctionMode):
    """Under this, tensors say that they are on the GPU, where the ones that they stand for are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _is_cuda.__get__:  # a new wrapper at every look-up
            return True
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _answering_for(gpu: GPU) -> Iterator[None]:
    """Under this, Triton, the launchers and torch.cuda see ``gpu``, and a launch is a warm-up."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", gpu.capability[0] * 10 + gpu.capability[1], gpu.warp_size)
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "device_of", lambda tensor: contextlib.nullcontext()),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda device=None: gpu.capability),
        (
            torch.cuda,
            "get_device_properties",
            lambda device=None: SimpleNamespace(multi_processor_count=gpu.multiprocessors),
        ),
        (JITFunction, "__getitem__", lambda kernel, grid: lambda *a, **k: kernel.run(*a, grid=grid, warmup=True, **k)),
        (
            driver,
            "_active",
            SimpleNamespace(
                get_current_target=lambda: target,
                get_current_device=lambda: 0,
                get_current_stream=lambda device: 0,
            ),
        ),
    ]
    if gpu.assembler:
        replaced.append((compiler, "get_ptxas_version", lambda arch=80: gpu.assembler))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        with _OnGPU():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _build_launcher(kernel: Any) -> None:
    """Build what launches ``kernel``, which Triton 3.6 makes in C for each signature; later ones have one for all."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        try:
            driver.CudaLauncher(kernel.src, kernel.metadata)
        except Exception:  # without it the kernel is still there
            traceback.print_exc()


class _Forks(Executor):
    """Each task in a fork, at most ``limit`` at a time. Tasks give no result; those that fail are counted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running: set[int] = set()
        self.failed = 0

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if len(self.running) >= self.limit:
            self._wait()
        process = os.fork()
        if process == 0:
            try:
                _build_launcher(task(*args, **kwargs))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        self.running.add(process)
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while wait and self.running:
            self._wait()

    def _wait(self) -> None:
        process, status = os.wait()
        self.running.discard(process)
        self.failed += status != 0


def compile_launches(job: CompileJob, executor: Executor) -> None:
    """Compile in ``executor`` every kernel that ``job`` launches, each specialisation once, into Triton's cache."""
    import triton

    with _answering_for(job.gpu), triton.AsyncCompileMode(executor, ignore_errors=True), executor:
        for call in job.calls:
            call.run()


def main() -> None:
    os.nice(10)
    forks = _Forks(os.cpu_count() or 1)
    compile_launches(CompileJob.from_json(sys.stdin.read()), forks)
    sys.exit(f"{forks.failed} kernel(s) did not compile" if forks.failed else 0)


if __name__ == "__main__":
    main()
