"""What the target of a call tells: whether it writes, and into which of its arguments."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sla_compile.passes.node_ops import disturbs, writes

IN_PLACE: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    *((function, (), {}) for name, function in vars(operator).items() if name in
      ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
       "irshift", "setitem")),
    *((name, (), {}) for name in ("add_", "__iadd__", "__iand__", "__ipow__", "copy_", "zero_", "__setitem__")),
    *((function, (), {}) for function in (torch.relu_, F.relu_, torch.ops.aten.add_.Tensor, torch.ops.aten.add_)),
    *((function, (), {"inplace": True}) for function in (F.relu, F.silu, F.dropout, F.hardswish)),
    (F.relu, (True,), {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "more", "named"), IN_PLACE, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_writes_into_the_first_argument(target: Any, more: tuple[Any, ...], named: dict[str, Any]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_method if isinstance(target, str) else graph.call_function
    node = call(target, (x, *more), named)
    assert writes(node) == (x,)
    assert disturbs(node)


NOT_IN_PLACE: list[tuple[Any, dict[str, Any]]] = [
    *((function, {}) for function in (operator.and_, operator.or_, operator.add, operator.invert, operator.index)),
    *((name, {}) for name in ("add", "__and__", "__or__", "__invert__", "__index__", "__radd__")),
    *((function, {}) for function in (torch.relu, F.relu, torch.ops.aten.add.Tensor, torch.ops.aten.add, torch.add)),
    *((function, {"inplace": False}) for function in (F.relu, F.dropout)),
]


@pytest.mark.parametrize(("target", "named"), NOT_IN_PLACE, ids=lambda value: getattr(value, "__name__", str(value)))
def test_writes_into_nothing(target: Any, named: dict[str, Any]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_method if isinstance(target, str) else graph.call_function
    node = call(target, (x,), named)
    assert writes(node) == ()
    assert not disturbs(node)


def test_writes_elsewhere() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert writes(graph.call_function(torch.add, (x, 1), {"out": y})) == (y,)
    assert writes(graph.call_function(torch.ops.aten.add.out, (x, x), {"out": y})) == (y,)
    assert disturbs(graph.call_function(torch._C._set_grad_enabled, (False,)))
