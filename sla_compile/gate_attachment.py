"""Give the owner of an attention its gate, or other settings to the one it has; and what speaks against it."""

from __future__ import annotations

import torch
from torch import nn

from sla_compile.common.limits import FLOATING_DTYPES
from sla_compile.compat import forget_code
from sla_compile.gate import Gate, gate_name, own_gates, sparsity_of, update_hooks
from sla_compile.gate_settings import GateSpec
from sla_compile.memory import take_dense_code

__all__ = ["attach_gate", "gate_dtype", "refuse_other_form", "refuse_taken_name"]


def attach_gate(
    owner: nn.Module, spec: GateSpec, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> Gate:
    """The gate of ``owner`` that ``spec`` describes, made and hooked if it is not there yet.

    A gate that is there keeps its parameters and takes the settings of ``spec``, topk and bottomk too.

    Raises:
        ValueError: ``owner`` has something else under the gate's name, or a gate of another shape.
    """
    name = gate_name(spec.ordinal)
    refuse_taken_name(owner, spec.ordinal, spec.path)
    existing = own_gates(owner).get(name)
    if existing is None:
        gate = Gate(spec, device=device, dtype=dtype)
        gate.train(owner.training)
        owner.add_module(name, gate)
        update_hooks(owner)
        for code in take_dense_code(owner):  # Dynamo does not guard on hooks
            forget_code(code)
        return gate
    refuse_other_form(existing, spec)
    for copy in (module for module in getattr(owner, name).modules() if isinstance(module, Gate)):
        _change_settings(copy, spec)
    return existing


def _change_settings(gate: Gate, spec: GateSpec) -> None:
    before, after = gate.config, spec.config
    if any(getattr(before, name) != getattr(after, name) for name in ("topk", "bottomk", "max_topk", "topk_by")):
        with torch.inference_mode(False), torch.no_grad():
            sparsity = sparsity_of(after, gate.heads, gate.device)
            if gate.sparsity is None or sparsity is None or gate.sparsity.shape != sparsity.shape:
                gate.sparsity = sparsity
            else:
                gate.sparsity.copy_(sparsity)  # in place: a CUDA graph reads this memory
    gate.apply_settings(spec)


def refuse_taken_name(owner: nn.Module, ordinal: int, path: str) -> None:
    """Raise ValueError if ``owner`` has something that is no gate under the gate's name; ``path`` is the gate's."""
    name = gate_name(ordinal)
    existing = getattr(owner, name, None)
    if existing is not None and name not in own_gates(owner):
        kind = type(existing).__name__
        raise ValueError(f"{path}: the attention's owner already has a {kind} called {name!r}; rename it")


def refuse_other_form(existing: Gate, spec: GateSpec) -> None:
    """Raise ValueError if ``existing`` has not the parameters that ``spec`` asks for."""
    config, path = spec.config, spec.path
    shapes = spec.shapes()
    if (existing.shift is not None) != ("shift" in shapes):
        raise ValueError(
            f"{path}: has a gate for linear={existing.config.linear!r}, but these settings have "
            f"linear={config.linear!r}, whose gate is another; keep linear={existing.config.linear!r}, or remove the "
            f"gate by sla_compile.detach(model)"
        )
    if existing.shift is not None and existing.form() != spec.form():
        raise ValueError(
            f"{path}: has a gate of {existing.heads} heads, but the attention has {spec.heads}; "
            f"remove the gate by sla_compile.detach(model)"
        )
    if existing.shift is None and tuple(existing.weight.shape) != (wanted := shapes["weight"]):
        raise ValueError(
            f"{path}: has a gate of shape {tuple(existing.weight.shape)}, but these settings "
            f"(gate={config.gate!r}, {spec.heads} heads of {spec.head_dim}) need {wanted}; "
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
    """The dtype for a gate of ``owner``: that of its first parameter of a dtype gates may have, else ``fallback``."""
    for parameter in owner.parameters():
        if parameter.dtype in FLOATING_DTYPES:
            return parameter.dtype
    return fallback
