"""Whether the Gluon kernels can run a call; elsewhere the Triton kernels do, with the same arithmetic."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch
import triton

__all__ = [
    "attention_backward_key",
    "attention_backward_query",
    "attention_forward",
    "key_states",
    "linear_backward",
    "usable",
]

TRITON_VERSIONS = ((3, 6), (3, 9))
"""First and last minor version whose Gluon these kernels were compiled with: Gluon is experimental."""


@functools.cache
def available(device: int) -> bool:
    """Whether ``device`` is a Hopper GPU and this Triton's Gluon is one that the kernels are written for."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    known = TRITON_VERSIONS[0] <= version <= TRITON_VERSIONS[1]
    # an AMD GPU may say (9, x) too
    return known and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def usable(*tensors: torch.Tensor, scale: float, block_q: int, block_k: int, masked: bool) -> bool:
    """Whether the Gluon kernels take this call: 16-bit, head dimension a multiple of 8 up to 128, blocks of 64 or more,
    no mask.

    ``tensors`` (B, H, L, D) are `vector_readable`. A scale below zero would turn the maximum into a minimum.
    """
    first = tensors[0]
    return (
        first.is_cuda
        and not masked
        and first.numel() > 0  # TMA has no axis of size 0
        and first.dtype in (torch.float16, torch.bfloat16)
        and first.shape[3] <= 128
        and first.shape[3] % 8 == 0  # TMA takes results in whole vectors
        and block_q in (64, 128, 256)
        and block_k in (64, 128)
        and scale > 0
        and all(stride > 0 for x in tensors for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
        and available(first.device.index)
    )


def key_states(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gluon_states.key_states`, imported when a Hopper GPU first needs it."""
    return import_module("sla_compile.kernels.hopper.states").key_states(*arguments)  # type: ignore[no-any-return]


def attention_forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gluon_forward.attention_forward`, likewise."""
    return import_module("sla_compile.kernels.hopper.forward").attention_forward(*arguments)  # type: ignore[no-any-return]


def attention_backward_query(*arguments: Any) -> None:
    """`gluon_backward_query.attention_backward_query`, likewise."""
    import_module("sla_compile.kernels.hopper.backward_query").attention_backward_query(*arguments)


def attention_backward_key(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`gluon_backward_key.attention_backward_key`, likewise."""
    return import_module("sla_compile.kernels.hopper.backward_key").attention_backward_key(*arguments)  # type: ignore[no-any-return]


def linear_backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gluon_linear_backward.linear_backward`, likewise."""
    return import_module("sla_compile.kernels.hopper.linear_backward").linear_backward(*arguments)  # type: ignore[no-any-return]
