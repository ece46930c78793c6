"""A function of tensors, replayed as a CUDA graph: hundreds of small kernels for the host's price of one launch."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["GraphedCallable"]

WARM_UP = 3
"""Calls before the capture: they compile, and they count like any other."""


class GraphedCallable:
    """``function``, whose every call after a few is a replay; without ``enabled`` just ``function``.

    It must do the same with tensors of the same shapes in every call, and what it reads besides its arguments must
    keep its memory. The result is overwritten by the next call. What cannot be captured is called, with a warning.
    """

    def __init__(self, function: Callable[..., Tensor], enabled: bool) -> None:
        self.function, self.enabled = function, enabled
        self.calls = 0
        self.stream: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What ``function`` gives."""
        if self.enabled and self.graph is None:
            if self.calls < WARM_UP:
                return self._warmed(inputs)
            self._capture(inputs)
        if self.graph is None:
            return self.function(*inputs)
        for fixed, given in zip(self.inputs, inputs, strict=True):
            fixed.copy_(given)
        self.graph.replay()
        return self.output

    def _warmed(self, inputs: Sequence[Tensor]) -> Tensor:
        """A call on the stream of the capture, as captures ask for."""
        self.calls += 1
        stream = self.stream = self.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*without CUDA graph capture")  # what optimizers say of a warm-up
            output = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return output

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        gc.collect()  # an old graph must not be freed in the middle of the capture
        self.inputs = [tensor.clone() for tensor in inputs]
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph, which is slower: {error}", stacklevel=3)
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
            self.enabled = False
        else:
            self.graph = graph
