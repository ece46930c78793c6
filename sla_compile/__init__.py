"""sla-compile: ``torch.compile(model, backend="sla")`` turns a DiT's self-attention into Sparse-Linear Attention.

Everything here is imported on first use: importing the package touches no device and imports no compiler. It makes
``backend="sla"`` known, also where the package is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sla_compile.registration import register as _register

if TYPE_CHECKING:
    from sla_compile.checkpoints.gate_files import load, save
    from sla_compile.checkpoints.projections import load_projections
    from sla_compile.compiler.exporting import export
    from sla_compile.compiler.preparation import prepare
    from sla_compile.config import SLAConfig
    from sla_compile.fitting.allocation import AllocationReport, allocate
    from sla_compile.fitting.allocation_by_time import allocate_by_time
    from sla_compile.fitting.calibration import CalibrationReport, calibrate
    from sla_compile.fitting.distillation import DistillationReport, distill
    from sla_compile.fitting.orders import OrderReport, choose_orders
    from sla_compile.fitting.sparsity import anneal, set_sparsity
    from sla_compile.fitting.sparsity_plan import SparsityPlan
    from sla_compile.gate import Gate, detach, gate_parameters, gates
    from sla_compile.inspection.atlas import Atlas, atlas
    from sla_compile.inspection.benchmark import BenchReport, bench
    from sla_compile.inspection.comparison import ComparisonReport, compare
    from sla_compile.inspection.counters import RunCounters
    from sla_compile.inspection.doctor import DoctorReport, doctor
    from sla_compile.ops.attention import sparse_linear_attention
    from sla_compile.reporting.model_report import Report, explain, report
    from sla_compile.user_warnings import (
        DenseAttentionWarning,
        LateGatesWarning,
        RecompileLimitWarning,
        TokenOrderWarning,
        UnmatchedPatternWarning,
        UntrainedGatesWarning,
    )

__version__ = "0.1.0"

__all__ = [
    "AllocationReport",
    "Atlas",
    "BenchReport",
    "CalibrationReport",
    "ComparisonReport",
    "DenseAttentionWarning",
    "DistillationReport",
    "DoctorReport",
    "Gate",
    "LateGatesWarning",
    "OrderReport",
    "RecompileLimitWarning",
    "Report",
    "RunCounters",
    "SLAConfig",
    "SparsityPlan",
    "TokenOrderWarning",
    "UnmatchedPatternWarning",
    "UntrainedGatesWarning",
    "allocate",
    "allocate_by_time",
    "anneal",
    "atlas",
    "bench",
    "calibrate",
    "choose_orders",
    "compare",
    "detach",
    "distill",
    "doctor",
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
    "AllocationReport": "fitting.allocation",
    "Atlas": "inspection.atlas",
    "BenchReport": "inspection.benchmark",
    "CalibrationReport": "fitting.calibration",
    "ComparisonReport": "inspection.comparison",
    "DenseAttentionWarning": "user_warnings",
    "DistillationReport": "fitting.distillation",
    "DoctorReport": "inspection.doctor",
    "Gate": "gate",
    "LateGatesWarning": "user_warnings",
    "RecompileLimitWarning": "user_warnings",
    "TokenOrderWarning": "user_warnings",
    "UnmatchedPatternWarning": "user_warnings",
    "UntrainedGatesWarning": "user_warnings",
    "OrderReport": "fitting.orders",
    "Report": "reporting.model_report",
    "RunCounters": "inspection.counters",
    "SLAConfig": "config",
    "SparsityPlan": "fitting.sparsity_plan",
    "allocate": "fitting.allocation",
    "allocate_by_time": "fitting.allocation_by_time",
    "anneal": "fitting.sparsity",
    "atlas": "inspection.atlas",
    "bench": "inspection.benchmark",
    "calibrate": "fitting.calibration",
    "choose_orders": "fitting.orders",
    "compare": "inspection.comparison",
    "detach": "gate",
    "distill": "fitting.distillation",
    "doctor": "inspection.doctor",
    "explain": "reporting.model_report",
    "export": "compiler.exporting",
    "gate_parameters": "gate",
    "gates": "gate",
    "load": "checkpoints.gate_files",
    "load_projections": "checkpoints.projections",
    "prepare": "compiler.preparation",
    "report": "reporting.model_report",
    "save": "checkpoints.gate_files",
    "set_sparsity": "fitting.sparsity",
    "sparse_linear_attention": "ops.attention",
}


_register()


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
