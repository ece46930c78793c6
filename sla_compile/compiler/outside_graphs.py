"""Attention that no graph holds, as far as code tells: a backend sees no more than what Dynamo traced."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from sla_compile.compat import Frame, forward_functions
from sla_compile.compiler.compiled_sites import compiled_sites, shared_sites
from sla_compile.compiler.dense_warnings import warn_of_outside
from sla_compile.compiler.site_report import graph_break
from sla_compile.config import SLAConfig
from sla_compile.gate import PREPARED
from sla_compile.memory import breaks_in
from sla_compile.module_paths import module_paths

__all__ = ["outside_graphs", "tell_of_outside"]

ATTENTION = frozenset(
    {
        "dispatch_attention_fn",
        "flash_attn_func",
        "flash_attn_varlen_func",
        "flex_attention",
        "memory_efficient_attention",
        "multi_head_attention_forward",
        "scaled_dot_product_attention",
        "varlen_attn",
    }
)
"""Functions of libraries that are attention, by name."""


def outside_graphs(model: nn.Module, found: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of ``model`` that call a function of `ATTENTION` by name, by path, without those ``found`` in graphs.

    They may not have been called at all. What code of another model of the class may serve is left out. Attention that
    is written by hand is not told from other code, so not here.
    """
    known, shared = {*found}, shared_sites(model)
    outside = {}
    for local, module in module_paths(model):
        path = local or module.__dict__.get(PREPARED, (None, ""))[1]  # as the reports of sites say it
        # nn.TransformerEncoderLayer owns the attention of its self_attn.
        names = {path, path.rpartition(".")[0]} if isinstance(module, nn.MultiheadAttention) else {path}
        if known.isdisjoint(names) and local not in shared and _calls_attention(module):
            outside[path] = module
    return outside


def tell_of_outside(gm: fx.GraphModule, config: SLAConfig, frame: Frame, run: Callable[..., Any]) -> Callable[..., Any]:
    """Warn, once a module, of such attention where a graph break cut the forward of ``frame``, when all of it has run.

    That is at the last graph of the forward, or, as Dynamo makes none for an end without tensors, when its first graph
    runs for the second time: so this returns what is to be run in place of ``run``, the compiled ``gm``.
    """
    root = frame.root_module()
    if root is None or not (frame.resumed or graph_break(gm)):
        return run
    if graph_break(gm) is None:
        _warn(root, config)
        return run
    alive, runs = weakref.ref(root), iter((False, True))

    def told(*args: Any) -> Any:
        if next(runs, False) and (module := alive()) is not None:
            _warn(module, config)
        return run(*args)

    return told


def _warn(root: nn.Module, config: SLAConfig) -> None:
    outside = outside_graphs(root, (site.path for site in compiled_sites(root)))
    selected = {}
    for path, module in outside.items():
        settings, place = module.__dict__.get(PREPARED, (config, path))
        if settings.rejects(place) is None and config.rejects(place) is None:
            selected[path] = module
    breaks = breaks_in(root)
    warn_of_outside(selected, f" (graph break: {breaks[-1].reason})" if breaks else "")


def _calls_attention(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return any(name in str(getattr(module, "code", "")) for name in ATTENTION)
    if isinstance(module, fx.GraphModule):  # Dynamo traces it, and its owner is the module that calls it
        return False
    pending, seen = [*forward_functions(module)], set()
    while pending:
        function = pending.pop()
        if function.__code__ not in seen:
            seen.add(function.__code__)
            names = {*_names(function.__code__)}
            if not ATTENTION.isdisjoint(names):
                return True
            pending += _callees(module, function, names)
    return False


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _callees(module: nn.Module, function: types.FunctionType, names: Iterable[str]) -> Iterator[types.FunctionType]:
    """Functions of a user's that ``function`` may call by ``names``: of its file, of ``module``, or of an object there.

    The last is how diffusers' processors are called; a child that is a module is looked at by itself.
    """
    for name in names:
        held = module.__dict__.get(name)
        known = function.__globals__.get(name)
        if isinstance(known, type) and issubclass(known, torch.autograd.Function):
            known = known.forward
        methods = (vars(kind).get(name) for kind in type(module).__mro__ if kind is not nn.Module)
        for callee in (known, held, vars(type(held)).get("__call__"), *methods):
            plain = inspect.unwrap(getattr(callee, "__func__", callee)) if callable(callee) else None
            if isinstance(plain, types.FunctionType) and not (plain.__module__ or "").startswith("torch."):
                yield plain
