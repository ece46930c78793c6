"""``prepare``: give a model its gates before anything is compiled; and the dry run behind it and ``explain``.

The dry run traces the model with Dynamo on a shell: a deep copy that shares every tensor with the model. No graph is
executed; each returns zeros of the right shapes (``stand_ins``). So nothing the trace does to Python state reaches
the model, no attention is computed, and no number of the model changes.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import sla_compile
from sla_compile.compat import (
    current_frame,
    forget_code,
    is_user_error,
    no_compile_under,
    plain_function_name,
    runs_forward_of,
    throw_away_compile,
    trace_ulysses,
)
from sla_compile.compiler.call_watch import watch
from sla_compile.compiler.example_call import example_call
from sla_compile.compiler.fake_run import stand_ins
from sla_compile.compiler.left_behind import note_folder
from sla_compile.compiler.model_copy import traceable_copy
from sla_compile.compiler.nothing_rewritten import why_nothing
from sla_compile.compiler.patterns import warn_unmatched
from sla_compile.compiler.refused_engines import refuse_engine
from sla_compile.compiler.rewriting import refuse_unsynchronised, rewrite_graph
from sla_compile.compiler.site_numbers import spare_numbers
from sla_compile.compiler.site_report import GraphBreak, SiteReport, describe, graph_break
from sla_compile.compiler.sites import Settings
from sla_compile.config import SLAConfig
from sla_compile.gate import (
    PREPARED,
    Gate,
    detach_gate,
    gate_name,
    gates,
    mark_prepared,
    model_config,
    own_gates,
    owner_path,
)
from sla_compile.gate_attachment import attach_gate, refuse_other_form
from sla_compile.gate_settings import NO_GRIDS, GateSpec, SeenGrids, all_grids
from sla_compile.module_paths import module_paths
from sla_compile.passes.token_order import Grid
from sla_compile.user_warnings import TokenOrderWarning, warn_user

__all__ = ["DryRun", "dry_run", "left_out_again", "prepare", "unwrapped"]


@dataclass
class DryRun:
    """What a trace of a model found; paths are the model's own."""

    sites: list[SiteReport] = field(default_factory=list)
    gates: dict[str, Gate] = field(default_factory=dict)
    """The gates that the shell was given, by their module path."""
    owners: set[str] = field(default_factory=set)
    """Module path of every owner of an attention, rewritten or kept."""
    spare: set[str] = field(default_factory=set)
    """Module path of every gate of the model that has no attention any more: a line has one gate, and had several."""
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    stopped: Exception | None = None
    """What ended the trace early: the model's own code, after a graph break, on values that a trace does not have."""


def prepare(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    call: Callable[[], Any] | None = None,
    config: SLAConfig | Mapping[str, Any] | None = None,
) -> nn.Module:
    """Inject the gates of every attention that ``backend="sla"`` will rewrite, and return ``model``.

    Call it before the optimizer, FSDP or a checkpoint needs the gates' parameters. Until it is compiled, a prepared
    model computes exactly what it did. Twice is the same as once; again with a ``config`` changes the settings and
    keeps the gates' values; again with another number of tokens finds their grid. A UserWarning says so, and why, where
    no attention will be.

    Args:
        model: any module; also one that is compiled already.
        args, kwargs: an example call, ``model(*args, **kwargs)``, with the shapes it will be used at (the
            convention of ``torch.export.export``). It is traced, not executed.
        call: instead of them, a function that calls ``model``, such as ``lambda: pipe("a prompt")``: it runs up to its
            first call of ``model``, which is the example.
        config: an ``SLAConfig`` or a mapping of its fields; None: what the model was prepared with last, by a fit or a
            file too, or the defaults.

    Raises:
        ValueError: a setting is refused, or none is given where parts of the model were prepared by themselves;
            ``call`` does not call the model; a gate of another shape is there; settings that leave out a site would
            drop its trained gate; the model is in DistributedDataParallel already, which would not see a new gate; or
            the model reads values after a graph break that a trace does not have. Nothing is changed then.
    """
    model = unwrapped(model)
    settings = Settings.of(config) if config is not None else _settings_there(model)
    run = _whole_run(model, *example_call(model, args, kwargs, call), settings)
    modules = dict(module_paths(model))
    specs = {path: replace(gate.spec(), path=path, model_config=settings.config) for path, gate in run.gates.items()}
    planned = {(modules[owner_path(path)], spec.ordinal) for path, spec in specs.items()}
    _check(model, modules, specs, planned, run.spare)
    for owner in list(model.modules()):
        for gate in list(own_gates(owner).values()):
            if (owner, gate.ordinal) not in planned:
                detach_gate(owner, gate.ordinal)
    before = {path: gate.seen for path, gate in gates(model).items()}
    specs = {path: replace(spec, seen=all_grids(before.get(path, NO_GRIDS), spec.seen)) for path, spec in specs.items()}
    _tell_replaced(before, specs)
    for path, spec in specs.items():
        gate = run.gates[path]
        attach_gate(modules[owner_path(path)], spec, device=gate.device, dtype=gate.dtype)
    for path in run.owners:
        modules[path].__dict__[PREPARED] = (settings.config, path)
    note_folder(model, (modules[path] for path in run.owners))
    watch(model)
    warn_unmatched(model, settings.config, {site.path for site in run.sites})
    if not any(site.rewritten for site in run.sites):
        warn_user(f"prepare: no attention of {type(model).__name__} will be rewritten: {why_nothing(run.sites)}")
    return model


def _settings_there(model: nn.Module) -> Settings:
    """What ``model`` was prepared with; ValueError where its parts were by themselves, and one would lose its own."""
    settings = Settings.of(model_config(model))
    for path, gate in gates(model).items():
        if conflicts := settings.conflicts(owner_path(path), gate.config):
            raise ValueError(
                f"prepare: {path} was prepared in another model, or a part of this: {'; '.join(conflicts)}; accepted: "
                f"a config for all, or prepare of that part"
            )
    return settings


def _tell_replaced(before: Mapping[str, SeenGrids], specs: Mapping[str, GateSpec]) -> None:
    """Warn where a grid took the place of another in as many tokens, which gates knew ``before``."""
    lost = {
        path: [grid for grid in before.get(path, NO_GRIDS) if grid and grid not in spec.seen]
        for path, spec in specs.items()
        if spec.config.looks_for_grid
    }
    if first := next((path for path, grids in lost.items() if grids), None):
        old, new = lost[first][0], next(grid for grid in reversed(specs[first].seen) if grid)
        warn_user(
            f"prepare: {first} knew {old.tokens} tokens as a grid of {_sizes(old)}, and knows them as {_sizes(new)} "
            f"now ({sum(map(bool, lost.values()))} gate(s)): blocks compiled by themselves do not tell these apart",
            TokenOrderWarning,
        )


def _sizes(grid: Grid) -> str:
    return " x ".join(map(str, grid.sizes))


def left_out_again(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Module paths of the gates that ``model``, prepared with these arguments as it was, would lose; it keeps them.

    Raises ValueError as `prepare` does where the trace ends early.
    """
    run = _whole_run(model, args, kwargs, Settings.of(model_config(model)))
    return [path for path in gates(model) if path not in run.gates and path not in run.spare]


def _whole_run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], settings: Settings) -> DryRun:
    """`dry_run`; ValueError where it ended early."""
    run = dry_run(model, args, kwargs, settings)
    if run.stopped is not None:
        found = run.graph_breaks[-1]
        raise ValueError(
            f"{type(model).__name__}: {found.reason} ({found.file}:{found.line}). Not all gates can be known before: "
            f"compile the model and call it once, which injects them"
        ) from run.stopped
    return run


def unwrapped(model: nn.Module) -> nn.Module:
    """``model``, or the module inside where ``torch.compile`` made it; TypeError where it is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _check(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    specs: Mapping[str, GateSpec],
    planned: Set[tuple[nn.Module, int]],
    spare: Set[str],
) -> None:
    """Raise before anything is changed; ``planned`` are the owners and ordinals of the gates of ``specs``."""
    dropped = []
    for path, gate in gates(model).items():
        if (modules[owner_path(path)], gate.ordinal) not in planned and path not in spare and gate.trained():
            dropped.append(path)
    if dropped:
        raise ValueError(
            f"these settings leave out attention whose gate is trained: {', '.join(dropped)}; "
            f"select it again, or call sla_compile.detach(model) first to drop every gate"
        )
    replicated = {
        inner
        for outer in model.modules()
        if isinstance(outer, nn.parallel.DistributedDataParallel)
        for inner in outer.modules()
    }
    for path, spec in specs.items():
        owner = modules[owner_path(path)]
        existing = own_gates(owner).get(gate_name(spec.ordinal))
        if existing is not None:
            refuse_other_form(existing, spec)
        else:
            # one in fully_shard could not be copied for the dry run
            refuse_unsynchronised(path, "DistributedDataParallel" if owner in replicated else None)


def _refuse_where_nothing_compiles(model: nn.Module) -> None:
    if hindrance := no_compile_under():
        raise ValueError(
            f"{type(model).__name__}: cannot be traced under {hindrance}, where Dynamo compiles nothing; accepted: "
            f"prepare and explain outside it"
        )


def dry_run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], settings: Settings) -> DryRun:
    """Trace ``model(*args, **kwargs)`` as ``backend="sla"`` would compile it; ``model`` is left untouched."""
    _refuse_where_nothing_compiles(model)
    trace_ulysses(refuse_engine)
    shell = traceable_copy(model)
    paths = {id(module): path for path, module in module_paths(shell)}
    mark_prepared(shell, settings.config)
    run = DryRun()
    refused: list[bool] = []
    returned: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        frame = current_frame()
        frames.extend([frame] if frame is not None else [])
        try:
            sites, _ = rewrite_graph(gm, settings, frame, once=True)
        except ValueError:
            refused.append(True)
            raise
        for site in sites:
            run.sites.append(describe(site))
            if site.owner is not None and id(site.owner) in paths:
                run.owners.add(paths[id(site.owner)])
        if (found := graph_break(gm)) is not None:
            run.graph_breaks.append(found)
        without_running = stand_ins(gm)

        def run_once(*inputs: Any) -> tuple[Any, ...]:
            returned.append(True)
            # The next call of this code, by another block perhaps, is another site.
            if frame is not None:
                forget_code(frame.code, frame.compiler)
            return without_running(*inputs)

        return run_once

    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with (
        throw_away_compile() as frames,
        torch.random.fork_rng([d.index for d in devices if d.index is not None]),
        torch.no_grad(),
    ):
        try:
            torch.compile(shell, backend=backend, dynamic=False)(*args, **kwargs)
        except Exception as error:
            if refused or not returned or is_user_error(error):  # the call itself is wrong, or its settings are
                raise
            run.stopped = error
        given_up = not any(runs_forward_of(frame.code, shell) for frame in frames)
    run.gates = gates(shell)
    for path, owner in module_paths(shell):
        run.spare.update(f"{path}.{gate_name(ordinal)}".lstrip(".") for ordinal in spare_numbers(owner))
    if run.stopped is not None:
        run.graph_breaks.append(_end_of_trace(run.stopped))
    elif run.sites and given_up:
        # Dynamo gives up such a forward with no word to the backend, and compiles what it calls.
        reason = f"{type(model).__name__}.forward is not compiled, only what it calls (a break in a loop, say)"
        run.graph_breaks.append(GraphBreak(reason))
    return run


def _end_of_trace(error: Exception) -> GraphBreak:
    """Where and why a trace stopped, and what to do."""
    stack: Any = getattr(error, "real_stack", None) or traceback.extract_tb(error.__traceback__)
    ours = (str(Path(torch.__file__).parent), str(Path(sla_compile.__file__).parent))
    user = [frame for frame in stack if not frame.filename.startswith((*ours, "<"))] or list(stack)
    text = next(iter(str(error).splitlines()), "")
    return GraphBreak(
        f"the trace stopped here, on a value that only a run gives ({type(error).__name__}: {text}); attention after "
        f"it is not listed: compile the model, call it once and see sla_compile.report(model)",
        user[-1].filename,
        user[-1].lineno or 0,
        plain_function_name(user[-1].name),
    )
