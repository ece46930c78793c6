"""Module paths that differ in numbers alone become one pattern."""

from __future__ import annotations

import pytest

from sla_compile.reporting.path_patterns import path_patterns


@pytest.mark.parametrize(
    ("paths", "patterns"),
    [
        (["blocks.0.a", "blocks.1.a", "blocks.2.a"], ["blocks.{0..2}.a"]),
        ([f"blocks.{i}.a" for i in range(12)], ["blocks.{0..11}.a"]),
        (["b.0", "b.1", "b.2", "b.5", "b.7"], ["b.{0..2,5,7}"]),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0", "s.1.b.1"], ["s.{0,1}.b.{0,1}"]),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0"], ["s.0.b.{0,1}", "s.1.b.0"]),
        (["only"], ["only"]),
        ([""], [""]),
    ],
)
def test_path_patterns(paths: list[str], patterns: list[str]) -> None:
    assert path_patterns(paths) == patterns
