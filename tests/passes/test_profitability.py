"""How many tokens are enough, and ranges of keys: pure arithmetic, without a graph."""

from __future__ import annotations

import pytest

from sla_compile.passes.profitability import SkippablePairs, default_min_tokens, token_ranges


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("forced", [0, 1, 7, 500])
@pytest.mark.parametrize("min_tokens", [0, 1, 2, 63, 64, 4096])
def test_least_is_the_first_length_with_enough_pairs(min_tokens: int, forced: int, causal: bool) -> None:
    least = SkippablePairs(1, None, causal, forced, min_tokens).least
    wanted = min_tokens**2 * (2 if causal else 1)
    assert least * (least - forced) >= wanted
    assert least <= forced or (least - 1) * (least - 1 - forced) < wanted


def test_default_min_tokens() -> None:
    assert [default_min_tokens(device) for device in ("cpu", "cuda", "meta", "another")] == [768, 6144, 6144, 6144]
    accepted = SkippablePairs(767, 20, False, 0, 768, "cpu").accepted
    assert accepted == "queries x keys of at least min_tokens=768 squared, the default on cpu"


def test_ranges_are_cut_merged_and_counted_from_the_end() -> None:
    assert token_ranges(((-16, None), (0, 10), (5, 20)), 100) == (0, 20, 84, 100)
    assert token_ranges(((90, 1000), (200, 300), (-300, 4)), 100) == (0, 4, 90, 100)
    assert token_ranges(((10, -10), (-10, 95)), 100) == (10, 95)
    assert token_ranges((), 100) == ()
