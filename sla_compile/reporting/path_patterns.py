"""Module paths that differ in numbers alone, as patterns: ``blocks.{0..29}.attn1``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

__all__ = ["grouped_paths", "path_patterns", "patterns_with_paths", "without_numbers"]


def grouped_paths(paths: Sequence[str]) -> list[str]:
    """Patterns that name exactly ``paths``, whatever these are."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        groups.setdefault(without_numbers(path), []).append(path)
    return [pattern for group in groups.values() for pattern in path_patterns(group)]


def path_patterns(paths: Sequence[str]) -> list[str]:
    """Patterns like ``blocks.{0..29}.attn1`` that name exactly ``paths``, which are alike but for numbers."""
    return [pattern for pattern, _ in patterns_with_paths(list(paths))]


def patterns_with_paths(paths: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each pattern with the paths it names. One, if every combination of the numbers in ``paths`` is there.

    Otherwise one or more for each value of the first number that varies.
    """
    split = [path.split(".") for path in paths]
    columns = [sorted(set(column), key=_numeric_order) for column in zip(*split, strict=True)]
    if prod(map(len, columns)) == len(paths):
        yield ".".join(_braces(column) for column in columns), paths
        return
    first = next(i for i, column in enumerate(columns) if len(column) > 1)
    for value in columns[first]:
        yield from patterns_with_paths(
            [path for path, parts in zip(paths, split, strict=True) if parts[first] == value]
        )


def _numeric_order(part: str) -> tuple[int, str]:
    """Sorting key: names, then numbers by value."""
    return (int(part), "") if part.isdigit() else (-1, part)


def _braces(values: list[str]) -> str:
    """``values``, ascending numbers unless there is but one, as one path component: ``{0..3,7}``."""
    if len(values) == 1:
        return values[0]
    runs: list[list[int]] = []
    for number in map(int, values):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return "{" + ",".join(texts) + "}"


def without_numbers(path: str) -> tuple[str, ...]:
    """The components of ``path``, "" for each number: equal for paths that are alike but for numbers."""
    return tuple("" if part.isdigit() else part for part in path.split("."))
