"""The difference of a site before and after: what it shows, and of which sites."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.models import HEADS, CheckpointedModel, Model
from tests.support.reports import explain

WEIGHT_AND_BIAS = ["blocks.1.attention.sla.weight", "blocks.1.attention.sla.bias"]

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sla_compile.UntrainedGatesWarning"),
]


@pytest.mark.parametrize(
    ("linear", "parts"), [("taylor", ["shift=blocks.1.attention.sla.shift"]), ("marginal", WEIGHT_AND_BIAS)]
)
def test_diff_shows_the_site_before_and_after(linear: str, parts: list[str]) -> None:
    diff = explain(Model(), linear=linear).sites[1].diff
    minus = [line for line in diff if line.startswith("- ")]
    plus = [line for line in diff if line.startswith("+ ")]
    context = [line for line in diff if line.startswith("  ")]
    assert len(minus) + len(plus) + len(context) == len(diff) <= 12
    assert any("scaled_dot_product_attention(" in line for line in minus)
    assert any("sla::forward(" in line for line in plus)
    assert all(part in "".join(plus) for part in parts)
    assert not any("gate(" in line or "_parameters_" in line for line in diff)
    assert not any("sla" in line for line in minus + context)


def test_an_operand_that_is_not_in_the_graph_has_parameters_by_their_paths() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out

    diff = explain(Owner(), torch.randn(2, 100, 32)).sites[0].diff
    assert any(line.startswith("- ") and "attention.in_proj_weight, " in line for line in diff)
    assert not any("_parameters_" in line for line in diff)


def test_diff_inside_activation_checkpointing() -> None:
    diff = explain(CheckpointedModel()).sites[1].diff
    assert "blocks.1.attention.sla.shift" in "".join(diff)
    assert not any("gate(" in line for line in diff)


def test_a_view_that_became_a_reshape_is_shown_as_it_was() -> None:
    class Views(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return (q @ q.mT).softmax(-1).matmul(q).view(2, -1).sum(0)

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.views = Views()

        def forward(self, q: Tensor) -> Tensor:
            return self.views(q)

    diff = explain(Owner(), torch.randn(2, HEADS, 100, 16)).sites[0].diff
    assert any(line.startswith("- ") and ".view(" in line for line in diff)
    assert any(line.startswith("+ ") and ".reshape(" in line for line in diff)


def test_kept_sites_have_no_diff() -> None:
    assert not explain(Model(), min_tokens=1000).sites[0].diff
