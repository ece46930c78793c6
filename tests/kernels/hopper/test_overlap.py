"""Kernels that run beside each other give the bits of kernels that wait for each other."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sla_compile.kernels.hopper import support as hopper
from tests.support.triton_cases import Case, inputs, run_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not hopper.available(0),
        reason="needs a Hopper GPU and a Triton whose Gluon is known",
    ),
]

CASES = [
    Case(tokens=8192, heads=3, head_dim=128, block_q=128, block_k=128, topk=0.05, bottomk=0.1),
    Case(tokens=6007, heads=12, head_dim=128, block_q=128, block_k=128, topk=0.05, bottomk=0.1),
    Case(tokens=4001, heads=4, group=2, head_dim=64, topk=0.05, bottomk=0.1, causal=True),
    Case(tokens=1003, heads=3, head_dim=72, batch=2, topk=0.2, block_q=256, block_k=128),
]


@pytest.mark.parametrize("popular", [False, True], ids=["even", "popular"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_those_of_one_after_the_other(case: Case, popular: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sla_compile.kernels.triton import overlap

    tensors = inputs(case, torch.bfloat16, "cuda")
    if popular:
        q, k = tensors[:2]
        q[..., 0] += 8.0
        k[:, :, : 2 * case.block_k, 0] += 8.0
    assert overlap.may_overlap()
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "may_overlap", lambda: False)
        expected, _ = run_kernels(case, tensors)
    run_kernels(case, tensors)  # nothing may be compiled in a graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = run_kernels(case, tensors)
    for _ in range(20):
        found, _ = run_kernels(case, tensors)
        graph.replay()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
            assert torch.equal(captured[name], value), f"{name}, replayed"


def test_not_where_pytorch_fills_fresh_memory() -> None:
    from sla_compile.kernels.triton import overlap

    torch.use_deterministic_algorithms(True)
    try:
        assert not overlap.may_overlap()
    finally:
        torch.use_deterministic_algorithms(False)
