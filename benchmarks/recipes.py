"""What training of the gates alone gives: calibration, distillation of each attention, distillation of the output.

    python benchmarks/recipes.py --checkpoint runs/quality/pretrained-0.pt [--sparsity 0.95] [--videos 64] [--steps 60]

On a dense checkpoint of `benchmarks/quality.py` (or of `examples/finetune.py`), each recipe from zero gates and on the
same videos; then, on held-out ones, the error of each attention on the dense model's inputs (mean over attentions of
||O - dense|| / ||dense||), the error of the model's output against the dense model's, and the loss of flow matching.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout comes before what is installed

import sla_compile
from benchmarks.dense_checkpoint import Batch, Study, parser
from sla_compile.fitting.calibration import gather
from sla_compile.inspection.timing import run_time


def measured(model: torch.nn.Module, compiled: Callable[..., torch.Tensor], held_out: list[Batch]) -> tuple[float, ...]:
    """Error of the attentions, error of the output, loss; on ``held_out``."""
    with torch.no_grad():
        _, sites = gather(model, [(batch[:2], {}) for batch in held_out])
        attention = statistics.fmean(site.error(*site.gate.parameters()) for site in sites.values())
        wrong = whole = loss = 0.0
        for noisy, when, velocity in held_out:
            dense, output = model(noisy, when), compiled(noisy, when)
            wrong += (output - dense).square().sum().item()
            whole += dense.square().sum().item()
            loss += F.mse_loss(output, velocity).item() / len(held_out)
    return attention, (wrong / whole) ** 0.5, loss


def main(given: Sequence[str] | None = None) -> None:
    """Train the gates by each recipe, print the table."""
    arguments = parser(__doc__, videos=64)
    arguments.add_argument("--sparsity", type=float, default=0.95)
    arguments.add_argument("--steps", type=int, default=60, help="of either distillation, a batch each")
    arguments.add_argument("--lr", type=float, default=1e-2)
    arguments.add_argument("--sparse-scale", action="store_true", help="gates that scale the sparse branch too")
    options = arguments.parse_args(given)
    study = Study(options, batches=8)
    study.prepare(topk=round(1 - options.sparsity, 6), sparse_scale=options.sparse_scale)
    model, held_out, batches = study.model, study.held_out, [batch[:2] for batch in study.seen()]
    compiled = torch.compile(model, backend="sla")
    recipes: dict[str, Callable[[], object]] = {
        "gates of zero (sparse only)": lambda: None,
        "calibrate": lambda: sla_compile.calibrate(model, batches),
        "distill, attention": lambda: sla_compile.distill(model, batches, steps=options.steps, lr=options.lr),
        "distill, output": lambda: sla_compile.distill(
            model, batches, steps=options.steps, lr=options.lr, loss="output"
        ),
    }
    recipes["calibrate, then distill, output"] = lambda: (recipes["calibrate"](), recipes["distill, output"]())
    table = Table("recipe", "error of attentions", "error of output", "loss", "seconds")
    with torch.no_grad():
        dense = statistics.fmean(F.mse_loss(model(noisy, when), v).item() for noisy, when, v in held_out)
    table.add_row("dense", "0", "0", f"{dense:.4f}", "")
    for name, recipe in recipes.items():
        for gate in sla_compile.gates(model).values():
            gate.reset_parameters()
        seconds = run_time(recipe) / 1000
        attention, output, loss = measured(model, compiled, held_out)
        table.add_row(name, f"{attention:.4f}", f"{output:.4f}", f"{loss:.4f}", f"{seconds:.0f}")
        Console(stderr=True).print(f"{name}: {attention:.4f} {output:.4f} {loss:.4f}, {seconds:.0f} s")
    console = Console(width=110)
    counts = f"{study.counts}, {options.steps} steps, lr {options.lr:g}"
    console.print(f"{study.name} at {options.sparsity:.0%}: {counts}, torch {torch.__version__}, {study.device.type}")
    console.print(table)


if __name__ == "__main__":
    main()
