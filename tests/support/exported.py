"""A process of test_exporting.py's own: run a program or a package that another one has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import sla_compile.ops  # noqa: F401  all of this package that they need


def run_saved(folder: str, name: str) -> None:
    """Fail unless ``name`` in ``folder`` gives, of the first of ``tensors.pt`` there, the second."""
    x, expected = torch.load(f"{folder}/tensors.pt")
    path = str(Path(folder) / name)
    load: Any = torch.export.load if name == "program.pt2" else torch._inductor.aoti_load_package
    run = load(path)
    with torch.no_grad():
        output = (run.module() if name == "program.pt2" else run)(x)
    assert (output - expected).norm() < 1e-6 * expected.norm()
