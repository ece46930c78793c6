"""What each attention, and the model's output, lose at each topk of a ladder: the measurements behind `allocate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sla_compile.common.blocks import MILLION, num_blocks, num_critical
from sla_compile.fitting.distillation import floating
from sla_compile.fitting.observer import Arguments, GatedCall, gated_calls
from sla_compile.gate import Gate

__all__ = ["Measured", "Outputs", "measure"]

_TOKENS_PER_CHUNK = 2048


@dataclass
class Measured:
    """One attention: its rungs, and for each the squared error and the critical share of the work."""

    path: str
    topk_before: float
    bottomk: float
    rungs: tuple[float, ...]
    squared: Tensor
    block_k: int
    dense: float = 0.0
    work: float = 0.0
    critical: list[float] = field(default_factory=list)
    calls: int = 0
    effect: float | None = None

    @classmethod
    def of(cls, path: str, gate: Gate, budget: float, ladder: Sequence[float]) -> Measured:
        topk, bottomk = gate.shares()
        most = min(1.0 if gate.config.max_topk is None else gate.config.max_topk, 1 - bottomk)
        if budget > most:
            raise ValueError(f"{path}: got budget={budget}; accepted: up to {most}, for its max_topk and bottomk")
        wanted = {round(rung * budget * MILLION) / MILLION for rung in ladder}
        rungs = sorted({rung for rung in wanted if 0 < rung <= most} | {topk, budget})
        zeros = torch.zeros(len(rungs), dtype=torch.float64, device=gate.weight.device)
        return cls(path, topk, bottomk, tuple(rungs), zeros, gate.config.block_k, critical=[0.0] * len(rungs))

    def add(self, call: GatedCall) -> None:
        """Measure ``call`` at every rung."""
        batch, heads, queries, _ = call.query.shape
        blocks = num_blocks(call.key.shape[2], self.block_k)
        work = float(batch * heads * queries * call.key.shape[2])
        for i, rung in enumerate(self.rungs):
            self.squared[i] += _distance(call.at(rung, min(self.bottomk, 1 - rung)), call.dense)
            self.critical[i] += work * num_critical(rung, blocks) / blocks
        self.dense += _distance(call.dense, None).item()
        self.work += work
        self.calls += 1

    def losses(self) -> list[float]:
        """||O - dense||^2 / ||dense||^2 at each rung."""
        found: list[float] = (self.squared / max(self.dense, torch.finfo(torch.float64).tiny)).tolist()
        if not all(map(math.isfinite, found)):
            raise ValueError(f"{self.path}: attention, dense or sparse, is not finite on these batches")
        return found


def _distance(a: Tensor, b: Tensor | None) -> Tensor:
    """||a - b||^2 of tensors (B, H, N, D) in float64, a chunk at a time; ||a||^2 without b."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[2], _TOKENS_PER_CHUNK):
        rows = slice(start, start + _TOKENS_PER_CHUNK)
        part = a[:, :, rows].double()
        total += (part if b is None else part - b[:, :, rows].double()).square().sum()
    return total


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Arguments], measured: Mapping[str, Measured]) -> int:
    def observe(call: GatedCall) -> Tensor:
        measured[call.path].add(call)
        return call.dense

    count = 0
    with gated_calls(model, observe):
        for args, kwargs in batches:
            model(*args, **kwargs)
            count += 1
    return count


class Outputs:
    """The model's outputs on a few batches while some attentions are sparse, against its dense outputs."""

    def __init__(self, model: nn.Module, batches: Sequence[Arguments], sites: Mapping[str, Measured]) -> None:
        self.model, self.batches, self.sites = model, batches, sites
        self.dense = self._run(lambda call: call.dense)
        self.norm = sum(float(_wide(d).square().sum()) for d in self.dense)

    def squared(self, topks: Mapping[str, float]) -> float:
        """||output - dense output||^2 / ||dense output||^2 with these topks by path, the rest dense."""

        def attend(call: GatedCall) -> Tensor:
            if call.path not in topks:
                return call.dense
            topk = topks[call.path]
            return call.at(topk, min(self.sites[call.path].bottomk, 1 - topk))

        moved = self._run(attend)
        total = sum(float((_wide(m) - _wide(d)).square().sum()) for m, d in zip(moved, self.dense, strict=True))
        if not math.isfinite(total):
            raise ValueError(f"{type(self.model).__name__}: its output is not finite on the first batches")
        return total / self.norm if self.norm > 0 else total

    def weigh(self, budget: float) -> None:
        """Set each site's ``effect``, unless the output does not depend on any."""
        effects = {}
        for path, site in self.sites.items():
            loss = site.losses()[site.rungs.index(budget)]
            effects[path] = self.squared({path: budget}) / loss if loss > 0 else 0.0
        if any(effects.values()):
            for path, effect in effects.items():
                self.sites[path].effect = effect

    @torch.no_grad()
    def _run(self, attend: Callable[[GatedCall], Tensor]) -> list[Tensor]:
        devices = {p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(sorted(devices)), gated_calls(self.model, attend):
            torch.manual_seed(0)  # dropout, say, is the same in every run
            return [part for args, kwargs in self.batches for part in floating(self.model(*args, **kwargs))]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
