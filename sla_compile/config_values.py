"""Validators for the fields of ``SLAConfig``: what a field accepts, in words and as a test, and its stored form."""

from __future__ import annotations

import copy
import difflib
import json
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sla_compile.common.limits import BLOCK_SIZES, TEXT
from sla_compile.common.token_orders import ORDERS, TILES_OF, is_order, joined_order

__all__ = [
    "BLOCK_SIZE",
    "BOOLEAN",
    "GRID_SIZES",
    "OPTIONAL_INTEGER",
    "OPTIONAL_MAX_TOPK",
    "OPTIONAL_MIN_TOKENS",
    "TOKEN_ORDER",
    "TOKEN_RANGES",
    "FrozenMapping",
    "Validator",
    "mapping",
    "nearest_hint",
    "number",
    "one_of",
    "short",
    "string_list",
    "value_error",
]

# Models pickled while this module was called ``sla_compile.accepts`` look for FrozenMapping under that name, inside an
# SLAConfig, whose module imports this one. Remove when such pickles need not load any more.
sys.modules.setdefault("sla_compile.accepts", sys.modules[__name__])

# Similarity (difflib's ratio) from which a known name is taken for what the user meant; and how much of a name is
# compared, as the search takes longer with its square.
_CLEARLY_CLOSE, _CLOSE = 0.8, 0.6
_COMPARED = 100

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


class FrozenMapping(Mapping[str, Any]):
    """An immutable, hashable, ordered mapping of JSON values; values are copied in and out.

    Two FrozenMappings with the same items in another order differ; any other mapping is compared without its order.
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
class Validator:
    """What a field accepts, and the form in which an accepted value is stored."""

    accepted: str
    """In words, for error messages."""
    is_valid: Callable[[Any], bool]
    normalise: Callable[[Any], Any] = lambda value: value
    """Accepted value -> stored value."""
    choices: tuple[str, ...] = ()
    """The accepted strings, where there are only so many; an error names the nearest of them."""

    def check(self, name: str, value: Any) -> Any:
        """The stored form of ``value``; ValueError with ``name``, the value and what is accepted if it is refused."""
        if not self.is_valid(value):
            raise value_error(name, value, self.accepted, nearest_hint(value, self.choices))
        return self.normalise(value)


def number(accepted: str, in_range: Callable[[float], bool]) -> Validator:
    """Accepts an int or a float for which ``in_range`` holds; stored as a float."""
    # Adding 0.0 turns an int into a float and -0.0 into 0.0; bool and numpy scalars are other types.
    return Validator(accepted, lambda value: type(value) in (int, float) and in_range(value), lambda value: value + 0.0)


def one_of(*choices: str) -> Validator:
    """Accepts one of the strings ``choices``."""
    accepted = "one of " + ", ".join(map(repr, choices))
    return Validator(accepted, lambda value: type(value) is str and value in choices, choices=choices)


def string_list(accepted: str, at_least: int) -> Validator:
    """Accepts a list or tuple of ``at_least`` strings or more; stored as a tuple."""

    def is_valid(value: Any) -> bool:
        return type(value) in (tuple, list) and len(value) >= at_least and all(type(item) is str for item in value)

    return Validator(accepted, is_valid, tuple)


def mapping(accepted: str) -> Validator:
    """Accepts any mapping; what is in it is checked elsewhere."""
    return Validator(accepted, lambda value: isinstance(value, Mapping))


BOOLEAN = Validator("True or False", lambda value: type(value) is bool)
BLOCK_SIZE = Validator("a power of two from 16 to 256", lambda value: type(value) is int and value in BLOCK_SIZES)


def _are_orders(value: Any) -> bool:
    each = value.split(",") if type(value) is str else value
    return type(each) in (tuple, list) and len(each) > 0 and all(map(is_order, each))


TOKEN_ORDER = Validator(
    f"one of {', '.join(map(repr, ORDERS))}, or {TILES_OF!r} with at most N frames in a tile, N from 1 to 99; or a "
    f"list of these, one for each head",
    _are_orders,
    joined_order,
    choices=ORDERS,
)
OPTIONAL_INTEGER = Validator("None, or an integer", lambda value: value is None or type(value) is int)
OPTIONAL_MIN_TOKENS = Validator(
    "None, or an integer of at least 0", lambda value: value is None or (type(value) is int and value >= 0)
)
OPTIONAL_MAX_TOPK = Validator(
    "None, or a number from topk up to 1",
    lambda value: value is None or (type(value) in (int, float) and 0 < value <= 1),
    lambda value: None if value is None else value + 0.0,
)
"""Accepts None or a share; that it is at least ``topk`` is checked where topk is known."""


def _is_grid(value: Any) -> bool:
    return type(value) in (tuple, list) and len(value) in (2, 3) and all(type(n) is int and n >= 1 for n in value)


GRID_SIZES = Validator(
    "None, or the sizes (T, H, W) or (H, W) of a grid of tokens, integers of at least 1",
    lambda value: value is None or _is_grid(value),
    lambda value: None if value is None else tuple(value),
)


def _is_token_range(value: Any) -> bool:
    if type(value) not in (tuple, list) or len(value) != 2:
        return False
    start, stop = value
    if type(start) is not int or (type(stop) is not int and stop is not None):
        return False
    # One counted from the start and one from the end can be compared only where the number of tokens is known.
    return stop is None or (start < 0) != (stop < 0) or start < stop


TOKEN_RANGES = Validator(
    "a list or tuple of (start, stop) ranges of key tokens, start below stop; negative numbers count from the end, "
    "stop=None is the end; or 'text'",
    lambda value: value == TEXT or (type(value) in (tuple, list) and all(map(_is_token_range, value))),
    lambda value: value if value == TEXT else tuple((start, stop) for start, stop in value),
    choices=(TEXT,),
)
"""Accepts ranges of tokens as in slices, stored as a tuple of (start, stop) pairs; or "text"."""


def short(value: Any) -> str:
    """``repr(value)``, of bounded length."""
    return _SHORT.repr(value)


def value_error(name: str, value: Any, accepted: str, hint: str = "") -> ValueError:
    """The error to raise for ``value`` as the value of ``name``; ``hint`` follows what is accepted."""
    kind = type(value).__qualname__
    return ValueError(f"{name}: got {reprlib.repr(value)} ({kind}); accepted: {accepted}{hint}")


def nearest_hint(value: Any, *groups: tuple[str, ...], always: bool = False) -> str:
    """``"; nearest known: 'name'"``, or "" where no name is close or ``value`` is no string.

    A clearly close name wins over a close one, and among equals one of an earlier group. With ``always`` the nearest of
    all names is named however far it is.
    """
    if not isinstance(value, str):
        return ""
    attempts = [(group, cutoff) for cutoff in (_CLEARLY_CLOSE, _CLOSE) for group in groups]
    if always:
        attempts.append((sum(groups, ()), 0.0))
    for names, cutoff in attempts:
        if close := difflib.get_close_matches(value[:_COMPARED].lower(), names, 1, cutoff):
            return f"; nearest known: {close[0]!r}"
    return ""
