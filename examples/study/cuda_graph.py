"""A function of tensors that is replayed as a CUDA graph: one launch from the host for hundreds of small kernels."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["GraphedCallable"]

WARM_UP = 3
"""Calls before the capture. They compile the function, and their results are used like those of later calls."""


class GraphedCallable:
    """Calls ``function`` a few times, captures it, and replays it from then on; if not ``enabled``, only calls it.

    Every call must do the same work on tensors of the same shapes, and tensors that ``function`` reads besides its
    arguments must stay where they are in memory. The next call overwrites the result. A function that cannot be
    captured is called as it is, with a warning.
    """

    def __init__(self, function: Callable[..., Tensor], enabled: bool) -> None:
        self.function, self.enabled = function, enabled
        self.calls = 0
        self.stream: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result of ``function`` on ``inputs``."""
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
        """A call on the stream that the capture will use, as CUDA graphs require."""
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
