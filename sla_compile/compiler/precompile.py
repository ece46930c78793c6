"""While Inductor compiles a rewritten graph, compile the kernels that its first run will launch.

Triton compiles a kernel when it is first launched: about ten of them, one after another, after Inductor is done. So as
soon as a graph with static shapes on a CUDA device is rewritten, its calls go to a process of its own
(``kernels/triton/compile_process.py``) that compiles for them into Triton's cache on disk, all at once and at low
priority, and the first launch finds them there. A launch never waits for it: what is not there yet is compiled as ever.
A note beside the entries says what is done, so that a process with a warm cache starts nothing. It ends by itself, or
with this process; what goes wrong there is a line for the logger ``sla_compile.compiler.precompile`` at level DEBUG.
``SLA_COMPILE_AHEAD=0`` turns it off.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from sla_compile.common.options import AttentionOptions
from sla_compile.compat import triton_cache_folder
from sla_compile.compiler.sites import Site
from sla_compile.kernels.triton import launches
from sla_compile.kernels.triton.compile_process import GPU, CompileJob, OpCall, TensorForm
from sla_compile.passes.attention_call import AttentionCall
from sla_compile.passes.decide import Rewrite
from sla_compile.passes.operands import REPLACED_BY, example
from sla_compile.passes.parts import parts

__all__ = ["calls_of", "compile_ahead", "compile_calls", "start"]

log = logging.getLogger(__name__)

TIMEOUT = 600
"""Seconds after which the process is ended."""

_asked: set[tuple[torch.device, OpCall]] = set()


def compile_ahead(sites: Iterable[Site]) -> None:
    """Start to compile the kernels of the rewritten ``sites`` where that can help; raises nothing."""
    try:
        for device, calls in calls_of(sites).items():
            compile_calls(device, calls)
    except Exception:  # a compile must not fail for what only makes it faster
        log.debug("the kernels will be compiled when they are launched", exc_info=True)


def compile_calls(device: torch.device, calls: Iterable[OpCall]) -> threading.Thread | None:
    """Start to compile the kernels of those ``calls`` that were not asked for; what waits for them, None where nothing
    was started."""
    if os.environ.get("SLA_COMPILE_AHEAD", "1") == "0" or os.environ.get("TRITON_INTERPRET", "0") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    new = [call for call in calls if (device, call) not in _asked]
    _asked.update((device, call) for call in new)
    return start(CompileJob(_gpu(device), tuple(new)), Path(triton_cache_folder(device))) if new else None


def calls_of(sites: Iterable[Site]) -> dict[torch.device, list[OpCall]]:
    """The different calls of ``sla::forward`` in the graph that ``sites`` were rewritten in; static shapes only."""
    found: dict[torch.device, dict[OpCall, None]] = {}
    for site in sites:
        if isinstance(site.decision, Rewrite) and site.marker is not None:
            for part in parts(site.call, site.decision):
                call = _call(site, *part)
                if call is not None:
                    found.setdefault(site.decision.shape.device, {})[call] = None
    return {device: list(calls) for device, calls in found.items()}


def _call(site: Site, attention: AttentionCall, decision: Rewrite) -> OpCall | None:
    """The call of the op at ``site`` for a part of it; None where a size is not known before it runs."""
    marker: Any = site.marker
    operands = [example(source) for source in decision.operands(attention)]
    masks = [example(source) for source in decision.masks()]
    gate = [example(node) for node in (marker.weight, marker.bias, marker.shift)]
    *given, shift = gate
    if marker.log_scale is not None:
        given = [example(node) for node in _forward(site).args[3:5]]
    tensors: list[Any] = [*operands, *given, *(masks or [None]), example(marker.sparsity), shift]
    sizes = [size for x in tensors if x is not None for size in (*x.shape, *x.stride())]
    if not all(type(size) is int for size in sizes):
        return None
    dtypes = [decision.shape.dtype] * 3 + [None] * 5  # autocast comes between q, k, v and the op
    forms = tuple(None if x is None else TensorForm.of(x, dtype) for x, dtype in zip(tensors, dtypes, strict=True))
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (*operands, *gate) if x is not None)
    options = {**decision.options(), **site.config.compiled_options()}
    always_critical = tuple(options.pop("always_critical", ()))
    return OpCall(forms, AttentionOptions(**options, always_critical=always_critical), backward=trained)


def _forward(site: Site) -> fx.Node:
    """The call of the op that stands where the attention of ``site`` stood."""
    added: tuple[fx.Node, ...] = site.call.node.meta[REPLACED_BY]
    return next(node for node in added if node.target is torch.ops.sla.forward.default)


def _gpu(device: torch.device) -> GPU:
    from triton.backends.nvidia.compiler import get_ptxas_version

    about = torch.cuda.get_device_properties(device)
    assembler = get_ptxas_version(about.major * 10 + about.minor)
    return GPU((about.major, about.minor), about.multi_processor_count, about.warp_size, assembler)


def start(job: CompileJob, folder: Path) -> threading.Thread | None:
    """The thread that waits for a process that compiles ``job`` into ``folder``; None where that was done before."""
    note = folder / f"sla_{_key(job)}"
    if note.exists():
        return None
    waiting = threading.Thread(target=_wait, args=(job, folder, note), daemon=True, name=__name__)
    waiting.start()
    return waiting


def _wait(job: CompileJob, folder: Path, note: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONSAFEPATH": "1",
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "sla_compile.kernels.triton.compile_process"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        _running.add(process)
        try:
            _, errors = process.communicate(job.to_json(), timeout=TIMEOUT)
        finally:
            _end(process)
            _running.discard(process)
        if process.returncode == 0:
            note.touch()
        else:
            log.debug("compiling ahead ended with %s: %s", process.returncode, errors)
    except Exception:  # nobody waits for this thread
        log.debug("compiling ahead failed", exc_info=True)


_running: set[subprocess.Popen[str]] = set()


@atexit.register
def _end_all() -> None:
    for process in [*_running]:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and its forks, where they have not ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _key(job: CompileJob) -> str:
    """Of the job, the kernels' sources, the user's launches and Triton: with those, the note says, this was done."""
    key = hashlib.sha256(f"{job.to_json()} {_versions()}".encode())
    key.update(launches.content())
    return key.hexdigest()


@cache
def _versions() -> str:
    import triton

    import sla_compile.kernels

    source = hashlib.sha256()
    for path in sorted(Path(sla_compile.kernels.__path__[0]).rglob("*.py")):
        source.update(path.read_bytes())
    return f"{triton.__version__} {source.hexdigest()}"
