"""Whose ``forward`` a code object is, and whose is under way."""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = [
    "RESUMED",
    "forward_codes",
    "forward_functions",
    "model_under_way",
    "modules_under_way",
    "plain_function_name",
    "runs_forward_of",
]

RESUMED = "torch_dynamo_resume_in_"
"""How Dynamo names the code that continues a function after a graph break."""


def runs_forward_of(code: types.CodeType, module: nn.Module) -> bool:
    """Whether ``code`` is the ``forward`` of ``module``, or resumes it after a graph break.

    Both that of its class count and one put on the module itself, as hooks of accelerate and diffusers do.
    """
    return any(_runs(code, forward) for forward in forward_codes(module))


def forward_codes(module: nn.Module) -> Iterator[types.CodeType]:
    """The code of each of `forward_functions`."""
    return (function.__code__ for function in forward_functions(module))


def forward_functions(module: nn.Module) -> Iterator[types.FunctionType]:
    """Each function that a call of ``module.forward`` may run, wrappers first."""
    # A scripted module's class has no forward to show.
    functions: list[Any] = [module.__dict__.get("forward"), getattr(type(module), "forward", None)]
    seen: set[int] = set()
    while functions:
        function = functions.pop(0)
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        if isinstance(function, types.FunctionType):
            yield function
        inner = function.func if isinstance(function, functools.partial) else getattr(function, "__func__", None)
        # functools.wraps leaves the one, torch.compile the other, and accelerate keeps what it replaced on the module.
        wrapped = (getattr(function, name, None) for name in ("__wrapped__", "_torchdynamo_orig_callable"))
        functions += [inner, *wrapped]


def _runs(code: types.CodeType, forward: types.CodeType) -> bool:
    if forward is code:
        return True
    if forward.co_filename != code.co_filename:
        return False
    if not code.co_name.startswith(RESUMED):  # Dynamo may hand out a copy of the code
        return bool((forward.co_name, forward.co_firstlineno) == (code.co_name, code.co_firstlineno))
    lines = [line for _, _, line in forward.co_lines() if line is not None]
    named = code.co_name.startswith(f"{RESUMED}{forward.co_name}_at_")
    return named and min(lines) <= code.co_firstlineno <= max(lines)


def modules_under_way() -> Iterator[nn.Module]:
    """The modules whose call is on this thread's Python stack, the innermost first.

    Only the locals of torch's own frames are looked at: a frame keeps what was looked at alive until it ends, and a
    user may delete a model before. Remove when Dynamo tells a backend in which calls of modules a frame runs.
    """
    call: Any = nn.Module._call_impl
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is call.__code__:
            module = frame.f_locals["self"]
            if "_orig_mod" not in module._modules:  # torch.compile's wrapper is no module of the model
                yield module
        frame = frame.f_back


def model_under_way(module: nn.Module) -> nn.Module:
    """The model whose call this is: the outermost module whose call is under way, or ``module``."""
    return [module, *modules_under_way()][-1]


def plain_function_name(name: str) -> str:
    """``torch_dynamo_resume_in_forward_at_12``, what runs after a graph break, as ``forward``."""
    return re.sub(rf"^{RESUMED}(.+)_at_\d+$", r"\1", name)
