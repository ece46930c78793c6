"""Values of settings: what each field takes, what it refuses with which words, and frozen mappings."""

from __future__ import annotations

import re
from typing import Any

import numpy
import pytest
import torch

from sla_compile.config import SITE_FIELDS, FrozenMapping, SLAConfig

SHARE_OF_TOPK = "accepted: a number above 0 and up to 1"
SHARE_OF_BOTTOMK = "accepted: a number from 0 to 1"
BLOCK = "accepted: a power of two from 16 to 256"
RANGES = "accepted: a list or tuple of (start, stop) ranges of key tokens"
GRID = "accepted: None, or the sizes (T, H, W) or (H, W) of a grid of tokens"
TOKENS = "accepted: None, or an integer of at least 0"
ORDER = "or 'tiles:N' with at most N frames in a tile, N from 1 to 99; or a list of these, one for each head"


def fails_with(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


@pytest.mark.parametrize(
    ("name", "value", "shown", "accepted"),
    [
        ("topk", 0, "0 (int)", SHARE_OF_TOPK),
        ("topk", -0.1, "-0.1 (float)", SHARE_OF_TOPK),
        ("topk", 1.5, "1.5 (float)", SHARE_OF_TOPK),
        ("topk", 10**400, "(int)", SHARE_OF_TOPK),
        ("topk", float("nan"), "nan (float)", SHARE_OF_TOPK),
        ("topk", float("inf"), "inf (float)", SHARE_OF_TOPK),
        ("topk", True, "True (bool)", SHARE_OF_TOPK),
        ("topk", "0.1", "'0.1' (str)", SHARE_OF_TOPK),
        ("topk", None, "None (NoneType)", SHARE_OF_TOPK),
        ("topk", numpy.float64(0.5), "(float64)", SHARE_OF_TOPK),
        ("topk", torch.tensor(0.5), "tensor(0.5000) (Tensor)", SHARE_OF_TOPK),
        ("sparse_scale", 1, "1 (int)", "True or False"),
        ("bottomk", -1e-9, "-1e-09 (float)", SHARE_OF_BOTTOMK),
        ("bottomk", 1.01, "1.01 (float)", SHARE_OF_BOTTOMK),
        ("bottomk", float("-inf"), "-inf (float)", SHARE_OF_BOTTOMK),
        ("bottomk", float("nan"), "nan (float)", SHARE_OF_BOTTOMK),
        ("bottomk", False, "False (bool)", SHARE_OF_BOTTOMK),
        ("block_q", 8, "8 (int)", BLOCK),
        ("block_q", 96, "96 (int)", BLOCK),
        ("block_q", 64.0, "64.0 (float)", BLOCK),
        ("block_k", 512, "512 (int)", BLOCK),
        ("block_k", numpy.int64(64), "(int64)", BLOCK),
        ("block_k", True, "True (bool)", BLOCK),
        ("min_tokens", -1, "-1 (int)", TOKENS),
        ("min_tokens", 1.0, "1.0 (float)", TOKENS),
        ("min_tokens", True, "True (bool)", TOKENS),
        (
            "feature_map",
            "sofmax",
            "'sofmax' (str)",
            "one of 'softmax', 'elu', 'relu'; nearest known: 'softmax'",
        ),
        ("feature_map", None, "None (NoneType)", "one of 'softmax', 'elu', 'relu'"),
        ("linear", "Marginal", "'Marginal' (str)", "'marginal', 'all', 'none', 'taylor'; nearest known: 'marginal'"),
        ("linear", ["all"], "['all'] (list)", "one of 'marginal', 'all', 'none', 'taylor'"),
        ("gate", "per-head", "'per-head' (str)", "one of 'shared', 'per_head'; nearest known: 'per_head'"),
        ("inner", "aot-eager", "'aot-eager' (str)", "'aot_eager', 'eager'; nearest known: 'aot_eager'"),
        ("inner", 1, "1 (int)", "one of 'inductor', 'aot_eager', 'eager'"),
        ("include", (), "() (tuple)", "a list or tuple of at least one glob pattern"),
        ("include", "blocks.*", "'blocks.*' (str)", "a list or tuple of at least one glob pattern"),
        ("include", ("a", 1), "('a', 1) (tuple)", "a list or tuple of at least one glob pattern"),
        ("exclude", "blocks.*", "'blocks.*' (str)", "a list or tuple of glob patterns"),
        ("exclude", None, "None (NoneType)", "a list or tuple of glob patterns"),
        ("always_critical", (0, 64), "(0, 64) (tuple)", RANGES),
        ("always_critical", ((0, 64, 1),), "((0, 64, 1),) (tuple)", RANGES),
        ("always_critical", ((0, 64.0),), "((0, 64.0),) (tuple)", RANGES),
        ("always_critical", ((0, True),), "((0, True),) (tuple)", RANGES),
        ("always_critical", ((None, 64),), "((None, 64),) (tuple)", RANGES),
        ("always_critical", ((64, 64),), "((64, 64),) (tuple)", RANGES),
        ("always_critical", ((-1, -64),), "((-1, -64),) (tuple)", RANGES),
        ("always_critical", "0:64", "'0:64' (str)", RANGES),
        ("cross_attention", 1, "1 (int)", "accepted: True or False"),
        ("reorder", "tile", "'tile' (str)", f"{ORDER}; nearest known: 'tiles'"),
        ("reorder", None, "None (NoneType)", ORDER),
        ("reorder", (), "()", ORDER),
        ("reorder", "tiles,", "'tiles,' (str)", ORDER),
        ("reorder", ("raster", 4), "('raster', 4)", ORDER),
        ("reorder", "tiles:0", "'tiles:0' (str)", f"{ORDER}; nearest known: 'tiles'"),
        ("reorder", "tiles:100", "'tiles:100' (str)", f"{ORDER}; nearest known: 'tiles'"),
        ("grid", (4,), "(4,) (tuple)", GRID),
        ("grid", (4, 0, 4), "(4, 0, 4) (tuple)", GRID),
        ("grid", (4.0, 4, 4), "(4.0, 4, 4) (tuple)", GRID),
        ("grid", 64, "64 (int)", GRID),
        ("grid_start", 1.0, "1.0 (float)", "accepted: None, or an integer"),
        ("inductor", [("max_autotune", True)], "(list)", "a mapping of Inductor option names"),
        ("inductor", True, "True (bool)", "a mapping of Inductor option names"),
        ("overrides", [("a", {})], "(list)", "a mapping of glob patterns to mappings of topk, bottomk"),
    ],
)
def test_refused_value_names_field_value_and_what_is_accepted(name: str, value: Any, shown: str, accepted: str) -> None:
    with fails_with(f"SLAConfig.{name}: got ", shown, accepted):
        SLAConfig(**{name: value})
    with fails_with(f"SLAConfig.{name}: got ", shown, accepted):
        SLAConfig.from_options({name: value})
    if name in SITE_FIELDS:
        with fails_with(f"SLAConfig.overrides['blocks.0.*'].{name}: got ", shown, accepted):
            SLAConfig(overrides={"blocks.0.*": {name: value}})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("topk", (1e-300, 0.5, 1.0)),
        ("bottomk", (0.0, 0.95)),
        ("block_q", (16, 32, 64, 128, 256)),
        ("block_k", (16, 32, 64, 128, 256)),
        ("feature_map", ("softmax", "elu", "relu")),
        ("linear", ("marginal", "all", "none", "taylor")),
        ("gate", ("shared", "per_head")),
        ("min_tokens", (None, 0, 1, 10**9)),
        ("always_critical", ((), ((0, 1),), ((-64, None), (0, None)), ((-64, 4096), (64, -64)), "text")),
        ("cross_attention", (False, True)),
        ("reorder", ("raster", "tiles", "hilbert", "tiles:1", "tiles:4", "tiles:99", "tiles:4,raster")),
        ("grid", (None, (1, 1), (21, 30, 52))),
        ("inner", ("inductor", "aot_eager", "eager")),
        ("include", (("",), ("a", "b"))),
        ("exclude", ((), ("a", "b"))),
    ],
)
def test_edges_of_each_range_are_accepted(name: str, values: tuple[Any, ...]) -> None:
    other: dict[str, Any] = {"bottomk": 0.0} if name == "topk" else {}
    if name in ("feature_map", "gate"):
        other["linear"] = "marginal"
    for value in values:
        assert getattr(SLAConfig(**{name: value}, **other), name) == value


def test_ints_become_floats_and_lists_become_tuples() -> None:
    config = SLAConfig(topk=1, bottomk=0, include=["a.*"], exclude=["b"])  # type: ignore[arg-type]
    assert SLAConfig(always_critical=[[0, 64]]).always_critical == ((0, 64),)  # type: ignore[arg-type]
    assert (type(config.topk), type(config.bottomk)) == (float, float)
    assert (config.include, config.exclude) == (("a.*",), ("b",))
    assert config == SLAConfig(topk=1.0, bottomk=-0.0, include=("a.*",), exclude=("b",))
    assert config.fingerprint() == SLAConfig(topk=1.0, bottomk=-0.0, include=("a.*",), exclude=("b",)).fingerprint()


def test_unknown_field_is_a_value_error_with_the_nearest() -> None:
    with fails_with("unknown field 'top_k' of SLAConfig: got 0.1 (float); accepted: topk, ", "nearest known: 'topk'"):
        SLAConfig(top_k=0.1)  # type: ignore[call-arg]
    with fails_with("unknown field 'Block_Q' of SLAConfig", "nearest known: 'block_q'"):
        SLAConfig.from_dict({"version": 1, "Block_Q": 64})


def test_stored_mappings_share_nothing_with_the_caller() -> None:
    changes, architectures = {"topk": 0.5}, ["gfx90a"]
    config = SLAConfig(overrides={"a": changes}, inductor={"rocm.arch": architectures})
    before = config.to_json()
    changes["topk"] = 0.25
    architectures.append("gfx950")
    config.overrides["a"]["topk"] = 0.25  # type: ignore[index]
    config.inductor["rocm.arch"].append("gfx942")
    assert config.to_json() == before
    with pytest.raises(TypeError):
        config.inductor["max_autotune"] = True  # type: ignore[index]


def test_frozen_mapping_counts_order_only_among_its_kind() -> None:
    ab, ba = {"a": 1, "b": [2]}, {"b": [2], "a": 1}
    assert FrozenMapping(ab) != FrozenMapping(ba)
    assert FrozenMapping(ab) == FrozenMapping(ab)
    assert FrozenMapping(ab) == ba
    assert FrozenMapping(ab) != 1
    assert repr(FrozenMapping(ab)) == "{'a': 1, 'b': [2]}"
