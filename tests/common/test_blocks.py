"""How many blocks of keys are critical and negligible: exact at every share, and never none critical."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import sympy

from sla_compile.common.blocks import exact_fraction, forced_blocks, num_blocks, num_critical, num_negligible


@pytest.mark.parametrize("blocks", [1, 7, 20, 100, 1182])
def test_counts_are_floors_of_the_exact_product(blocks: int) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point, and 29 blocks here."""
    for percent in range(1, 101):
        critical = num_critical(percent / 100, blocks)
        assert critical == max(1, percent * blocks // 100)
        assert num_negligible(percent / 100, critical, blocks) == min(percent * blocks // 100, blocks - critical)


def test_a_share_is_the_fraction_that_is_written() -> None:
    assert exact_fraction(0.29) == Fraction(29, 100)
    assert exact_fraction(1.0) == 1


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32760])
def test_the_last_block_may_be_short(tokens: int) -> None:
    assert num_blocks(tokens, 16) == math.ceil(tokens / 16)


def test_symbolic_counts_agree_with_those_of_numbers() -> None:
    tokens = sympy.Symbol("N", integer=True, positive=True)
    blocks = num_blocks(tokens, 64)
    critical = num_critical(0.05, blocks)
    negligible = num_negligible(0.1, critical, blocks)
    for number in (1, 64, 1000, 75600):
        counted = num_blocks(number, 64)
        expected = num_critical(0.05, counted)
        assert blocks.subs(tokens, number) == counted
        assert critical.subs(tokens, number) == expected
        assert negligible.subs(tokens, number) == num_negligible(0.1, expected, counted)


def test_forced_blocks_hold_every_token_of_a_range() -> None:
    assert forced_blocks((), 100, 16) == []
    assert forced_blocks([0, 17, 90, 100], 100, 16) == [(0, 2), (5, 7)]
