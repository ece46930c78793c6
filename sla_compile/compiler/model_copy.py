"""A copy of a model to trace in its place: its Python state, without gates, and the very same tensors."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sla_compile.compiler.site_numbers import known_sites
from sla_compile.gate import detach, gates
from sla_compile.memory import remember_site
from sla_compile.sharded import refuse_flattened

__all__ = ["traceable_copy", "waits_for_gates"]

_COPY = "_sla_traceable_copy"
"""Attribute of every module of a copy."""


def waits_for_gates(model: nn.Module) -> bool:
    """Whether ``model`` is a copy, or a part of one, with no gates yet: there a model's own hooks have none to set."""
    return _COPY in model.__dict__ and not gates(model)


def traceable_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model``'s Python state, without gates, that shares every tensor with it.

    Raises ValueError where a part of the model cannot be copied, or is in FullyShardedDataParallel.
    """
    refuse_flattened(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value
    try:
        with _shared_between_copies():
            copied = copy.deepcopy(model, memo)
            for module, original in zip(copied.modules(), model.modules(), strict=True):
                module.__dict__["_compiled_call_impl"] = None  # blocks compiled by themselves are traced as part of it
                if isinstance(function := original.__dict__.get("forward"), types.FunctionType | functools.partial):
                    module.__dict__["forward"] = _of_the_copy(function, memo)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied for a trace: {error}") from error
    for module, original in zip(copied.modules(), model.modules(), strict=True):
        module.__dict__[_COPY] = True
        for ordinal, site in known_sites(original).items():
            remember_site(module, ordinal, site)
    return detach(copied)


@contextlib.contextmanager
def _shared_between_copies() -> Iterator[None]:
    """Let a deep copy share process groups and meshes, which have no copy: it is to run on the same ranks."""
    kinds: list[Any] = []
    if torch.distributed.is_available():
        kinds = [torch.distributed.ProcessGroup, *torch.distributed.ProcessGroup.__subclasses__()]
        mesh = sys.modules.get("torch.distributed.device_mesh")
        kinds += [mesh.DeviceMesh] if mesh is not None else []
    known = {kind: copyreg.dispatch_table.get(kind) for kind in kinds}
    for kind in kinds:
        copyreg.dispatch_table[kind] = lambda _: "itself"  # by a name, which a deep copy takes for the object it has
    try:
        yield
    finally:
        for kind, reduce in known.items():
            copyreg.dispatch_table.pop(kind)
            if reduce is not None:
                copyreg.dispatch_table[kind] = reduce


def _of_the_copy(function: Any, memo: dict[int, Any]) -> Any:
    """A ``forward`` put on a module, as the copy has it: a function is not copied, and may hold on to the model.

    ``memo`` is that of ``deepcopy``, which says what each object has become.
    """
    compiled = getattr(function, "_torchdynamo_orig_callable", None)
    if compiled is not None:  # m.forward = torch.compile(m.forward)
        return _of_the_copy(copy.deepcopy(compiled, memo), memo)
    if isinstance(function, functools.partial):
        arguments = [_copied(argument, memo) for argument in function.args]
        keywords = {name: _copied(argument, memo) for name, argument in function.keywords.items()}
        return functools.partial(_of_the_copy(function.func, memo), *arguments, **keywords)
    if not isinstance(function, types.FunctionType) or not function.__closure__:
        return function
    cells = tuple(types.CellType(_copied(cell.cell_contents, memo)) for cell in function.__closure__)
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _copied(content: Any, memo: dict[int, Any]) -> Any:
    """What a function holds on to, as the copy has it; itself where that cannot be copied."""
    if isinstance(content, types.FunctionType | functools.partial):
        return _of_the_copy(content, memo)
    try:
        copied = copy.deepcopy(content, memo)
    except Exception:  # a lock, a file: nothing that leads back to the model
        return content
    if not isinstance(content, nn.Module) and copied is not content:
        for name, value in getattr(content, "__dict__", {}).items():  # diffusers' hooks keep what they replaced so
            if isinstance(value, types.FunctionType | functools.partial):
                copied.__dict__[name] = _of_the_copy(value, memo)
    return copied
