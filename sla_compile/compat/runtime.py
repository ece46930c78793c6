"""What is in force around a call: tangents, wrappers of data parallelism, counters and traces."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

__all__ = [
    "count_in_running_counters",
    "data_parallel",
    "flattened",
    "fully_sharded",
    "has_tangent",
    "no_compile_under",
    "running_transform",
    "trace_artifact",
]


def running_transform() -> str:
    """The transform of ``torch.func`` that this runs under ("grad" for vjp too); empty where there is none.

    Remove when torch has a public function that tells.
    """
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return "" if interpreter is None else interpreter.key().name.lower()


def no_compile_under() -> str:
    """What is in force that lets Dynamo compile nothing, so that a compiled model runs as it is written; or nothing.

    Remove when torch has a public function that tells.
    """
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    if transform := running_transform():
        return f"torch.func.{transform}"
    modes = [mode for mode in _get_current_dispatch_mode_stack() if not mode.is_infra_mode()]
    return type(modes[-1]).__name__.lstrip("_") if modes else ""


def has_tangent(*tensors: torch.Tensor | None) -> bool:
    """True if any tensor carries a forward-mode tangent, also inside an op, where autograd's dispatch keys are off.

    Remove when torch has a public function that tells.
    """
    if forward_ad._current_level < 0:
        return False
    unpacked: Any = forward_ad.unpack_dual
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), nothing):
        return any(x is not None and unpacked(x).tangent is not None for x in tensors)


def data_parallel() -> bool:
    """Whether this runs inside the forward of a DistributedDataParallel."""
    if not torch.distributed.is_available():
        return False
    wrapper: Any = nn.parallel.DistributedDataParallel
    return wrapper._get_active_ddp_module() is not None


def fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (or another of torch's composable wrappers) holds ``module``.

    Inside its forward the parameters are plain tensors, so only its own list tells. Remove when torch has a function
    that says which wrapper owns a module.
    """
    composable = sys.modules.get("torch.distributed._composable_state")
    wrapped = getattr(composable, "_module_state_mapping", ())
    return any(module is inner for outer in list(wrapped) for inner in outer.modules())


def flattened(module: nn.Module) -> bool:
    """Whether ``module`` is in a FullyShardedDataParallel (FSDP1), which makes parts of a flat tensor of parameters.

    Remove when torch has a function that says which wrapper owns a module.
    """
    return bool(getattr(module, "_is_fsdp_managed_module", False)) and not fully_sharded(module)


def count_in_running_counters(packet: Any, formula: Callable[..., int]) -> None:
    """Let each FlopCounterMode that counts right now count ``packet`` by ``formula``: it copied the formulas when made.

    Remove when FlopCounterMode looks formulas up when it counts.
    """
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if counter is not None and hasattr(counter, "flop_registry"):
            counter.flop_registry.setdefault(packet, formula)


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Hand ``payload()`` to PyTorch's structured trace (``TORCH_TRACE``, read by ``tlparse``) where one is written.

    Remove when ``torch.compiler`` has a public way to add to the trace of a compile.
    """
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)
