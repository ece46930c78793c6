"""What a graph returns in a dry run: the values that follow from small inputs, zeros for the rest, nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sla_compile.compiler import fake_run as stand_ins
from tests.support.closeness import assert_close

MASK = torch.arange(10) < 6


def returned(function: Callable[..., Any], *inputs: Any) -> Any:
    """What ``function`` gives where each of its graphs is a dry run."""
    torch._dynamo.reset()

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return stand_ins.stand_ins(gm)

    with torch.no_grad():
        return torch.compile(function, backend=backend, dynamic=False)(*inputs)


def lengths(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = mask.sum()
    positions = torch.arange(10.0) * count / 2
    low, high = torch.stack([positions, -positions]).aminmax(dim=1)
    return count, low, high


def written(mask: Tensor) -> tuple[Tensor, Tensor]:
    made = torch.zeros(10, dtype=torch.int64)
    view = made[2:]
    made[3:5] = 7
    view += mask[2:]
    return made, view


def written_by_operators(mask: Tensor) -> tuple[Tensor, Tensor]:
    made = torch.arange(10)
    made -= 3
    made[2:] **= mask[2:]
    torch.add(made, 1, out=made)
    other = torch.ops.aten.mul_.Tensor(made.clone(), 2)
    return made, other


@pytest.mark.parametrize("function", [lengths, written, written_by_operators])
def test_small_values_are_those_of_a_run(function: Callable[..., Any]) -> None:
    for actual, expected in zip(returned(function, MASK), function(MASK), strict=True):
        assert expected.any()
        assert torch.equal(actual, expected)


def test_an_input_is_not_changed() -> None:
    def clear(mask: Tensor) -> Tensor:
        mask[0] = False
        return mask.sum()

    mask = MASK.clone()
    assert int(returned(clear, mask)) == 5
    assert torch.equal(mask, MASK)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y, y.argmax() + 1


def test_no_layer_runs_nor_what_follows_from_it() -> None:
    y, largest = returned(Layer(), torch.ones(10))
    assert y.shape == (10,)
    assert not y.any()
    assert not largest.any()


class Overwritten(Layer):
    def forward(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.ones(10)
        view = made[2:]
        view[3:] = self.linear(mask.float())[5:]
        return made, mask.sum()


class OverwrittenByAnOperator(Layer):
    def forward(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.ones(10)
        made -= self.linear(mask.float())
        return made, mask.sum()


class OverwrittenAsOutput(Layer):
    def forward(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.ones(10)
        torch.mul(self.linear(mask.float()), 2, out=made)
        return made, mask.sum()


@pytest.mark.parametrize("layer", [Overwritten, OverwrittenByAnOperator, OverwrittenAsOutput])
def test_a_value_that_a_layer_wrote_into_is_unknown(layer: type[Layer]) -> None:
    made, count = returned(layer(), MASK)
    assert not made.any()
    assert int(count) == 6


def test_large_tensors_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "LARGEST", 100)
    small, large = returned(lambda mask: (mask + 1, torch.ones(101) * mask.sum()), MASK)
    assert_close("small", small.double(), MASK.double() + 1, 0.0)
    assert large.shape == (101,)
    assert not large.any()


def test_zeros_that_stand_in_are_no_values() -> None:
    """A later graph computes nothing from them."""
    y, _ = returned(Layer(), torch.ones(10))
    assert not returned(lambda y, mask: (y == 0) & mask, y, MASK).any()
    assert torch.equal(returned(lambda y, mask: (y == 0) & mask, torch.zeros(10), MASK), MASK)
