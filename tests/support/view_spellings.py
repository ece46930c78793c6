"""Views in every spelling that PyTorch has for them, and graphs of functions without Dynamo."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

View = Callable[[Any], Any]
aten = torch.ops.aten


def permuted(order: Sequence[int]) -> Iterator[View]:
    """Every way to put the axes into ``order``."""
    order, count = list(order), len(order)
    negative = [axis - count for axis in order]
    yield lambda x: x.permute(*order)
    yield lambda x: x.permute(order)
    yield lambda x: x.permute(dims=negative)
    yield lambda x: torch.permute(x, order)
    yield lambda x: torch.permute(dims=order, input=x)
    yield lambda x: aten.permute.default(x, negative)
    yield lambda x: aten.permute(x, order)
    yield lambda x: x.movedim(order, list(range(count)))
    yield lambda x: torch.moveaxis(x, source=negative, destination=list(range(count)))
    changed = [axis for axis in range(count) if order[axis] != axis]
    if len(changed) == 2:
        yield from transposed(changed[0], changed[1], count)
    for source in range(count):
        for destination in range(count):
            rest = [axis for axis in range(count) if axis != source]
            if source != destination and [*rest[:destination], source, *rest[destination:]] == order:
                yield from moved(source, destination, count)


def moved(source: int, destination: int, count: int) -> Iterator[View]:
    """Every way to move one axis of ``count``."""
    yield lambda x: x.movedim(source, destination)
    yield lambda x: torch.movedim(input=x, source=source - count, destination=destination)
    yield lambda x: aten.movedim.int(x, source, destination - count)


def transposed(one: int, other: int, count: int) -> Iterator[View]:
    """Every way to swap two axes of ``count``."""
    a, b = one, other - count
    for name in ("transpose", "swapaxes", "swapdims"):
        yield from transposed_by(name, a, b)
    yield lambda x: x.transpose(dim1=a, dim0=b)
    yield lambda x: torch.transpose(input=x, dim0=a, dim1=b)
    yield lambda x: torch.swapaxes(x, axis0=b, axis1=a)
    yield lambda x: aten.transpose.int(x, a, b)
    yield lambda x: aten.transpose(x, b, a)
    if {one, other} == {count - 2, count - 1}:
        yield lambda x: x.mT
        yield lambda x: x.mH
        yield lambda x: torch.adjoint(x)
    if count == 2:
        yield lambda x: x.T
        yield lambda x: torch.t(x)


def transposed_by(name: str, a: int, b: int) -> Iterator[View]:
    """A method and a function of that name, which swap the axes ``a`` and ``b``."""
    yield lambda x: getattr(x, name)(a, b)
    yield lambda x: getattr(torch, name)(x, b, a)


def regrouped(shape: Sequence[int], result: Sequence[int]) -> Iterator[View]:
    """Every way to see (a tensor of) ``shape`` as one of ``result``; a view of some is no view of others."""
    result = list(result)
    open_one = [*result[:-1], -1]
    yield lambda x: x.view(result)
    yield lambda x: x.view(*open_one)
    yield lambda x: x.reshape(*result)
    yield lambda x: x.reshape(shape=open_one)
    yield lambda x: torch.reshape(input=x, shape=result)
    yield lambda x: aten.view.default(x, result)
    yield lambda x: aten.reshape(x, result)
    for axis in range(len(shape)):
        count = len(result) - len(shape) + 1
        if count > 1 and [*shape[:axis], *result[axis : axis + count], *shape[axis + 1 :]] == result:
            yield from unflattened(axis, result[axis : axis + count], len(shape))
        last = axis + len(shape) - len(result)
        if last > axis and [*shape[:axis], result[axis] if axis < len(result) else 0, *shape[last + 1 :]] == result:
            yield from flattened(axis, last, len(shape))


def unflattened(axis: int, sizes: list[int], count: int) -> Iterator[View]:
    """Every way to split one axis of ``count`` into axes of ``sizes``."""
    yield lambda x: x.unflatten(axis, sizes)
    yield lambda x: torch.unflatten(input=x, dim=axis - count, sizes=sizes)
    yield lambda x: aten.unflatten.int(x, axis, sizes)


def flattened(first: int, last: int, count: int) -> Iterator[View]:
    """Every way to merge the axes from ``first`` to ``last``, inclusive, of ``count``."""
    yield lambda x: x.flatten(first, last)
    yield lambda x: torch.flatten(x, start_dim=first, end_dim=last - count)
    yield lambda x: aten.flatten.using_ints(x, first, last)


def unsqueezed(axis: int, count: int) -> Iterator[View]:
    """Every way to put an axis of size 1 before ``axis`` of ``count`` others."""
    index = (*[slice(None)] * axis, None)
    yield lambda x: x.unsqueeze(axis)
    yield lambda x: torch.unsqueeze(input=x, dim=axis - count - 1)
    yield lambda x: aten.unsqueeze.default(x, axis)
    yield lambda x: x[index]
    yield lambda x: x[(..., None, *[slice(None)] * (count - axis))]


def one_of(axis: int, place: int, shape: Sequence[int]) -> Iterator[View]:
    """Every way to take one position of an axis, which goes."""
    index = (*[slice(None)] * axis, place)
    yield lambda x: x[index]
    yield lambda x: x[(..., place - shape[axis], *[slice(None)] * (len(shape) - axis - 1))]
    yield lambda x: x.select(axis, place)
    yield lambda x: torch.select(x, dim=axis - len(shape), index=place)
    yield lambda x: aten.select.int(x, axis, place)
    yield lambda x: x.unbind(axis)[place]
    yield lambda x: torch.unbind(x, dim=axis)[place]
    yield lambda x: aten.unbind.int(x, axis)[place]
    yield lambda x: x.narrow(axis, place, 1).squeeze(axis)
    yield lambda x: torch.squeeze(x.chunk(shape[axis], dim=axis)[place], dim=axis)


def part_of(axis: int, first: int, last: int, shape: Sequence[int]) -> Iterator[View]:
    """Every way to take the positions from ``first`` to ``last`` of an axis."""
    size = shape[axis]
    sizes = [length for length in (first, last - first, size - last) if length]
    place = 1 if first else 0
    index = (*[slice(None)] * axis, slice(first, last))
    yield lambda x: x[index]
    yield lambda x: x[(..., slice(first - size, last), *[slice(None)] * (len(shape) - axis - 1))]
    yield lambda x: x.narrow(axis, first, last - first)
    yield lambda x: torch.narrow(input=x, dim=axis - len(shape), start=first, length=last - first)
    yield lambda x: aten.slice.Tensor(x, axis, first, last)
    yield lambda x: x.split(sizes, axis)[place]
    yield lambda x: torch.split(x, sizes, dim=axis)[place]
    yield lambda x: aten.split_with_sizes.default(x, sizes, axis)[place]
    yield lambda x: x.tensor_split([first, last], dim=axis)[1]


def joined(axis: int, count: int) -> Iterator[Callable[[list[Any]], Any]]:
    """Every way to join tensors along ``axis`` of ``count``."""
    yield lambda parts: torch.cat(parts, axis)
    yield lambda parts: torch.cat(tuple(parts), dim=axis - count)
    yield lambda parts: torch.concat(tensors=parts, dim=axis)
    yield lambda parts: torch.concatenate(parts, axis=axis)  # type: ignore[call-arg]
    yield lambda parts: aten.cat.default(parts, axis)


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """``function`` as Dynamo would spell it, each node with its value for ``inputs``."""
    names = [f"x{i}" for i in range(len(inputs))]
    called = eval(f"lambda {', '.join(names)}: function({', '.join(names)})", {"function": function})
    module = fx.symbolic_trace(called)

    class Values(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            n.meta["example_value"] = value
            return value

    Values(module).run(*inputs)
    return module


def working(ways: Iterator[View], value: Tensor) -> list[View]:
    """Those that take a tensor of these strides."""
    found = []
    for way in ways:
        try:
            way(value)
        except RuntimeError:
            continue
        found.append(way)
    return found


def some_way(ways: Iterator[View], value: Tensor, draw: random.Random) -> View:
    """One of those that take a tensor of these strides."""
    tried = list(ways)
    draw.shuffle(tried)
    for way in tried:
        try:
            way(value)
        except RuntimeError:
            continue
        return way
    raise RuntimeError(f"no spelling takes a tensor of strides {value.stride()}")
