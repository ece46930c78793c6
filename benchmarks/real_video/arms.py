"""The arms of the experiment: what takes the place of dense attention, and how many key blocks stay exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from benchmarks.real_video.data import Batch
from benchmarks.real_video.fitting import allocate, calibrate, even_masses, install, layer_errors
from benchmarks.real_video.forms import Budget, Form, FormSpec
from benchmarks.real_video.losses import LOSSES, Loss
from benchmarks.real_video.model import RotaryVideoDiT
from benchmarks.real_video.package_arms import PACKAGE_ARMS

__all__ = ["ARMS", "CLOSED", "AnyArm", "Arm"]

TILE = (4, 4, 4)
LEAST = 0.03
"""The share of blocks that every row keeps where rows differ (SpargeAttention2)."""


class AnyArm(Protocol):
    """What the study asks of an arm: a form of this folder (``Arm``), or the package as it is (``PackageArm``)."""

    @property
    def title(self) -> str:
        """As the tables have it."""

    @property
    def loss(self) -> Loss:
        """What it is fine-tuned towards."""

    @property
    def rate(self) -> float:
        """Its learning rate, of the model's weights, in units of the study's."""

    @property
    def levels(self) -> int:
        """How many parts of the times have numbers of critical blocks of their own; 0: a batch may mix times."""

    @property
    def sparsity(self) -> str:
        """As the tables have it."""

    def small(self) -> AnyArm:
        """The same for a tiny study."""

    def put_into(self, model: RotaryVideoDiT, tokens: int, batches: Sequence[Batch], kept: Path) -> RotaryVideoDiT:
        """Give the dense ``model`` this attention, fitted on ``batches``, and compile it on a GPU.

        kept: a folder that may hold the fit from the last time, and may be given it.
        """

    def gates(self, model: RotaryVideoDiT) -> list[Tensor]:
        """What was added to the model's own parameters."""

    def budgets(self, model: RotaryVideoDiT) -> list[Any]:
        """Of each layer: "dense", or how many blocks are critical."""

    def orders(self, model: RotaryVideoDiT) -> list[str]:
        """Of each layer the token order, or those of its heads joined by commas; nothing where all have the model's."""


@dataclass(frozen=True)
class Arm:
    """A form, how many blocks are critical, and what else is done."""

    title: str
    spec: FormSpec | None
    """None: dense."""
    topk: float = 0.05
    spread: str = "even"
    """How critical blocks are spread: "even", over "layers", over "heads" (of all layers), or over "rows"."""
    calibrated: bool = False
    sequential: bool = False
    """Each layer is calibrated on what the layers before make of the data in this form."""
    tiles: bool = False
    dense: tuple[int, ...] = ()
    """Layers that stay dense."""
    loss: Loss = "flow"
    rate: float = 1.0
    levels: int = 0

    def count(self, tokens: int) -> int:
        """Critical blocks of a row, on average."""
        assert self.spec is not None
        return max(1, int(self.topk * (tokens // self.spec.block)))

    @property
    def sparsity(self) -> str:
        """As the tables have it."""
        return "-" if self.spec is None else f"{1 - self.topk:.0%}"

    def small(self) -> Arm:
        """The same with small blocks, three times as many of them critical."""
        return self if self.spec is None else replace(self, spec=replace(self.spec, block=16), topk=3 * self.topk)

    def gates(self, model: RotaryVideoDiT) -> list[Tensor]:
        """What was added to the model's own parameters."""
        return [p for block in model.attentions() if block.form is not None for p in block.form.parameters()]

    def budgets(self, model: RotaryVideoDiT) -> list[Any]:
        """Of each layer: "dense", or how many blocks are critical and the mass of a row's prefix."""
        forms = [block.form for block in model.attentions()]
        return [[form.budget.count, form.budget.mass] if isinstance(form, Form) else "dense" for form in forms]

    def orders(self, model: RotaryVideoDiT) -> list[str]:
        """None: the tokens of the whole model stand in tiles, or not."""
        return []

    def put_into(self, model: RotaryVideoDiT, tokens: int, batches: Sequence[Batch], kept: Path) -> RotaryVideoDiT:
        """Give the dense ``model`` the attention of this arm, its budgets and gates fitted on ``batches`` each time."""
        if model.head.weight.is_cuda:
            model.compile_blocks()
        model.tile = TILE if self.tiles else None
        if self.spec is None:
            return model
        install(model, self.spec, self._budgets(model, tokens, batches), self.dense)
        if self.calibrated:
            calibrate(model, batches, self.sequential)
        return model

    def _budgets(self, model: RotaryVideoDiT, tokens: int, batches: Sequence[Batch]) -> list[Budget]:
        assert self.spec is not None
        config, count = model.config, self.count(tokens)
        if self.spread == "even":
            return [Budget(count)] * config.layers
        few = batches[: max(1, len(batches) // 2)]
        if self.spread == "rows":
            least = max(1, int(LEAST * (tokens // self.spec.block)))
            masses = even_masses(model, few, self.spec.block, min(least, count), count)
            return [Budget(min(least, count), mass) for mass in masses]
        plain = replace(self.spec, gated=False, scaled=False, per_head=False, shifted=False)
        errors, rungs = layer_errors(model, plain, few, count)
        if self.spread == "layers":
            chosen = allocate(errors.sum(-1), rungs, count * config.layers)
            return [Budget(one) for one in chosen]
        chosen = allocate(errors.transpose(1, 2).flatten(0, 1), rungs, count * config.layers * config.heads)
        rows = [chosen[at : at + config.heads] for at in range(0, len(chosen), config.heads)]
        return [Budget(tuple(row)) for row in rows]


SPARSE = FormSpec()
LINEAR = FormSpec("linear", gated=True)
SCALED = replace(LINEAR, scaled=True)
VIRTUAL = FormSpec("virtual")
VARIANCE = replace(VIRTUAL, variance=True)
HBAR = replace(VARIANCE, slope="global")
ROW = replace(VARIANCE, slope="row")
MASS = replace(ROW, route="mass")


def fitted(title: str, spec: FormSpec, per_head: bool = False) -> Arm:
    """An arm whose gate is calibrated: W O^l + b, shared by the heads or ``per_head``, and a scale for each head."""
    return Arm(title, replace(spec, gated=True, scaled=True, per_head=per_head), calibrated=True)


_FORMS: dict[str, Arm] = {
    "dense": Arm("dense", None),
    "sparse": Arm("sparse only", SPARSE),
    "sla": Arm("SLA, the paper's", LINEAR),
    "sla-cal": Arm("SLA, calibrated", LINEAR, calibrated=True),
    "sla-scale-cal": fitted("SLA, scaled, calibrated", SCALED),
    "sla-scale-head-cal": fitted("SLA, scaled, W per head, calibrated", SCALED, per_head=True),
    "mix": Arm("SLA2's mix", FormSpec("mix")),
    "mix-cal": Arm("SLA2's mix, fitted", FormSpec("mix"), calibrated=True),
    "virtual": Arm("virtual keys", VIRTUAL),
    "virtual-hbar": Arm("virtual keys, Hbar", replace(VIRTUAL, slope="global")),
    "virtual-w": Arm("virtual keys, w", VARIANCE),
    "virtual-w-hbar": Arm("virtual keys, w, Hbar", HBAR),
    "virtual-w-row": Arm("virtual keys, w, S of the row", ROW),
    "virtual-w-scale": Arm("virtual keys, w, scaled", replace(VARIANCE, scaled=True), calibrated=True),
    "virtual-row-shift": Arm("virtual keys, w, S of the row, shifted", replace(ROW, shifted=True), calibrated=True),
    "virtual-w-gate": fitted("virtual keys, w, gate", VARIANCE),
    "virtual-w-row-gate": fitted("virtual keys, w, S of the row, gate", ROW),
    "virtual-w-row-gate-head": fitted("virtual keys, w, S of the row, gate per head", ROW, per_head=True),
    "virtual-w-row-gate-seq": replace(
        fitted("virtual keys, w, S of the row, gate per head, in sequence", ROW, per_head=True), sequential=True
    ),
    "two": Arm("two virtual keys a block, w", replace(VARIANCE, splits=2)),
    "two-row": Arm("two virtual keys a block, w, S of the row", replace(ROW, splits=2)),
    "four-row": Arm("four virtual keys a block, w, S of the row", replace(ROW, splits=4)),
    "route-error": Arm("virtual keys, w, S of the row, ranked by error", replace(ROW, route="error")),
    "mass": Arm("virtual keys, w, S of the row, ranked by mass", MASS),
    "mass-gate": fitted("virtual keys, w, S of the row, ranked by mass, gate", MASS),
    "mass-shift": Arm(
        "virtual keys, w, S of the row, ranked by mass, shifted", replace(MASS, shifted=True), calibrated=True
    ),
    "mass-hbar-shift": Arm(
        "virtual keys, w, Hbar, ranked by mass, shifted", replace(HBAR, route="mass", shifted=True), calibrated=True
    ),
    "mass-hbar": Arm("virtual keys, w, Hbar, ranked by mass", replace(HBAR, route="mass")),
}
_VARIED = [name for name in _FORMS if name.startswith("mass")]
for _name in ("sparse", "sla-scale-cal", "virtual-w", "virtual-w-row", "virtual-w-row-gate", *_VARIED):
    _arm = _FORMS[_name]
    for _spread in ("layers", "heads", "rows"):
        _FORMS[f"{_name}-{_spread}"] = replace(_arm, title=f"{_arm.title}, spread over {_spread}", spread=_spread)
    _FORMS[f"{_name}-tiles"] = replace(_arm, title=f"{_arm.title}, tokens in tiles", tiles=True)
    _FORMS[f"{_name}-ends"] = replace(_arm, title=f"{_arm.title}, first and last layer dense", dense=(0, -1))
CLOSED: list[str] = [name for name in _FORMS if name != "sla"]
"""The arms that are measured right after the switch; the paper's is sparse only then."""

for _name in list(_FORMS)[1:]:
    for _topk in (0.1, 0.03):
        _FORMS[f"{_name}@{1 - _topk:.0%}"] = replace(_FORMS[_name], topk=_topk)
for _name in list(_FORMS):
    _arm = _FORMS[_name]
    _FORMS |= {
        f"{_name}+{_loss}": replace(_arm, title=f"{_arm.title}, {LOSSES[_loss]}", loss=_loss) for _loss in LOSSES
    }

_OTHER = ("sparse", "sla-scale-cal", "virtual-w", "virtual-w-row", "virtual-w-row-gate", "mass-gate-heads")
CLOSED += [f"{name}@{sparsity}" for sparsity in ("90%", "97%") for name in _OTHER]

ARMS: dict[str, AnyArm] = {**_FORMS, **PACKAGE_ARMS}
