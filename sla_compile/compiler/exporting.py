"""``export``: a prepared model as an ``ExportedProgram`` that holds ``sla::forward`` where the compiled model does.

``torch.export`` traces a model as it runs uncompiled, which is dense. So the model is exported with the markers of
its gates in the graph, that graph is rewritten by the passes of the backend, and exported once more, which traces the
op and checks every shape again. Names of parameters, arguments and outputs stay the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

import sla_compile.ops  # noqa: F401  the library op that an exported program calls
from sla_compile.compat import Frame, always_holds
from sla_compile.compiler.preparation import dry_run, unwrapped
from sla_compile.compiler.rewriting import apply_decisions
from sla_compile.compiler.sites import Settings, Site, find_sites
from sla_compile.gate import gates, marked_exports, model_config
from sla_compile.module_paths import module_paths
from sla_compile.passes.decide import Keep, Rewrite
from sla_compile.passes.find_attention import graphs

__all__ = ["export"]


def export(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    strict: bool = False,
) -> ExportedProgram:
    """Export a prepared model by ``torch.export``, its attention made sparse-linear as in the compiled model.

    The program is for inference and for training, and for ``torch._inductor.aoti_compile_and_package``. Whoever
    loads it has to ``import sla_compile.ops`` first, which registers the op.

    Args:
        model: a module that ``prepare`` gave its gates; also one that is compiled already.
        args, kwargs, dynamic_shapes, strict: as of ``torch.export.export``.

    Raises:
        ValueError: the model has no gates; an attention with a gate would stay dense in the program; one that would be
            sparse in the compiled model has no gate; or the number of tokens, dynamic, decides which it is.
    """
    model = unwrapped(model)
    if not gates(model):
        name = type(model).__name__
        raise ValueError(f"{name} has no gates; accepted: a model that sla_compile.prepare(...) prepared")
    call = tuple(args), dict(kwargs or {})
    with marked_exports():
        program = torch.export.export(model, *call, dynamic_shapes=dynamic_shapes, strict=strict)
    graph = program.module()
    _rewrite(graph, model, program.range_constraints, _numbers(model, call))
    return torch.export.export(graph, *call, dynamic_shapes=dynamic_shapes, strict=False)


@dataclass(frozen=True)
class _Program:
    """An exported program's stand-in for Dynamo's frame, as far as sites ask for it."""

    root: nn.Module
    locals: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False

    def module(self, identity: int) -> nn.Module | None:
        return next((module for module in self.root.modules() if id(module) == identity), None)

    def root_module(self) -> nn.Module:
        return self.root


def _numbers(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[int, list[int]]:
    """The numbers of the attention calls of each owner, by its ``id``, in the order of the forward.

    Of a call, torch.export says only in which line of a forward it is, or not even that. So Dynamo is asked.
    """
    modules = dict(module_paths(model))
    numbers: dict[int, list[int]] = {}
    for site in dry_run(model, *call, Settings.of(model_config(model))).sites:
        if site.path in modules and site.owner:
            numbers.setdefault(id(modules[site.path]), []).append(site.ordinal)
    return numbers


def _rewrite(
    graph: fx.GraphModule, model: nn.Module, ranges: Mapping[Any, Any], ordinals: Mapping[int, Sequence[int]]
) -> None:
    """Put the op where the compiled model has it, and take the markers out; ValueError where that cannot be."""
    paths = {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}
    for module in graphs(graph):
        for node in list(module.graph.nodes):
            _as_traced_by_dynamo(node, paths)
    found = find_sites(graph, Settings.of(None), cast(Frame, _Program(model)), ordinals)
    _check(found.sites, model, ranges)
    apply_decisions(found.sites, found.markers, graphs(graph))


def _check(sites: Sequence[Site], model: nn.Module, ranges: Mapping[Any, Any]) -> None:
    problems = []
    reached = set()
    for site in sites:
        reached.add(id(site.gate))
        decision, path = site.decision, site.path or type(model).__name__
        if isinstance(decision, Keep) and site.gate is not None:
            problems.append(f"{path}: has a gate, but would stay dense: {decision}")
        elif isinstance(decision, Rewrite) and site.marker is None:
            problems.append(f"{path}: has no gate; accepted: sla_compile.prepare(...) with these arguments")
        elif decision.condition is not None and not always_holds(decision.condition, ranges):
            accepted = "dynamic_shapes within it, or prepare(...) with min_tokens=0"
            problems.append(f"{path}: sparse only if {decision.condition}; accepted: {accepted}")
    for path, gate in gates(model).items():
        if id(gate) not in reached:
            accepted = "F.scaled_dot_product_attention, or softmax(q @ k.mT * scale) @ v in its usual spellings"
            problems.append(f"{path}: its attention is not found in what torch.export traces; accepted: {accepted}")
    if problems:
        raise ValueError(f"{type(model).__name__} cannot be exported: " + "; ".join(problems))


def _as_traced_by_dynamo(node: fx.Node, paths: Mapping[str, int]) -> None:
    """Name the modules of ``node`` by their ids, of ``paths``; take it out where exporting again makes it again."""
    stack = {}
    for key, (name, kind) in node.meta.get("nn_module_stack", {}).items():
        path, _, call = name.partition("@")
        identity, _, later_call = str(key).partition("@")
        if not identity.isdigit():  # strict export has the ids
            if path not in paths:  # what torch.export puts beside a symbolic size
                continue
            identity = str(paths[path])
        stack[f"{identity}@{later_call or call or 0}"] = (name, kind)
    node.meta["nn_module_stack"] = stack
    if node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
        node.graph.erase_node(node)
