"""Parameters that are DTensors, as ``fully_shard`` makes them: gathered, and given values, on all their ranks at once.

A plain tensor passes through, so that callers need not ask. Nothing here imports torch.distributed for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fill", "is_sharded", "on_first_rank", "refuse_flattened", "reshard", "whole"]


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_flattened(model: nn.Module) -> None:
    """Raise ValueError where ``model`` has a FullyShardedDataParallel (FSDP1): parameters in it are not theirs."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for path, module in model.named_modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"{path or 'the model'}: got a FullyShardedDataParallel (FSDP1), in which gates are parts of a flat "
                f"parameter; accepted: FSDP2 (torch.distributed.fsdp.fully_shard), or the model before it is wrapped"
            )


def whole(tensor: Any) -> Tensor:
    """All of ``tensor``: gathered where it is a DTensor, for which every rank of its mesh has to call this."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return gathered


@torch.no_grad()
def fill(parameter: Any, values: Tensor) -> None:
    """Copy ``values``, of the whole parameter and alike on all ranks, into ``parameter``; no communication."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        local = values.to(parameter.device, parameter.dtype)
        values = distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


def reshard(model: nn.Module) -> None:
    """Have every part of ``model`` in ``fully_shard`` hold its shards: the outermost keeps all after a forward."""
    for module in model.modules():
        if callable(reshard := getattr(module, "reshard", None)) and hasattr(module, "_get_fsdp_state"):
            reshard()


def on_first_rank(parameters: Iterable[Any], act: Callable[[], None]) -> None:
    """Call ``act()``: once, on the first rank of the mesh of those of ``parameters`` that are sharded, if any are.

    Every rank of that mesh has to call this; it returns when ``act`` is done, or raises on all what it raised there.
    """
    mesh = next((parameter.device_mesh for parameter in parameters if is_sharded(parameter)), None)
    if mesh is None:
        act()
        return
    outcome: list[Any] = [None]
    if not any(mesh.get_coordinate()):
        try:
            act()
        except Exception as error:
            outcome[0] = error
    for axis in range(mesh.ndim):
        group = mesh.get_group(axis)
        torch.distributed.broadcast_object_list(outcome, torch.distributed.get_global_rank(group, 0), group)
    if outcome[0] is not None:
        raise outcome[0]
