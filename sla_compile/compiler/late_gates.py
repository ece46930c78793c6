"""Gates that a compile makes after the optimizer was made are trained by none: said once for each model."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from sla_compile.compat import model_under_way
from sla_compile.gate import Gate
from sla_compile.memory import remember_told, was_told
from sla_compile.user_warnings import LateGatesWarning, warn_user

__all__ = ["warn_of_late_gates"]

_LATE = "late gates"


def warn_of_late_gates(part: nn.Module, late: Mapping[str, Gate]) -> None:
    """Warn if an optimizer has parameters of the model that ``part`` belongs to, whose gates ``late``, by their paths,
    were made just now.

    Silent without gradients: nothing is trained then.
    """
    if not late or not torch.is_grad_enabled():
        return
    model = model_under_way(part)
    if was_told(model, _LATE):
        return
    new = {id(parameter) for gate in late.values() for parameter in gate.parameters()}
    trainable = {id(parameter) for parameter in model.parameters()} - new
    if trainable and any(id(parameter) in trainable for parameter in _optimized()):
        remember_told(model, _LATE)
        warn_user(
            f"{next(iter(late))}: this gate{'' if len(late) == 1 else ', and others,'} was made by the first "
            f"call, after the optimizer, which so does not train it: call sla_compile.prepare(model, ...) before "
            f"the optimizer is made, or give it gate_parameters(model) by add_param_group",
            LateGatesWarning,
        )


def _optimized() -> Iterator[nn.Parameter]:
    """The parameters that any optimizer has. It looks at every object there is: a tenth of a second."""
    kinds = _kinds(torch.optim.Optimizer)
    for optimizer in gc.get_referrers(*kinds):  # an object refers to its class
        if type(optimizer) in kinds:  # a class may run code of its own when it is asked what it is
            for group in optimizer.param_groups:
                yield from group["params"]


def _kinds(of: type) -> set[type]:
    """``of`` and every class below it."""
    return {of}.union(*map(_kinds, of.__subclasses__()))
