"""Kernels that run beside the one before them: programmatic dependent launch, on Hopper.

A kernel that needs nothing of the one before it need not wait for the last of its programs. Launched `beside` it, it
starts on multiprocessors that fall idle, once all programs of that one have begun and called `let_next_start`, and ends
after it, so that all later kernels see both done. Two things make that right. The one before must have been launched in
the usual way, or beside one that was and of which nothing is needed either: then all that comes before is done. And
memory that it uses may not be freed before the next one has its own, because PyTorch gives what is freed to what is
launched next on the stream; nor may anything fill that memory in between (`may_overlap`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["beside", "end_beside", "let_next_start", "may_overlap", "start_beside", "wait_for_kernel_before"]


@triton.jit
def let_next_start():
    """From here on the next kernel may start, if it was launched `beside` this one."""
    gdc_launch_dependents()


@triton.jit
def start_beside(BESIDE: tl.constexpr):
    """First in a kernel that may run `beside` another."""
    if BESIDE:
        gdc_launch_dependents()
        # what the multiprocessor has cached may be older than what the kernels before that one wrote
        tl.inline_asm_elementwise("fence.acq_rel.gpu; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_kernel_before(BESIDE: tl.constexpr):
    """In such a kernel that needs something of the one before it after all, before it reads that."""
    if BESIDE:
        gdc_wait()


@triton.jit
def end_beside(BESIDE: tl.constexpr):
    """Last in such a kernel: waits for the one before it."""
    if BESIDE:
        gdc_wait()


def may_overlap() -> bool:
    """Whether kernels may run beside each other: not where PyTorch fills fresh memory, by kernels in between."""
    return not torch.are_deterministic_algorithms_enabled()


def beside(wanted: bool) -> dict[str, Any]:
    """Launch options of a kernel that runs beside the one before it where that is ``wanted``, else after it."""
    return {"BESIDE": True, "launch_pdl": True} if wanted else {"BESIDE": False}
