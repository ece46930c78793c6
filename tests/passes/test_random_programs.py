"""Random programs: at topk=1 the rewritten program is the dense one, below it is the definition.

By hand, for longer: ``python -m tests.passes.test_random_programs SEED FIRST LAST``.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import sla_compile.ops  # noqa: F401  the ops of a rewritten graph
from sla_compile.common.limits import DTYPES
from sla_compile.common.token_orders import positions
from sla_compile.config import SLAConfig
from sla_compile.kernels import reference
from sla_compile.passes.decide import Decision, Keep, Requirements, Rewrite, decide
from sla_compile.passes.find_attention import Marker, find_attention
from sla_compile.passes.hoist_gathers import hoist_gathers
from sla_compile.passes.rewrite import replace_attention
from sla_compile.passes.token_order import Wanted
from tests.support.capture import run as capture_of
from tests.support.closeness import assert_close
from tests.support.random_attentions import program
from tests.support.random_programs import GRID, Core, Program

SECONDS, SEED = 12.0, "numbers"
BLOCKS = (16, 16)
SPARSE: dict[str, Any] = {"topk": 0.4, "bottomk": 0.2, "block_q": BLOCKS[0], "block_k": BLOCKS[1], "linear": "marginal"}
EXACT = {**SPARSE, "topk": 1.0, "bottomk": 0.0}


REFUSED = (
    "modified by an inplace operation",
    "don't support automatic differentiation",
    "derivative for aten::floor_divide_ is not implemented",
    "This view is the output of a function that returns multiple views",
)
"""What PyTorch says of a write that has, or leaves, no gradient."""


class Uncompiled(fx.GraphModule):
    """A graph that is only read and interpreted: no code is made of it."""

    def recompile(self) -> Any:
        return None


def run(graph: fx.Graph, inputs: list[Tensor]) -> Any:
    """The outputs of ``graph`` for copies of ``inputs``, node by node."""
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(given).clone()
        elif node.op == "call_method":
            values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        elif node.op == "call_function":
            values[node] = node.target(*args, **kwargs)
        else:
            return args[0]
    raise ValueError("a graph without an output")


def rewritten(p: Program, wanted: Requirements) -> list[Decision]:
    """What is decided of each attention of ``p``; those to be rewritten are, to be exact."""
    module = Uncompiled(torch.nn.Module(), p.graph)
    p.graph = module.graph
    decisions = []
    for ordinal, call in enumerate(find_attention(module)):
        decisions.append(decide(call, wanted))
        if isinstance(decisions[-1], Rewrite):
            weight, bias = p.gates[ordinal]
            marker = Marker(weight, module, (), weight, bias, None, None, None, ordinal, "", False)
            replace_attention(call, decisions[-1], marker, SLAConfig(**EXACT).compiled_options())
    hoist_gathers(module)
    p.graph.lint()
    return decisions


def definition(p: Program, decisions: list[Decision], graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> fx.Graph:
    """``graph``, of which ``copies`` gives the node for each of ``p``, with its attentions by the definition."""
    for core, decision, gate in zip(p.cores, decisions, p.gates, strict=False):
        if isinstance(decision, Rewrite):
            result = copies[core.result]
            sides = (core.queries, core.keys, core.values, *gate, core.key_mask)
            with graph.inserting_after(result):
                arguments = (None if side is None else copies[side] for side in sides)
                instead = graph.call_function(defined(core, decision), (result, *arguments))
            result.replace_all_uses_with(instead)
            instead.replace_input_with(instead, result)
    return graph


def defined(core: Core, decision: Rewrite) -> Callable[..., Tensor]:
    """The definition of ``core`` as a function that gives what lies in memory as the dense result does."""
    queries, keys = decision.order.queries, decision.order.keys

    def function(dense: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, mask: Any) -> Tensor:
        rows = torch.tensor(positions(queries, q.shape[2]) if queries else range(q.shape[2]))
        columns = torch.tensor(positions(keys, k.shape[2]) if keys else range(k.shape[2]))
        mask = None if mask is None else mask[:, columns]
        told: dict[str, Any] = {"key_mask": mask, "scale": core.scale, "causal": core.causal, **SPARSE}
        out = reference.sparse_linear_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], weight, bias, **told)
        return torch.empty_like(dense).copy_(core.place(out[:, :, rows.argsort()]))

    return function


def check(seed: str) -> str:
    """Try the program of ``seed``; in one word, what was tried."""
    draw = random.Random(seed)
    writes, per_head, order = draw.choice((0.0, 0.04, 0.12)), draw.random() < 0.3, draw.choice(("raster", "tiles"))
    wanted = Requirements(0, DTYPES, per_head=per_head, order=Wanted(order, GRID, None, BLOCKS))
    try:
        p = program(seed, writes, per_head)
    except RuntimeError as error:  # a view or write that PyTorch refuses
        return f"no program: {error}"
    trained = draw.random() < 0.15
    untrained = [x * 0 if i >= len(p.inputs) - 4 else x for i, x in enumerate(p.inputs)]
    dense, gradients = run(p.graph, p.inputs), of_inputs(p.graph, untrained) if trained else None
    if not all(bool(torch.isfinite(out).all()) for out in dense):
        return "not finite"
    copy, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(p.graph, copies))
    decisions = rewritten(p, wanted)
    compare(run(p.graph, untrained), dense)
    if gradients is not None:
        compare_gradients(of_inputs(p.graph, untrained), gradients)
    if not any(isinstance(decision, Rewrite) for decision in decisions):
        return f"kept: {decisions[0].reason if isinstance(decisions[0], Keep) else ''}" if decisions else "not found"
    if len(decisions) != len(p.cores) or not all(core.defined for core in p.cores):
        return "rewritten"
    by_definition = definition(p, decisions, copy, copies)
    for node in p.graph.find_nodes(op="call_function", target=torch.ops.sla.forward.default):
        node.kwargs = {**node.kwargs, "topk": SPARSE["topk"], "bottomk": SPARSE["bottomk"]}
    try:
        compare(run(p.graph, p.inputs), run(by_definition, p.inputs))
    except AssertionError:
        if not is_tied(by_definition, p.inputs):
            raise
        return "a tie between blocks"
    return "rewritten and defined"


def is_tied(graph: fx.Graph, inputs: list[Tensor]) -> bool:
    """Whether rounding decides which blocks are critical: outputs jump when inputs move by no more than that."""
    outputs, generator = run(graph, inputs), torch.Generator().manual_seed(0)
    for _ in range(4):
        noise = (1e-14 * torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in inputs)
        moved = [x * (1 + part) if x.is_floating_point() else x for x, part in zip(inputs, noise, strict=True)]
        if any((a - b).norm() > 1e-6 * b.norm() for a, b in zip(run(graph, moved), outputs, strict=True)):
            return True
    return False


def of_inputs(graph: fx.Graph, inputs: list[Tensor]) -> list[Tensor | None] | None:
    """The gradients of the inputs but for gates; None where a write took what the backward reads."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    try:
        total = sum(out.square().sum() for out in run(graph, inputs) if out.requires_grad)
        given = [x for x in inputs[:-4] if x.requires_grad]
        return [*torch.autograd.grad(total, given, allow_unused=True)] if isinstance(total, Tensor) else None
    except RuntimeError as error:
        if any(text in str(error) for text in REFUSED):
            return None
        raise


def compare_gradients(actual: list[Tensor | None] | None, dense: list[Tensor | None]) -> None:
    for i, (a, d) in enumerate(zip(actual or [], dense, strict=False)):
        if d is not None and torch.isfinite(d).all() and d.norm() > 1e-6:  # not one that is zero but for rounding
            assert_close(f"gradient {i}", torch.zeros_like(d) if a is None else a, d, 1e-6)


def compare(outputs: Any, expected: Any) -> None:
    for i, (actual, dense) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(f"output {i}", actual, dense, 1e-6)
        strides = [(n, a, b) for n, a, b in zip(dense.shape, actual.stride(), dense.stride(), strict=True) if n > 1]
        assert all(a == b for _, a, b in strides), f"output {i}: strides {actual.stride()}, dense {dense.stride()}"


def test_random_programs() -> None:
    end, tried = time.monotonic() + SECONDS, Counter[str]()
    while time.monotonic() < end or sum(tried.values()) < 50:
        seed = f"{SEED} {sum(tried.values())}"
        try:
            tried[check(seed).partition(":")[0]] += 1
        except Exception as error:
            raise AssertionError(f"the program of seed {seed!r}: {error}") from error
    assert tried["rewritten and defined"] > 5, tried


def test_a_tie_between_blocks_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks have scores that differ by rounding alone; a program without one is held to its definition."""
    assert check("left 91") == "a tie between blocks"
    assert check("left 90") == "rewritten and defined"
    right = reference.sparse_linear_attention
    monkeypatch.setattr(reference, "sparse_linear_attention", lambda *args, **told: 1.00001 * right(*args, **told))
    with pytest.raises(AssertionError, match="relative error"):
        check("left 90")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("number", range(6))
def test_random_programs_in_a_compile(number: int) -> None:
    p = program(f"{SEED} compiled {number}", 0.06, per_head=False)
    dense = run(p.graph, p.inputs)
    call = fx.GraphModule(torch.nn.Module(), p.graph)
    capture, outputs = capture_of(call, *(x.clone() for x in p.inputs), **EXACT)
    assert capture.sites
    compare(outputs, dense)


if __name__ == "__main__":
    failed, counted = 0, Counter[str]()
    for number in range(int(sys.argv[2]), int(sys.argv[3])):
        try:
            counted[check(f"{sys.argv[1]} {number}")] += 1
        except Exception as error:
            failed += 1
            print(f"{sys.argv[1]} {number}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        if number % 500 == 499:
            print(number + 1, failed, time.process_time(), flush=True)
    for what, count in counted.most_common():
        print(count, what)
    print("failed", failed)
