"""Fixtures that several test files share."""

from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")  # read at import; processes of tests take it over
# Nor does each process of Inductor's ask the compiler whether it knows the vectors of this CPU: builds, and loads.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import torch
from torch.utils._device import _device_constructors

from tests.support.processes import leave_guards_untimed

_FRESH = (
    (torch, ("empty", "empty_like", "empty_strided")),
    (torch.Tensor, ("new_empty", "new_empty_strided")),
)


LONGEST = (
    "flows/test_diffusers.py",
    "test_docs.py",
    "kernels/triton/test_attention.py",
    "flows/test_many_gpus.py",
    "examples/test_examples.py",
    "flows/test_dynamic.py",
    "compiler/test_exporting.py",
    "compiler/test_precompile.py",
    "test_packaging.py",
    "ops/test_attention.py",
    "flows/test_sparse_scale.py",
    "examples/test_wan_finetune.py",
    "benchmarks/test_quality.py",
    "test_backend.py",
    "flows/test_distributed.py",
    "kernels/test_reference.py",
    "passes/test_cross_attention.py",
    "flows/test_modes.py",
    "fitting/test_distillation.py",
    "compiler/test_cache_key.py",
    "flows/test_ecosystem.py",
    "fitting/test_sparsity.py",
    "flows/test_unused_gates.py",
    "fitting/test_traced_calls.py",
    "passes/test_every_spelling.py",
    "benchmarks/test_real_video.py",
    "compiler/test_gate_binding.py",
    "fitting/test_orders.py",
    "passes/test_random_programs.py",
    "fitting/test_allocation.py",
    "flows/test_diffusers_files.py",
    "compiler/test_logs.py",
    "flows/test_taylor.py",
    "compiler/test_marking.py",
    "benchmarks/test_recipes.py",
    "kernels/triton/test_launches.py",
    "flows/test_stability.py",
    "ops/test_validation.py",
    "test_main.py",
    "ops/test_reorder.py",
    "inspection/test_atlas.py",
    "passes/test_handwritten.py",
    "reporting/test_model_report.py",
    "kernels/triton/test_tuning.py",
    "fitting/test_allocation_by_time.py",
    "benchmarks/test_parallel.py",
)
"""The files that take longest, the longest first; of all in `tests`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a worker that begins one at the end lets the other wait for it."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``, one worker runs the whole of a file, so that what its tests share is made once.

    With a GPU the most by far are in one file, and share what is compiled in files of Triton's: there each by itself.
    """
    from xdist.scheduler import LoadFileScheduling, WorkStealingScheduling

    if torch.cuda.is_available():
        return WorkStealingScheduling(config, log)
    config.option.loadscopereorder = False  # the order of above, not the number of tests
    return LoadFileScheduling(config, log)


TESTS_BETWEEN = 25
"""How many tests of a file run before what is alive is hidden from collections again."""

_tests_since = 0


def _hide_from_collections() -> None:
    """What is alive now is no garbage: a collection, and who asks for all objects, need not look at it any more."""
    global _tests_since
    gc.collect()
    gc.freeze()
    _tests_since = 0


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """The modules of torch and of the tests stay; each trace makes objects by the ten thousands that do not."""
    gc.set_threshold(5000)  # Python's own collects all of them about once a second
    _hide_from_collections()


def pytest_runtest_setup() -> None:
    leave_guards_untimed()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Now and then, what Dynamo keeps for good: the graphs of a thousand tests, or every compile waits for them."""
    global _tests_since
    _tests_since += 1
    if nextitem is None or nextitem.path != item.path or _tests_since == TESTS_BETWEEN:
        _hide_from_collections()


atexit.register(gc.unfreeze)  # or libraries that look at exit report what they find as leaks


@pytest.fixture
def nan_fresh_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers made empty from Python start as NaN (integers: as -77), so that an unwritten element shows."""

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fresh(*args: Any, **kwargs: Any) -> torch.Tensor:
            buffer = make(*args, **kwargs)
            if buffer.is_floating_point():
                return buffer.fill_(float("nan"))
            return buffer if buffer.dtype == torch.bool else buffer.fill_(-77)

        return fresh

    # it keeps what it finds at its first call: found here, `with torch.device(...)` would miss torch.empty ever after
    _device_constructors()
    for owner, names in _FRESH:
        for name in names:
            monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled yet, counters and seed are at zero; user warnings are not shown, but three are errors."""
    from torch._dynamo.utils import counters

    import sla_compile

    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name in ("DenseAttentionWarning", "LateGatesWarning", "UnmatchedPatternWarning"):
            warnings.simplefilter("error", getattr(sla_compile, name))  # as in pyproject.toml
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """What is made without a dtype is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
