"""Notice, while a compiled model runs, what no graph can tell: where Dynamo started, and attention that ran dense.

The owner of a gate and the modules around it have two hooks. While Dynamo traces they do nothing and leave nothing in
the graph. They run in Python only where Dynamo starts at their module, or could not trace the call of it: there they
note the call for `report`, and warn once where a gate was not used or is untrained. Where nothing is compiled they note
for `report` that the attention of an owner ran dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sla_compile import memory
from sla_compile.compat import backend_function, frame_callback, skip_as_root_frame
from sla_compile.compiler.dense_warnings import note_dense_run, warn_of_untrained
from sla_compile.gate import Hook, gates, own_gates, remark_children, remove_hooks
from sla_compile.module_paths import module_paths

__all__ = ["CallEnd", "CallStart", "watch"]


class CallStart(Hook):
    """Forward pre-hook: notes that the module is called from Python, within a compiled call of ours or of none."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            _before_call(frame_callback(), module)


class CallEnd(Hook):
    """Forward hook, the other end of `CallStart`."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            _after_call(frame_callback(), module)


def _before_call(callback: Any, module: nn.Module) -> None:
    if callable(callback) and memory.is_our_backend(backend_function(callback)):
        memory.remember_start(module)
        remark_children(module)
    elif _is_eager(callback) and own_gates(module):
        memory.remember_eager_start(module)


def _is_eager(callback: Any) -> bool:
    """Whether nothing compiles or exports the call at hand."""
    return callback is None and not torch.compiler.is_compiling()


def _after_call(callback: Any, module: nn.Module) -> None:
    if _is_eager(callback) and own_gates(module):
        if memory.ran_since_eager_start(module):  # a part of it is compiled by itself
            memory.clear_dense_run(module)
        else:
            memory.remember_dense_run(module, compiled=False)
    if not (callable(callback) and memory.is_our_backend(backend_function(callback))):
        return
    ran = memory.ran_since_start(module)
    if ran:
        memory.clear_dense_run(module)
        warn_of_untrained(module)
    elif own_gates(module):
        note_dense_run(module)


for _hook in (CallStart, CallEnd):
    skip_as_root_frame(_hook.__call__)
for _function in (_before_call, _after_call):
    skip_as_root_frame(_function, with_callees=True)


def watch(model: nn.Module) -> None:
    """Have the hooks on every owner of a gate in ``model`` and on the modules around it, and on no other."""
    around = {path[:end] for path in gates(model) for end in _ends(path)}
    for path, module in module_paths(model):
        watched = any(isinstance(hook, CallStart) for hook in module._forward_pre_hooks.values())
        if path in around and not watched:
            module.register_forward_pre_hook(CallStart())
            module.register_forward_hook(CallEnd())
        elif path not in around and watched:
            remove_hooks(module, (CallStart, CallEnd))


def _ends(path: str) -> list[int]:
    """Where each part of a module path ends but the last, which is the gate's; 0 for the model itself."""
    return [0, *(place for place, character in enumerate(path) if character == ".")]
