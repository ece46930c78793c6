"""``torch.compile(model, backend="sla")``: find attention, bind gates, rewrite, hand the graph to Inductor."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import fx, nn

import sla_compile.ops  # noqa: F401  the library ops that a rewritten graph calls
from sla_compile.compat import (
    Frame,
    compiled_siblings,
    current_frame,
    data_parallel,
    fully_sharded,
    on_recompile_limit,
    user_errors,
)
from sla_compile.compiler.precompile import compile_ahead
from sla_compile.compiler.sites import BROKEN, Settings, Site, find_sites, remember_calls
from sla_compile.config import SLAConfig
from sla_compile.gate import (
    attach_gate,
    detach_gate,
    gate_dtype,
    mark_from_children,
    refuse_taken_name,
    remember_dense,
)
from sla_compile.ops.reorder import inline_in_inductor
from sla_compile.passes.decide import Keep, Rewrite
from sla_compile.passes.hoist_gathers import hoist_gathers
from sla_compile.passes.rewrite import erase_markers, replace_attention
from sla_compile.reporting.site_report import remember, remember_break

__all__ = ["RecompileLimitWarning", "TokenOrderWarning", "UntrainedGatesWarning", "rewrite_graph", "sla"]

CompiledFunction = Callable[..., Any]


class UntrainedGatesWarning(UserWarning):
    """Attention was made sparse whose gates are still zero."""


class RecompileLimitWarning(UserWarning):
    """Dynamo gave up compiling a forward: calls that it has no code for run dense."""


class TokenOrderWarning(UserWarning):
    """The order of tokens that was asked for could not be had."""


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
    sites = rewrite_graph(gm, settings, frame)
    compile_ahead(sites)
    if frame is not None:
        remember(sites, frame.code)
        remember_break(gm, frame.root_module())
        if any(isinstance(site.decision, Rewrite) for site in sites):
            on_recompile_limit(frame.code, partial(_warn_of_limit, sites[0].path or "the compiled module"))
    _warn_untrained(sites)
    _warn_of_order(sites)
    compile_inner = partial(_compile_inner, config=settings.config)
    return cast(CompiledFunction, (frame.in_buckets(compile_inner) if frame else compile_inner)(gm, example_inputs))


def rewrite_graph(gm: fx.GraphModule, settings: Settings, frame: Frame | None) -> list[Site]:
    """Rewrite ``gm`` in place and return its sites with their final decisions.

    Where a site to be rewritten has no gate yet, gates are injected and Dynamo starts this frame over, so this
    function does not return then. Outside Dynamo (no frame) nothing owns the attention and all is kept.

    Raises:
        ValueError: options contradict a gate, or an owner has something else under a gate's name. No gate has
            been injected then.
    """
    if frame is None:
        return []
    with user_errors():
        sites, markers = find_sites(gm, settings, frame)
        remember_calls(sites, frame)
        if (sites or markers) and frame.join_buckets():
            frame.restart("sla_compile sees the graph before it is cut into DDP's buckets")
        injected = _inject(sites, frame)
    if injected:
        frame.drop_superseded()
        frame.restart(f"sla_compile gave {injected} attention(s) a gate")
    sites = [_settle(site, frame) for site in sites]
    for site in sites:
        if isinstance(site.decision, Rewrite) and site.marker is not None:
            replace_attention(site.call, site.decision, site.marker, site.config.compiled_options())
        elif site.owner is not None:
            remember_dense(site.owner, frame.code)
    erase_markers(markers)
    for module in {id(site.call.module): site.call.module for site in sites}.values():
        hoist_gathers(module)
        module.recompile()
    return sites


# Attention whose gate was injected in this frame, until its marker turns up; a gate whose marker does not is
# taken back, so that no frame is restarted twice for it and nobody trains a gate that is not used.
_AWAITED: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()


def _inject(sites: list[Site], frame: Frame) -> int:
    """Give every site that needs one its gate, or a marker that this frame can see; how many changed."""
    root = frame.root_module()
    missing = [
        (site, site.owner, site.decision)
        for site in sites
        if isinstance(site.decision, Rewrite) and site.marker is None and site.owner is not None
        if site.ordinal not in _AWAITED.get(site.owner, ())
    ]
    for site, owner, _ in missing:
        refuse_taken_name(owner, site.ordinal, site.gate_path)
        if site.gate is None:
            sharded = "fully_shard" if fully_sharded(owner) else None
            refuse_unsynchronised(site.gate_path, "DistributedDataParallel" if data_parallel() else sharded)
    changed = []
    for site, owner, decision in missing:
        had_gate = site.gate is not None
        if not had_gate:
            _attach(site, owner, decision)
            _AWAITED.setdefault(owner, set()).add(site.ordinal)
        newly_marked = owner is root and mark_from_children(owner)
        if newly_marked or not had_gate:
            changed.append(site)
    if changed and root is not None:
        _inject_siblings(changed, root, frame)
    return len(changed)


def refuse_unsynchronised(gate_path: str, wrapper: str | None) -> None:
    """Raise ValueError where a new gate's gradients would stay on this process: ``wrapper`` has not seen it."""
    if wrapper is not None and torch.is_grad_enabled():
        raise ValueError(
            f"{gate_path}: the model is in {wrapper} already, so each process would train a gate made now on "
            f"its own; call sla_compile.prepare(model, ...) first, {wrapper} after it"
        )


def _attach(site: Site, owner: nn.Module, decision: Rewrite) -> None:
    shape = decision.shape
    attach_gate(
        owner,
        site.ordinal,
        head_dim=int(shape.head_dim),
        heads=int(shape.heads),
        config=site.config,
        model_config=site.model_config,
        device=shape.device,
        dtype=gate_dtype(owner, shape.dtype),
        path=site.gate_path,
        seen=site.seen,
    )


def _inject_siblings(sites: list[Site], root: nn.Module, frame: Frame) -> None:
    """The same gates for every module that shares this code: it would fail the guards and recompile otherwise."""
    names = {id(module): name for name, module in root.named_modules()}
    for sibling in compiled_siblings(root, frame.compiler):
        for site in sites:
            name = names.get(id(site.owner))
            if name is None or not isinstance(site.decision, Rewrite):
                continue
            try:
                owner = sibling.get_submodule(name)
            except AttributeError:  # a sibling of another structure compiles by itself
                continue
            _attach(site, owner, site.decision)
            if owner is sibling:
                mark_from_children(owner)


def _settle(site: Site, frame: Frame) -> Site:
    """``site`` with the decision that holds now that no gate can be added any more."""
    owner = site.owner
    if owner is None or not isinstance(site.decision, Rewrite):
        return site
    awaited = site.ordinal in _AWAITED.get(owner, ())
    if awaited:
        _AWAITED[owner].discard(site.ordinal)
    if site.marker is not None:
        return site
    if awaited:
        detach_gate(owner, site.ordinal)
    broken = frame.resumed and owner is frame.root_module()
    keep = (
        Keep(BROKEN, site.path, "an attention without a break before it")
        if broken
        else Keep("the traced graph does not reach its gate", site.path, "a forward that calls its submodules")
    )
    return Site(**{**site.__dict__, "decision": keep})


def _warn_untrained(sites: list[Site]) -> None:
    global _warned
    if _warned:
        return
    rewritten = [site for site in sites if isinstance(site.decision, Rewrite)]
    untrained = [site.path for site in rewritten if site.gate is not None and not site.gate.trained()]
    if untrained:
        _warned = True
        warnings.warn(
            f"{len(untrained)} attention(s) are now sparse with gates that are still zero (first: "
            f"{untrained[0] or 'the compiled module'!r}): fine-tune the model or load trained gates",
            UntrainedGatesWarning,
            stacklevel=2,
        )


_warned = False


def _warn_of_limit(path: str, limit: str) -> None:
    warnings.warn(
        f"{path}: Dynamo reached torch._dynamo.config.{limit} and compiles its forward no more: calls that need other "
        f"code run as the model is written, their attention dense. Raise that limit, let what changes be dynamic "
        f"(torch.compile(dynamic=True)), or take fullgraph=True, with which this is an error",
        RecompileLimitWarning,
        stacklevel=2,
    )


def _warn_of_order(sites: list[Site]) -> None:
    """Tell where another order than the model's was asked for and could not be had, once for each reason."""
    for site in sites:
        reason = site.decision.order.obstacle if isinstance(site.decision, Rewrite) else ""
        if reason and not site.call.is_causal:
            warnings.warn(
                f"{site.path or 'the compiled module'}: reorder={site.config.reorder!r}, but its tokens stay in the "
                f"model's order: {reason}",
                TokenOrderWarning,
                stacklevel=3,
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
        patches = dict(config.inductor) or None
        compiled: Any = in_cache_key(compile_fx)(gm, inputs, inner_compile=inner, config_patches=patches)
        return cast(CompiledFunction, compiled)
    from torch._dynamo import lookup_backend

    other: CompiledFunction = lookup_backend(config.inner)(gm, inputs)
    return other
