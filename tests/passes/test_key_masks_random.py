"""Random chains of views and repetitions: what is claimed to be constant along an axis is."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sla_compile.passes.key_masks import constant_along

SIZES = (1, 2, 3, 4, 6)


def factors(size: int, draw: random.Random, most: int) -> list[int]:
    """Up to ``most`` + 1 sizes whose product is ``size``."""
    found = []
    for _ in range(draw.randint(1, most)):
        found.append(draw.choice([factor for factor in SIZES if size % factor == 0]))
        size //= found[-1]
    found.append(size)
    draw.shuffle(found)
    return found


def sliced(x: Tensor, draw: random.Random) -> tuple[Any, ...]:
    index: list[Any] = [draw.choice((slice(None), slice(None), slice(0, size, 2), 0)) for size in x.shape]
    if draw.random() < 0.3:
        index.insert(draw.randrange(len(index) + 1), None)
    return (tuple(index),)


def neighbours(x: Tensor, draw: random.Random) -> tuple[int, int]:
    first = draw.randrange(max(1, x.dim() - 1))
    return first, min(first + 1, x.dim() - 1)


def split(x: Tensor, draw: random.Random) -> tuple[Any, ...]:
    axis = draw.randrange(x.dim())
    return axis, tuple(factors(x.shape[axis], draw, 1))


STEPS: dict[str, Callable[[Tensor, random.Random], tuple[Any, ...]]] = {
    "reshape": lambda x, draw: tuple(factors(x.numel(), draw, 4)),
    "flatten": neighbours,
    "unflatten": split,
    "transpose": lambda x, draw: (draw.randrange(-x.dim(), x.dim()), draw.randrange(x.dim())),
    "permute": lambda x, draw: tuple(draw.sample(range(x.dim()), x.dim())),
    "unsqueeze": lambda x, draw: (draw.randrange(-x.dim() - 1, x.dim() + 1),),
    "expand": lambda x, draw: (*[2] * draw.randint(0, 1), *(draw.choice(SIZES) if n == 1 else -1 for n in x.shape)),
    "repeat": lambda x, draw: tuple(draw.choice((1, 2)) for _ in range(x.dim() + draw.randint(0, 1))),
    "repeat_interleave": lambda x, draw: (draw.choice((1, 2, 3)), draw.randrange(-x.dim(), x.dim())),
    "getitem": sliced,
    "mul": lambda x, draw: (2,),
}


def chain(draw: random.Random) -> tuple[fx.Node, list[tuple[Any, ...]]]:
    """A graph's last node, of a random number of steps, and what they were."""
    graph = fx.Graph()
    shape = [draw.choice(SIZES) for _ in range(draw.randint(1, 4))]
    value = torch.randint(0, 1000, shape)
    if draw.random() < 0.4:
        value = value.narrow(draw.randrange(len(shape)), 0, 1).expand(shape)
    node = graph.placeholder("x")
    steps: list[tuple[Any, ...]] = [("x", value.shape, value.stride())]
    node.meta["example_value"] = value
    for _ in range(draw.randint(1, 5)):
        name = draw.choice(list(STEPS))
        arguments = STEPS[name](value, draw)
        if name == "getitem":
            made, following = graph.call_function(operator.getitem, (node, *arguments)), value[arguments[0]]
        else:
            made, following = graph.call_method(name, (node, *arguments)), getattr(value, name)(*arguments)
        if not 0 < following.dim() <= 6 or following.numel() > 20000:
            break
        made.meta["example_value"] = following
        node, value = made, following
        steps.append((name, arguments, value.shape))
    return node, steps


@pytest.mark.parametrize("seed", range(4))
def test_what_is_claimed_to_be_constant_is(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    claims = 0
    for _ in range(1000):
        node, steps = chain(draw)
        value = node.meta["example_value"]
        for axis in range(-value.dim(), 0):
            if constant_along(node, axis):
                claims += 1
                assert (value == value.narrow(axis, 0, 1)).all(), (axis, steps)
    assert claims > 1000
