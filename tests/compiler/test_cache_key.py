"""PyTorch's compile caches across processes: hit by an equal model, not by other settings or another version of us."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from sla_compile.compiler import cache_key
from tests.support import cache_process
from tests.support.paths import ROOT
from tests.support.processes import FRESH

SETTINGS: list[dict[str, Any]] = [
    *({"topk": 0.5}, {"bottomk": 0.4}, {"block_q": 32}, {"block_k": 32}, {"linear": "all"}, {"linear": "marginal"}),
    *({"linear": "marginal", **one} for one in ({"feature_map": "elu"}, {"gate": "per_head"}, {"sparse_scale": True})),
    {"always_critical": [[0, 20]]},
]


def process(caches: Path, *settings: dict[str, Any], package: Path | None = None) -> list[dict[str, Any]]:
    """What cache_process.py says of each of ``settings``; ``package`` holds another sla_compile to import."""
    said = caches / "said.json"
    said.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        if package:  # the process looks for modules where this one does
            patch.setattr(sys, "path", [str(package), *sys.path])
        worker = FRESH.Process(target=cache_process.main, args=(str(caches), [*settings], str(said)))
        worker.start()
    worker.join(600)
    assert worker.exitcode == 0
    result: list[dict[str, Any]] = json.loads(said.read_text())
    return result


ORDER: dict[str, Any] = {"reorder": "tiles", "grid": [4, 5, 5]}
OTHER_ORDERS: list[dict[str, Any]] = [{**ORDER, "reorder": "hilbert"}, {**ORDER, "grid": [2, 10, 5]}]


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder of caches, and what the process said that filled it: with no settings, and with an order of tokens."""
    folder = tmp_path_factory.mktemp("caches")
    return folder, process(folder, {}, ORDER)


@pytest.fixture(scope="module")
def second(cold: tuple[Path, Any]) -> list[dict[str, Any]]:
    """What a second process said on the same caches: of ORDER and OTHER_ORDERS, no settings, and SETTINGS."""
    return process(cold[0], ORDER, *OTHER_ORDERS, {}, *SETTINGS)


def test_a_second_process_hits_the_caches_unless_settings_differ(
    cold: tuple[Path, list[dict[str, Any]]], second: list[dict[str, Any]]
) -> None:
    first = cold[1][0]
    warm, *others = second[-1 - len(SETTINGS) :]
    assert (first["hit"], first["miss"], first["bypass"], first["graph bypass"]) == (0, 1, 0, 0)
    assert (warm["hit"], warm["miss"], warm["bypass"]) == (1, 0, 0)
    assert (warm["graph hit"], warm["graph miss"], warm["graph bypass"]) == (2, 0, 0), "forward and backward"
    assert max(first["error"], warm["error"]) < 1e-12
    assert first["seconds"] > 3 * warm["seconds"], (first["seconds"], warm["seconds"])
    for settings, other in zip(SETTINGS, others, strict=True):
        assert (other["hit"], other["miss"], other["bypass"]) == (0, 1, 0), settings
        if "always_critical" not in settings:  # which the definition does not know
            assert other["error"] < 1e-12, settings
        assert other["norm of dq"] != warm["norm of dq"], settings


def test_an_order_of_tokens_is_cached_and_another_one_is_not_taken_for_it(
    cold: tuple[Path, list[dict[str, Any]]], second: list[dict[str, Any]]
) -> None:
    none, order = cold[1]
    assert (order["hit"], order["miss"], order["bypass"]) == (0, 1, 0)
    assert order["norm of dq"] != none["norm of dq"]
    same, kind, grid = second[: 1 + len(OTHER_ORDERS)]
    assert (same["hit"], same["miss"], same["graph hit"], same["graph miss"]) == (1, 0, 2, 0)
    for other in (kind, grid):
        assert (other["hit"], other["miss"]) == (0, 1)
    assert len({run["norm of dq"] for run in (same, kind, grid)}) == 3


def test_another_version_of_the_package_gets_no_stale_graph(cold: tuple[Path, Any], tmp_path: Path) -> None:
    """A copy whose backward gives twice the gradient: a cached graph has the old backward in it."""
    for room in ("passes", "kernels"):
        shutil.copytree(ROOT / room, tmp_path / "sla_compile" / room)
    shutil.copytree(ROOT / "sla_compile", tmp_path / "sla_compile", dirs_exist_ok=True)
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    ops = tmp_path / "sla_compile" / "ops" / "attention.py"
    text = ops.read_text()
    edited = text.replace("sla.backward.default(grad_out,", "sla.backward.default(2 * grad_out,")
    assert edited != text
    ops.write_text(edited)
    (result,) = process(cold[0], {}, package=tmp_path)
    assert (result["hit"], result["miss"], result["bypass"]) == (0, 1, 0)
    assert result["error"] > 0.5, "the copy's own backward ran"


def test_the_key_is_of_version_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.compiler.config as config

    seen = []
    read = cache_key.in_cache_key(lambda: seen.append(config.cache_key_tag))
    read()
    with config.patch(cache_key_tag="mine"):  # type: ignore[attr-defined]
        read()
        cache_key.in_cache_key(read)()
    assert seen == [cache_key.package_key(), *[f"mine {cache_key.package_key()}"] * 2]
    assert config.cache_key_tag == ""
    monkeypatch.setattr("sla_compile.__version__", "0.0.0")
    cache_key.package_key.cache_clear()
    try:
        assert cache_key.package_key() not in seen[0]
    finally:
        cache_key.package_key.cache_clear()
