"""Random programs: at topk=1 the rewritten program is the dense one, below it is the definition.

By hand, for longer: ``python -m tests.passes.test_random_programs SEED COUNT``.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

import sla_compile.ops  # noqa: F401  the ops of a rewritten graph
from sla_compile.common.limits import DTYPES
from sla_compile.common.token_orders import positions
from sla_compile.config import SLAConfig
from sla_compile.kernels import reference
from sla_compile.passes.decide import Keep, Requirements, Rewrite, decide
from sla_compile.passes.find_attention import Marker, find_attention
from sla_compile.passes.hoist_gathers import hoist_gathers
from sla_compile.passes.rewrite import replace_attention
from sla_compile.passes.token_order import Wanted
from tests.support.closeness import assert_close
from tests.support.random_attentions import program
from tests.support.random_programs import GRID, Core, Program

SECONDS, SEED = 12.0, "numbers"
BLOCKS = (16, 16)
SPARSE = {"topk": 0.4, "bottomk": 0.2, "block_q": BLOCKS[0], "block_k": BLOCKS[1]}
EXACT = {**SPARSE, "topk": 1.0, "bottomk": 0.0}


def run(module: fx.GraphModule, inputs: list[Tensor]) -> Any:
    return fx.Interpreter(module).run(*(x.clone() for x in inputs))


def rewritten(p: Program, module: fx.GraphModule, options: dict[str, Any], wanted: Requirements) -> list[Any]:
    """What was decided of each attention; those to be rewritten are."""
    decisions = []
    for ordinal, call in enumerate(find_attention(module)):
        decision = decide(call, wanted)
        decisions.append((call.node, decision))
        if isinstance(decision, Rewrite) and ordinal < 2:
            weight, bias = p.gates[ordinal]
            marker = Marker(weight, module, (), weight, bias, None, None, ordinal, "", False)
            replace_attention(call, decision, marker, SLAConfig(**options).compiled_options())
    hoist_gathers(module)
    module.graph.lint()
    return decisions


def defined(p: Program, core: Core, decision: Rewrite, gate: tuple[fx.Node, fx.Node]) -> fx.Node:
    """A node of ``p`` that gives the definition of ``core``, laid out as its result."""
    queries, keys = decision.order.queries, decision.order.keys

    def function(dense: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, mask: Any) -> Tensor:
        rows = torch.tensor(positions(queries, q.shape[2]) if queries else range(q.shape[2]))
        columns = torch.tensor(positions(keys, k.shape[2]) if keys else range(k.shape[2]))
        mask = None if mask is None else mask[:, columns]
        told = {"key_mask": mask, "scale": core.scale, "causal": core.causal, **SPARSE}
        out = reference.sparse_linear_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], weight, bias, **told)
        return torch.empty_like(dense).copy_(core.place(out[:, :, rows.argsort()]))

    return p.call(function, core.result, core.queries, core.keys, core.values, *gate, core.key_mask)


def check(seed: str) -> str:
    """Try the program of ``seed``; in one word, what was tried."""
    draw = random.Random(seed)
    writes, per_head, order = draw.choice((0.0, 0.04, 0.12)), draw.random() < 0.3, draw.choice(("raster", "tiles"))
    wanted = Requirements(0, DTYPES, per_head=per_head, order=Wanted(order, GRID, None, BLOCKS))
    try:
        p, module = program(seed, writes, per_head)
    except (RuntimeError, IndexError) as error:  # no program: a view or write that PyTorch refuses
        return f"no program: {str(error)[:60]}"
    dense = run(module, p.inputs)
    if not all(bool(torch.isfinite(out).all()) for out in dense):
        return "not finite"
    untrained = [x.zero_() if i >= len(p.inputs) - 4 else x for i, x in enumerate(map(torch.clone, p.inputs))]
    decisions = rewritten(p, module, EXACT, wanted)
    count = sum(isinstance(decision, Rewrite) for _, decision in decisions)
    compare(module, untrained, dense)
    if not count:
        return "kept: " + (str(decisions[0][1].reason) if decisions else "not found")
    if len(decisions) != len(p.cores) or not all(core.defined for core in p.cores):
        return "rewritten"
    same_per_head = all(
        isinstance(decision, Keep) or not per_head or decision.shape is not None for _, decision in decisions
    )
    assert same_per_head

    def substitute(p: Program, index: int, core: Core) -> fx.Node | None:
        decision = decisions[index][1]
        return defined(p, core, decision, p.gates[index]) if isinstance(decision, Rewrite) else None

    other, expected = program(seed, writes, per_head, substitute)
    wanted_outputs = run(expected, other.inputs)
    p, module = program(seed, writes, per_head)
    rewritten(p, module, SPARSE, wanted)
    compare(module, p.inputs, wanted_outputs)
    return "rewritten and defined"


def compare(module: fx.GraphModule, inputs: list[Tensor], expected: Any) -> None:
    for i, (actual, dense) in enumerate(zip(run(module, inputs), expected, strict=True)):
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
