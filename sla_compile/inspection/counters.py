"""``RunCounters``: what the attentions of a model did while it ran, counted on the device, read when asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult
from sla_compile.compiler.preparation import unwrapped
from sla_compile.gate import Gate, gates
from sla_compile.ops.run_watchers import unwatch_runs, watch_runs

__all__ = ["OTHER", "RunCounters"]

OTHER = "other"
"""Stands for calls whose site is not known: of another model, or with a gate that is computed from its parameters."""

_captured: dict[int, Tensor] = {}
"""Totals that CUDA graphs write to, kept for as long as the process may replay them."""

_COUNTS = ("calls", "blocks", "critical", "rows", "rows_without_marginal", "outputs", "non_finite")


class RunCounters:
    """Counts, for each gate of a model, the runs of the op within this context: ``with RunCounters(model) as found``.

    Nothing waits for the device until `read`. What a CUDA graph replays is counted, even later, if it was captured
    within this context, and not if before; a run that activation checkpointing repeats is counted twice. A gate with
    ``sparse_scale`` and without ``max_topk`` is not told from others: its runs are under ``"other"``, as are those of
    other models.

    Raises TypeError where ``model`` is no module, and ValueError where it has no gates.
    """

    def __init__(self, model: nn.Module) -> None:
        model = unwrapped(model)
        self._gates: dict[str, Gate] = gates(model)
        if not self._gates:
            raise ValueError(f"{type(model).__name__} has no gates; accepted: a model that was prepared or compiled")
        devices = {path: gate.device for path, gate in self._gates.items()}
        devices[OTHER] = next(iter(devices.values()))
        # Made here, outside any capture of a CUDA graph.
        with torch.inference_mode(False):
            self._totals: dict[str, Tensor] = {
                path: torch.zeros(len(_COUNTS), dtype=torch.int64, device=device) for path, device in devices.items()
            }

    def reset(self) -> None:
        """Count from zero again."""
        for total in self._totals.values():  # in place: a CUDA graph may write to it
            total.zero_()

    def __enter__(self) -> RunCounters:
        watch_runs(self._count)
        return self

    def __exit__(self, *_: Any) -> None:
        unwatch_runs(self._count)

    def read(self) -> dict[str, dict[str, float]]:
        """By gate path, and for ``"other"`` where there were any; waits for the device.

        ``calls``; ``critical_share`` of all blocks; ``rows_without_marginal``, the share of rows of blocks whose linear
        branch has nothing to sum; ``non_finite``, how many numbers of the output are infinite or nan. A gate of no call
        is there too, with zeros: its attention did not run, or ran dense.
        """
        found = {}
        for path, total in self._totals.items():
            counts = dict(zip(_COUNTS, total.tolist(), strict=True))
            if path == OTHER and not counts["calls"]:
                continue
            found[path] = {
                "calls": counts["calls"],
                "critical_share": counts["critical"] / max(counts["blocks"], 1),
                "rows_without_marginal": counts["rows_without_marginal"] / max(counts["rows"], 1),
                "non_finite": counts["non_finite"],
            }
        return found

    def scalars(self, prefix: str = "sla") -> dict[str, float]:
        """`read` as one level, "sla/blocks.0.attn1.sla/calls": for ``wandb.log`` and TensorBoard's ``add_scalar``."""
        return {
            f"{prefix}/{path}/{name}": value for path, counts in self.read().items() for name, value in counts.items()
        }

    @torch.no_grad()
    def _count(self, inputs: AttentionInputs, result: ForwardResult) -> None:
        total = self._totals[self._site(inputs)]
        if total.device != result.out.device:  # the model was moved since
            total = self._totals[self._site(inputs)] = total.to(result.out.device)
        if total.is_cuda and torch.cuda.is_current_stream_capturing():
            _captured[id(total)] = total
        block_map = result.block_map
        known = (1, block_map.numel(), block_map.shape[:-1].numel(), result.out.numel())
        for name, value in zip(("calls", "blocks", "rows", "outputs"), known, strict=True):
            total[_COUNTS.index(name)].add_(value)
        counted: dict[str, Any] = {
            "critical": (block_map == 1).sum(),
            "rows_without_marginal": (block_map != 0).all(-1).sum(),
            "non_finite": result.out.isfinite().logical_not_().sum(),
        }
        for name, value in counted.items():
            total[_COUNTS.index(name)].add_(value)

    def _site(self, inputs: AttentionInputs) -> str:
        """The path of the gate whose tensors these are."""
        tensors = (inputs.weight, inputs.bias, inputs.shift, inputs.sparsity)
        given = {x.data_ptr() for x in tensors if x is not None}
        for path, gate in self._gates.items():
            own = (x for x in (gate.weight, gate.bias, gate.shift, gate.sparsity) if x is not None)
            if any(x.data_ptr() in given for x in own):
                return path
        return OTHER
