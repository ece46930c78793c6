"""The fits of benchmarks/gate_forms.py find what a form can express, and no form finds what it cannot."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gate_forms import FORMS, Sums, fitted

HEADS, TOKENS, DIM = 2, 400, 8


def sums_of(number: float, by_mass: float) -> Sums:
    """Sums of random branches and of O = (number + by_mass * mass) O^s + W (1 - mass) O^l + b."""
    generator = torch.Generator().manual_seed(0)
    o_s, o_l = (torch.randn(HEADS, TOKENS, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    mass = torch.rand(HEADS, TOKENS, 1, generator=generator, dtype=torch.float64)
    weight = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    rest = (1 - mass if by_mass else 1) * o_l @ weight.mT + 0.5
    dense = (number + by_mass * mass) * o_s + rest
    features = F.pad(torch.cat([o_s, mass * o_s, o_l, (1 - mass) * o_l], dim=-1), (0, 1), value=1.0)
    sums = Sums()
    sums.gram, sums.cross, sums.norm = features.mT @ features, features.mT @ dense, dense.square().sum().item()
    return sums


@pytest.mark.parametrize(("number", "by_mass", "places"), [(1.0, 0.0, (0, 4)), (0.5, 0.0, (4, 5)), (0.2, 0.7, (6, 7))])
def test_a_form_finds_what_it_expresses(number: float, by_mass: float, places: tuple[int, ...]) -> None:
    sums = sums_of(number, by_mass)
    errors = [sums.error(fitted(form, sums, ridge=1e-12)) for form in FORMS]
    assert all(errors[place] < 1e-5 for place in places), errors
    assert errors[2] > 0.1  # a number alone
    if number != 1.0:
        assert errors[0] > 0.1  # none
