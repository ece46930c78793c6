"""Which numbers the attentions of an owner have, from what its gates and earlier compiles say."""

from __future__ import annotations

import torch
from torch import nn

import sla_compile
from sla_compile.compiler.site_numbers import known_sites, number_calls, spare_numbers
from sla_compile.gate_attachment import attach_gate
from sla_compile.gate_settings import GateSpec, NumberedSite
from sla_compile.memory import remember_site

A, B, C = "forward+1", "forward+2", "forward+3"


def owner(*sites: str, traced: bool = True) -> nn.Module:
    """An owner with a gate for each of ``sites``, those of before without one."""
    module = nn.Linear(2, 2)
    for ordinal, site in enumerate(sites):
        spec = GateSpec(
            heads=2, head_dim=2, config=sla_compile.SLAConfig(), ordinal=ordinal, call_site=site, traced=traced
        )
        attach_gate(module, spec, device="cpu", dtype=torch.float32)
    return module


def numbers(module: nn.Module, *sites: str, resumed: bool = False) -> list[int]:
    return number_calls(module, [(0, site) for site in sites], resumed).ordinals


def test_in_the_order_in_which_they_are_met() -> None:
    module = owner()
    assert numbers(module, A, B, A, C) == [0, 1, 0, 2]
    for ordinal, site in enumerate((A, B)):
        remember_site(module, ordinal, NumberedSite(site, True))
    assert numbers(module, C, B) == [2, 1]
    assert numbers(owner(B), A, B, C) == [1, 0, 2]


def test_a_gate_says_more_than_memory() -> None:
    module = owner(B)
    remember_site(module, 0, NumberedSite(A, True))
    remember_site(module, 1, NumberedSite(B, True))
    assert known_sites(module) == {0: (B, True), 1: (B, True)}
    assert numbers(module, A, B) == [2, 0]


def test_a_gate_whose_call_site_was_traced_is_for_no_other() -> None:
    assert numbers(owner(A), B) == [1]
    assert numbers(owner(A, traced=False), B) == [0]
    assert numbers(owner(A, B, traced=False), B, C) == [1, 0]


def test_what_is_not_certain_is_said() -> None:
    def doubt(gates: tuple[str, ...], *sites: str) -> str:
        return number_calls(owner(*gates, traced=False), [(0, site) for site in sites]).doubt

    assert not doubt((A, B), A, B)
    assert not doubt((A,), B)
    assert not doubt((A, B), A)
    assert f"{C} (was {B})" in doubt((A, B), A, C)
    assert f"{B} (was {A})" in doubt((A,), B, C)


def test_gates_of_before_are_counted() -> None:
    assert numbers(owner("", ""), A, B) == [0, 1]
    numbering = number_calls(owner("", "", "", ""), [(0, site) for site in (A, A, B)])
    assert numbering.ordinals == [0, 0, 2]
    assert numbering.spare == {1: A}
    twice = number_calls(owner("", ""), [(call, site) for call in (0, 1) for site in (A, B)])
    assert (twice.ordinals, twice.spare) == ([0, 1, 0, 1], {})


def test_gates_of_before_after_a_graph_break() -> None:
    module = owner("", "", "")
    for ordinal in (0, 1):
        remember_site(module, ordinal, NumberedSite(A, True))
        module._modules.pop(f"sla_{ordinal}" if ordinal else "sla")
    assert spare_numbers(module) == [1]
    assert numbers(module, B, resumed=True) == [2]


def test_a_trace_without_columns_knows_its_attention() -> None:
    assert numbers(owner("forward+1:4", B), "forward+1", B) == [0, 1]
    assert numbers(owner(A, B), "forward+2:8", "forward+1:4") == [1, 0]
    assert numbers(owner("forward+1:4", "forward+1:8"), "forward+1") == [2]  # of two on a line, either


def test_a_stack_that_starts_elsewhere_is_known_by_its_inner_part() -> None:
    complete = "forward+1 > __call__+2 > attend+7"
    for place in (
        "attend+7",
        "__call__+2 > attend+7",
        "<lambda>+0 > attend+7",
        "new_forward+9 > __call__+2 > attend+7",
    ):
        assert numbers(owner(complete, B), place) == [0]
        assert numbers(owner(place, B), complete) == [0]
    assert numbers(owner(complete), "forward+5 > attend+7") == [1]  # another line of the same forward
    assert numbers(owner(complete), complete, "attend+7") == [0, 1]
    assert numbers(owner(complete, "forward+3 > __call__+2 > attend+7"), "attend+7") == [2]
