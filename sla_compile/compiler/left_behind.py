"""Tell of gates that lie where a model was loaded from, by something that knows no gates, and that it has not got."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from sla_compile.checkpoints.places import folder_with_gates
from sla_compile.compat import Frame
from sla_compile.compiler.sites import Site
from sla_compile.memory import gate_folder, remember_gate_folder
from sla_compile.passes.decide import Rewrite
from sla_compile.user_warnings import UntrainedGatesWarning, warn_user

__all__ = ["note_folder", "warn_of_gates_left_behind"]


def note_folder(model: nn.Module, owners: Iterable[nn.Module]) -> None:
    """Note where gates of ``model`` lie for its ``owners``: a block that is compiled by itself knows no model."""
    if gate_folder(model) is None:
        folder = folder_with_gates(model)
        for module in (model, *owners):
            remember_gate_folder(module, folder)


def warn_of_gates_left_behind(sites: Sequence[Site], frame: Frame | None) -> None:
    """Of one compile: gates are zero, and the folder that the model comes from has them; told once for each model."""
    rewritten = [site for site in sites if isinstance(site.decision, Rewrite)]
    root = frame.root_module() if frame is not None and rewritten else None
    if root is not None:
        note_folder(root, ())
    asked = [module for module in (root, *(site.owner for site in rewritten)) if module is not None]
    folder = next(filter(None, map(gate_folder, asked)), "")
    if not folder:  # asked first: reading the gates' values waits for the device
        return
    for module in asked:
        remember_gate_folder(module, "")
    if any(site.gate is not None and not site.gate.trained() for site in rewritten):
        warn_user(
            f"the model was loaded from {folder!r}, where gates are saved, but its gates are untrained: "
            f"from_pretrained leaves them out. Call sla_compile.load(model, {folder!r}) after it, or load_state_dict "
            f"after prepare",
            UntrainedGatesWarning,
        )
