"""Fixtures of the tests of launches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sla_compile.kernels.triton import launches
from sla_compile.kernels.triton.launches import VARIABLE


@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file is named, and none was read before."""
    caches = (launches.from_environment, launches._capability)
    monkeypatch.delenv(VARIABLE, raising=False)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the environment variable says that the launches are."""
    path = tmp_path / "launches.json"
    monkeypatch.setenv(VARIABLE, str(path))
    return path
