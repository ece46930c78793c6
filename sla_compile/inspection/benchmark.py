"""``bench``: one attention on this machine, dense against sparse-linear, timed after its numbers were checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sla_compile
from sla_compile.common.limits import TAYLOR
from sla_compile.config import SLAConfig
from sla_compile.inspection.self_test import BUDGETS, errors_by_definition
from sla_compile.inspection.timing import Times, peak_bytes, time_in_turn
from sla_compile.ops.attention import sparse_linear_attention

__all__ = ["BenchArm", "BenchReport", "bench"]

SHAPES = {"cuda": (1, 12, 32760, 128), "cpu": (1, 4, 4096, 64)}
"""B, H, N, D where none is asked for: of Wan2.1-1.3B at 480p on a GPU, and what a CPU does in seconds."""

_CHECKED_BLOCKS, _CHECKED_HEADS = 8, 2


@dataclass(frozen=True)
class BenchArm:
    """One way to compute the attention."""

    name: str
    """Such as "dense" or "SLA, linear marginal"."""
    forward: Times
    """Without gradients."""
    both: Times
    """A forward and its backward."""
    forward_bytes: int | None = None
    """What a forward allocates at most beyond its inputs, its output included; None on a CPU."""
    both_bytes: int | None = None

    @property
    def is_dense(self) -> bool:
        return self.name.startswith("dense")


@dataclass(frozen=True, repr=False)
class BenchReport:
    """Times of one attention on one machine; prints as a table, ``save`` draws it, ``to_dict`` for tools."""

    device: str
    """Name of the GPU, or the threads of the CPU."""
    torch: str
    sla_compile: str
    shape: tuple[int, int, int, int]
    """B, H, N, D."""
    dtype: str
    settings: dict[str, Any]
    """topk, block_q, block_k, feature_map and gate."""
    arms: tuple[BenchArm, ...]
    """Dense ones first."""
    errors: dict[str, float]
    """By form of ``linear``, the largest relative error of output and gradients, at fewer tokens."""

    def speedup(self, arm: BenchArm, what: str) -> float:
        """How many times ``arm`` is as fast as the fastest dense one; ``what`` is "forward" or "both"."""
        dense = min(getattr(other, what).median for other in self.arms if other.is_dense)
        return float(dense / getattr(arm, what).median)

    @property
    def title(self) -> str:
        """One line: the call, and where it ran."""
        batch, heads, tokens, dim = self.shape
        shares = f"topk {100 * self.settings['topk']:g}%"
        blocks = f"blocks {self.settings['block_q']}x{self.settings['block_k']}"
        return f"B{batch} H{heads} N{tokens} D{dim} {self.dtype}, {shares}, {blocks}, on {self.device}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields."""
        arms = [dataclasses.asdict(arm) for arm in self.arms]
        return {**dataclasses.asdict(self), "shape": list(self.shape), "arms": arms}

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def figure(self) -> Any:
        """A ``matplotlib.figure.Figure``: bars of both times, with their spread."""
        from sla_compile.inspection.figures import bench_figure

        return bench_figure(self)

    def save(self, path: str | Path) -> None:
        """Write the figure (.png, .svg, .pdf) or the data (.json) to ``path``; ValueError for another ending."""
        from sla_compile.inspection.figures import write

        write(path, {"figure": self.figure, "json": self.to_json})

    def __rich__(self) -> Any:
        from sla_compile.inspection.terminal import BenchView

        return BenchView(self)

    def __str__(self) -> str:
        from sla_compile.reporting.terminal import plain_text

        return plain_text(self.__rich__(), width=100)

    def __repr__(self) -> str:
        return f"<BenchReport of {len(self.arms)} arms: {self.title}>"


def bench(
    shape: Sequence[int] | None = None,
    *,
    linear: Sequence[str] | None = None,
    config: SLAConfig | Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seconds: float = 1.0,
) -> BenchReport:
    """Time one self-attention on this machine, dense and sparse-linear, forward and with its backward.

    Each form is first compared with the definition at fewer tokens, and nothing is timed where it is wrong. Inputs are
    random, in (B, N, H, D) memory as models pass them. Dense is ``F.scaled_dot_product_attention`` as PyTorch chooses
    its kernel, and on a GPU cuDNN's besides where it takes the call. Everything is counted: choosing the blocks too.

    Args:
        shape: B, H, N, D; by default (1, 12, 32760, 128) on a GPU and (1, 4, 4096, 64) on a CPU.
        linear: forms to time, each a value of ``SLAConfig.linear``; by default that of ``config``.
        config: an ``SLAConfig`` or a mapping of its fields: topk, bottomk, blocks, feature map and gate count.
        dtype: by default bfloat16 on a GPU and float32 on a CPU.
        device: "cuda" or "cpu"; by default the GPU if there is one.
        seconds: how long each arm is timed for in each direction, about.

    Raises:
        TypeError, ValueError: the op refuses the call, or a setting is refused.
        RuntimeError: a form differs from the definition.
    """
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    sizes = _checked_shape(shape, device)
    if not seconds > 0:
        raise ValueError(f"seconds: got {seconds}; accepted: a number above 0")
    forms = _forms(linear, config)
    base = next(iter(forms.values()))
    errors = {form: _checked_error(form, settings, sizes, device, dtype) for form, settings in forms.items()}
    calls = dict(_calls(forms, _inputs(sizes, dtype, device)))
    return BenchReport(
        device=_device_name(device),
        torch=torch.__version__,
        sla_compile=sla_compile.__version__,
        shape=sizes,
        dtype=str(dtype).removeprefix("torch."),
        settings={name: getattr(base, name) for name in ("topk", "block_q", "block_k", "feature_map", "gate")},
        arms=tuple(_timed(calls, device, seconds)),
        errors=errors,
    )


def _forms(linear: Sequence[str] | None, config: SLAConfig | Mapping[str, Any] | None) -> dict[str, SLAConfig]:
    """The settings of each form; those of a mapping are read with the form, as a feature map may need it."""
    if not linear or isinstance(config, SLAConfig):
        base = SLAConfig.from_options(config)
        return {form: base.changed({"linear": form}) for form in linear or (base.linear,)}
    return {form: SLAConfig.from_options({**(config or {}), "linear": form}) for form in linear}


def _checked_shape(shape: Sequence[int] | None, device: torch.device) -> tuple[int, int, int, int]:
    given = SHAPES.get(device.type, SHAPES["cpu"]) if shape is None else tuple(shape)
    if len(given) != 4 or not all(type(size) is int and size > 0 for size in given):
        raise ValueError(f"shape: got {shape!r}; accepted: four positive integers, B, H, N, D")
    batch, heads, tokens, dim = given
    return batch, heads, tokens, dim


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def _checked_error(
    form: str, config: SLAConfig, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> float:
    """The largest error of this form; RuntimeError where rounding does not explain it."""
    tokens = min(shape[2], _CHECKED_BLOCKS * max(config.block_q, config.block_k) - 8)  # the last blocks are short
    sizes: dict[str, Any] = {"tokens": tokens, "heads": min(shape[1], _CHECKED_HEADS), "dim": shape[3]}
    found = errors_by_definition(device, dtype, **sizes, **config.kernel_options())
    name = max(found, key=lambda key: found[key])
    if not found[name] <= BUDGETS[dtype]:
        raise RuntimeError(
            f"linear {form!r}: relative error {found[name]:.2g} of {name} against the definition, accepted up to "
            f"{BUDGETS[dtype]:g}: nothing was timed"
        )
    return found[name]


def _inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v and the upstream gradient (B, H, N, D), in (B, N, H, D) memory; the random state stays as it was."""
    batch, heads, tokens, dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(batch, tokens, heads, dim, generator=generator, device=device).to(dtype).transpose(1, 2)

    return [normal() for _ in range(4)]


def _calls(
    forms: Mapping[str, SLAConfig], inputs: Sequence[Tensor]
) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """By name of the arm, what to call for "forward" and "both"."""
    q, k, v = (x.requires_grad_() for x in inputs[:3])

    def arm(attend: Callable[[], Tensor], *parameters: Tensor) -> dict[str, Callable[[], Any]]:
        def both() -> Any:
            return torch.autograd.grad(attend(), (q, k, v, *parameters), inputs[3])

        return {"forward": torch.no_grad()(attend), "both": both}

    yield "dense", arm(lambda: F.scaled_dot_product_attention(q, k, v))
    if q.is_cuda and _takes_cudnn(q, k, v):
        yield "dense, cuDNN", arm(lambda: _cudnn(q, k, v))
    for form, config in forms.items():
        gate = _gate(form, config, q)
        arguments: dict[str, Any] = {**gate, **config.kernel_options()}

        def attend(arguments: dict[str, Any] = arguments) -> Tensor:
            return sparse_linear_attention(q, k, v, **arguments)

        yield f"SLA, linear {form}", arm(attend, *gate.values())


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _takes_cudnn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    try:
        _cudnn(q, k, v)
    except RuntimeError:
        return False
    return True


def _gate(form: str, config: SLAConfig, q: Tensor) -> dict[str, Tensor]:
    """The parameters of a gate of this form, by the op's names for them; float32, as models keep them."""
    heads, dim = q.shape[1], q.shape[3]
    if form == "none":
        return {}
    if form == TAYLOR:
        return {"shift": torch.zeros(heads, device=q.device, requires_grad=True)}
    shape = (dim,) if config.gate == "shared" else (heads, dim)
    dtype = torch.promote_types(q.dtype, torch.float32)
    sizes = {"weight": (*shape, dim), "bias": shape}
    return {
        name: torch.full(size, 0.01, device=q.device, dtype=dtype, requires_grad=True) for name, size in sizes.items()
    }


def _timed(
    calls: Mapping[str, Mapping[str, Callable[[], Any]]], device: torch.device, seconds: float
) -> Iterator[BenchArm]:
    times = {}
    for what in ("forward", "both"):
        arms = {name: call[what] for name, call in calls.items()}
        times[what] = time_in_turn(arms, device, seconds=seconds)
    for name, call in calls.items():
        peaks = {f"{what}_bytes": peak_bytes(call[what], [device]) for what in ("forward", "both")}
        yield BenchArm(name, times["forward"][name], times["both"][name], **peaks)
