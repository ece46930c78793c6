"""The block map of the CPU kernels, by hand: ties, dead blocks, forced blocks, causal attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sla_compile.ops  # noqa: F401  registers the op
from sla_compile.kernels import reference
from sla_compile.kernels.cpu.classify import Choice, classify, pool

pytestmark = pytest.mark.usefixtures("nan_fresh_buffers")


def classes(q: Tensor, k: Tensor, critical: int, negligible: int, block_q: int, block_k: int) -> Tensor:
    choice = Choice(None, None, torch.tensor([[critical]]), torch.tensor([[negligible]]))
    return classify(pool(q, block_q, q.dtype) @ pool(k, block_k, q.dtype).mT, choice)


def test_ties_go_to_the_lower_key_block() -> None:
    torch.manual_seed(0)
    q, k = torch.randint(-1, 2, (2, 2, 3, 500, 16), dtype=torch.float64)
    block_map = classes(q[0], k[0], 3, 4, 16, 32)
    # 3 of 16 and 4 of 16 key blocks; sums of small integers are exact, so ties are exact too
    expected_map = reference.classify(q, k, scale=1.0, topk=3 / 16, bottomk=4 / 16, block_q=16, block_k=32)[0]
    assert torch.equal(block_map, expected_map)
    equal = torch.ones(1, 4800, 16)
    row = classes(equal, equal, 30, 40, 256, 16)[0, 0].tolist()
    assert row == [1] * 30 + [0] * 230 + [-1] * 40


def test_dead_blocks_by_hand() -> None:
    levels = torch.tensor([3.0, 7.0, 9.0, 1.0, 5.0, 4.0])
    k = levels.repeat_interleave(16)[:90].view(1, 1, 90, 1).expand(1, 1, 90, 16)
    mask = torch.ones(1, 90, dtype=torch.bool)
    mask[:, 32:48] = False
    mask[:, 64:79] = False
    q = torch.ones(1, 1, 16, 16)

    def row(**options: Any) -> list[int]:
        settings: dict[str, Any] = {"topk": 0.2, "bottomk": 0.34, "block_q": 16, "block_k": 16, "feature_map": "elu"}
        settings |= {"scale": 1.0, "linear": "none", "key_mask": mask, "sparsity": None} | options
        given: list[int] = torch.ops.sla.forward.default(q, k, k, None, None, **settings)[3].flatten().tolist()
        return given

    # floor(0.2 * 6) = 1 critical; floor(0.34 * 6) = 2 negligible: the dead block and the lowest live one
    assert row() == [0, 1, -1, -1, 0, 0]
    assert row(bottomk=0.0) == [0, 1, -1, 0, 0, 0]
    assert row(topk=1.0, bottomk=0.0) == [1, 1, -1, 1, 1, 1]
    assert row(always_critical=[40, 49]) == [-1, 1, -1, 1, 0, 0]
    assert row(always_critical=[40, 49], bottomk=0.5) == [-1, 1, -1, 1, 0, -1]
    assert row(sparsity=torch.tensor([1_000_000, 0])) == [0, 1, -1, 0, 0, 0]
    assert row(topk=0.6, bottomk=0.0, sparsity=torch.tensor([340_000, 500_000])) == [-1, 1, -1, -1, 1, 0]


def test_causal_classes_by_hand() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 70, 16)
    block_map = torch.ops.sla.forward.default(
        x, x, x, None, None, None, None, 1.0, 0.5, 0.5, 32, 16, "softmax", "none", True
    )[3][0, 0]
    scores = (
        torch.stack([b.mean(0) for b in x[0, 0].split(32)]) @ torch.stack([b.mean(0) for b in x[0, 0].split(16)]).mT
    )
    assert block_map[0].tolist() == [1, 1, -1, -1, -1]
    best = int(scores[1, :2].argmax())
    assert block_map[1].tolist() == [1 if best == 0 else -1, 1 if best == 1 else -1, 1, 1, -1]
    order = scores[2, :4].argsort(descending=True).tolist()
    assert block_map[2, 4] == 1
    assert [int(block_map[2, j]) for j in order] == [1, 1, -1, -1]
