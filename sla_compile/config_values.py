"""What a setting accepts: in words, and as a test; and the error that names the value where it does not fit."""

from __future__ import annotations

import copy
import difflib
import json
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RANGES", "Accepts", "FrozenMapping", "choice", "nearest", "patterns", "refusal", "share"]


class FrozenMapping(Mapping[str, Any]):
    """A hashable, ordered mapping of JSON values that nobody can change: values are copied in and out.

    Two of them are equal only in the same order; with any other mapping the order does not count.
    """

    __slots__ = ("_items", "_text")

    def __init__(self, items: Mapping[str, Any]) -> None:
        """Raises ValueError (from json) on NaN or infinity, TypeError on what JSON cannot hold."""
        self._text = json.dumps(dict(items), allow_nan=False)
        self._items = copy.deepcopy(dict(items))

    def __getitem__(self, key: str) -> Any:
        return copy.deepcopy(self._items[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenMapping):
            return self._text == other._text
        return isinstance(other, Mapping) and self._items == dict(other)

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class Accepts:
    """What a field accepts: in words, and as a test. ``normal`` gives a value its stored form."""

    text: str
    test: Callable[[Any], bool]
    normal: Callable[[Any], Any] = lambda value: value
    names: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        """The stored form of ``value``; ValueError with ``name``, the value and ``text`` if it is refused."""
        if not self.test(value):
            raise refusal(name, value, self.text, nearest(value, self.names))
        return self.normal(value)


def share(text: str, test: Callable[[float], bool]) -> Accepts:
    """A number for which ``test`` holds, stored as a float."""
    # Adding 0.0 turns an int into a float and -0.0 into 0.0; bool and numpy scalars are other types.
    return Accepts(text, lambda value: type(value) in (int, float) and test(value), lambda value: value + 0.0)


def choice(*names: str) -> Accepts:
    """One of ``names``."""
    text = "one of " + ", ".join(map(repr, names))
    return Accepts(text, lambda value: type(value) is str and value in names, names=names)


def patterns(text: str, least: int) -> Accepts:
    """At least ``least`` strings, stored as a tuple."""

    def test(value: Any) -> bool:
        return type(value) in (tuple, list) and len(value) >= least and all(type(p) is str for p in value)

    return Accepts(text, test, tuple)


def _is_range(value: Any) -> bool:
    if type(value) not in (tuple, list) or len(value) != 2:
        return False
    start, stop = value
    if type(start) is not int or (type(stop) is not int and stop is not None):
        return False
    # A start from the end and a stop from the start, or the reverse, can only be compared at a site.
    return stop is None or (start < 0) != (stop < 0) or start < stop


RANGES = Accepts(
    "a list or tuple of (start, stop) ranges of key tokens, start below stop; negative numbers count from the end, "
    "stop=None is the end",
    lambda value: type(value) in (tuple, list) and all(map(_is_range, value)),
    lambda value: tuple((start, stop) for start, stop in value),
)
"""Token ranges, stored as a tuple of pairs."""


def refusal(name: str, value: Any, accepted: str, hint: str = "") -> ValueError:
    """The error for ``value`` under ``name``; ``hint`` follows what is accepted."""
    kind = type(value).__qualname__
    return ValueError(f"{name}: got {reprlib.repr(value)} ({kind}); accepted: {accepted}{hint}")


def nearest(value: Any, *known: tuple[str, ...], always: bool = False) -> str:
    """``; nearest known: ...`` for a string; an earlier group's win, unless a later one has one clearly closer."""
    if not isinstance(value, str):
        return ""
    for names, cutoff in [(group, least) for least in (0.8, 0.6) for group in known] + [(sum(known, ()), 0.0)] * always:
        if close := difflib.get_close_matches(value.lower(), names, 1, cutoff):
            return f"; nearest known: {close[0]!r}"
    return ""
