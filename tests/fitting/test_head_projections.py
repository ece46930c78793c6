"""The linear layer after an attention, and what it has to say about which heads get blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from sla_compile.fitting.head_projections import find_head_projections
from sla_compile.fitting.observer import Arguments
from sla_compile.fitting.sensitivity import SiteSensitivity, measure_sites
from tests.support.allocation import BUDGET, batches, prepared, uneven
from tests.support.models import HEADS, WIDTH, Attention, Model

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

BY_HEAD: dict[str, Any] = {"topk_by": "head", "max_topk": 0.8}


class Gated(Attention):
    """What a product in between makes of an error is not known."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y * x.sigmoid())


class Late(Attention):
    """The first layer after the attention takes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).reshape(*x.shape)
        return self.first(x) + self.out(y)


def found(model: nn.Module) -> dict[str, SiteSensitivity]:
    sites = {
        path: SiteSensitivity.of_gate(path, gate, BUDGET, (1.0,)) for path, gate in sla_compile.gates(model).items()
    }
    find_head_projections(model, ((batches(1)[0][0],), {}), sites)
    return sites


def replaced(attention: Attention) -> Model:
    model = Model(1)
    model.blocks[0].attention = attention
    return model


@pytest.mark.parametrize("attention", [Attention, Late])
def test_the_layer_is_found(attention: type[Attention]) -> None:
    model = prepared(replaced(attention()), **BY_HEAD)
    (site,) = found(model).values()
    columns = model.blocks[0].attention.out.weight.detach().view(WIDTH, HEADS, -1)
    assert site.head_gram is not None
    torch.testing.assert_close(site.head_gram, torch.einsum("chd,che->hde", columns, columns).float())


def test_what_lies_between_is_not_guessed() -> None:
    (site,) = found(prepared(replaced(Gated()), **BY_HEAD)).values()
    assert site.head_gram is None
    (site,) = found(prepared(Model(1), max_topk=0.8)).values()
    assert site.head_gram is None  # heads share their topk


def test_losses_of_heads_are_those_after_the_layer() -> None:
    model = prepared(uneven(1), **BY_HEAD)
    data: list[Arguments] = [(batch, {}) for batch in batches()]
    path, gate = next(iter(sla_compile.gates(model).items()))
    site = SiteSensitivity.of_gate(path, gate, BUDGET, (0.5, 1.0))
    find_head_projections(model, data[0], {path: site})
    measure_sites(model, data, {path: site})
    with torch.no_grad():
        weight = model.blocks[0].attention.out.weight
        weight[:, : WIDTH // HEADS] = 0.0  # as if head 0 were not read
    blind = SiteSensitivity.of_gate(path, gate, BUDGET, (0.5, 1.0))
    find_head_projections(model, data[0], {path: blind})
    measure_sites(model, data, {path: blind})
    assert site.relative_losses() == blind.relative_losses()
    assert sum(losses[-1] for losses in site.head_losses(BUDGET)) == pytest.approx(site.relative_losses()[-1])
    assert blind.head_losses(BUDGET)[0] == [0.0, 0.0]
    assert blind.head_losses(BUDGET)[1][-1] == pytest.approx(site.relative_losses()[-1])


def test_heads_that_are_not_read_get_no_blocks() -> None:
    model = uneven(2)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight[:, : WIDTH // HEADS] = 0.0
    model = prepared(model, **BY_HEAD)
    report = sla_compile.allocate(model, batches(), budget=BUDGET)
    for site in report.sites:
        assert site.topks is not None
        assert site.topks[0] == pytest.approx(0.1 * BUDGET)
    assert max(site.topks[1] for site in report.sites if site.topks is not None) > BUDGET
    assert report.output < report.output_uniform
