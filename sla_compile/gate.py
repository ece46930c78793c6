"""Gates: the trainable ``weight`` and ``bias`` of each attention site, and the marker that lets Dynamo see them.

A gate is a child module of the module that owns the attention, so it is in ``state_dict()``, ``parameters()``,
``.to()``, ``deepcopy``, FSDP and EMA with no help. A forward pre-hook of the owner calls the marker op on the
gate's parameters while Dynamo traces, and does nothing else: Dynamo itself lifts them as graph inputs, from the
module of *this* call, with its own guards, also inside activation checkpointing. The pass takes the marker's
arguments and erases it. A prepared model that is not compiled is exactly the dense model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sla_compile.ops.gate_marker  # noqa: F401  the op that marks a gate in a graph
from sla_compile.common.limits import FLOATING_DTYPES
from sla_compile.compat import forget_code, skip_as_root_frame
from sla_compile.compiler.memory import take_dense_code
from sla_compile.config import SLAConfig
from sla_compile.gate_settings import UNSEEN, Seen, settings_text
from sla_compile.module_paths import module_paths

__all__ = ["Gate", "attach_gate", "detach", "detach_gate", "gate_name", "gate_parameters", "gates", "model_config"]

PREPARED = "_sla_prepared"
"""Attribute of an owner: (SLAConfig, module path) that ``prepare`` saw it under; survives deepcopy and pickle."""

MILLION = 10**6
"""The unit of a gate's ``sparsity``."""


class Gate(nn.Module):
    """The gate of one attention site: O = O^s + O^l weight^T + bias (paper, section 5; here W and b).

    Attributes:
        weight: (D, D) shared by the heads, or (H, D, D) per head. Zero at start.
        bias: (D) or (H, D). Zero at start, so that an untuned SLA equals its sparse branch.
        log_scale: (H), where the settings have ``sparse_scale``; O = exp(log_scale) O^s + O^l weight^T + bias then,
            so that zero, as at the start, scales nothing. None without.
        sparsity: int64 (2,), topk and bottomk in millionths, read whenever the attention runs; a buffer. None
            where the settings have no ``max_topk``: they are constants of the compiled graph then.
        path: module path of the gate when it was made, for example ``"blocks.0.attn1.sla"``.
        config: the settings of this site.
        model_config: the settings the whole model was prepared with.
        ordinal: which attention call of its owner it belongs to, counted from 0.
        seen: the grids of tokens that this attention had in the whole model, for when only a part is compiled.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    log_scale: nn.Parameter | None
    sparsity: Tensor | None

    def __init__(
        self,
        *,
        head_dim: int,
        heads: int,
        config: SLAConfig,
        model_config: SLAConfig | None = None,
        path: str = "",
        ordinal: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seen: Seen = UNSEEN,
    ) -> None:
        super().__init__()
        lead = (heads,) if config.gate == "per_head" else ()
        # A parameter made under inference_mode could never be trained.
        with torch.inference_mode(False):
            weight = torch.zeros(*lead, head_dim, head_dim, device=device, dtype=dtype)
            bias = torch.zeros(*lead, head_dim, device=device, dtype=dtype)
            self.weight = nn.Parameter(weight)
            self.bias = nn.Parameter(bias)
            scale = nn.Parameter(torch.zeros(heads, device=device, dtype=dtype)) if config.sparse_scale else None
            self.register_parameter("log_scale", scale)
            # Integers, which a move to another floating dtype leaves alone.
            self.register_buffer("sparsity", _millionths(config, device))
        self.heads = heads
        self.head_dim = head_dim
        self.ordinal = ordinal
        self.path = path
        self.config = config
        self.model_config = model_config if model_config is not None else config
        # What the traced graph depends on, and so what Dynamo guards on: nothing in it differs from site to site.
        self.seen = seen
        self.settings = settings_text(config, seen)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero, and the settings' topk and bottomk: for a model that got its memory by ``to_empty``."""
        for parameter in self.parameters():
            parameter.zero_()
        if (shares := _millionths(self.config, self.weight.device)) is not None and self.sparsity is not None:
            self.sparsity.copy_(shares)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise TypeError(f"gate {self.path!r} is not called: the compiled attention reads its weight and bias")

    def extra_repr(self) -> str:
        kind = "per head" if self.weight.dim() == 3 else "shared"
        most = "" if self.config.max_topk is None else f" of at most {self.config.max_topk}"
        scaled = "" if self.log_scale is None else ", sparse branch scaled by head"
        return f"heads={self.heads}, head_dim={self.head_dim}, {kind}{scaled}, topk={self.shares()[0]}{most}"

    def shares(self) -> tuple[float, float]:
        """topk and bottomk as they are now; reads the buffer where there is one, so it may wait for the device."""
        if self.sparsity is None or self.sparsity.is_meta:
            return self.config.topk, self.config.bottomk
        topk, bottomk = (millionths / MILLION for millionths in self.sparsity.tolist())
        return min(topk, self.config.max_topk or 1.0), bottomk

    def trained(self) -> bool:
        """Whether any parameter has left zero. Reads the values, so it waits for the device."""
        if self.weight.is_meta:
            return False
        return any(bool(parameter.detach().any()) for parameter in self.parameters())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + name for name in ("weight", "bias", "log_scale")]
        if not any(name in state_dict for name in names) and not self.trained():
            return  # a checkpoint of the dense model: an untrained gate has nothing to miss
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _millionths(config: SLAConfig, device: torch.device | str | None) -> Tensor | None:
    if config.max_topk is None:
        return None
    shares = [round(config.topk * MILLION), round(config.bottomk * MILLION)]
    return torch.tensor(shares, dtype=torch.int64, device=device)


class GateMarker:
    """Forward pre-hook: marks the gates called ``names`` of ``owner``, or of the hooked module where it is None.

    Dynamo does not trace the hooks of the module whose ``forward`` it starts at. Such an owner is marked from
    its children instead, which it calls on the way to its attention; ``owner`` is then that parent.
    """

    def __init__(self, names: tuple[str, ...], owner: nn.Module | None = None) -> None:
        self.names = names
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_dynamo_compiling() or _MARK_EXPORTS[0]:
            owner = module if self.owner is None else self.owner
            for name in self.names:
                gate = getattr(owner, name)
                told = gate.ordinal, gate.settings, self.owner is not None
                torch.ops.sla.gate(gate.weight, gate.bias, gate.sparsity, gate.log_scale, *told)


skip_as_root_frame(GateMarker.__call__)

_MARK_EXPORTS = [False]


@contextlib.contextmanager
def marked_exports() -> Iterator[None]:
    """Within this, markers also appear where ``torch.export`` traces without Dynamo."""
    _MARK_EXPORTS[0] = True
    try:
        yield
    finally:
        _MARK_EXPORTS[0] = False


def gate_name(ordinal: int) -> str:
    """``sla`` for an owner's first attention call, ``sla_1`` for the second, and so on."""
    return "sla" if ordinal == 0 else f"sla_{ordinal}"


def own_gates(owner: nn.Module) -> dict[str, Gate]:
    """The gates that are children of ``owner``, by name."""
    return {name: child for name, child in owner._modules.items() if isinstance(child, Gate)}


def attach_gate(
    owner: nn.Module,
    ordinal: int,
    *,
    head_dim: int,
    heads: int,
    config: SLAConfig,
    model_config: SLAConfig | None = None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    path: str,
    seen: Seen = UNSEEN,
) -> Gate:
    """The gate of ``owner``'s attention call ``ordinal``, made and hooked if it is not there; idempotent.

    An existing gate keeps its values and takes the new settings. ``path`` is the gate's module path.

    Raises:
        ValueError: ``owner`` has something else under the gate's name, or a gate of another shape.
    """
    name = gate_name(ordinal)
    existing: Gate | None = getattr(owner, name, None)
    if existing is None:
        gate = Gate(
            head_dim=head_dim,
            heads=heads,
            config=config,
            model_config=model_config,
            path=path,
            ordinal=ordinal,
            device=device,
            dtype=dtype,
            seen=seen,
        )
        gate.train(owner.training)
        owner.add_module(name, gate)
        _mark(owner)
        for code in take_dense_code(owner):  # Dynamo does not guard on hooks
            forget_code(code)
        return gate
    refuse_taken_name(owner, ordinal, path)
    refuse_other_form(existing, heads, head_dim, config, path)
    if any(getattr(existing.config, name) != getattr(config, name) for name in ("topk", "bottomk", "max_topk")):
        with torch.inference_mode(False), torch.no_grad():
            wanted_shares = _millionths(config, existing.weight.device)
            if existing.sparsity is None or wanted_shares is None:
                existing.sparsity = wanted_shares
            else:
                existing.sparsity.copy_(wanted_shares)  # in place: a CUDA graph reads this memory
    existing.config, existing.path = config, path
    existing.model_config = model_config if model_config is not None else config
    existing.seen = seen
    existing.settings = settings_text(config, seen)
    return existing


def refuse_taken_name(owner: nn.Module, ordinal: int, path: str) -> None:
    """Raises ValueError where ``owner`` has something that is not a gate under the gate's name."""
    name = gate_name(ordinal)
    existing = getattr(owner, name, None)
    if existing is not None and not isinstance(existing, Gate):
        kind = type(existing).__name__
        raise ValueError(f"{path}: the attention's owner already has a {kind} called {name!r}; rename it")


def refuse_other_form(existing: Gate, heads: int, head_dim: int, config: SLAConfig, path: str) -> None:
    """Raises ValueError where ``config`` needs other parameters than the gate at ``path`` has."""
    wanted = (heads, head_dim, head_dim) if config.gate == "per_head" else (head_dim, head_dim)
    if tuple(existing.weight.shape) != wanted:
        raise ValueError(
            f"{path}: has a gate of shape {tuple(existing.weight.shape)}, but these settings "
            f"(gate={config.gate!r}, {heads} heads of {head_dim}) need {wanted}; "
            f"keep gate={existing.config.gate!r}, or remove the gate by sla_compile.detach(model)"
        )
    scaled = existing.log_scale is not None
    if scaled != config.sparse_scale:
        raise ValueError(
            f"{path}: has a gate {'with' if scaled else 'without'} log_scale, but these settings have "
            f"sparse_scale={config.sparse_scale}; keep sparse_scale={scaled}, or remove the gate by "
            f"sla_compile.detach(model)"
        )


def gate_dtype(owner: nn.Module, fallback: torch.dtype) -> torch.dtype:
    """The dtype a gate of ``owner`` gets: that of its first ordinary floating-point parameter."""
    for parameter in owner.parameters():
        if parameter.dtype in FLOATING_DTYPES:
            return parameter.dtype
    return fallback


def detach_gate(owner: nn.Module, ordinal: int) -> None:
    """Remove the gate of ``owner``'s attention call ``ordinal``, and the hooks when no gate is left."""
    owner._modules.pop(gate_name(ordinal), None)
    _mark(owner)


def mark_from_children(owner: nn.Module) -> bool:
    """Let ``owner``'s children mark its gates too, for when Dynamo starts at ``owner``; False if they do already."""
    if owner.__dict__.get(_FROM_CHILDREN):
        return False
    owner.__dict__[_FROM_CHILDREN] = True
    _mark(owner)
    return True


# Attributes of an owner; plain values, so that deepcopy and pickle carry them along.
_FROM_CHILDREN = "_sla_marked_from_children"


def _mark(owner: nn.Module) -> None:
    """Make the hooks of ``owner``, and of its children where asked, name exactly the gates it has."""
    names = tuple(own_gates(owner))
    _set_marker(owner, names, None)
    if owner.__dict__.get(_FROM_CHILDREN):
        for child in _called_children(owner):
            _set_marker(child, names, owner)


def _called_children(owner: nn.Module) -> Iterator[nn.Module]:
    """Direct children, with containers that are never called themselves opened."""
    for child in owner.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called_children(child)
        elif not isinstance(child, Gate):
            yield child


def _set_marker(module: nn.Module, names: tuple[str, ...], owner: nn.Module | None) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, GateMarker) and hook.owner is owner:
            del module._forward_pre_hooks[key]
    if names:
        module.register_forward_pre_hook(GateMarker(names, owner))


def mark_prepared(model: nn.Module, config: SLAConfig) -> None:
    """Note on every module of ``model`` these settings and its path in ``model``.

    A part that is compiled by itself, or that continues after a graph break, would know only its path inside that part.
    """
    for path, module in module_paths(model):
        module.__dict__[PREPARED] = (config, path)


def detach(model: nn.Module) -> nn.Module:
    """Remove every gate, hook and setting from ``model``, then as it was before it was prepared; returns it."""
    for owner in list(model.modules()):
        for gate in own_gates(owner).values():
            detach_gate(owner, gate.ordinal)
        owner.__dict__.pop(PREPARED, None)
    return model


def gates(model: nn.Module) -> dict[str, Gate]:
    """Every gate of ``model`` by the path of its module, for example ``"blocks.0.attn1.sla"``.

    ``model`` may be compiled or in DistributedDataParallel: what those put into names is left out.
    """
    return {path: module for path, module in module_paths(model) if isinstance(module, Gate)}


def gate_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weight, bias and any log_scale of every gate of ``model``, to be an optimizer's parameter group of their own."""
    for gate in gates(model).values():
        yield from gate.parameters()


def model_config(model: nn.Module) -> SLAConfig | None:
    """The settings ``model`` was prepared with; None for a model without gates."""
    return next((gate.model_config for gate in gates(model).values()), None)
