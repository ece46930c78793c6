"""Which attention of a graph belongs to which module, and so to which gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sla_compile
from tests.support.compiled import EAGER, compiled, first_call
from tests.support.models import (
    MARGINAL,
    OPTIONS,
    Attention,
    BrokenAttention,
    BrokenAttentionWithProjection,
    CalledTwice,
    Doubled,
    Model,
    TwoAttentions,
    assert_follows_definition,
    random_input,
    randomize_gates,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_the_compiled_module_owns_the_attention(how: str) -> None:
    owners = [Attention() for _ in range(3)]
    x = random_input()
    for owner in owners:
        run = compiled(owner) if how == "torch.compile" else owner
        if how == "module.compile":
            owner.compile(backend="sla", options=EAGER)
        first_call(run, x)
        assert list(sla_compile.gates(owner)) == ["sla"]
        assert_follows_definition(run, owner, x)


def test_a_module_called_twice_has_one_gate() -> None:
    model, x = CalledTwice(), random_input()
    run = compiled(model)
    first_call(run, x)
    assert list(sla_compile.gates(model)) == ["attention.sla"]
    assert_follows_definition(run, model, x)


@pytest.mark.parametrize("root", [False, True])
def test_two_attentions_in_one_module_have_two_gates(root: bool) -> None:
    owner, x = TwoAttentions(), random_input()
    model = owner if root else nn.Sequential(owner)
    run = compiled(model)
    first_call(run, x)
    assert [path.rpartition(".")[2] for path in sla_compile.gates(model)] == ["sla", "sla_1"]
    assert_follows_definition(run, model, x)


def test_function_over_a_model() -> None:
    model, x = Model(), random_input()

    def function(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x)

    run = torch.compile(function, backend="sla", options=EAGER)
    run(model, x.requires_grad_())
    assert list(sla_compile.gates(model)) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    randomize_gates(model)
    assert_follows_definition(lambda x: run(model, x), model, x)


def test_closure_over_a_model() -> None:
    model, x = Model(), random_input()
    run = torch.compile(lambda x: model(x), backend="sla", options=EAGER)
    run(x.requires_grad_())
    randomize_gates(model)
    assert len(sla_compile.gates(model)) == 2
    assert_follows_definition(run, model, x)


def test_a_checkpoint_inside_the_owner_keeps_its_attention_dense() -> None:
    """The gate is bound where the owner starts, outside the region that holds the attention."""

    class PartlyCheckpointed(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.heads(x)
            y = checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False)
            return self.out(y.transpose(1, 2).flatten(2))

    model, x = Doubled(PartlyCheckpointed()), random_input()
    with pytest.warns(sla_compile.DenseAttentionWarning, match="its gate is bound outside the region"):
        assert torch.equal(compiled(model)(x), model(x))
    (site,) = sla_compile.report(model).sites
    assert not site.rewritten
    assert site.reason == "its gate is bound outside the region that holds the attention"


def test_graph_break_before_the_attention() -> None:
    model, x = Doubled(BrokenAttentionWithProjection()), random_input()
    run = compiled(model)
    first_call(run, x)
    assert list(sla_compile.gates(model)) == ["attention.sla"]
    assert_follows_definition(run, model, x)


def test_graph_break_that_cuts_the_attention_off_keeps_it_dense() -> None:
    model, x = Doubled(BrokenAttention()), random_input()
    dense = model(x)
    with pytest.warns(sla_compile.DenseAttentionWarning, match="graph break between the owner's start"):
        assert torch.equal(compiled(model)(x), dense)
    assert not sla_compile.gates(model)
    (site,) = sla_compile.report(model).sites
    assert (site.path, site.rewritten) == ("attention", False)
    assert site.reason == "graph break between the owner's start and its attention"


def test_a_gate_whose_marker_does_not_turn_up_is_taken_back() -> None:
    class Bare(nn.Module):  # the compiled module itself, with no child to mark its gate from
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.unflatten(-1, (2, 16)).transpose(1, 2)
            return F.scaled_dot_product_attention(x, x, x)

    model, x = Bare(), random_input()
    with pytest.warns(sla_compile.DenseAttentionWarning, match="the traced graph does not reach its gate"):
        assert torch.equal(compiled(model)(x), model(x))
    assert not sla_compile.gates(model)
    assert not model._forward_pre_hooks
    (site,) = sla_compile.report(model).sites
    assert site.reason == "the traced graph does not reach its gate"


def test_excluded_sites_of_a_prepared_model_stay_dense() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config={**OPTIONS, "exclude": ["blocks.0.*"]})
    randomize_gates(model)
    run = torch.compile(model, backend="sla", options={"inner": "eager"})
    assert_follows_definition(run, model, x)
    assert list(sla_compile.gates(model)) == ["blocks.1.attention.sla"]


def test_a_gate_of_another_attention_is_refused() -> None:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config=MARGINAL)
    sla_compile.gates(model)["blocks.1.attention.sla"].weight = nn.Parameter(torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.sla: has a gate of shape \(5, 5\), but"):
        compiled(model)(x)


def test_a_module_at_two_places_has_one_gate() -> None:
    model, x = Model(3), random_input()
    model.blocks[2] = model.blocks[0]
    run = compiled(model)
    first_call(run, x)
    assert list(sla_compile.gates(model)) == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    assert_follows_definition(run, model, x)
