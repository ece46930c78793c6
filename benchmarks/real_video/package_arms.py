"""The arms that are the package as its users have it: prepare, allocate, calibrate, and each block compiled by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sla_compile
from benchmarks.real_video.data import Batch, part_middles
from benchmarks.real_video.losses import LOSSES, Loss
from benchmarks.real_video.measuring import autocast
from benchmarks.real_video.model import RotaryVideoDiT
from sla_compile import SparsityPlan

__all__ = ["PACKAGE_ARMS", "PackageArm"]


@dataclass(frozen=True)
class PackageArm:
    """Settings of the package, and what is fitted before the model is trained or sampled from."""

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    topk: float = 0.05
    heads: bool = False
    """Whether each head gets a topk of its own, by ``allocate``."""
    calibrated: bool = False
    loss: Loss = "flow"
    rate: float = 1.0
    """Of the model's weights, in units of the study's learning rate."""
    tile: tuple[int, int, int] | None = None
    """The model's tokens stand in tiles of this shape."""
    ordered: str = ""
    """What gets a token order of its own, by ``choose_orders``: "site", each "head" of one, or nothing."""
    weights: tuple[float, ...] = ()
    """Of the errors at each part of the times, of which there are as many. Each head then gets a topk for each part, by
    ``allocate_by_time``; with none it has one for all times."""

    @property
    def levels(self) -> int:
        """How many parts of the times there are."""
        return len(self.weights)

    @property
    def sparsity(self) -> str:
        """As the tables have it."""
        return f"{1 - self.topk:.0%}"

    def small(self) -> PackageArm:
        """The same with small blocks, three times as many of them critical, and no Inductor."""
        settings = {**self.settings, "block_q": 16, "block_k": 16, "min_tokens": 0, "inner": "eager"}
        return replace(self, settings=settings, topk=3 * self.topk)

    def put_into(self, model: RotaryVideoDiT, tokens: int, batches: Sequence[Batch], kept: Path) -> RotaryVideoDiT:
        """Prepare the dense ``model``, fit it on ``batches`` or as it is ``kept``, and have its blocks compiled one by
        one.
        """
        model.tile = self.tile
        plan = kept / "plan.json"
        if plan.exists():
            sla_compile.load(model, kept)
            with autocast(model.head.weight.device):
                sla_compile.prepare(model, batches[0][:2])  # so many tokens may be another grid
            model.plan = SparsityPlan.from_json(plan.read_text()) if self.levels else None
        else:
            self._fit(model, [(video, time) for video, time, _ in batches])
            kept.mkdir(parents=True, exist_ok=True)
            sla_compile.save(model, kept)
            plan.write_text(model.plan.to_json() if model.plan is not None else "")
        torch._dynamo.config.recompile_limit = 64  # every arm has its settings, so its graphs
        for block in model.blocks:
            block.compile(backend="sla", dynamic=False)
        return model

    def _fit(self, model: RotaryVideoDiT, calls: list[tuple[Tensor, Tensor]]) -> None:
        """Prepare the dense ``model`` and fit what this arm fits; ``calls`` as ``Study.fitted_on`` orders them."""
        by_head = {"topk_by": "head", "max_topk": min(1.0, (10 if self.levels else 5) * self.topk)}
        with autocast(model.head.weight.device):
            settings = {"topk": self.topk, **(by_head if self.heads else {}), **self.settings}
            sla_compile.prepare(model, calls[0], config=settings)
            if self.ordered:
                print(sla_compile.choose_orders(model, calls, by=self.ordered), flush=True)
            if self.levels:
                times, size = part_middles(self.levels), len(calls) // self.levels
                levels = {time: calls[size * at : size * (at + 1)] for at, time in enumerate(times)}
                weights = dict(zip(times, self.weights, strict=True))
                model.plan = sla_compile.allocate_by_time(model, levels, budget=self.topk, weights=weights)
                print(
                    model.plan, f"{sampled(model.plan):.2%} critical on average over a sampling", sep="\n", flush=True
                )
                calls = one_by_one(calls)
            elif self.heads:
                print(sla_compile.allocate(model, calls, budget=self.topk).title, flush=True)
            if self.calibrated:
                sla_compile.calibrate(model, calls)

    def gates(self, model: RotaryVideoDiT) -> list[Tensor]:
        """The gates' parameters."""
        return list(sla_compile.gate_parameters(model))

    def budgets(self, model: RotaryVideoDiT) -> list[Any]:
        """Of each layer: the topk, of each head where they differ."""
        if model.plan is not None:
            return [dict(level) for level in model.plan.to_dict()["levels"]]
        found: list[Any] = []
        for gate in sla_compile.gates(model).values():
            found.append(gate.shares()[0] if gate.sparsity is None else (gate.sparsity[..., 0] / 1e6).tolist())
        return found

    def orders(self, model: RotaryVideoDiT) -> list[str]:
        """Of each layer, if they were chosen."""
        return [gate.config.reorder for gate in sla_compile.gates(model).values()] if self.ordered else []


def one_by_one(calls: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """A call for each video, in any order, so that those held back from a fit have any time."""
    found = [one for video, time in calls for one in zip(video.split(1), time.split(1), strict=True)]
    return [found[at] for at in torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()]


def sampled(plan: SparsityPlan, steps: int = 24) -> float:
    """The mean share of critical blocks over a sampling with as many steps of Euler's method."""
    return sum(plan.at((step + 1) / steps).critical or 0.0 for step in range(steps)) / steps


_TAYLOR = {"linear": "taylor"}
PACKAGE_ARMS = {
    "package-sparse": PackageArm("the package, sparse only", {"linear": "none"}),
    "package-marginal": PackageArm(
        "the package, SLA, scaled, calibrated", {"linear": "marginal", "sparse_scale": True}, calibrated=True
    ),
    "package-taylor": PackageArm("the package, taylor", _TAYLOR),
    "package-taylor-cal": PackageArm("the package, taylor, calibrated", _TAYLOR, calibrated=True),
    "package-taylor-heads": PackageArm("the package, taylor, a topk for each head", _TAYLOR, heads=True),
    "package-taylor-heads-cal": PackageArm(
        "the package, taylor, a topk for each head, calibrated", _TAYLOR, heads=True, calibrated=True
    ),
}
_BEST = PACKAGE_ARMS["package-taylor-heads-cal"]
for _name, _weights in {
    "levels": (1.0,) * 4,
    "skewed": (2.0, 1.0, 0.6, 0.4),
    "levels8": (1.0,) * 8,
    "skewed8": (2.4, 1.7, 1.2, 0.9, 0.7, 0.55, 0.45, 0.35),
}.items():
    _counts = "" if len(set(_weights)) == 1 else ", little noise counts more"
    PACKAGE_ARMS[f"package-taylor-{_name}-cal"] = replace(
        _BEST, title=f"{_BEST.title}, for each of {len(_weights)} parts of the times{_counts}", weights=_weights
    )
    _arm = PACKAGE_ARMS[f"package-taylor-{_name}-cal"]
    for _ordered, _by, _whose in (("ordered", "site", "layer"), ("headordered", "head", "head")):
        PACKAGE_ARMS[f"package-taylor-{_name}-{_ordered}-cal"] = replace(
            _arm, title=f"{_arm.title}, a token order for each {_whose}", ordered=_by
        )
_LEVELS = [name for name, arm in PACKAGE_ARMS.items() if arm.weights]
for _tile in ((1, 8, 8), (2, 4, 8), (4, 4, 4)):
    _shape = "x".join(map(str, _tile))
    PACKAGE_ARMS[f"package-taylor-heads-cal-{_shape}"] = replace(
        _BEST, title=f"{_BEST.title}, tokens in tiles of {_shape}", tile=_tile
    )
for _name in ("package-taylor-heads-cal", "package-taylor-heads-cal-1x8x8", *_LEVELS):
    _arm = PACKAGE_ARMS[_name]
    _settings = {**_arm.settings, "block_k": 32}
    PACKAGE_ARMS[f"{_name}-k32"] = replace(_arm, title=f"{_arm.title}, key blocks of 32", settings=_settings)
    _settings = {**_settings, "block_q": 32}
    PACKAGE_ARMS[f"{_name}-q32k32"] = replace(_arm, title=f"{_arm.title}, blocks of 32", settings=_settings)
for _name in list(PACKAGE_ARMS):
    for _topk in (0.1, 0.03):
        PACKAGE_ARMS[f"{_name}@{1 - _topk:.0%}"] = replace(PACKAGE_ARMS[_name], topk=_topk)
for _name in list(PACKAGE_ARMS):
    _arm = PACKAGE_ARMS[_name]
    PACKAGE_ARMS |= {
        f"{_name}+{_loss}": replace(_arm, title=f"{_arm.title}, {LOSSES[_loss]}", loss=_loss) for _loss in LOSSES
    }
_arm = PACKAGE_ARMS["package-taylor-heads-cal+teacher"]
PACKAGE_ARMS["package-taylor-heads-cal+teacher-fast"] = replace(_arm, title=f"{_arm.title}, 3 x the rate", rate=3.0)
