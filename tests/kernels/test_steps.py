"""Triton's and Gluon's steps have the signatures of `Steps`, and Gluon is imported for a Hopper GPU alone."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import textwrap

import pytest

from sla_compile.kernels.steps import Steps

pytest.importorskip("triton", reason="triton is not installed")

NAMES = [name for name, _ in inspect.getmembers(Steps, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("language", ["triton", "hopper"])
def test_signatures(language: str) -> None:
    """mypy checks the types; the names of the parameters, which a call may use, are checked here."""
    module = importlib.import_module(f"sla_compile.kernels.{language}.steps")
    assert sorted(module.__all__) == sorted(NAMES)
    for name in NAMES:
        _, *wanted = inspect.signature(getattr(Steps, name)).parameters.values()
        found = [*inspect.signature(getattr(module, name)).parameters.values()]
        assert [(p.name, p.kind) for p in found] == [(p.name, p.kind) for p in wanted], name


def test_gluon_is_not_imported_until_a_hopper_gpu_needs_it() -> None:
    code = """
        import sys
        import sla_compile.kernels.triton.attention
        ours = [name for name in sys.modules if name.startswith("sla_compile.kernels.hopper.")]
        assert ours == ["sla_compile.kernels.hopper.support"], ours
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
