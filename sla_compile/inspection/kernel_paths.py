"""Which kernels a call takes on a device, and why not faster ones: asked of the code that chooses, never told again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sla_compile.common.limits import BLOCK_SIZES, DTYPES, MAX_HEAD_DIM, MIN_HEAD_DIM, TAYLOR
from sla_compile.common.options import BackwardOptions
from sla_compile.ops import attention as op

__all__ = ["MASKS", "CallKind", "KernelPath", "kernel_path", "kernel_paths"]

MASKS = ("none", "keys", "causal")
"""No mask, one over the keys, and causal attention."""

_TENSOR_SIZE = 256
"""Tokens of the empty tensors that the choosing code is shown: a block of any size."""
_HEAD_DIMS = (MIN_HEAD_DIM, 64, 72, 100, 128, MAX_HEAD_DIM)


@dataclass(frozen=True)
class CallKind:
    """What decides about the path of a call, but for its memory: rows here are dense."""

    dtype: torch.dtype
    head_dim: int = 128
    mask: str = "none"
    """One of `MASKS`."""
    block_q: int = 64
    block_k: int = 64


@dataclass(frozen=True)
class KernelPath:
    """The kernels that one kind of call takes on a device."""

    device: str
    dtype: str
    head_dim: int
    mask: str
    block_q: int
    block_k: int
    path: str
    """``cpu``, ``triton``, ``gluon`` (Hopper), or ``refused``."""
    reason: str
    """Why not Gluon's, or why it is refused; empty where nothing is faster."""
    launch: str = ""
    """Tiles, warps and stages of the forward kernel, where it is Triton's."""


def kernel_path(device: torch.device, kind: CallKind) -> KernelPath:
    """The path of a call of this ``kind`` on ``device``, cpu or cuda."""
    fields = dataclasses.asdict(kind) | {"device": str(device), "dtype": _name(kind.dtype)}
    try:
        q = _empty(device, kind)
        kernels = op._kernels(q)  # the function that every call asks
        if device.type == "cuda":
            _check_supported(q, _options(kind))
    except (TypeError, ValueError) as error:
        return KernelPath(**fields, path="refused", reason=str(error))
    if device.type == "cpu":
        package: str = getattr(kernels, "__package__", "")
        return KernelPath(**fields, path=package.rpartition(".")[2], reason="")
    if _takes_gluon(device, kind):
        return KernelPath(**fields, path="gluon", reason="")
    return KernelPath(**fields, path="triton", reason=_why_not_gluon(device, kind), launch=_launch(device, kind))


def kernel_paths(device: torch.device) -> Iterator[KernelPath]:
    """The paths of the usual call, and of those that differ from it in one thing: dtype, head dim, mask or blocks."""
    usual = CallKind(torch.bfloat16 if device.type == "cuda" else torch.float32)
    kinds = [dataclasses.replace(usual, dtype=dtype) for dtype in DTYPES["cpu"]]
    kinds += [dataclasses.replace(usual, head_dim=dim) for dim in _HEAD_DIMS]
    kinds += [dataclasses.replace(usual, mask=mask) for mask in MASKS]
    kinds += [dataclasses.replace(usual, block_q=size) for size in BLOCK_SIZES]
    kinds += [dataclasses.replace(usual, block_k=size) for size in BLOCK_SIZES]
    for kind in dict.fromkeys([usual, *kinds]):
        yield kernel_path(device, kind)


def _empty(device: torch.device, kind: CallKind) -> Tensor:
    return torch.empty(1, 1, _TENSOR_SIZE, kind.head_dim, device=device, dtype=kind.dtype)


def _options(kind: CallKind) -> BackwardOptions:
    return BackwardOptions(
        scale=kind.head_dim**-0.5,
        block_q=kind.block_q,
        block_k=kind.block_k,
        feature_map="softmax",
        linear=TAYLOR,
        causal=kind.mask == "causal",
    )


def _check_supported(q: Tensor, options: BackwardOptions) -> None:
    from sla_compile.kernels.triton.tiles import check_supported

    check_supported(q, options)


def _takes_gluon(device: torch.device, kind: CallKind) -> bool:
    from sla_compile.kernels.hopper import support
    from sla_compile.kernels.triton.tiles import vector_readable

    q = vector_readable(_empty(device, kind))
    return support.usable(q, options=_options(kind), has_key_mask=kind.mask == "keys")


def _why_not_gluon(device: torch.device, kind: CallKind) -> str:
    """Each property of ``kind`` that alone keeps a call which Gluon takes from it; or what the machine lacks."""
    from sla_compile.kernels.hopper.support import TRITON_VERSIONS

    best = CallKind(torch.bfloat16)
    if not _takes_gluon(device, best):
        import triton

        versions = " to ".join(".".join(map(str, version)) for version in TRITON_VERSIONS)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"compute capability {capability}, Triton {triton.__version__}; Gluon's: 9.x (Hopper), {versions}"
    changed = [f.name for f in dataclasses.fields(kind) if getattr(kind, f.name) != getattr(best, f.name)]
    alone = [
        name for name in changed if not _takes_gluon(device, dataclasses.replace(best, **{name: getattr(kind, name)}))
    ]
    return ", ".join(f"{name} {_name(getattr(kind, name))}" for name in alone or changed)


def _launch(device: torch.device, kind: CallKind) -> str:
    from sla_compile.kernels.triton.tiles import launch_for

    with torch.cuda.device(device):
        launch = launch_for("forward", kind.head_dim, kind.dtype, kind.block_q, kind.block_k)
    return f"{launch.tile_q}x{launch.tile_k}, chunk {launch.chunk}, {launch.warps} warps, {launch.stages} stages"


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")
