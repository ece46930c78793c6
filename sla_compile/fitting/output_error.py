"""The error of a model's output while its gated attentions compute something else than dense attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sla_compile.fitting.observer import Arguments, GatedCall, gated_calls
from sla_compile.fitting.ranks import total

__all__ = ["OutputError", "at_least_float32", "floating_tensors"]


class OutputError:
    """||output - dense output||^2 / ||dense output||^2 on a few batches (of all ranks), attention replaced.

    ``dense`` holds every floating-point tensor that the dense model returns on them, ``dense_square`` their ||.||^2.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Arguments]) -> None:
        self.model, self.batches = model, batches
        self.dense = self._outputs(lambda call: call.dense)
        self.dense_square = total(sum(float(at_least_float32(d).square().sum()) for d in self.dense))

    def of(self, attend: Callable[[GatedCall], Tensor]) -> float:
        """The error where each gated attention outputs what ``attend`` returns; absolute if the dense output is 0.

        It may be infinite or nan.
        """
        differences = (
            at_least_float32(got) - at_least_float32(dense)
            for got, dense in zip(self._outputs(attend), self.dense, strict=True)
        )
        distance = total(sum(float(difference.square().sum()) for difference in differences))
        return distance / self.dense_square if self.dense_square > 0 else distance

    @property
    def mean_square(self) -> float:
        """The mean square of the dense output's numbers; 0 if it has none."""
        return self.dense_square / max(1.0, total(sum(dense.numel() for dense in self.dense)))

    @property
    def is_defined(self) -> bool:
        """Whether the dense output has floating-point tensors, and all their numbers are finite."""
        return total(len(self.dense)) > 0 and math.isfinite(self.dense_square)

    @torch.no_grad()
    def _outputs(self, attend: Callable[[GatedCall], Tensor]) -> list[Tensor]:
        """Every floating-point tensor that the model returns, where gated attention gives what ``attend`` returns."""
        devices = {p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(sorted(devices)), gated_calls(self.model, attend):
            torch.manual_seed(0)  # the same dropout, say, in every run
            return [part for args, kwargs in self.batches for part in floating_tensors(self.model(*args, **kwargs))]


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def floating_tensors(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in ``output``: a tensor, or tuples, lists, mappings and dataclasses of them."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from floating_tensors(list(output.values()))
    elif isinstance(output, tuple | list):
        for part in output:
            yield from floating_tensors(part)
    elif dataclasses.is_dataclass(output):
        yield from floating_tensors([getattr(output, field.name) for field in dataclasses.fields(output)])
