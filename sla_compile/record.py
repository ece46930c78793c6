"""The account of every attention site: what was decided, why, and what it costs, as plain data.

What was compiled is remembered by the module that owns each attention, and forgotten with it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sla_compile.compat import size_hint
from sla_compile.gate import Gate, gate_name, own_gates
from sla_compile.passes.cost import BATCH, ELEMENT_BYTES, HEAD_DIM, HEADS, TOKENS, dense_cost, evaluate, sla_cost
from sla_compile.passes.decide import Keep, Rewrite, example_shape
from sla_compile.sites import PREPARED, Site

__all__ = ["SiteReport", "describe", "remember", "remembered"]


@dataclass(frozen=True)
class SiteReport:
    """One attention site. FLOPs and bytes are of one forward; None where the sizes are not known."""

    path: str
    """Module path of the owner, for example ``"blocks.0.attn1"``."""
    owner: str
    """Class of the owner; empty where no module owns the attention."""
    ordinal: int
    """Which attention call of the owner, counted from 0."""
    rewritten: bool
    reason: str
    """Why it was rewritten or kept."""
    value: str = ""
    """The value that decided."""
    accepted: str = ""
    """What would have been accepted, where it was kept."""
    condition: str = ""
    """Guard under which this holds, for a symbolic number of tokens."""
    shape: dict[str, int | str] = field(default_factory=dict)
    """batch, heads, tokens, head_dim, dtype, device; a symbolic size is a string."""
    settings: dict[str, Any] = field(default_factory=dict)
    """topk, bottomk, block_q, block_k, feature_map, linear, gate; empty where it was kept."""
    gate_path: str = ""
    gate_parameters: int = 0
    """Numbers in the gate's weight and bias."""
    flops_before: int | None = None
    flops_after: int | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    formula_before: str = ""
    """FLOPs in B, H, N, d, before and after."""
    formula_after: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def describe(site: Site) -> SiteReport:
    """``site`` as plain data that holds on to no graph and no module."""
    decision = site.decision
    shape = example_shape(site.call)
    costs: dict[str, Any] = {}
    dense = dense_cost()
    hints = {name: size_hint(size) for name, size in shape.sizes.items()} if shape is not None else {}
    known = None
    if shape is not None and None not in hints.values() and shape.self_attention:
        known = {
            BATCH: hints["batch"],
            HEADS: hints["heads"],
            TOKENS: hints["tokens"],
            HEAD_DIM: hints["head_dim"],
            ELEMENT_BYTES: shape.dtype.itemsize,
        }
        costs["flops_before"] = evaluate(dense.flops, known)
        costs["bytes_before"] = evaluate(dense.bytes, known)
        costs["formula_before"] = str(dense.flops)
    if isinstance(decision, Rewrite):
        options = site.config.kernel_options()
        cost = sla_cost(*(options[name] for name in ("topk", "bottomk", "block_q", "block_k", "linear")))
        costs["formula_after"] = str(cost.flops)
        if known is not None:
            costs["flops_after"] = evaluate(cost.flops, known)
            costs["bytes_after"] = evaluate(cost.bytes, known)
    gate = site.gate
    keep = decision if isinstance(decision, Keep) else None
    return SiteReport(
        path=site.path,
        owner=type(site.owner).__name__ if site.owner is not None else "",
        ordinal=site.ordinal,
        rewritten=keep is None,
        reason="self-attention" if keep is None else keep.reason,
        value=keep.value if keep is not None else f"{shape.sizes['tokens']} tokens" if shape else "",
        accepted=keep.accepted if keep is not None else "",
        condition=(decision.condition or "") if isinstance(decision, Rewrite) else "",
        shape=_plain_shape(shape) if shape is not None else {},
        settings={**site.config.kernel_options(), "gate": site.config.gate} if keep is None else {},
        gate_path=site.gate_path if keep is None else "",
        gate_parameters=_count(gate) if gate is not None and keep is None else 0,
        **costs,
    )


def _plain_shape(shape: Any) -> dict[str, int | str]:
    sizes = {name: size if isinstance(size, int) else str(size) for name, size in shape.sizes.items()}
    return {**sizes, "dtype": str(shape.dtype).removeprefix("torch."), "device": str(shape.device)}


def _count(gate: Gate) -> int:
    return gate.weight.numel() + gate.bias.numel()


_BY_OWNER: weakref.WeakKeyDictionary[nn.Module, dict[int, SiteReport]] = weakref.WeakKeyDictionary()
# Modules that run code compiled for another of their class (regional compile, a deepcopy) have no entry of
# their own; the one of their class, with the same settings, is theirs.
_BY_CLASS: weakref.WeakKeyDictionary[type, dict[tuple[int, str], SiteReport]] = weakref.WeakKeyDictionary()


def remember(sites: Iterable[Site]) -> None:
    """Keep the account of what was compiled, for ``report(model)``."""
    for site in sites:
        if site.owner is None:
            continue
        account = describe(site)
        _BY_OWNER.setdefault(site.owner, {})[site.ordinal] = account
        if site.gate is not None:
            _BY_CLASS.setdefault(type(site.owner), {})[(site.ordinal, site.gate.settings)] = account


def remembered(model: nn.Module) -> list[SiteReport]:
    """The sites of ``model`` as last compiled, by module path, and its gates that were not compiled yet."""
    found = []
    for name, owner in model.named_modules():
        path = name.replace("_orig_mod.", "").removesuffix("_orig_mod")
        accounts = dict(_BY_OWNER.get(owner, {}))
        for gate in own_gates(owner).values():
            if gate.ordinal not in accounts:
                shared = _BY_CLASS.get(type(owner), {}).get((gate.ordinal, gate.settings))
                accounts[gate.ordinal] = shared if shared is not None else _not_compiled(gate, owner)
        for ordinal, account in sorted(accounts.items()):
            full = path or owner.__dict__.get(PREPARED, (None, ""))[1]
            gate_path = f"{full}.{gate_name(ordinal)}".lstrip(".") if account.gate_path else ""
            found.append(dataclasses.replace(account, path=full, gate_path=gate_path))
    return found


def _not_compiled(gate: Gate, owner: nn.Module) -> SiteReport:
    return SiteReport(
        path=gate.path,
        owner=type(owner).__name__,
        ordinal=gate.ordinal,
        rewritten=False,
        reason="prepared, not compiled yet",
        accepted='torch.compile(model, backend="sla") and a call',
        settings={**gate.config.kernel_options(), "gate": gate.config.gate},
        gate_path=gate.path,
        gate_parameters=_count(gate),
    )
