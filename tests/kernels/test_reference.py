"""The definition itself: against torch's dense attention, by hand, and by numerical differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sla_compile.kernels import reference
from tests.support.closeness import assert_close


def random_inputs(*shape: int, gate: tuple[int, ...]) -> list[Tensor]:
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(*gate, gate[-1], dtype=torch.float64, requires_grad=True)
    return [q, k, v, weight, torch.randn(gate, dtype=torch.float64, requires_grad=True)]


@pytest.mark.parametrize("linear", ["marginal", "all", "none"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_gradients_are_those_of_the_function(feature_map: str, linear: str) -> None:
    torch.manual_seed(0)
    inputs = random_inputs(1, 2, 21, 4, gate=(2, 4))

    def function(*tensors: Tensor) -> Tensor:
        return reference.sparse_linear_attention(
            *tensors, topk=0.3, bottomk=0.2, block_q=8, block_k=4, feature_map=feature_map, linear=linear
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("gate", [(8,), (3, 8)], ids=["shared", "per_head"])
def test_topk_1_is_dense_attention_for_any_weight(gate: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    q, k, v, weight, _ = random_inputs(2, 3, 65, 8, gate=gate)
    out = reference.sparse_linear_attention(q, k, v, weight, topk=1.0, bottomk=0.0, block_q=16, block_k=16)
    assert_close("out", out, F.scaled_dot_product_attention(q, k, v), 1e-14)


def test_sparse_branch_is_attention_under_a_mask() -> None:
    torch.manual_seed(2)
    q, k, v, _, bias = random_inputs(1, 2, 50, 8, gate=(2, 8))
    block_map = reference.classify(q, k, scale=0.7, topk=0.3, bottomk=0.2, block_q=16, block_k=8)
    rows, columns = torch.arange(50) // 16, torch.arange(50) // 8
    mask = block_map[:, :, rows][:, :, :, columns] == 1
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7) + bias[:, None]
    out = reference.sparse_linear_attention(
        q, k, v, None, bias, scale=0.7, topk=0.3, bottomk=0.2, block_q=16, block_k=8
    )
    assert_close("out", out, expected, 1e-14)


@pytest.mark.parametrize("linear", ["marginal", "all"])
def test_linear_branch_is_the_masked_product_of_features(linear: str) -> None:
    torch.manual_seed(3)
    q, k, v, weight, _ = random_inputs(2, 2, 50, 8, gate=(8,))
    options: dict[str, Any] = {"topk": 0.3, "bottomk": 0.2, "block_q": 16, "block_k": 8}
    block_map = reference.classify(q, k, scale=8**-0.5, **options)
    rows, columns = torch.arange(50) // 16, torch.arange(50) // 8
    summed = block_map[:, :, rows][:, :, :, columns] == 0
    products = q.softmax(-1) @ k.softmax(-1).mT
    if linear == "marginal":
        products = products * summed
    expected = products / products.sum(-1, keepdim=True) @ v @ weight.mT
    with_branch = reference.sparse_linear_attention(q, k, v, weight, linear=linear, **options)
    without = reference.sparse_linear_attention(q, k, v, **options)
    assert_close("linear branch", with_branch - without, expected, 1e-14)


def test_classes_by_hand() -> None:
    q = torch.ones(1, 1, 70, 1)
    levels = torch.tensor([3.0, 7.0, 7.0, 1.0, 5.0])
    k = levels.repeat_interleave(16)[:70].view(1, 1, 70, 1)
    block_map = reference.classify(q, k, scale=1.0, topk=0.25, bottomk=0.4, block_q=64, block_k=16)
    # floor(0.25 * 5) = 1 critical: of the tied blocks 1 and 2 the lower; floor(0.4 * 5) = 2 negligible
    assert block_map.tolist() == [[[[-1, 1, 0, -1, 0]] * 2]]


def test_last_block_is_averaged_over_its_true_length() -> None:
    k = torch.cat([torch.full((64,), 1.0), torch.full((2,), 1.5)]).view(1, 1, 66, 1)
    q = torch.ones_like(k)
    block_map = reference.classify(q, k, scale=1.0, topk=0.5, bottomk=0.5, block_q=64, block_k=64)
    assert block_map.tolist() == [[[[-1, 1], [-1, 1]]]]


@pytest.mark.parametrize(
    ("topk", "bottomk", "blocks", "expected"),
    [
        (0.29, 0.0, 100, (29, 0)),
        (0.05, 0.10, 19, (1, 1)),
        (0.05, 0.10, 1, (1, 0)),
        (0.57, 0.43, 100, (57, 43)),
    ],
)
def test_floor_is_exact(topk: float, bottomk: float, blocks: int, expected: tuple[int, int]) -> None:
    torch.manual_seed(4)
    q, k = torch.randn(2, 1, 1, blocks * 2, 4)
    row = reference.classify(q, k, scale=1.0, topk=topk, bottomk=bottomk, block_q=2, block_k=2)[0, 0, 0]
    assert (int((row == 1).sum()), int((row == -1).sum())) == expected


def test_zero_denominator_gives_zero_and_zero_gradient() -> None:
    torch.manual_seed(5)
    q, k, v, weight, bias = random_inputs(1, 1, 32, 4, gate=(4,))
    with torch.no_grad():
        q.copy_(-q.abs())
    options: dict[str, Any] = {"topk": 0.25, "bottomk": 0.0, "block_q": 8, "block_k": 8, "feature_map": "relu"}
    out = reference.sparse_linear_attention(q, k, v, weight, bias, **options)
    expected = reference.sparse_linear_attention(q, k, v, None, bias, **options)
    assert_close("out", out, expected, 0.0)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v, weight))
    expected_gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for name, actual, wanted in zip("qkv", gradients, expected_gradients, strict=False):
        assert_close(f"d{name}", actual, wanted, 1e-15)
    assert not gradients[3].any()


def test_unknown_names_are_refused() -> None:
    x = torch.randn(1, 1, 32, 4)
    with pytest.raises(ValueError, match="feature_map='gelu'"):
        reference.sparse_linear_attention(x, x, x, torch.eye(4), block_q=8, block_k=8, feature_map="gelu")
    with pytest.raises(ValueError, match="linear='some'"):
        reference.sparse_linear_attention(x, x, x, torch.eye(4), linear="some")
