"""FlopCounterMode counts the ops as ``passes/cost.py`` does."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import sla_compile
from sla_compile.passes.cost import BATCH, HEAD_DIM, HEADS, KEY_TOKENS, TOKENS, evaluate, sla_cost
from tests.support.models import OPTIONS, Model, random_input

B, H, N, D = 2, 3, 200, 16
SIZES = {BATCH: B, HEADS: H, TOKENS: N, KEY_TOKENS: N, HEAD_DIM: D}
BLOCKS: dict[str, Any] = {"block_q": 16, "block_k": 16, "linear": "marginal"}


def inputs(requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(B, H, N, D, requires_grad=requires_grad) for _ in range(3))
    return q, k, v


def counted(function: Any) -> dict[Any, int]:
    with FlopCounterMode(display=False) as counter:
        function()
    return dict(counter.get_flop_counts()["Global"])


@pytest.mark.parametrize("linear", ["marginal", "all", "none", "taylor"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_forward_counts_its_cost(linear: str, causal: bool) -> None:
    weight = None if linear == "taylor" else torch.zeros(D, D)
    options: dict[str, Any] = {**BLOCKS, "topk": 0.25, "linear": linear, "causal": causal}
    found = counted(lambda: sla_compile.sparse_linear_attention(*inputs(), weight, **options))
    cost = sla_cost(0.25, 16, 16, linear, causal=causal)
    assert found == {torch.ops.sla.forward: evaluate(cost.flops, SIZES)}


def test_without_a_gate_there_is_no_linear_branch_to_count() -> None:
    found = counted(lambda: sla_compile.sparse_linear_attention(*inputs(), topk=0.25, **BLOCKS))
    assert found[torch.ops.sla.forward] == evaluate(sla_cost(0.25, 16, 16, "none").flops, SIZES)


def test_always_critical_blocks_are_counted() -> None:
    options: dict[str, Any] = {"topk": 0.25, "always_critical": [0, 20, 190, 200], **BLOCKS}
    found = counted(lambda: sla_compile.sparse_linear_attention(*inputs(), **options))
    # tokens 0 to 19 touch two blocks, 190 to 199 two more
    assert found[torch.ops.sla.forward] == evaluate(sla_cost(0.25, 16, 16, "none", forced=4).flops, SIZES)


def test_at_topk_of_one_it_counts_what_pytorch_counts_for_dense_attention() -> None:
    """But for the classification, which dense attention has not; on whole blocks."""
    shape = (B, H, 192, D)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def run() -> None:
        sla_compile.sparse_linear_attention(q, k, v, topk=1.0, bottomk=0.0, **BLOCKS).sum().backward()

    found = counted(run)
    classification = 2 * B * H * (192 // 16) ** 2 * D
    assert found[torch.ops.sla.forward] - classification == sdpa_flop_count(shape, shape, shape)
    assert found[torch.ops.sla.backward] == sdpa_backward_flop_count(shape, shape, shape, shape)


def test_a_backward_counts_the_critical_blocks_that_there_were() -> None:
    weight = torch.zeros(D, D, requires_grad=True)

    def backward(topk: float) -> int:
        def run() -> None:
            out = sla_compile.sparse_linear_attention(*inputs(requires_grad=True), weight, topk=topk, **BLOCKS)
            out.sum().backward()

        return counted(run)[torch.ops.sla.backward]

    blocks = -(-N // 16)
    one_more = 10 * B * H * blocks * 16 * 16 * D
    assert backward(3 / blocks) - backward(2 / blocks) == one_more


def test_a_backward_without_values_cannot_be_counted() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = sla_compile.sparse_linear_attention(*inputs(requires_grad=True), topk=0.25, **BLOCKS)
        with pytest.raises(NotImplementedError, match="need its block map's values"):
            counted(lambda: out.sum().backward())


@pytest.mark.usefixtures("float64", "fresh_dynamo")
def test_an_exported_model_is_counted() -> None:
    """A compiled model cannot be: PyTorch runs any model uncompiled under a dispatch mode."""
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config={**OPTIONS, "inner": "eager"})
    program = sla_compile.export(model, (x,)).module()
    assert counted(lambda: program(x))[torch.ops.sla.forward] > 0


LATE = """\
import json, sys
import sla_compile
attend = sla_compile.sparse_linear_attention
early = "torch.utils.flop_counter" in sys.modules
import torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    attend(*torch.randn(3, 1, 2, 64, 16).unbind(), block_q=16, block_k=16, linear="taylor")
print(json.dumps([early, counter.get_total_flops() > 0]))
"""


def test_a_counter_that_is_imported_after_the_op_counts_too() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, True]
