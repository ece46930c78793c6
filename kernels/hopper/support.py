"""Whether Gluon's kernels can run a call; elsewhere Triton's do, with the same arithmetic. This imports no Gluon."""

from __future__ import annotations

import functools

import torch
import triton

from sla_compile.common.limits import TAYLOR
from sla_compile.common.options import BackwardOptions

__all__ = ["WIDE", "available", "usable"]

TRITON_VERSIONS = ((3, 6), (3, 9))
"""First and last minor version whose Gluon these kernels were compiled with: Gluon is experimental."""

WIDE = 128
"""Head dimensions above this have kernels of their own: a warpgroup has not the registers for dK and dV of 64 keys."""

HOPPER = 9
"""Major compute capability."""


@functools.cache
def available(device: int) -> bool:
    """Whether ``device`` is a Hopper GPU and this Triton's Gluon is one that the kernels are written for."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    known = TRITON_VERSIONS[0] <= version <= TRITON_VERSIONS[1]
    # an AMD GPU may say (9, x) too
    return known and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == HOPPER


def usable(*tensors: torch.Tensor, options: BackwardOptions, has_key_mask: bool) -> bool:
    """Whether the Gluon kernels take this call: 16-bit, head dimension a multiple of 8, blocks of 64 or more, causal
    only without a mask and with as many keys as queries; above 128 dimensions neither causal nor with a mask or virtual
    keys.

    ``tensors`` (B, H, L, D) are `vector_readable`. A scale below zero would turn the maximum into a minimum.
    """
    first = tensors[0]
    plain = not (options.causal or has_key_mask or options.linear == TAYLOR)
    return (
        first.is_cuda
        and not (options.causal and (has_key_mask or len({x.shape[2] for x in tensors}) > 1))
        and (first.shape[3] <= WIDE or plain)
        and first.numel() > 0  # TMA has no axis of size 0
        and first.dtype in (torch.float16, torch.bfloat16)
        and first.shape[3] % 8 == 0  # TMA takes results in whole vectors
        and options.block_q in (64, 128, 256)
        and options.block_k in (64, 128)
        and options.scale > 0
        and all(stride > 0 for x in tensors for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
        and available(first.device.index)
    )
