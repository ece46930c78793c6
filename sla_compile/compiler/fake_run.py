"""What a traced graph returns in a dry run: zeros of the right shapes, and the small values that Python may go by.

After a graph break a model's Python code may read numbers that a graph made: lengths from a mask, the size of a grid.
So what follows from the call's own small tensors alone, with no parameter in it, is computed; all else is zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from sla_compile.compat import size_hint
from sla_compile.passes.node_ops import writes

__all__ = ["stand_ins"]

LARGEST = 2**20
"""Elements of the largest tensor that is computed."""

# Zeros that stand in for values, so that nothing is computed from them.
_made_up = WeakIdKeyDictionary()


def stand_ins(gm: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
    """A function like ``gm`` that runs no layer and changes no input."""
    nodes = list(gm.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]

    def run(*inputs: Any) -> tuple[Any, ...]:
        given = dict(zip(placeholders, inputs, strict=True))
        known = {node: value for node, value in given.items() if _readable(value)}
        known = {node: value.clone() if isinstance(value, torch.Tensor) else value for node, value in known.items()}
        with torch.no_grad():
            for node in nodes:
                if node.op in ("call_function", "call_method"):
                    _compute(node, known)
        return tuple(_output(output, given, known) for output in nodes[-1].args[0])

    return run


def _readable(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return True
    plain = type(value) is torch.Tensor and value.device.type != "meta"
    return plain and value.numel() <= LARGEST and value not in _made_up


def _compute(node: fx.Node, known: dict[fx.Node, Any]) -> None:
    """Put the value of ``node`` into ``known``, if all that it takes is there and it is small."""
    changed = [argument for argument in writes(node) if isinstance(argument, fx.Node)]
    if not all(source in known for source in node.all_input_nodes):
        for argument in changed:
            _forget(known, known.get(argument))
        return
    if not (changed or _small(node.meta.get("example_value"))):
        return
    if "c10d" in str(node.target):  # it would wait for ranks that may trace nothing
        return
    arguments, keywords = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
    target: Any = node.target
    try:
        call = getattr(arguments[0], target) if node.op == "call_method" else target
        known[node] = call(*(arguments[1:] if node.op == "call_method" else arguments), **keywords)
    except Exception:  # the trace succeeded, so this is of a value that differs; zeros will do as well
        for argument in changed:
            _forget(known, known.get(argument))


def _forget(known: dict[fx.Node, Any], changed: Any) -> None:
    """Take ``changed`` and the views of it out of ``known``."""
    if isinstance(changed, torch.Tensor):
        memory = changed.untyped_storage().data_ptr()
        for node, value in list(known.items()):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == memory:
                del known[node]


def _small(example: Any) -> bool:
    """Whether this traced value is tensors, none of them large."""
    if isinstance(example, torch.Tensor):
        sizes = [size_hint(size) for size in example.shape]
        return example.device.type != "meta" and None not in sizes and torch.Size(sizes).numel() <= LARGEST  # type: ignore[arg-type]
    return isinstance(example, tuple | list) and bool(example) and all(map(_small, example))


def _output(output: Any, given: dict[fx.Node, Any], known: dict[fx.Node, Any]) -> Any:
    if not isinstance(output, fx.Node):
        return output
    if output in given:
        return given[output]
    if output in known:
        return known[output]
    example = output.meta.get("example_value")
    if isinstance(example, torch.Tensor):
        sizes = tuple(size_hint(size) or 0 for size in example.shape)
        zeros = torch.zeros(sizes, dtype=example.dtype, device=example.device)
        _made_up[zeros] = True
        return zeros
    return size_hint(example) if isinstance(example, torch.SymInt) else example
