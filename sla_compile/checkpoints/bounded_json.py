"""JSON out of a file that anybody may have written: of bounded size in every respect before anything looks at it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from sla_compile.config_values import short, value_error

__all__ = ["read_json"]

LONGEST_TEXT, DEEPEST, MOST_ITEMS, LONGEST_STRING, LARGEST_NUMBER = 2**22, 8, 10_000, 1000, 2**53


def read_json(name: str, text: str) -> Any:
    """What ``text`` holds; ValueError with ``name``, the place, the value and what is accepted where it is too much.

    Accepted: 4 MiB of text, 8 levels, 10,000 entries in each list or mapping, printable strings of 1000 characters,
    numbers up to 2^53.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{name}: {len(text)} characters; accepted: up to {LONGEST_TEXT}")
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"{name}: nested too deeply; accepted: up to {DEEPEST} levels") from error
    except ValueError as error:
        raise ValueError(f"{name}: no JSON that can be read: {error}") from error
    _check(name, data)
    return data


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _check(name: str, data: Any) -> None:
    left = [(name, data, 0)]  # no recursion: depth is one of the things to be checked
    while left:
        where, value, depth = left.pop()
        if isinstance(value, str):
            if len(value) > LONGEST_STRING or not value.isprintable():
                raise value_error(where, value, f"printable text of up to {LONGEST_STRING} characters")
        elif isinstance(value, int | float):
            if not abs(value) <= LARGEST_NUMBER:
                raise value_error(where, value, f"a number up to {LARGEST_NUMBER}")
        elif value is not None:
            if depth == DEEPEST:
                raise ValueError(f"{where}: nested too deeply; accepted: up to {DEEPEST} levels")
            if len(value) > MOST_ITEMS:
                raise ValueError(f"{where}: {len(value)} entries; accepted: up to {MOST_ITEMS}")
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            for key, entry in entries:
                if isinstance(key, str):
                    left.append((f"a key of {where}", key, 0))
                left.append((f"{where}[{short(key)}]", entry, depth + 1))
