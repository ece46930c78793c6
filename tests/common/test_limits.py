"""The limits are those that settings and the op hold to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sla_compile import SLAConfig, sparse_linear_attention
from sla_compile.common import limits


@pytest.mark.parametrize(
    ("field", "accepted", "refused"),
    [
        ("block_q", limits.BLOCK_SIZES, 2 * max(limits.BLOCK_SIZES)),
        ("block_k", limits.BLOCK_SIZES, min(limits.BLOCK_SIZES) // 2),
        ("feature_map", limits.FEATURE_MAPS, "tanh"),
        ("linear", limits.LINEAR_BRANCHES, "critical"),
        ("gate", limits.GATE_FORMS, "per_token"),
    ],
)
def test_settings(field: str, accepted: tuple[Any, ...], refused: Any) -> None:
    other: dict[str, Any] = {"linear": "marginal"} if field in ("feature_map", "gate") else {}
    for value in accepted:
        assert getattr(SLAConfig(**{field: value}, **other), field) == value
    with pytest.raises(ValueError, match=f"SLAConfig.{field}: got {refused!r}"):
        SLAConfig(**{field: refused})


@pytest.mark.parametrize("dtype", limits.DTYPES["cpu"])
@pytest.mark.parametrize("head_dim", [limits.MIN_HEAD_DIM, limits.MAX_HEAD_DIM])
def test_the_op_takes_the_ends_of_the_ranges(head_dim: int, dtype: torch.dtype) -> None:
    q = torch.randn(1, 1, 32, head_dim).to(dtype)
    assert (
        sparse_linear_attention(q, q, q, topk=1.0, bottomk=0.0, block_q=16, block_k=16, linear="taylor").dtype == dtype
    )


@pytest.mark.parametrize("head_dim", [limits.MIN_HEAD_DIM - 1, limits.MAX_HEAD_DIM + 1])
def test_the_op_refuses_what_is_beyond(head_dim: int) -> None:
    q = torch.randn(1, 1, 32, head_dim)
    with pytest.raises(ValueError, match=str(head_dim)):
        sparse_linear_attention(q, q, q, linear="taylor")
