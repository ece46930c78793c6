"""Gates that a compile makes after the optimizer was made are trained by none: said once for each model."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import nn

from sla_compile.compat import model_under_way
from sla_compile.memory import remember_told, was_told
from sla_compile.user_warnings import LateGatesWarning, warn_user

__all__ = ["warn_of_late_gates"]

_LATE = "late gates"


def warn_of_late_gates(part: nn.Module, gate_paths: Sequence[str]) -> None:
    """Warn if an optimizer has parameters of the model that ``part`` belongs to, whose gates were made just now.

    Silent without gradients: nothing is trained then.
    """
    if not gate_paths or not torch.is_grad_enabled():
        return
    model = model_under_way(part)
    if was_told(model, _LATE):
        return
    kinds = _kinds(torch.optim.Optimizer)
    trained = {
        id(parameter)
        for optimizer in gc.get_objects()
        if type(optimizer) in kinds  # a class may run code of its own when it is asked what it is
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    if any(id(parameter) in trained for parameter in model.parameters()):
        remember_told(model, _LATE)
        warn_user(
            f"{gate_paths[0]}: this gate{'' if len(gate_paths) == 1 else ', and others,'} was made by the first "
            f"call, after the optimizer, which so does not train it: call sla_compile.prepare(model, ...) before "
            f"the optimizer is made, or give it gate_parameters(model) by add_param_group",
            LateGatesWarning,
        )


def _kinds(of: type) -> set[type]:
    """``of`` and every class below it."""
    return {of}.union(*map(_kinds, of.__subclasses__()))
