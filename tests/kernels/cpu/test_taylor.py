"""The CPU path of ``linear="taylor"`` against the definition, in float64, and its cost in 16 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sla_compile
from sla_compile.kernels import reference
from sla_compile.kernels.cpu import attention as cpu
from sla_compile.kernels.cpu import gathered
from tests.support.closeness import assert_close
from tests.support.triton_cases import VIRTUAL, Case, check, expected_classes, inputs


@pytest.mark.parametrize("case", VIRTUAL, ids=str)
def test_follows_the_definition(case: Case) -> None:
    case = replace(case, gate_dtype=torch.float64)
    tensors = inputs(case, torch.float64, "cpu")
    assert torch.equal(check(case, tensors, 1e-12, 1e-11, cpu), expected_classes(case, tensors))


@pytest.mark.parametrize("elements_per_chunk", [1, 1 << 24])
def test_chunks_change_nothing(elements_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "_ELEMENTS_PER_CHUNK", elements_per_chunk)
    check(VIRTUAL[0], inputs(VIRTUAL[0], torch.float64, "cpu"), 1e-12, 1e-11, cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    check(VIRTUAL[0], inputs(VIRTUAL[0], dtype, "cpu"), 5e-3, 5e-3, cpu)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    shift = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(1, 40, dtype=torch.float64)

    def attention(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v, shift = tensors
        options = {"topk": 0.3, "bottomk": 0.0, "block_q": 16, "block_k": 16}
        return sla_compile.sparse_linear_attention(q, k, v, shift=shift, key_mask=mask, linear="taylor", **options)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(attention, (q, k, v, shift), fast_mode=True)


def test_exact_where_keys_of_a_block_are_equal() -> None:
    """A block of equal keys is its virtual key, so that all of attention is there, whatever the values."""
    torch.manual_seed(0)
    q, v = torch.randn(1, 2, 96, 16).double(), torch.randn(1, 2, 96, 16).double()
    k = torch.randn(1, 2, 6, 16).double().repeat_interleave(16, dim=2)
    out = sla_compile.sparse_linear_attention(q, k, v, topk=0.2, bottomk=0.0, block_q=16, block_k=16, linear="taylor")
    assert_close("out", out, torch.nn.functional.scaled_dot_product_attention(q, k, v), 1e-12)


def test_of_second_order_in_the_spread_of_keys() -> None:
    """Halve the distance of the keys from their block's mean, and the error is at most a quarter."""
    torch.manual_seed(0)
    q, v, off = (torch.randn(1, 1, 128, 16).double() for _ in range(3))
    centre = torch.randn(1, 1, 8, 16).double().repeat_interleave(16, dim=2)
    q = q.mean(dim=2, keepdim=True).expand_as(q) * 4  # one query a block: what blocks of queries share is exact
    errors = []
    for spread in (0.2, 0.1, 0.05):
        k = centre + spread * off
        out = reference.sparse_linear_attention(
            q, k, v, topk=0.125, bottomk=0.0, block_q=16, block_k=16, linear="taylor"
        )
        errors.append((out - torch.nn.functional.scaled_dot_product_attention(q, k, v)).norm().item())
    assert errors[0] > 3.5 * errors[1] > 3.5**2 * errors[2] > 0


def test_blocks_are_ranked_by_a_weight_without_a_bound() -> None:
    """Of blocks with the same mean key and w above its bound the one whose keys lie further apart is critical."""
    torch.manual_seed(0)
    q, v = torch.randn(1, 1, 64, 16).double(), torch.randn(1, 1, 64, 16).double()
    off = torch.randn(1, 1, 4, 8, 16).double()
    off = torch.cat([off, -off], dim=3) * torch.tensor([20.0, 40.0, 30.0, 10.0]).view(4, 1, 1)  # a mean of zero
    k = off.flatten(2, 3)
    for topk, critical in ((0.25, [1]), (0.5, [1, 2]), (0.75, [0, 1, 2])):
        _, _, _, found, *_ = torch.ops.sla.forward.default(
            q, k, v, None, None, None, None, 0.25, topk, 0.0, 16, 16, "softmax", "taylor"
        )
        assert (found[0, 0] == 1).nonzero().tolist() == [[row, block] for row in range(4) for block in critical]


def test_opcheck() -> None:
    q, k, v = (torch.randn(1, 2, 50, 16, requires_grad=True) for _ in range(3))
    rest = (None, None, None, None, 0.25, 0.3, 0.0, 16, 16, "softmax", "taylor", False, None, torch.randn(2))
    torch.library.opcheck(torch.ops.sla.forward.default, (q, k, v, *rest))
