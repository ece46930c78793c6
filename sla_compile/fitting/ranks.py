"""Fitting on several ranks, each with batches of its own: sums over them, so that all get the same gates.

``over_ranks`` says which ranks; within it the other functions add up over them, and outside they do nothing. Every
rank has to call all of them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sla_compile.compat import fully_sharded
from sla_compile.gate import gates
from sla_compile.sharded import is_sharded, refuse_flattened

__all__ = ["every_site", "from_first_rank", "over_ranks", "refuse_distributed", "sum_tensors", "total"]

T = TypeVar("T")

# Groups over which one after the other a sum is taken, the axes of a mesh say, and a device of theirs.
_ranks: ContextVar[tuple[tuple[Any, ...], torch.device]] = ContextVar("_ranks", default=((), torch.device("cpu")))


@contextmanager
def over_ranks(model: nn.Module, group: Any = None) -> Iterator[nn.Module]:
    """Within this, sums are over ``group``; None: over the ranks of the data parallelism that ``model`` is in, if any.

    Yields the module to run: that inside DistributedDataParallel, whose reducer waits for backwards of its own.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: ``model`` is sharded over a mesh of which it is not known which axes have batches of their own; it
            is in FullyShardedDataParallel; or `refuse_distributed`.
    """
    refuse_flattened(model)
    refuse_distributed(model, parameters=False)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}; accepted: a torch.distributed.ProcessGroup, or None")
    replicas = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    found = [group] if group is not None else [replica.process_group for replica in replicas[:1]] or _of_shards(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    token = _ranks.set((tuple(one for one in found if dist.get_world_size(one) > 1), device))
    try:
        yield model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    finally:
        _ranks.reset(token)


def refuse_distributed(model: nn.Module, *, parameters: bool) -> None:
    """Raise ValueError where nothing gathers buffers, or parameters too, of gates that are run for a measurement.

    The op takes plain tensors: those of ``fully_shard`` are plain in a forward, those of a parallel plan are not.
    """
    for path, gate in gates(model).items():
        run = parameters or gate.shift is not None  # a shift is fitted by running it
        tensors = [*gate.buffers(), *(gate.parameters() if run else ())]
        placed = next((tensor for tensor in tensors if is_sharded(tensor)), None)
        if placed is not None and not fully_sharded(gate):
            raise ValueError(
                f"{path}: got a gate of DTensors ({', '.join(map(str, placed.placements))}), which only fully_shard "
                f"gathers; accepted: a gate outside of the parallel plan, or to fit before distribute_module"
            )


def _of_shards(model: nn.Module) -> list[Any]:
    """The groups of ``fully_shard``, of one axis or of a replicated and a sharded one."""
    sharded: Any = next((p for p in model.parameters() if is_sharded(p)), None)
    if sharded is None or not any(hasattr(module, "_get_fsdp_state") for module in model.modules()):
        return []
    mesh, placements = sharded.device_mesh, sharded.placements
    if mesh.ndim > 1 and not (mesh.ndim == 2 and placements[0].is_replicate() and placements[1].is_shard()):
        raise ValueError(
            f"group: got None for a model sharded over a mesh {tuple(mesh.shape)}, {', '.join(map(str, placements))}; "
            f"accepted: the process group of the ranks that have batches of their own"
        )
    return [mesh.get_group(axis) for axis in range(mesh.ndim)]


@torch.no_grad()
def sum_tensors(tensors: Iterable[Tensor]) -> None:
    """Replace each of ``tensors`` (float64) by its sum over the ranks, in place."""
    groups, _ = _ranks.get()
    parts = list(tensors)
    if not groups or not parts:
        return
    joined = torch.cat([part.flatten() for part in parts])
    for group in groups:
        dist.all_reduce(joined, group=group)
    start = 0
    for part in parts:
        part.copy_(joined[start : start + part.numel()].view_as(part))
        start += part.numel()


def total(number: float) -> float:
    """The sum of ``number`` over the ranks."""
    groups, device = _ranks.get()
    if not groups:
        return number
    tensor = torch.tensor([number], dtype=torch.float64, device=device)
    sum_tensors([tensor])
    return float(tensor)


@torch.no_grad()
def from_first_rank(tensor: Tensor) -> Tensor:
    """``tensor`` as the first rank has it, plain and contiguous."""
    groups, _ = _ranks.get()
    tensor = tensor.contiguous()
    for group in groups:
        dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
    return tensor


def every_site(model: nn.Module, found: Mapping[str, T], empty: Callable[[str], T]) -> dict[str, T]:
    """``found``, by gate path, with an ``empty`` one for each site that only other ranks reached; in one order."""
    groups, _ = _ranks.get()
    if not groups:
        return dict(found)
    order = {path: number for number, path in enumerate(found)}
    reached = {path: total(float(path in found)) for path in gates(model)}
    places = {path: total(float(order.get(path, 0))) for path in reached}
    paths = sorted((path for path, ranks in reached.items() if ranks), key=places.__getitem__)
    return {path: found[path] if path in found else empty(path) for path in paths}
