"""A copy of a model to trace in its place: its Python state, without gates, and the very same tensors."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import nn

from sla_compile.compiler.site_numbers import known_sites
from sla_compile.gate import detach
from sla_compile.memory import remember_site

__all__ = ["traceable_copy"]


def traceable_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model``'s Python state, without gates, that shares every tensor with it.

    Raises ValueError where a part of the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied for a trace: {error}") from error
    for module, original in zip(copied.modules(), model.modules(), strict=True):
        module.__dict__["_compiled_call_impl"] = None  # blocks compiled by themselves are traced as part of it
        if "forward" in module.__dict__:
            module.__dict__["forward"] = _of_the_copy(module.__dict__["forward"], memo)
        for ordinal, site in known_sites(original).items():
            remember_site(module, ordinal, site)
    return detach(copied)


def _of_the_copy(function: Any, memo: dict[int, Any]) -> Any:
    """A ``forward`` put on a module, as the copy has it: a function is not copied, and may hold on to the model.

    ``memo`` is that of ``deepcopy``, which says what each object has become.
    """
    compiled = getattr(function, "_torchdynamo_orig_callable", None)
    if compiled is not None:  # m.forward = torch.compile(m.forward)
        return _of_the_copy(copy.deepcopy(compiled, memo), memo)
    if isinstance(function, functools.partial):
        return functools.partial(_of_the_copy(function.func, memo), *function.args, **function.keywords)
    if not isinstance(function, types.FunctionType) or not function.__closure__:
        return function
    cells = tuple(types.CellType(_copied(cell, memo)) for cell in function.__closure__)
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _copied(cell: types.CellType, memo: dict[int, Any]) -> Any:
    """What ``cell`` of a function's closure holds, as the copy has it; itself where that cannot be copied."""
    content = cell.cell_contents
    if isinstance(content, types.FunctionType | functools.partial):
        return _of_the_copy(content, memo)
    try:
        return copy.deepcopy(content, memo)
    except Exception:  # a lock, a process group: nothing that leads back to the model
        return content
