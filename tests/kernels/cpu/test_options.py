"""Key masks, cross-attention, run-time sparsity, ranges always critical and causal attention on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sla_compile.kernels import reference
from sla_compile.kernels.cpu import attention as cpu
from sla_compile.kernels.cpu import gathered
from sla_compile.ops.attention import sparse_linear_attention
from tests.support.closeness import assert_close
from tests.support.triton_cases import (
    GROUPED,
    NAMES,
    OPTIONS,
    Case,
    check,
    expected_classes,
    inputs,
    key_mask,
    run_kernels,
)

pytestmark = pytest.mark.usefixtures("nan_fresh_buffers")


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_matches_the_definition(case: Case) -> None:
    tensors = inputs(case, torch.float64, "cpu")
    assert torch.equal(check(case, tensors, 1e-10, 1e-10, cpu), expected_classes(case, tensors))
    check(case, inputs(case, torch.float32, "cpu", seed=1), 2e-6, 5e-6, cpu)


@pytest.mark.parametrize("rows_per_group", [1, 1000])
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_grouped_queries_match_the_definition(case: Case, rows_per_group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "_ROWS_PER_GROUP", rows_per_group)
    tensors = inputs(case, torch.float64, "cpu")
    assert torch.equal(check(case, tensors, 1e-10, 1e-10, cpu), expected_classes(case, tensors))


@pytest.mark.parametrize("elements_per_chunk", [1, 1 << 14])
def test_chunks_and_groups_change_nothing(elements_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "_ELEMENTS_PER_CHUNK", elements_per_chunk)
    monkeypatch.setattr(gathered, "_ROWS_PER_GROUP", 30)
    for case in OPTIONS[::3]:
        case = replace(case, heads=5)
        check(case, inputs(case, torch.float64, "cpu"), 1e-10, 1e-10, cpu)


MASKS = ["none", "bool", "one row", "dead row", "-inf", "-10000", "all -10000", "moderate"]
DENSE = [
    *(Case(tokens=150, batch=2, mask=mask, head_dim=32) for mask in MASKS),
    Case(tokens=70, keys=200, batch=2, head_dim=32),
    Case(tokens=200, keys=70, batch=2, mask="-inf", head_dim=32),
    Case(tokens=150, batch=2, causal=True, head_dim=32),
    Case(tokens=150, batch=2, causal=True, mask="moderate", head_dim=32),
]


def dense(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA under the case's mask."""
    given = key_mask(case, "cpu")
    if given is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)
    mask = given[:, None, None, :].expand(-1, 1, case.tokens, -1)
    if case.causal:
        mask = mask.to(q.dtype).masked_fill(~torch.ones(mask.shape[2:], dtype=torch.bool).tril(), float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if mask.dtype == torch.bool else mask.to(q.dtype))


@pytest.mark.parametrize("of", ["kernels", "definition"])
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_topk_1_is_dense_attention_under_the_mask(case: Case, of: str) -> None:
    case = replace(case, topk=1.0, bottomk=0.0, block_q=32, block_k=16, bias="none")
    tensors = inputs(case, torch.float64, "cpu")
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3] if x is not None)
    grad_out = tensors[5]
    expected = dense(case, q, k, v)
    wanted = (expected, *torch.autograd.grad(expected, (q, k, v), grad_out))
    if of == "kernels":
        actual, _ = run_kernels(case, tensors, cpu)
    else:
        out = reference.sparse_linear_attention(
            q, k, v, tensors[3], key_mask=key_mask(case, "cpu"), topk=1.0, bottomk=0.0, **case.options
        )
        actual = dict(zip(NAMES, (out, *torch.autograd.grad(out, (q, k, v), grad_out)), strict=False))
    # a mask of -10000 is not minus infinity, and its own float64 rounding is 1e-12
    budget = 1e-11 if "10000" in case.mask else 1e-13
    for name, value in zip(NAMES, wanted, strict=False):
        assert_close(name, actual[name], value, budget)


def test_what_a_mask_hides_changes_nothing() -> None:
    case = Case(tokens=150, batch=2, block_q=32, block_k=16, head_dim=32, mask="bool")
    q, k, v, weight, bias, _ = inputs(case, torch.float64, "cpu")
    mask = key_mask(case, "cpu")
    assert mask is not None
    results = []
    for factor in (1.0, -50.0):
        hidden = torch.where(mask[:, None, :, None], 1.0, factor).double()
        given = (q, k * hidden, v * hidden, weight, bias)
        leaves = [x.detach().requires_grad_() for x in given if x is not None]
        options: dict[str, Any] = {"topk": 0.2, "bottomk": 0.2, "block_q": 32, "block_k": 16, "linear": "marginal"}
        out = sparse_linear_attention(*leaves, key_mask=mask, **options)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        for gradient in gradients[1:3]:
            assert not gradient.masked_select(~mask[:, None, :, None]).any()
        results.append((out, *gradients))
    for name, a, b in zip(NAMES, *results, strict=True):
        assert_close(name, a, b, 1e-14)


def test_one_row_and_its_repeats_are_one_mask() -> None:
    case = Case(tokens=150, batch=3, head_dim=32, mask="one row")
    q, k, v, weight, bias, _ = inputs(case, torch.float64, "cpu")
    mask = key_mask(case, "cpu")
    assert mask is not None
    a, b = (
        sparse_linear_attention(q, k, v, weight, bias, key_mask=m, block_k=16, linear="marginal")
        for m in (mask, mask.expand(3, -1))
    )
    assert torch.equal(a, b)


def test_run_time_sparsity_is_that_of_the_arguments() -> None:
    q, k, v, weight, bias, _ = inputs(Case(tokens=400, head_dim=32), torch.float64, "cpu")
    options: dict[str, Any] = {"block_q": 16, "block_k": 16, "linear": "marginal"}
    for topk, bottomk in ((0.05, 0.1), (0.28, 0.4), (0.5, 0.5)):
        wanted = sparse_linear_attention(q, k, v, weight, bias, topk=topk, bottomk=bottomk, **options)
        millionths = torch.tensor([round(topk * 1e6), round(bottomk * 1e6)])
        actual = sparse_linear_attention(q, k, v, weight, bias, sparsity=millionths, topk=0.5, bottomk=0.0, **options)
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("case", OPTIONS[::4], ids=str)
def test_gradients_by_differences(case: Case) -> None:
    case = replace(case, tokens=40, keys=case.keys and 50, head_dim=16, heads=1)
    tensors = [x for x in inputs(case, torch.float64, "cpu")[:5] if x is not None]
    leaves = [x.detach().requires_grad_() for x in tensors]
    options = {**case.options, "topk": case.topk, "bottomk": case.bottomk, "always_critical": list(case.always)}

    def function(*x: Tensor) -> Tensor:
        return sparse_linear_attention(*x, key_mask=key_mask(case, "cpu"), **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
