"""How much of the attention error of the sparse branch alone the best gate of each form closes.

    python benchmarks/gate_forms.py --checkpoint runs/quality/pretrained-0.pt [--sparsity 0.95 0.8] [--videos 128]

SLA normalises its two branches apart, so that O^s is too large by the share of the softmax's mass that is not on
critical blocks (SLA2, arXiv 2602.12675). The forms are O^s + W O^l + b, the paper's, and ones that may also scale O^s:
by a number for each head, or by an affine function of ``mass``, the critical share of the softmax over pooled scores.
Each is fitted on calibration videos by least squares and judged on held-out ones, on the dense model's inputs.

Everything follows from sums over tokens: F^T F and F^T O with the features F = [O^s, mass O^s, O^l, (1 - mass) O^l, 1].
Axes: H heads, N tokens, D head dimension, P = 4 D + 1 features.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

from benchmarks.dense_checkpoint import Batch, Study, parser
from sla_compile.fitting.observer import GatedCall, gated_calls

SPARSE, SPARSE_BY_MASS, LINEAR, LINEAR_BY_REST = range(4)


@dataclass(frozen=True)
class Form:
    """O = sum of c_i S_i + X W + b, with numbers c_i for each head."""

    title: str
    scaled: tuple[int, ...] = ()
    """The features S_i."""
    matrix: int | None = None
    """The features X."""
    shared: bool = True
    """Whether the heads share W and b."""
    free: bool = True
    """Whether the numbers are fitted; they are 1 otherwise."""


FORMS = (
    Form("O^s + W O^l + b (SLA)", (SPARSE,), LINEAR, free=False),
    Form("the same, W and b of each head", (SPARSE,), LINEAR, shared=False, free=False),
    Form("s O^s", (SPARSE,)),
    Form("s O^s + r O^l", (SPARSE, LINEAR)),
    Form("s O^s + W O^l + b", (SPARSE,), LINEAR),
    Form("the same, W and b of each head", (SPARSE,), LINEAR, shared=False),
    Form("(s + t mass) O^s + W (1 - mass) O^l + b", (SPARSE, SPARSE_BY_MASS), LINEAR_BY_REST),
    Form("the same, W and b of each head", (SPARSE, SPARSE_BY_MASS), LINEAR_BY_REST, shared=False),
)


class Sums:
    """F^T F (H, P, P), F^T O (H, P, D) and ||O||^2 of one attention, float64."""

    def __init__(self) -> None:
        self.gram = self.cross = torch.zeros((), dtype=torch.float64)
        self.norm = 0.0

    def add(self, call: GatedCall, topk: float) -> None:
        """Add every token of ``call``."""
        head_dim, options = call.query.shape[3], {**call.options(), "topk": topk}
        out, linear, _, classes, *_ = torch.ops.sla.forward.default(
            call.query, call.key, call.value, call.query.new_zeros(head_dim, head_dim), None, **options
        )
        query, key = (x.float().unflatten(2, (classes.shape[2], -1)).mean(3) for x in (call.query, call.key))
        attention = (query @ key.mT * call.scale).softmax(-1)
        mass = (attention * (classes == 1)).sum(-1).repeat_interleave(call.query.shape[2] // classes.shape[2], dim=2)
        for video in range(len(out)):
            o_s, o_l, dense = (x[video].double() for x in (out, linear, call.dense))
            by_mass = mass[video].double()[..., None]
            features = F.pad(torch.cat([o_s, by_mass * o_s, o_l, (1 - by_mass) * o_l], dim=-1), (0, 1), value=1.0)
            self.gram = self.gram + features.mT @ features
            self.cross = self.cross + features.mT @ dense
            self.norm += dense.square().sum().item()

    def error(self, matrix: Tensor) -> float:
        """||F matrix - O|| / ||O|| with ``matrix`` (H, P, D)."""
        squared = self.norm - 2 * (matrix * self.cross).sum() + (matrix * (self.gram @ matrix)).sum()
        return float((squared.clamp(min=0) / self.norm).sqrt())


def fitted(form: Form, sums: Sums, ridge: float = 1e-2, rounds: int = 3000) -> Tensor:
    """The matrix (H, P, D) of ``form`` with the least error on ``sums``: numbers and W, b in turn, till they settle."""
    gram, cross = sums.gram, sums.cross
    heads, count, dim = cross.shape
    columns = [slice(i * dim, (i + 1) * dim) for i in range(4)]
    numbers = gram.new_ones(heads, len(form.scaled))
    fixed = torch.zeros_like(cross)  # of W and b
    within = gram.new_tensor(
        [
            [[float((gram[h, columns[i], columns[j]]).trace()) for j in form.scaled] for i in form.scaled]
            for h in range(heads)
        ]
    )

    def scaled_part() -> Tensor:
        matrix = torch.zeros_like(cross)
        for place, i in enumerate(form.scaled):
            matrix[:, columns[i]] += numbers[:, place, None, None] * torch.eye(
                dim, dtype=gram.dtype, device=gram.device
            )
        return matrix

    for _ in range(rounds if form.free else 1):
        if form.matrix is not None:
            rows = [*range(columns[form.matrix].start, columns[form.matrix].stop), count - 1]
            normal, wanted = gram[:, rows][:, :, rows], (cross - gram @ scaled_part())[:, rows]
            if form.shared:
                normal, wanted = normal.sum(0, keepdim=True), wanted.sum(0, keepdim=True)
            fixed[:, rows] = torch.linalg.solve(normal + _penalty(normal, ridge), wanted)
        if form.free:
            rest = cross - gram @ fixed
            traces = [rest[:, columns[i]].diagonal(dim1=1, dim2=2).sum(-1) for i in form.scaled]
            before, numbers = numbers, torch.linalg.solve(within, torch.stack(traces, dim=-1))
            if (numbers - before).abs().max() < 1e-9:
                break
    return scaled_part() + fixed


def _penalty(normal: Tensor, ridge: float) -> Tensor:
    """``ridge`` times the mean variance of X, as ``calibrate`` has it; none on b."""
    tokens, total = normal[:, -1, -1], normal[:, -1, :-1]
    variance = normal.diagonal(dim1=1, dim2=2)[:, :-1].sum(-1) - total.square().sum(-1) / tokens
    ones = F.pad(torch.ones_like(total), (0, 1))
    return torch.diag_embed(ridge * (variance / total.shape[-1])[:, None] * ones)


@torch.no_grad()
def gathered(model: torch.nn.Module, batches: Iterable[Batch], topks: Sequence[float]) -> dict[float, dict[str, Sums]]:
    """The sums of each attention at each topk."""
    found: dict[float, dict[str, Sums]] = {topk: {} for topk in topks}

    def observe(call: GatedCall) -> Tensor:
        for topk, sites in found.items():
            sites.setdefault(call.path, Sums()).add(call, topk)
        return call.dense

    with gated_calls(model, observe):
        for noisy, time, _ in batches:
            model(noisy, time)
    return found


def closed(form: Form, seen: Sums, held_out: Sums) -> tuple[float, float]:
    """The share of sparse only's error that ``form``, fitted on ``seen``, closes there and on ``held_out``."""
    matrix = fitted(form, seen)
    alone = torch.zeros_like(matrix)
    alone[:, : matrix.shape[2]] = torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device)
    in_sample, beyond = (1 - sums.error(matrix) / sums.error(alone) for sums in (seen, held_out))
    return in_sample, beyond


def main(given: Sequence[str] | None = None) -> None:
    """Gather, fit every form, print the table."""
    arguments = parser(__doc__, videos=128)
    arguments.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.9, 0.8])
    arguments.add_argument("--linear", choices=("marginal", "all"), default="marginal")
    options = arguments.parse_args(given)
    study = Study(options, batches=4)
    study.prepare(linear=options.linear)
    topks = [round(1 - sparsity, 6) for sparsity in options.sparsity]
    seen, fresh = (gathered(study.model, batches, topks) for batches in (study.seen(), study.held_out))
    table = Table("form of the gate", "sparsity", "closed, held out", "of each attention", "closed, seen")
    for topk in topks:
        for form in FORMS:
            shares = [closed(form, sums, fresh[topk][path]) for path, sums in seen[topk].items()]
            within, beyond = zip(*shares, strict=True)
            each = ", ".join(f"{share:.1%}" for share in beyond)
            means = [f"{statistics.fmean(part):.1%}" for part in (beyond, within)]
            table.add_row(form.title, f"{1 - topk:.0%}", means[0], each, means[1])
        table.add_section()
    console = Console(width=140)
    console.print(f"{study.name}, linear={options.linear!r}, {study.counts}")
    console.print(table)


if __name__ == "__main__":
    main()
