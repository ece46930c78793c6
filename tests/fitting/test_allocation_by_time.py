"""allocate_by_time and its plan: one budget for all times, set in the gates with no recompilation."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sla_compile
from sla_compile.common.blocks import num_critical
from sla_compile.fitting.sparsity_plan import PlanLevel, SparsityPlan
from tests.support.allocation import BLOCK, BUDGET, TOKENS, batches, prepared, uneven
from tests.support.models import OPTIONS, Model

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

BY_HEAD: dict[str, Any] = {"topk_by": "head", "max_topk": 0.9}


def sharp_and_flat() -> dict[float, list[tuple[Tensor]]]:
    """At time 100 videos, at 900 such that all tokens are nearly alike, where any block does."""
    return {900: [(x.mean(dim=1, keepdim=True) + 0.01 * x,) for (x,) in batches()], 100: batches()}


def refused(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def topks_of(model: nn.Module) -> dict[str, list[float]]:
    found = {path: gate.sparsity for path, gate in sla_compile.gates(model).items()}
    return {path: (buffer.view(-1, 2)[:, 0] / 1e6).tolist() for path, buffer in found.items() if buffer is not None}


def by_hand(model: nn.Module, first: float, second: float) -> SparsityPlan:
    heads = {path: gate.heads for path, gate in sla_compile.gates(model).items()}
    levels = [
        PlanLevel(time, {path: tuple(topk + 0.01 * head for head in range(n)) for path, n in heads.items()}, topk)
        for time, topk in ((100.0, first), (900.0, second))
    ]
    return SparsityPlan(BUDGET, tuple(levels))


@pytest.mark.parametrize("settings", [{"max_topk": 0.9}, BY_HEAD], ids=["site", "head"])
def test_the_time_that_needs_them_gets_more_blocks(settings: dict[str, Any]) -> None:
    model = prepared(uneven(2), **settings)
    plan = sla_compile.allocate_by_time(model, sharp_and_flat(), budget=BUDGET)
    assert all(own == BUDGET for topks in topks_of(model).values() for own in topks)  # nothing is set yet
    sharp, flat = plan.levels
    assert (sharp.time, flat.time) == (100.0, 900.0)
    assert sharp.mean_topk > 1.3 * BUDGET > BUDGET > 1.3 * flat.mean_topk
    assert 0.8 * BUDGET < plan.mean_topk <= BUDGET * (1 + 1e-9)
    blocks = TOKENS // BLOCK
    for level in plan.levels:
        topks = [topk if isinstance(topk, tuple) else (topk,) for topk in level.topks.values()]
        counts = [num_critical(own, blocks) for topk in topks for own in topk]
        assert level.critical == pytest.approx(sum(counts) / len(counts) / blocks)
    assert (sharp.critical or 0) + (flat.critical or 0) <= 2 * num_critical(BUDGET, blocks) / blocks + 1e-9
    assert sharp.output is not None
    assert sharp.output_uniform is not None
    assert sharp.output < 0.9 * sharp.output_uniform
    assert f"topk {plan.mean_topk:.3g} on average over 2 time(s), budget 0.2" in str(plan)


def test_a_time_counts_as_much_as_another_however_many_videos_it_has() -> None:
    model, data = prepared(uneven(2), **BY_HEAD), sharp_and_flat()
    plan = sla_compile.allocate_by_time(model, data, budget=BUDGET)
    again = sla_compile.allocate_by_time(model, {100: data[100], 900: data[900] * 3}, budget=BUDGET)
    assert [level.topks for level in again.levels] == [level.topks for level in plan.levels]
    weighted = sla_compile.allocate_by_time(model, data, budget=BUDGET, weights={900: 1e6})
    assert weighted.levels[1].mean_topk > plan.levels[1].mean_topk
    assert weighted.mean_topk <= BUDGET * (1 + 1e-9)


def test_levels_change_without_recompiling_and_the_model_computes_with_them() -> None:
    model = prepared(uneven(2), **BY_HEAD)
    (x,) = batches()[0]
    plan = by_hand(model, 0.6, 0.1)
    run: Any = torch.compile(model, backend="sla", options={"inner": "eager"})
    plan.set(run, 100)
    outputs, compiled = [run(x)], int(counters["stats"]["unique_graphs"])
    for time in (torch.tensor([700.0, 901.0]), 100.0, torch.tensor(2000, dtype=torch.int32)):
        plan.set(run, time)
        outputs.append(run(x))
    assert int(counters["stats"]["unique_graphs"]) == compiled
    torch.testing.assert_close(outputs[2], outputs[0])
    torch.testing.assert_close(outputs[3], outputs[1])
    assert (outputs[1] - outputs[0]).norm() > 1e-3 * outputs[0].norm()
    fixed = copy.deepcopy(model)
    for gate in sla_compile.gates(fixed).values():
        assert gate.sparsity is not None
        gate.sparsity[:, 0] = torch.tensor([round(1e6 * (0.1 + 0.01 * head)) for head in range(gate.heads)])
    torch.testing.assert_close(torch.compile(fixed, backend="sla", options={"inner": "eager"})(x), outputs[1])


def test_gradients_are_those_of_the_level() -> None:
    """Also where another level is set between two steps."""
    model = prepared(uneven(1), **BY_HEAD)
    (x,) = batches()[0]
    plan, run = by_hand(model, 0.6, 0.1), torch.compile(model, backend="sla", options={"inner": "aot_eager"})

    def gradients(time: float) -> list[Tensor]:
        model.zero_grad()
        plan.set(model, time)
        run(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    few, many, again = gradients(900), gradients(100), gradients(900)
    torch.testing.assert_close(few, again)
    assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(few, many, strict=True))


class Timed(Model):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def test_a_hook_that_reads_the_time_serves_calibrate_and_the_compiled_model() -> None:
    model = Timed(1)
    calls = [(x, torch.tensor([time])) for (x,), time in zip(batches(), (100, 900), strict=True)]
    sla_compile.prepare(model, calls[0], config={**OPTIONS, "topk": BUDGET, **BY_HEAD})
    plan, seen = SparsityPlan.from_json(by_hand(model, 0.6, 0.1).to_json()), set()
    plan.move_to(model)
    set_by_hand, compiled, graphs = [], [], []
    run: Any = torch.compile(model, backend="sla", options={"inner": "eager"}, fullgraph=True)
    for call in calls:
        plan.set(model, call[1])
        set_by_hand.append(run(*call))

    def follow(module: nn.Module, args: Any) -> None:
        plan.set(module, args[1])
        seen.update(topks_of(module)["blocks.0.attention.sla"])

    with model.register_forward_pre_hook(follow):
        sla_compile.calibrate(copy.deepcopy(model), calls)
    assert {0.1, 0.6} <= seen
    torch._dynamo.reset()
    with model.register_forward_pre_hook(lambda module, args: plan.set(module, args[1])):
        for call in (calls[0], *calls):
            compiled.append(run(*call))
            graphs.append(int(counters["stats"]["unique_graphs"]))
        assert len(set(graphs)) == 1  # all of it in the first call
        torch.testing.assert_close(compiled[1:], set_by_hand)


@pytest.mark.parametrize("by", ["plan", "share"])
def test_a_hook_that_sets_topks_stands_in_no_way(by: str) -> None:
    """What traces a copy of the model, which has no gates, or runs one as it was without them."""
    many = [0.88]
    model, (first, second) = Timed(1), [(x, torch.tensor([100])) for (x,) in batches()]
    sla_compile.prepare(model, first, config={**OPTIONS, "topk": BUDGET, **BY_HEAD})
    plans = {topk: by_hand(model, topk, 0.1) for topk in (0.88, 0.2)}

    def follow(module: nn.Module, args: Any) -> None:
        if by == "plan":
            plans[many[0]].set(module, args[1])
        else:
            sla_compile.set_sparsity(module, topk=many[0])

    model.register_forward_pre_hook(follow)
    (site,) = sla_compile.explain(model, first).sites
    assert site.rewritten
    sla_compile.prepare(model, first)
    assert set(topks_of(model)) == {"blocks.0.attention.sla"}
    near = sla_compile.compare(model, [first, second]).output.now
    many[0] = 0.2
    assert 0 < near < sla_compile.compare(model, [first, second]).output.now, "the copy with gates follows the hook"
    exported = sla_compile.export(model, first).module()
    wanted = torch.compile(model, backend="sla", options={"inner": "eager"})(*first)
    torch.testing.assert_close(exported(*first), wanted)
    sla_compile.detach(model)
    with pytest.raises(ValueError, match="no such gate" if by == "plan" else "has no SLA gates"):
        model(*first)


def test_round_trip() -> None:
    model = prepared(uneven(2), **BY_HEAD)
    plan = by_hand(model, 0.6, 0.1)
    again = SparsityPlan.from_json(plan.to_json())
    assert again == plan
    assert again.at(500).time == 100.0  # of two as near the lower
    for text in ("[]", "{", '{"budget": 0.1, "levels": [{"time": 1}]}'):
        with refused("SparsityPlan.from_json", "accepted: what to_json wrote"):
            SparsityPlan.from_json(text)


def test_what_a_plan_does_not_fit_changes_nothing() -> None:
    model = prepared(uneven(2), **BY_HEAD)
    plan, before = by_hand(model, 0.6, 0.1), topks_of(model)
    with refused("time: got nan; accepted: a finite number"):
        plan.set(model, math.nan)
    assert topks_of(model) == before
    with refused("blocks.1.attention.sla: the plan has topks for it, and the model has no such gate"):
        plan.set(prepared(uneven(1), **BY_HEAD), 100)
    with refused("blocks.0.attention.sla: its topk is a constant of the compiled graph"):
        plan.set(prepared(uneven(2)), 100)
    with refused("blocks.0.attention.sla: the plan has 2 topk(s), the gate 1"):
        plan.set(prepared(uneven(2), max_topk=0.9), 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, "topk: got 0.0"),
        ({"ladder": ()}, "ladder: got ()"),
        ({"weights": {500: 2.0}}, "weights: got 2.0 for 500"),
        ({"weights": {900: 0}}, "weights: got 0 for 900; accepted: numbers above 0"),
        ({"batches": lambda: {100: []}}, "batches: empty"),
        (
            {"batches": lambda: {100: batches(1), 900: [(batches(1)[0][0][:, :8],)]}},
            "time 900: Model: no attention with a gate was reached",
        ),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = uneven(1)
    config = {**OPTIONS, "topk": BUDGET, "max_topk": 0.9, "min_tokens": 64}
    data = arguments.pop("batches", sharp_and_flat)()
    with refused(message):
        sla_compile.allocate_by_time(model, data, config=config, **{"budget": BUDGET, **arguments})
    assert not sla_compile.gates(model)
    with refused("the topk of a gate is a constant of the compiled graph"):
        sla_compile.allocate_by_time(model, sharp_and_flat(), config=OPTIONS)
    with pytest.raises(TypeError, match="batches: got list; accepted: a mapping from times"):
        sla_compile.allocate_by_time(model, batches())  # type: ignore[arg-type]
