"""Gates in closed form, and budgets by measured errors: all from the dense model's own activations, nothing trained.

Axes: B batch, H heads, N tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.real_video.data import Batch
from benchmarks.real_video.forms import Budget, Form, FormSpec
from benchmarks.real_video.measuring import autocast
from benchmarks.real_video.model import Block, RotaryVideoDiT

__all__ = ["allocate", "calibrate", "even_masses", "head_errors", "install", "layer_errors", "walk"]

Heads = tuple[Tensor, Tensor, Tensor]
"""q, k, v (B, H, N, D)."""

RIDGE = 1e-4
SHIFTS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
LADDER = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Critical blocks to choose from; those above half of all blocks are left out."""


def install(
    model: RotaryVideoDiT, spec: FormSpec, budgets: Sequence[Budget], dense: Sequence[int] = ()
) -> RotaryVideoDiT:
    """Give every block of ``model`` but those in ``dense`` (negative from the end) the form, and return it."""
    kept = {index % len(model.blocks) for index in dense}
    device = model.head.weight.device
    for index, (block, budget) in enumerate(zip(model.attentions(), budgets, strict=True)):
        config = model.config
        block.form = None if index in kept else Form(spec, budget, config.heads, config.head_dim).to(device)
    return model


@torch.no_grad()
def walk(
    model: RotaryVideoDiT, batches: Sequence[Batch], sequential: bool = False
) -> Iterator[tuple[Block, list[Heads]]]:
    """Every block with its q, k, v of all ``batches``; later ones are given what dense attention makes of them.

    sequential: what the block's form makes of them, as it is when the iterator goes on.
    """
    device = model.head.weight.device
    with autocast(device):
        entered = [model.enter(video, time) for video, time, _ in batches]
    xs = [x for x, _, _ in entered]
    for block in model.attentions():
        with autocast(device):
            found = [block.before(x, embedding, turn) for x, (_, embedding, turn) in zip(xs, entered, strict=True)]
        heads = [(q, k, v) for q, k, v, _ in found]
        yield block, heads
        for index, (q, k, v, modulation) in enumerate(found):
            out = block.attend(q, k, v) if sequential else F.scaled_dot_product_attention(q, k, v)
            with autocast(device):
                xs[index] = block.after(xs[index], out, modulation)


@torch.no_grad()
def calibrate(model: RotaryVideoDiT, batches: Sequence[Batch], sequential: bool = False) -> None:
    """Fit the gates of every form by least squares to dense attention."""
    for block, heads in walk(model, batches, sequential):
        form = block.form
        if not isinstance(form, Form):
            continue
        wanted = [F.scaled_dot_product_attention(*one) for one in heads]
        if form.spec.shifted:
            _fit_shift(form, heads, wanted)
        if form.spec.tail == "mix":
            _fit_mix(form, heads, wanted)
        elif form.spec.gated or form.spec.scaled:
            _fit_gate(form, heads, wanted)


def head_errors(form: Form, heads: Sequence[Heads], wanted: Sequence[Tensor], project: Tensor | None = None) -> Tensor:
    """The squared error (H) of the form, after ``project`` (H, D, C), an attention's output projection by heads."""
    total = torch.zeros(heads[0][0].shape[1], device=heads[0][0].device)
    for one, dense in zip(heads, wanted, strict=True):
        missed = (form(*one) - dense).float()
        if project is not None:
            missed = missed @ project
        total += missed.square().sum((0, 2, 3))
    return total


def _fit_shift(form: Form, heads: Sequence[Heads], wanted: Sequence[Tensor]) -> None:
    """The best of ``SHIFTS`` for each head."""
    errors = []
    for shift in SHIFTS:
        form.shift.fill_(shift)
        errors.append(head_errors(form, heads, wanted))
    best = torch.stack(errors).argmin(0).tolist()
    form.shift.copy_(torch.tensor([SHIFTS[index] for index in best])[:, None, None])


def _fit_gate(form: Form, heads: Sequence[Heads], wanted: Sequence[Tensor]) -> None:
    """W, b and the scales that minimise |scale A + L W^T + b - Y|^2, by normal equations in float64.

    With W and b eliminated, the scales solve a system of H equations. Sums over heads where W is shared.
    """
    count, width = form.counts.shape[0], heads[0][0].shape[-1]
    features = width + 1 if form.spec.gated else 1
    device = heads[0][0].device
    gram = torch.zeros(count, features, features, dtype=torch.float64, device=device)
    with_base, with_wanted = (torch.zeros(count, features, width, dtype=torch.float64, device=device) for _ in range(2))
    base_base, base_wanted = (torch.zeros(count, dtype=torch.float64, device=device) for _ in range(2))
    for one, dense in zip(heads, wanted, strict=True):
        base, linear, _ = form.parts(*one)
        base, target = base.float(), dense.float()
        x = torch.zeros_like(base[..., :1]) if linear is None else F.pad(linear.float(), (0, 1), value=1.0)
        gram += (x.mT @ x).sum(0)
        with_base += (x.mT @ base).sum(0)
        with_wanted += (x.mT @ target).sum(0)
        base_base += base.square().sum((0, 2, 3))
        base_wanted += (base * target).sum((0, 2, 3))
    if form.spec.gated and not form.spec.per_head:
        gram = gram.sum(0, keepdim=True)
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-12)
    inverse = torch.linalg.inv(gram + ridge * torch.eye(features, dtype=torch.float64, device=device))
    if len(inverse) == 1 and count > 1:  # one W: every head sees what all heads ask of it
        solved_base = inverse @ with_base
        matrix = base_base.diag() - torch.einsum("hfd,gfd->hg", with_base, solved_base)
        solved_wanted = inverse @ with_wanted.sum(0, keepdim=True)
        side = base_wanted - (with_base * solved_wanted).sum((1, 2))
    else:
        solved_base, solved_wanted = inverse @ with_base, inverse @ with_wanted
        matrix = (base_base - (with_base * solved_base).sum((1, 2))).diag()
        side = base_wanted - (with_base * solved_wanted).sum((1, 2))
    scale = torch.ones_like(base_base)
    if form.spec.scaled:
        scale = torch.linalg.solve(matrix, side).clamp(0.05, 2.0)
        form.log_scale.copy_(scale.log()[:, None, None])
    if form.spec.gated:
        shared = len(inverse) == 1 and count > 1
        taken = scale[:, None, None] * solved_base
        solution = solved_wanted - (taken.sum(0, keepdim=True) if shared else taken)
        solution = solution if form.spec.per_head else solution[0]
        form.weight.copy_(solution[..., :-1, :].mT)
        form.bias.copy_(solution[..., -1:, :])


@torch.enable_grad()
def _fit_mix(form: Form, heads: Sequence[Heads], wanted: Sequence[Tensor]) -> None:
    """c0 and c1 by L-BFGS."""
    with torch.no_grad():
        parts = [form.parts(*one) for one in heads]
        size = sum(dense.float().square().sum() for dense in wanted)
    optimizer = torch.optim.LBFGS([form.c0, form.c1], max_iter=30, line_search_fn="strong_wolfe")

    def error() -> Tensor:
        optimizer.zero_grad()
        missed: list[Tensor] = [
            (form.merge(*part) - dense).float().square().sum() for part, dense in zip(parts, wanted, strict=True)
        ]
        loss = torch.stack(missed).sum() / size
        loss.backward()
        return loss

    optimizer.step(error)
    form.zero_grad()


@torch.no_grad()
def layer_errors(
    model: RotaryVideoDiT, spec: FormSpec, batches: Sequence[Batch], count: int
) -> tuple[Tensor, tuple[int, ...]]:
    """The squared error (layers, rungs, heads) of ``spec`` with each number of critical blocks, and those numbers.

    After the output projection, and weighted by what an error of each layer does to the model's output: the output's
    error with that layer alone switched, over the layer's own at ``count`` critical blocks.
    """
    config = model.config
    rungs: tuple[int, ...] = ()
    table, own = [], []
    for block, heads in walk(model, batches):
        wanted = [F.scaled_dot_product_attention(*one) for one in heads]
        blocks = wanted[0].shape[2] // spec.block
        rungs = tuple(rung for rung in LADDER if rung <= blocks // 2)
        project = block.after.out.weight.float().view(-1, config.heads, config.head_dim).permute(1, 2, 0)
        rows = []
        for rung in (*rungs, count):
            form = Form(spec, Budget(rung), config.heads, config.head_dim).to(project.device)
            rows.append(head_errors(form, heads, wanted, project))
        table.append(torch.stack(rows[:-1]))
        own.append(rows[-1].sum())
    effects = [_effect(model, spec, batches, index, count) for index in range(config.layers)]
    weight = torch.stack(effects) / torch.stack(own)
    return torch.stack(table) * weight[:, None, None], rungs


def _effect(model: RotaryVideoDiT, spec: FormSpec, batches: Sequence[Batch], index: int, count: int) -> Tensor:
    """The squared error of the model's output with one layer switched."""
    block, config = model.attentions()[index], model.config
    form = Form(spec, Budget(count), config.heads, config.head_dim).to(model.head.weight.device)
    total = torch.zeros((), device=model.head.weight.device)
    for video, time, _ in batches:
        found = []
        for block.form in (None, form):
            with autocast(total.device):
                found.append(model(video, time).float())
        total += (found[1] - found[0]).square().sum()
    block.form = None
    return total


def allocate(errors: Tensor, rungs: Sequence[int], budget: int) -> list[int]:
    """A rung for each row of ``errors`` (rows, rungs), at most ``budget`` in sum: the best gain for its cost first."""
    chosen = [0] * len(errors)
    left = budget - rungs[0] * len(errors)
    table = errors.tolist()
    while True:
        best, step = 0.0, None
        for row, at in enumerate(chosen):
            for rung in range(at + 1, len(rungs)):
                cost = rungs[rung] - rungs[at]
                gain = (table[row][at] - table[row][rung]) / cost
                if cost <= left and gain > best:
                    best, step = gain, (row, rung, cost)
        if step is None:
            return [rungs[at] for at in chosen]
        chosen[step[0]] = step[1]
        left -= step[2]


@torch.no_grad()
def even_masses(model: RotaryVideoDiT, batches: Sequence[Batch], block: int, least: int, mean: float) -> list[float]:
    """For each layer the mass at which "the first ``least`` and the shortest prefix of it" is ``mean`` blocks a row."""
    found = []
    for _, heads in walk(model, batches):
        weights = torch.cat([_pooled_scores(q, k, block).softmax(-1) for q, k, _ in heads])
        ordered = weights.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            size = (before < middle).sum(-1).clamp(min=least).float().mean()
            low, high = (middle, high) if size < mean else (low, middle)
        found.append(low)
    return found


def _pooled_scores(q: Tensor, k: Tensor, block: int) -> Tensor:
    pooled_q, pooled_k = (x.float().unflatten(2, (-1, block)).mean(3) for x in (q, k))
    return pooled_q @ pooled_k.mT * q.shape[-1] ** -0.5
