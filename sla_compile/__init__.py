"""sla-compile: ``torch.compile(model, backend="sla")`` turns a DiT's self-attention into Sparse-Linear Attention.

Everything here is imported on first use: importing the package touches no device and imports no compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sla_compile.allocation import AllocationReport, allocate
    from sla_compile.calibration import CalibrationReport, calibrate
    from sla_compile.checkpoint import load, save
    from sla_compile.config import SLAConfig
    from sla_compile.distillation import DistillationReport, distill
    from sla_compile.exporting import export
    from sla_compile.gate import Gate, detach, gate_parameters, gates
    from sla_compile.ops import sparse_linear_attention
    from sla_compile.preparation import prepare
    from sla_compile.projections import load_projections
    from sla_compile.reports import Report, explain, report
    from sla_compile.sparsity import anneal, set_sparsity

__version__ = "0.1.0"

__all__ = [
    "AllocationReport",
    "CalibrationReport",
    "DistillationReport",
    "Gate",
    "Report",
    "SLAConfig",
    "allocate",
    "anneal",
    "calibrate",
    "detach",
    "distill",
    "explain",
    "export",
    "gate_parameters",
    "gates",
    "load",
    "load_projections",
    "prepare",
    "report",
    "save",
    "set_sparsity",
    "sparse_linear_attention",
]

_HOMES = {
    "AllocationReport": "allocation",
    "CalibrationReport": "calibration",
    "DistillationReport": "distillation",
    "Gate": "gate",
    "Report": "reports",
    "SLAConfig": "config",
    "allocate": "allocation",
    "anneal": "sparsity",
    "calibrate": "calibration",
    "detach": "gate",
    "distill": "distillation",
    "explain": "reports",
    "export": "exporting",
    "gate_parameters": "gate",
    "gates": "gate",
    "load": "checkpoint",
    "load_projections": "projections",
    "prepare": "preparation",
    "report": "reports",
    "save": "checkpoint",
    "set_sparsity": "sparsity",
    "sparse_linear_attention": "ops",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # No submodule has the name of a public function, which importing it would hide.
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
