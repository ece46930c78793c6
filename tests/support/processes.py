"""Processes of the tests' own, forked from one that has imported torch: that takes longer than most tests run."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import start_processes

__all__ = ["FRESH", "launch", "leave_guards_untimed"]

FRESH = multiprocessing.get_context("forkserver")
"""Starts processes that have imported torch, and have done nothing with it."""

# Nothing of this checkout: the process that imports these is not told where it is.
FRESH.set_forkserver_preload(
    [
        "torch._functorch.aot_autograd",
        "torch._inductor.compile_fx",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "diffusers.models.transformers.transformer_wan",
    ]
)


def launch(work: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """Run ``work(rank, *arguments)`` in a process of its own for each rank; raise what one of them raises."""
    start_processes(_begin, (ranks, work, *arguments), nprocs=ranks, start_method="forkserver")


def _begin(rank: int, ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE=str(ranks))
    leave_guards_untimed()
    gc.freeze()  # as in tests/conftest.py: what was imported stays
    gc.set_threshold(5000)
    torch.set_num_threads(1)
    work(rank, *arguments)


def leave_guards_untimed() -> None:
    """Each compile times its guards, with the CPU's caches emptied before: more than all else that a small one does.

    Where Dynamo is imported; importing it takes seconds.
    """
    if "torch._dynamo.guards" in sys.modules:
        sys.modules["torch._dynamo.guards"].__dict__["profile_guard_manager"] = lambda *_: 0.0
