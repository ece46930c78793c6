"""Modules whose code a gate would disturb keep their attention dense, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sla_compile
from sla_compile.compiler.owners import iterates_over_children
from tests.support.compiled import compiled
from tests.support.models import OPTIONS, WIDTH, Attention, Model, random_input

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")


class OverChildren(Attention):
    """The layers behind its attention are its other children."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for name, child in self.named_children():
            if name not in ("qkv", "out"):
                y = child(y)
        return y


class OverItself(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(*[x.unflatten(-1, (2, -1)).transpose(1, 2)] * 3)
        for child in self:
            x = child(y.transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("make", [OverChildren, lambda: OverItself(nn.Linear(WIDTH, WIDTH))])
def test_an_owner_that_runs_over_its_children_stays_dense(make: Callable[[], nn.Module]) -> None:
    model, x = nn.Sequential(make()), random_input()
    dense = model(x)
    sla_compile.prepare(model, (x,), config=OPTIONS)
    assert torch.equal(model(x), dense)
    torch.testing.assert_close(compiled(model)(x), dense)
    (site,) = sla_compile.report(model).sites
    assert (site.rewritten, site.reason) == (False, "its module runs over its children")


def test_what_names_its_children_can_hold_a_gate() -> None:
    model = Model()
    assert not any(iterates_over_children(module) for module in (model, model.blocks[0], model.blocks[0].attention))
