"""How much of an attention can be skipped at all, against ``min_tokens``; and the key tokens that never are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

__all__ = ["SkippablePairs", "UnknownRange", "default_min_tokens", "forced_tokens", "token_ranges"]

# From the measured crossovers (benchmarks/RESULTS.md): on an H100 SLA is the faster one from 3072 tokens in a CUDA
# graph; where launches wait for the host, as in a model without one, it was slower at 4352 tokens and faster at 6144.
# What is on meta is prepared for another device, a GPU as a rule.
_DEFAULT_MIN_TOKENS = {"cpu": 768, "cuda": 6144, "meta": 6144}


def default_min_tokens(device: str) -> int:
    """``min_tokens`` on a type of ``device``, where the settings name none."""
    return _DEFAULT_MIN_TOKENS.get(device, max(_DEFAULT_MIN_TOKENS.values()))


class UnknownRange(ValueError):
    """A range of key tokens that has no place among the keys of a site; its text says why."""


END = 2**31 - 1
"""A stop that lies beyond the last key of any site."""


def token_ranges(ranges: Sequence[tuple[int, int | None]], keys: int | torch.SymInt) -> tuple[int, ...]:
    """``ranges`` as start, stop, start, stop, ... as the op takes them.

    They lie in 0 to ``keys`` and grow where that is a number, and follow the rules of slices where it is symbolic.
    Raises UnknownRange where how many tokens a range has depends on a symbolic number of keys.
    """
    if not isinstance(keys, int):
        for start, stop in ranges:
            if (start < 0) != (stop is None or stop < 0):
                raise UnknownRange(f"({start}, {stop}) of {keys} keys")
        return tuple(bound for start, stop in ranges for bound in (start, END if stop is None else stop))
    merged: list[int] = []
    for first, last in sorted(slice(start, stop).indices(keys)[:2] for start, stop in ranges):
        if first < last:
            if merged and first <= merged[-1]:
                merged[-1] = max(last, merged[-1])
            else:
                merged += [first, last]
    return tuple(merged)


def forced_tokens(ranges: Sequence[int]) -> int:
    """How many tokens ``token_ranges`` has at most."""
    pairs = zip(ranges[::2], ranges[1::2], strict=True)
    return sum((0 if start < 0 and stop == END else stop) - start for start, stop in pairs)


@dataclass(frozen=True)
class SkippablePairs:
    """Pairs of tokens that an attention may skip, against those of plain self-attention over ``min_tokens`` tokens."""

    tokens: Any
    keys: Any
    """None where they are as many as the queries."""
    causal: bool
    forced: int
    """Key tokens that are critical in every row."""
    min_tokens: int
    default_on: str = ""
    """The type of the device whose default ``min_tokens`` is; empty where the settings name it."""

    @property
    def least(self) -> int:
        """The fewest tokens of self-attention that are enough, exactly; ``min_tokens`` where it is plain."""
        pairs = self.min_tokens**2 * (2 if self.causal else 1)  # causal attention has half the pairs
        root = math.isqrt(self.forced**2 + 4 * pairs)
        least = (self.forced + root) // 2
        return least if least * (least - self.forced) >= pairs else least + 1

    @property
    def enough(self) -> Any:
        """The condition, as a bool or a SymBool that no guard is made of yet."""
        if self.keys is None:
            return self.tokens >= self.least
        return self.tokens * (self.keys - self.forced) >= self.min_tokens**2

    @property
    def known_short(self) -> bool:
        """Whether it is too short at any size that the graph can have."""
        enough = self.enough
        return isinstance(enough, bool) and not enough

    @property
    def known_late(self) -> bool:
        """Whether only a run tells if there is enough: the count is data, as that of ``nonzero`` is."""
        enough = self.enough
        if isinstance(enough, bool):
            return False
        short = torch.sym_not(enough)  # type: ignore[no-untyped-call]
        if statically_known_true(enough) or statically_known_true(short):
            return False
        return bool(free_unbacked_symbols(enough))

    def condition(self, enough: bool) -> str | None:
        """The guard that asking for ``enough`` makes; None where the sizes are fixed or nothing is asked."""
        if isinstance(self.enough, bool) or self.min_tokens <= 1:
            return None
        relation = ">=" if enough else "<"
        if self.keys is None:
            return f"{self.tokens} {relation} {self.least}"
        keys = f"({self.keys} - {self.forced})" if self.forced else f"{self.keys}"
        return f"{self.tokens}*{keys} {relation} {self.min_tokens**2}"

    @property
    def value(self) -> str:
        """What there is, in words."""
        plain = f"{self.tokens} tokens" if self.keys is None else f"{self.tokens} queries, {self.keys} keys"
        forced = f", {self.forced} keys always critical" if self.forced else ""
        return f"{plain}{', causal' if self.causal else ''}{forced}"

    @property
    def accepted(self) -> str:
        """What would be enough, in words."""
        if self.keys is not None:
            enough = f"queries x keys of at least min_tokens={self.min_tokens} squared"
        elif self.least == self.min_tokens:
            enough = f"at least min_tokens={self.min_tokens}"
        else:
            enough = f"at least {self.least} tokens, the work of min_tokens={self.min_tokens}"
        return enough + (f", the default on {self.default_on}" if self.default_on else "")
