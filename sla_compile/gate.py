"""Gates: the trainable ``weight`` and ``bias`` of each attention site, and the hook that lets Dynamo see them.

A gate is a child module of the attention's owner (the module whose forward calls the attention). So it is part of
``state_dict()``, ``parameters()``, ``.to()``, ``deepcopy``, FSDP and EMA without further code.

The owner has a forward pre-hook, `GateMarker`, that does one thing, and only while Dynamo traces: it calls the marker
op ``sla::gate`` on the gate's parameters. By that Dynamo makes them inputs of the graph, taken from the module of
*this* call and under its own guards, also inside activation checkpointing. The rewrite reads the marker's arguments
and erases it. A prepared model that is not compiled computes exactly what the dense model does.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sla_compile.ops.gate_marker  # noqa: F401  registers sla::gate
from sla_compile.common.blocks import MILLION, to_millionths
from sla_compile.compat import running_transform, runs_uncompiled, skip_as_root_frame
from sla_compile.config import SLAConfig
from sla_compile.gate_settings import GateSpec, SeenGrids, settings_to_json
from sla_compile.module_paths import all_module_paths, inside, module_paths

__all__ = [
    "PREPARED",
    "Gate",
    "GateMarker",
    "Hook",
    "detach",
    "detach_gate",
    "gate_name",
    "gate_parameters",
    "gates",
    "mark_from_children",
    "marked_exports",
    "model_config",
    "own_gates",
    "owner_path",
    "remark_children",
    "remove_hooks",
    "sparsity_of",
    "update_hooks",
]

_PROCESS = uuid.uuid4().hex
PARAMETERS = ("weight", "bias", "log_scale", "shift")
"""The parameters that a gate may have, in the order in which it has them."""
PREPARED = "_sla_prepared"
"""Attribute that ``prepare`` gives an owner: (SLAConfig, the owner's module path); survives deepcopy and pickle."""


class Gate(nn.Module):
    """The gate of one attention site: with ``linear="taylor"`` its ``shift``; else, as in the paper (W and b in its
    section 5), O = O^s + O^l weight^T + bias.

    Attributes:
        weight: (D, D) shared by the heads, or (H, D, D) per head; None with a shift. Zero at start.
        bias: (D) or (H, D); None with a shift. Zero at start, so that an untuned SLA equals its sparse branch.
        log_scale: (H) where the settings have ``sparse_scale``, else None. The gate then computes
            O = exp(log_scale) O^s + O^l weight^T + bias, so that zero, as at the start, scales nothing.
        shift: (H) with ``linear="taylor"``, else None: added to the logits of the virtual keys. Zero at start.
        sparsity: int64 (2), or (H, 2) with ``topk_by="head"``, where the settings have ``max_topk``, else None: topk
            and bottomk in millionths, a buffer read at each run. Without it they are constants of the compiled graph.
        heads, head_dim: H and D of the attention.
        path: module path of the gate when it was made, for example ``"blocks.0.attn1.sla"``.
        config: the settings of this site.
        model_config: the settings the whole model was prepared with.
        ordinal: the number of its attention among those of its owner, from 0; its name (`gate_name`) says the same.
        call_site: where its owner calls the attention, as ``compiler.call_sites`` writes it: by this, and not by its
            number, an attention finds its gate. Empty of a gate from before there were call sites.
        traced: whether this process has traced that call site; otherwise a file or a pickle says so.
        seen: the token grids found for its queries and keys in the whole model, used where only a part is compiled.
        pattern: what its attention is written as, such as ``"scaled_dot_product_attention"``; empty of a gate that was
            read from a file and not traced yet.
        settings: ``config``, ``seen`` and ``call_site`` as the JSON text that the marker carries into a graph.
    """

    weight: nn.Parameter  # as bias, None with a shift: said by its type, every reader of either would have to ask
    bias: nn.Parameter
    log_scale: nn.Parameter | None
    shift: nn.Parameter | None
    sparsity: Tensor | None
    path: str
    config: SLAConfig
    model_config: SLAConfig
    seen: SeenGrids
    pattern: str = ""  # of a gate that was pickled before there was this attribute
    call_site: str = ""  # as above
    settings: str
    _process: str = ""  # which process traced the call site: a pickle has another

    def __init__(
        self, spec: GateSpec, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        # A parameter made under inference_mode could never be trained.
        with torch.inference_mode(False):
            shapes = spec.shapes()
            for name in PARAMETERS:
                tensor = torch.zeros(shapes[name], device=device, dtype=dtype) if name in shapes else None
                self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
            # Integers, which a move to another floating dtype leaves alone.
            self.register_buffer("sparsity", sparsity_of(spec.config, spec.heads, device))
        self.heads = spec.heads
        self.head_dim = spec.head_dim
        self.ordinal = spec.ordinal
        self.apply_settings(spec)

    def apply_settings(self, spec: GateSpec) -> None:
        """Take path, settings, grids, pattern and call site of ``spec``; parameters and ``sparsity`` stay."""
        self.path, self.config, self.seen = spec.path, spec.config, spec.seen
        self.pattern = spec.pattern
        self.model_config = spec.config if spec.model_config is None else spec.model_config
        self.take_call_site(spec.call_site, spec.traced)

    def take_call_site(self, call_site: str, traced: bool = True) -> None:
        """Be the gate of the attention at ``call_site``."""
        self.call_site, self._process = call_site, _PROCESS if traced else ""
        # What the rewritten graph depends on, and so what Dynamo guards on: alike for all like sites.
        self.settings = settings_to_json(self.config, self.seen, call_site)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def form(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of its parameters, as `GateSpec.form` has them."""
        return tuple(tuple(parameter.shape) for parameter in self.parameters())

    @property
    def traced(self) -> bool:
        return bool(self.call_site) and self._process == _PROCESS

    def spec(self) -> GateSpec:
        """What its site asked of it."""
        return GateSpec(
            heads=self.heads,
            head_dim=self.head_dim,
            config=self.config,
            model_config=self.model_config,
            path=self.path,
            ordinal=self.ordinal,
            call_site=self.call_site,
            traced=self.traced,
            seen=self.seen,
            pattern=self.pattern,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set parameters to zero and ``sparsity`` to the settings: for a model that got its memory by ``to_empty``."""
        for parameter in self.parameters():
            parameter.zero_()
        if (sparsity := sparsity_of(self.config, self.heads, self.device)) is not None and self.sparsity is not None:
            self.sparsity.copy_(sparsity)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise TypeError(f"gate {self.path!r} is not called: the compiled attention reads its parameters")

    def extra_repr(self) -> str:
        form = "a number per head" if self.shift is not None else "per head" if self.weight.dim() == 3 else "shared"
        limit = "" if self.config.max_topk is None else f" of at most {self.config.max_topk}"
        scaled = "" if self.log_scale is None else ", sparse branch scaled by head"
        return f"heads={self.heads}, head_dim={self.head_dim}, {form}{scaled}, topk={self.shares()[0]}{limit}"

    def shares(self) -> tuple[float, float]:
        """topk and bottomk in force now, of heads with their own the mean. With ``max_topk`` it reads a buffer, so it
        waits for the device."""
        if self.sparsity is None or self.sparsity.is_meta:
            return self.config.topk, self.config.bottomk
        topk, bottomk = (share / MILLION for share in self.sparsity.view(-1, 2).double().mean(dim=0).tolist())
        return min(topk, self.config.max_topk or 1.0), bottomk

    def trained(self) -> bool:
        """Whether any parameter is not zero. Reads the values, so it waits for the device."""
        if self.device.type == "meta":
            return False
        return any(bool(parameter.detach().any()) for parameter in self.parameters())

    def silent(self) -> bool:
        """Whether critical blocks alone count: nothing is trained, and there are no virtual keys. Waits, as above."""
        return self.shift is None and not self.trained()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in PARAMETERS:
            self._parameters.setdefault(name, None)  # of a gate that was pickled before there was one

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
        names = [prefix + name for name in PARAMETERS]
        if not any(name in state_dict for name in names) and not self.trained():
            return  # a checkpoint of the dense model: an untrained gate has nothing to miss
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def sparsity_of(config: SLAConfig, heads: int, device: torch.device | str | None) -> Tensor | None:
    """int64 [topk, bottomk] in millionths, by head with ``topk_by="head"``: the ``sparsity`` of a gate with these
    settings; None without max_topk."""
    if config.max_topk is None:
        return None
    shares = [to_millionths(config.topk), to_millionths(config.bottomk)]
    sparsity = torch.tensor(shares, dtype=torch.int64, device=device)
    return sparsity.repeat(heads, 1) if config.topk_by == "head" else sparsity


class Hook:
    """A hook that this package puts on a module, and takes away with the gates."""


class GateMarker(Hook):
    """Forward pre-hook that marks, in a trace, the gates called ``names`` of ``owner``.

    ``owner`` None stands for the hooked module itself. But Dynamo does not trace the hooks of the module whose
    ``forward`` it starts at. The gates of such a module are marked by hooks of its children, which it calls before its
    attention; each of these has the parent as its ``owner``.
    """

    def __init__(self, names: tuple[str, ...], owner: nn.Module | None = None) -> None:
        self.names = names
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_dynamo_compiling() or _MARK_EXPORTS[0]:
            owner = module if self.owner is None else self.owner
            for name in self.names:
                gate: Any = getattr(owner, name, None)
                if not hasattr(gate, "settings"):  # taken away by hand; a wrapper has what its gate has
                    continue
                tensors = gate.weight, gate.bias, gate.sparsity, gate.log_scale, gate.shift
                torch.ops.sla.gate(*tensors, gate.ordinal, gate.settings, self.owner is not None)
        elif (transform := running_transform()) and runs_uncompiled():
            path = getattr(module if self.owner is None else self.owner, self.names[0]).path
            raise RuntimeError(
                f"{path}: Dynamo compiles nothing under torch.func.{transform}, so this gate would not be used; "
                f"accepted: torch.autograd.grad over the compiled model, or torch.func over the model as it is, dense"
            )


skip_as_root_frame(GateMarker.__call__)

_MARK_EXPORTS = [False]  # a list, so that the hook reads what is set here later


@contextlib.contextmanager
def marked_exports() -> Iterator[None]:
    """Within this context, gates are marked also where ``torch.export`` traces without Dynamo."""
    _MARK_EXPORTS[0] = True
    try:
        yield
    finally:
        _MARK_EXPORTS[0] = False


def gate_name(ordinal: int) -> str:
    """The gate's attribute of its owner: ``sla`` for the attention met first, ``sla_1`` for the second, and so on."""
    return "sla" if ordinal == 0 else f"sla_{ordinal}"


def owner_path(gate_path: str) -> str:
    """The module path of the owner of the gate at ``gate_path``."""
    return gate_path.rpartition(".")[0]


def own_gates(owner: nn.Module) -> dict[str, Gate]:
    """The gates that are children of ``owner``, or in wrappers there, by name."""
    found = {name: inside(child) for name, child in owner._modules.items() if child is not None}
    return {name: gate for name, gate in found.items() if isinstance(gate, Gate) and name == gate_name(gate.ordinal)}


def detach_gate(owner: nn.Module, ordinal: int) -> None:
    """Remove the gate of ``owner``'s attention ``ordinal``, and the hooks once no gate is left."""
    owner._modules.pop(gate_name(ordinal), None)
    update_hooks(owner)


def mark_from_children(owner: nn.Module, wanted: bool = True) -> bool:
    """Have ``owner``'s children mark its gates too, or not, for when Dynamo starts at ``owner``; False if it is so."""
    if owner.__dict__.get(_FROM_CHILDREN, False) is wanted:
        return False
    owner.__dict__[_FROM_CHILDREN] = wanted
    update_hooks(owner)
    return True


# Attribute of an owner: whether its children mark its gates. A plain value, which deepcopy and pickle carry along.
_FROM_CHILDREN = "_sla_marked_from_children"


def update_hooks(owner: nn.Module) -> None:
    """Make the hooks of ``owner``, and of its children where they mark too, name exactly the gates it has."""
    names = tuple(own_gates(owner))
    _replace_marker(owner, names, None)
    if (from_children := owner.__dict__.get(_FROM_CHILDREN)) is not None:
        called = list(_called_children(owner)) if from_children else []
        for inner in owner.modules():  # a child that was wrapped is no child any more, but may still mark
            if inner is not owner:
                _replace_marker(inner, names if inner in called else (), owner)


def remark_children(owner: nn.Module) -> None:
    """Have the children of ``owner`` mark its gates again, where that is asked for and some were replaced since."""
    if not owner.__dict__.get(_FROM_CHILDREN):
        return
    marked = (
        any(_marks(hook, owner) for hook in child._forward_pre_hooks.values()) for child in _called_children(owner)
    )
    if not all(marked):
        update_hooks(owner)


def _marks(hook: Any, owner: nn.Module | None) -> bool:
    return isinstance(hook, GateMarker) and hook.owner is owner


def _called_children(owner: nn.Module) -> Iterator[nn.Module]:
    """The direct children but gates; for a ModuleList or ModuleDict, which is never called, those inside it."""
    for child in owner.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called_children(child)
        elif not isinstance(inside(child), Gate):
            yield child


def _replace_marker(module: nn.Module, names: tuple[str, ...], owner: nn.Module | None) -> None:
    """Give ``module`` one marker of ``owner``'s gates, or none where there are no ``names``."""
    found: dict[int, Any] = {key: hook for key, hook in module._forward_pre_hooks.items() if _marks(hook, owner)}
    if [hook.names for hook in found.values()] == [names] * bool(names):
        return
    for key in found:
        del module._forward_pre_hooks[key]
    if names:
        module.register_forward_pre_hook(GateMarker(names, owner))


def mark_prepared(model: nn.Module, config: SLAConfig) -> None:
    """Note on every module of ``model`` these settings and its path in ``model``.

    A part that is compiled by itself, or that continues after a graph break, would know only its path inside that part.
    """
    for path, module in all_module_paths(model):
        module.__dict__[PREPARED] = (config, path)


def detach(model: nn.Module) -> nn.Module:
    """Remove every gate, hook and setting from ``model``, which is then as before ``prepare``; returns it."""
    for owner in list(model.modules()):
        for gate in own_gates(owner).values():
            detach_gate(owner, gate.ordinal)
        owner.__dict__.pop(PREPARED, None)
        owner.__dict__.pop(_FROM_CHILDREN, None)
        remove_hooks(owner, (Hook,))
    return model


def remove_hooks(module: nn.Module, kinds: tuple[type, ...]) -> None:
    """Take the forward hooks of these classes from ``module``."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, kinds):
                del hooks[key]


def gates(model: nn.Module) -> dict[str, Gate]:
    """Every gate of ``model`` by the path of its module, for example ``"blocks.0.attn1.sla"``.

    ``model``, its parts or its gates may be in wrappers, as `module_paths` knows them; the paths are the plain model's.
    """
    return {path: module for path, module in module_paths(model) if isinstance(module, Gate)}


def gate_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of every gate of ``model``, for an optimizer's parameter group of their own."""
    for gate in gates(model).values():
        yield from gate.parameters()


def model_config(model: nn.Module) -> SLAConfig | None:
    """The settings that ``model`` was prepared with, also where that gave no gates; None if it was not prepared."""
    prepared = (module.__dict__[PREPARED][0] for module in model.modules() if PREPARED in module.__dict__)
    return next((gate.model_config for gate in gates(model).values()), next(prepared, None))
