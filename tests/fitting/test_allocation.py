"""allocate: the topk of each attention from data; measured against the definition."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import sla_compile
from sla_compile.common.blocks import num_critical
from sla_compile.fitting.allocation import _set_topks
from sla_compile.fitting.sensitivity import SiteSensitivity
from sla_compile.fitting.water_fill import water_fill
from tests.support.allocation import BLOCK, BUDGET, TOKENS, batches, errors, prepared, topks, uneven
from tests.support.models import (
    MARGINAL,
    OPTIONS,
    WIDTH,
    CalledTwice,
    Model,
    SomeBlocks,
    TwoAttentions,
    assert_follows_definition,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

DISTILL = partial(sla_compile.distill, steps=1)
EAGER: dict[str, Any] = {"inner": "eager"}


def refused(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


@pytest.mark.parametrize("at_run_time", [False, True], ids=["constants", "run time"])
def test_less_error_at_the_same_total(at_run_time: bool) -> None:
    model = prepared(uneven(), **({"max_topk": 1.0} if at_run_time else {}))
    data = batches()
    uniform = errors(model, data, dict.fromkeys(sla_compile.gates(model), BUDGET))
    report = sla_compile.allocate(model, iter(data), budget=BUDGET, objective="attention")
    given = topks(model)
    after = errors(model, data, given)

    blocks = TOKENS // BLOCK
    assert sum(num_critical(topk, blocks) for topk in given.values()) <= 4 * num_critical(BUDGET, blocks)
    assert report.critical <= report.critical_uniform == pytest.approx(BUDGET)
    assert 0.9 * BUDGET < report.mean_topk <= BUDGET + 1e-12
    assert sum(e**2 for e in after.values()) < 0.8 * sum(e**2 for e in uniform.values())
    assert given["blocks.0.attention.sla"] < BUDGET < given["blocks.1.attention.sla"]
    assert [site.path for site in report.sites] == list(sla_compile.gates(model))
    for site in report.sites:
        assert site.topk == given[site.path]
        assert site.uniform == site.before == pytest.approx(uniform[site.path], rel=1e-9)
        assert site.after == pytest.approx(after[site.path], rel=1e-9)
        assert (site.work, site.calls) == (0.25, 2)
    assert report.mean("after") == pytest.approx(math.sqrt(sum(e**2 for e in after.values()) / 4))

    with torch.no_grad():
        for parameter in sla_compile.gate_parameters(model):
            parameter.normal_(std=0.5)
    run = torch.compile(model, backend="sla", options=EAGER)
    assert_follows_definition(run, model, data[0][0])


def test_larger_attentions_cost_more() -> None:
    """Work counts, not the number of attentions: over a quarter of the tokens, a raise costs a sixteenth."""

    class Pooled(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            short = self.blocks[1](x[:, : TOKENS // 2])
            return torch.cat([short, x[:, TOKENS // 2 :]], dim=1)

    model = Pooled(2)
    sla_compile.prepare(model, batches()[0], config={**OPTIONS, "topk": BUDGET, "bottomk": 0.0})
    report = sla_compile.allocate(model, batches(), budget=BUDGET)
    assert [site.work for site in report.sites] == pytest.approx([0.8, 0.2])
    blocks = [TOKENS // BLOCK, TOKENS // BLOCK // 2]
    shares = [num_critical(site.topk, n) / n for site, n in zip(report.sites, blocks, strict=True)]
    assert report.critical == pytest.approx(0.8 * shares[0] + 0.2 * shares[1])
    assert report.critical <= report.critical_uniform


def test_unprepared_model_and_overrides() -> None:
    """An override of the user's stays, the topk of each module comes after it."""
    settings = {**OPTIONS, "overrides": {"blocks.0.attention": {"linear": "none"}, "blocks.*": {"topk": 0.25}}}
    model, data = uneven(2), batches()
    report = sla_compile.allocate(model, data, budget=BUDGET, config=settings)
    gates = sla_compile.gates(model)
    assert [gate.config.linear for gate in gates.values()] == ["none", "taylor"]
    assert [gate.config.topk for gate in gates.values()] == [site.topk for site in report.sites]
    assert [site.topk_before for site in report.sites] == [0.25, 0.25]
    config = next(iter(gates.values())).model_config
    assert [config.for_site(path.removesuffix(".sla")).topk for path in gates] == list(topks(model).values())
    again = sla_compile.allocate(model, data, budget=BUDGET)
    assert [site.topk for site in again.sites] == [site.topk for site in report.sites]


def test_two_attentions_of_one_module() -> None:
    """One override is for both; buffers are for each."""
    data = [(x[0, :, :WIDTH],) for x in [b[0][None] for b in batches()]]
    constants = prepared(TwoAttentions())
    report = sla_compile.allocate(constants, data, budget=BUDGET)
    assert len({site.topk for site in report.sites}) == 1
    at_run_time = prepared(TwoAttentions(), max_topk=1.0)
    sla_compile.allocate(at_run_time, data, budget=BUDGET)
    assert len(topks(at_run_time)) == 2


def test_a_module_called_twice() -> None:
    model = prepared(CalledTwice())
    report = sla_compile.allocate(model, batches(), budget=BUDGET)
    assert [site.calls for site in report.sites] == [4]


def test_even_layers_are_left_even() -> None:
    model = prepared(uneven(1))
    report = sla_compile.allocate(model, batches(), budget=BUDGET)
    assert topks(model) == {"blocks.0.attention.sla": BUDGET}
    assert report.mean("after") == report.mean("uniform")


def test_a_head_with_as_many_blocks_as_the_budget_gets_the_budget() -> None:
    """And not a lesser rung, which would be fewer blocks than asked for where the model is used with more tokens."""
    model = prepared(uneven(2), topk_by="head", max_topk=0.5)
    sla_compile.allocate(model, batches(), budget=1.5 * BLOCK / TOKENS)
    for gate in sla_compile.gates(model).values():
        assert gate.sparsity is not None
        assert gate.sparsity[..., 0].tolist() == [75_000] * gate.heads


def test_never_worse_than_the_budget_spread_evenly() -> None:
    """The best raise first can leave room that no other fits: 2.5 + 10 then, against 5.1 + 5.1."""

    def site(path: str, rungs: tuple[float, ...], cost: list[float], loss: list[float]) -> Any:
        return SiteSensitivity(
            path, 0.2, 0.0, rungs, torch.tensor(loss)[:, None], BLOCK, dense_square=1.0, critical=cost
        )

    tempting = site("a.sla", (0.1, 0.2, 0.25), [1.0, 2.0, 2.5], [10.0, 5.1, 2.5])
    plain = site("b.sla", (0.1, 0.2), [1.0, 2.0], [10.0, 5.1])
    assert water_fill([[tempting, plain]], 0.2, True) == [{"a.sla": 0.2, "b.sla": 0.2}]
    roomy = site("b.sla", (0.1, 0.2), [0.5, 1.5], [10.0, 5.1])
    assert water_fill([[tempting, roomy]], 0.2, True) == [{"a.sla": 0.2, "b.sla": 0.2}]
    worthless = site("b.sla", (0.1, 0.2), [1.0, 2.0], [10.0, 9.9])
    assert water_fill([[tempting, worthless]], 0.2, True) == [{"a.sla": 0.25, "b.sla": 0.1}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, "topk: got 0.0 (float); accepted: a number above 0 and up to 1"),
        ({"budget": 0.5}, "blocks.0.attention.sla: got budget=0.5; accepted: up to 0.4, for its max_topk and bottomk"),
        ({"ladder": ()}, "ladder: got (); accepted: at least one finite number above 0"),
        ({"ladder": (1.0, -1.0)}, "ladder: got (1.0, -1.0)"),
        ({"max_batches": 0}, "max_batches: got 0"),
        ({"objective": "loss"}, "objective: got 'loss'; accepted: one of ('output', 'attention')"),
        ({"batches": []}, "batches: empty"),
        ({"batches": [(math.nan * torch.ones(1, TOKENS, WIDTH).double(),)]}, "is not finite on these batches"),
    ],
)
def test_what_is_refused_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    model = prepared(uneven(), max_topk=0.4)
    data = arguments.pop("batches", batches())
    with refused(message):
        sla_compile.allocate(model, data, **{"budget": BUDGET, **arguments})
    assert set(topks(model).values()) == {BUDGET}


def test_an_exception_leaves_an_unprepared_model_without_gates() -> None:
    model = uneven()
    with pytest.raises(TypeError, match="batches: item 1 is a Tensor"):
        sla_compile.allocate(model, [*batches(1), batches(1)[0][0]], budget=BUDGET, config=OPTIONS)
    assert not sla_compile.gates(model)
    with refused("no attention with a gate was reached"):
        sla_compile.allocate(prepared(uneven()), [(torch.randn(1, 8, WIDTH),)], budget=0.1, config={"min_tokens": 64})


@pytest.mark.parametrize("settings", [{}, {"max_topk": 1.0}], ids=["constants", "run time"])
def test_a_first_batch_that_does_not_reach_all(settings: dict[str, Any]) -> None:
    """Refused where the model is prepared with it again: the other gates would be gone."""
    model = prepared(SomeBlocks(2), **settings)
    data = [(batches()[0][0], 1), batches()[0]]
    if settings:
        report = sla_compile.allocate(model, data[:1], budget=BUDGET)
        assert report.unreached == ("blocks.1.attention.sla",)
    else:
        with refused("blocks.1.attention.sla: its attention is not reached by the first batch"):
            sla_compile.allocate(model, data, budget=BUDGET)
        with refused("SomeBlocks: no attention with a gate was reached"):
            sla_compile.allocate(model, [(batches()[0][0], 0), batches()[0]], budget=BUDGET)
    assert topks(model)["blocks.1.attention.sla"] == BUDGET


@pytest.mark.parametrize("fit", [sla_compile.allocate, sla_compile.allocate_by_time, sla_compile.calibrate, DISTILL])
def test_other_settings_with_a_first_batch_that_does_not_reach_all(fit: Any) -> None:
    """A gate that was never trained would go with no word, and not come back after an exception."""
    model = prepared(SomeBlocks(2), max_topk=1.0)
    data: Any = [(batches()[0][0], 1), batches()[0]]
    config = {**MARGINAL, "topk": 0.3, "max_topk": 1.0}
    with refused("blocks.1.attention.sla: its attention is not reached by the first batch"):
        fit(model, {0.5: data} if fit is sla_compile.allocate_by_time else data, config=config)
    assert set(topks(model).values()) == {BUDGET}
    assert len(topks(model)) == 2


def test_one_topk_goes_to_all_heads() -> None:
    """What an allocation that finds nothing better than the budget everywhere sets."""
    model = prepared(uneven(2), topk_by="head", max_topk=0.5)
    paths = list(sla_compile.gates(model))
    heads = sla_compile.gates(model)[paths[0]].heads
    own = tuple(0.1 + 0.1 * head / heads for head in range(heads))
    _set_topks(model, ((batches()[0][0],), {}), {paths[0]: BUDGET, paths[1]: own})
    found = [gate.sparsity[..., 0] for gate in sla_compile.gates(model).values() if gate.sparsity is not None]
    assert found[0].tolist() == [round(1e6 * BUDGET)] * heads
    assert found[1].tolist() == [round(1e6 * topk) for topk in own]


def test_an_attention_that_loses_nothing_gets_a_tenth_of_the_budget() -> None:
    model = uneven(2)
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[2 * WIDTH :] = 0.0
        model.blocks[0].attention.qkv.bias[2 * WIDTH :] = 0.0
    model = prepared(model, max_topk=1.0)
    sla_compile.allocate(model, batches(), budget=BUDGET, objective="attention")
    given = topks(model)
    assert given["blocks.0.attention.sla"] == pytest.approx(0.1 * BUDGET)
    assert given["blocks.1.attention.sla"] > BUDGET
