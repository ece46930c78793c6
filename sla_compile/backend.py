"""``torch.compile(model, backend="sla")``: find attention, bind gates, rewrite, hand the graph to Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import fx

import sla_compile.ops.flops  # noqa: F401  lets FlopCounterMode count the ops
from sla_compile.compat import (
    Frame,
    backend_function,
    count_apart,
    current_frame,
    on_recompile_limit,
    sound_options,
    trace_ulysses,
    user_errors,
)
from sla_compile.compiler.compiled_sites import remember
from sla_compile.compiler.dense_warnings import warn_of_dense, warn_of_untrained_sites
from sla_compile.compiler.left_behind import warn_of_gates_left_behind
from sla_compile.compiler.logs import log_rewritten
from sla_compile.compiler.nothing_rewritten import warn_of_nothing
from sla_compile.compiler.outside_graphs import tell_of_outside
from sla_compile.compiler.precompile import compile_ahead
from sla_compile.compiler.refused_engines import refuse_engine
from sla_compile.compiler.rewriting import rewrite_graph, take_back_gates
from sla_compile.compiler.sites import Settings, Site
from sla_compile.config import SLAConfig
from sla_compile.memory import remember_backend, take_unproven
from sla_compile.ops.reorder import inline_in_inductor
from sla_compile.passes.decide import Rewrite
from sla_compile.user_warnings import RecompileLimitWarning, TokenOrderWarning, warn_user

__all__ = ["sla"]

CompiledFunction = Callable[..., Any]


def sla(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | SLAConfig | None = None,
    name: str | None = None,
) -> CompiledFunction:
    """The Dynamo backend, registered under the entry point group ``torch_dynamo_backends`` as ``sla``.

    Args:
        gm: the torch-level graph of one frame.
        example_inputs: its inputs.
        mode: ``torch.compile``'s mode, for Inductor.
        options: fields of ``SLAConfig`` and options of Inductor, or an ``SLAConfig``.
        name: ``torch.compile``'s name for this compile (torch 2.15 hands it on); not used.

    Raises:
        ValueError: an option is refused, or contradicts what a gate was prepared with.
    """
    with user_errors():
        settings = Settings.of(options, mode)
    frame = current_frame()
    if trace_ulysses(refuse_engine) and frame is not None:  # diffusers was imported after this package
        frame.restart("sla_compile lets Dynamo trace diffusers' Ulysses attention")
    if frame is None:
        return _compile(gm, example_inputs, settings, None)
    try:
        compiled = _compile(gm, example_inputs, settings, frame)
    except Exception as error:
        if not frame.restarts(error):
            take_back_gates(frame)
        raise
    take_unproven(frame.code)
    return compiled


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, frame: Frame | None
) -> CompiledFunction:
    sites, unused = rewrite_graph(gm, settings, frame)
    compile_ahead(sites)
    log_rewritten(gm, sites, frame)
    if frame is not None:
        remember_backend(backend_function(frame.compiler))
        remember(gm, sites, unused, frame)
        warn_of_nothing(gm, sites, frame)
        if any(isinstance(site.decision, Rewrite) for site in sites):
            on_recompile_limit(frame.code, partial(_warn_of_limit, sites[0].path or "the compiled module"))
        count_apart(frame.code, frame.compiler, "".join(site.gate.settings for site in sites if site.gate is not None))
    warn_of_dense(sites, unused)
    warn_of_untrained_sites(sites, frame)
    _warn_of_order(sites)
    warn_of_gates_left_behind(sites, frame)
    compile_inner = partial(_compile_inner, config=settings.config)
    if frame is None:
        return compile_inner(gm, example_inputs)
    compiled: CompiledFunction = frame.in_buckets(compile_inner)(gm, example_inputs)
    return tell_of_outside(gm, settings.config, frame, compiled)


def _warn_of_limit(path: str, limit: str) -> None:
    warn_user(
        f"{path}: Dynamo reached torch._dynamo.config.{limit} and compiles its forward no more: calls that need other "
        f"code run as the model is written, their attention dense. Raise that limit, let what changes be dynamic "
        f"(torch.compile(dynamic=True)), or take fullgraph=True, with which this is an error",
        RecompileLimitWarning,
    )


def _warn_of_order(sites: Sequence[Site]) -> None:
    """Tell where another order than the model's was asked for and could not be had, once for each reason."""
    for site in sites:
        reason = site.decision.order.obstacle if isinstance(site.decision, Rewrite) else ""
        if reason and not site.call.is_causal:
            warn_user(
                f"{site.path or 'the compiled module'}: reorder={site.config.reorder!r}, but its tokens stay in the "
                f"model's order: {reason}",
                TokenOrderWarning,
            )
            return


def _compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], config: SLAConfig) -> CompiledFunction:
    inputs = list(example_inputs)
    if config.inner == "eager":
        return gm.forward
    if config.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        from sla_compile.compiler.cache_key import in_cache_key

        inline_in_inductor()
        # Also around the inner one, which a backward may reach only after this has returned.
        inner = in_cache_key(compile_fx_inner)
        patches = {**sound_options(), **config.inductor} or None
        compiled: Any = in_cache_key(compile_fx)(gm, inputs, inner_compile=inner, config_patches=patches)
        return cast(CompiledFunction, compiled)
    from torch._dynamo import lookup_backend

    other: CompiledFunction = lookup_backend(config.inner)(gm, inputs)
    return other


remember_backend(sla)
trace_ulysses(refuse_engine)
