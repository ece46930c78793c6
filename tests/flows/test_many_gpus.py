"""Many GPUs, on two gloo processes: exact, refused with a reason, or told; never quietly dense.

One launch runs all cases of ``tests/support/many_gpus.py`` and ``sequence_parallel.py``: a process takes longer to
start than most cases to run.
"""

from __future__ import annotations

from functools import partial

import pytest

from tests.support import many_gpus as cases
from tests.support import sequence_parallel as sequence
from tests.support.ranks import Case, failures

CASES: dict[str, Case] = {
    "diffusers' Ulysses": partial(cases.diffusers_ulysses, prepared_first=True),
    "prepared after diffusers' Ulysses": partial(cases.diffusers_ulysses, prepared_first=False),
    "files": cases.files,
    "fitting": cases.fitting,
    "tensor parallel": cases.tensor_parallel,
    "Ulysses by hand": sequence.by_hand,
    "heads in unequal parts": sequence.unequal_heads,
    "ring attention and ulysses_anything": sequence.refused_engines,
    "torch's context_parallel": sequence.torch_context_parallel,
    "a model that holds a group": cases.holds_a_group,
    "a gate in fully_shard": cases.gate_in_fully_shard,
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return failures(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, failed: dict[str, str]) -> None:
    if failed[case]:
        pytest.fail(failed[case], pytrace=False)
