"""Cases on two gloo processes: one launch runs them all, and each is a test of its own."""

from __future__ import annotations

import datetime
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore

from tests.support.processes import launch

__all__ = ["WORLD", "Case", "failures", "of_rank_0", "whole"]

WORLD = 2
Case = Callable[[int, Path], None]
"""Run on every rank with the rank and a folder that the ranks share; it asserts."""


def failures(cases: Mapping[str, Case], folder: Path) -> dict[str, str]:
    """Run ``cases`` in turn on `WORLD` processes; by name what each failed with, empty where it did not."""
    launch(_work, dict(cases), str(folder), ranks=WORLD)
    found = [torch.load(folder / f"failures.{rank}.pt") for rank in range(WORLD)]
    return {
        name: "\n".join(f"rank {rank}: {one[name]}" for rank, one in enumerate(found) if one[name]) for name in cases
    }


def _work(rank: int, cases: dict[str, Case], folder: str) -> None:
    limit = datetime.timedelta(seconds=120)
    store = FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
    found = {}
    for number, (name, case) in enumerate(cases.items()):
        torch._dynamo.reset()
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        shared = Path(folder) / str(number)
        shared.mkdir(exist_ok=True)
        started = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case(rank, shared)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
        if rank == 0:
            print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
        store.set(f"{number}.{rank}", "done")  # a rank that failed early does not run on into the next case
        store.wait([f"{number}.{other}" for other in range(WORLD)], limit)
    torch.save(found, f"{folder}/failures.{rank}.pt")
    dist.destroy_process_group()


def whole(tensor: Any) -> torch.Tensor:
    """All of ``tensor``, gathered where it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def of_rank_0(make: Callable[..., Any], *arguments: Any) -> Any:
    """What ``make(*arguments)`` returns on rank 0, on every rank; the others wait for it."""
    found = [make(*arguments) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]
