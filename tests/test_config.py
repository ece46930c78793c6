"""SLAConfig: ranges, errors, patterns and overrides, JSON, torch.compile's options, caches' fingerprint."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import itertools
import json
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import pytest

import sla_compile.config as config_module
from sla_compile.config import SITE_FIELDS, SLAConfig

SHARE_OF_TOPK = "accepted: a number above 0 and up to 1"

FULL: dict[str, Any] = {
    "always_critical": ((0, 128), (-64, None)),
    "cross_attention": True,
    "max_topk": 0.75,
    "reorder": "tiles",
    "grid": (4, 30, 52),
    "grid_start": -6240,
    "topk": 0.125,
    "bottomk": 0.25,
    "block_q": 128,
    "block_k": 32,
    "feature_map": "elu",
    "linear": "all",
    "gate": "per_head",
    "sparse_scale": True,
    "topk_by": "head",
    "min_tokens": 0,
    "inner": "inductor",
    "inductor": {"triton.cudagraphs": True, "max_autotune": False},
    "include": ("blocks.*.attn1", "mid.*"),
    "exclude": ("blocks.0.*",),
    "overrides": {"z.*": {"topk": 0.5}, "a.*": {"bottomk": 0.0, "gate": "shared"}},
}


def fails_with(*parts: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def test_defaults() -> None:
    config = SLAConfig()
    assert (config.topk, config.bottomk, config.block_q, config.block_k) == (0.05, 0.0, 64, 64)
    assert (config.feature_map, config.linear, config.gate) == ("softmax", "taylor", "shared")
    assert SLAConfig(linear="marginal") == SLAConfig(linear="marginal", bottomk=0.10, sparse_scale=False)
    assert (config.inner, config.min_tokens) == ("inductor", None)
    assert (config.inductor, config.overrides) == ({}, {})
    assert (config.include, config.exclude) == (("*",), ())
    assert set(FULL) == {f.name for f in dataclasses.fields(SLAConfig)}, "FULL sets every field"


def test_every_field_has_a_docstring_with_its_range() -> None:
    tree = ast.parse(inspect.getsource(config_module))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SLAConfig").body
    documented = set()
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = ast.literal_eval(following.value) if isinstance(following, ast.Expr) else None
            assert isinstance(text, str), f"{node.target.id} has no docstring"
            assert "Range" in text, f"the docstring of {node.target.id} names no range"
            documented.add(node.target.id)
    assert documented == {f.name for f in dataclasses.fields(SLAConfig)}
    assert all(f.metadata["validator"].accepted for f in dataclasses.fields(SLAConfig))


def test_shares_are_added_exactly() -> None:
    topk, bottomk = 0.56, 0.44000000000000006
    assert topk + bottomk == 1.0, "the binary sum hides the excess"
    with fails_with("SLAConfig: got topk=0.56, bottomk=0.44000000000000006; accepted: topk + bottomk up to 1"):
        SLAConfig(topk=topk, bottomk=bottomk)
    for hundredths in range(1, 101):
        SLAConfig(topk=hundredths / 100, bottomk=float(f"0.{100 - hundredths:02d}"))


def test_frozen_and_hashable() -> None:
    config = SLAConfig(**FULL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.topk = 0.5  # type: ignore[misc]
    for twin in (
        SLAConfig(**FULL),
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert twin == config
        assert hash(twin) == hash(config)
        assert twin.fingerprint() == config.fingerprint()
    assert len({config, SLAConfig(**FULL), SLAConfig()}) == 2


def test_patterns_select_sites() -> None:
    config = SLAConfig(include=("blocks.*.attn1", "mid"), exclude=("blocks.0.*", "blocks.1?.*"))
    assert config.rejects("blocks.2.attn1") is None
    assert config.selects("blocks.2.attn1")
    assert config.selects("mid")
    assert config.rejects("blocks.0.attn1") == "excluded by exclude pattern 'blocks.0.*'"
    assert config.rejects("blocks.12.attn1") == "excluded by exclude pattern 'blocks.1?.*'"
    assert config.rejects("blocks.2.attn2") == "matched by no include pattern: 'blocks.*.attn1', 'mid'"
    assert config.rejects("MID") == "matched by no include pattern: 'blocks.*.attn1', 'mid'"
    assert not config.selects("blocks.0.attn1")
    assert SLAConfig().selects("")
    assert SLAConfig().selects("any.module.at.all")


def test_later_override_wins_and_both_win_over_top_level() -> None:
    config = SLAConfig(
        topk=0.1,
        block_q=32,
        linear="marginal",
        overrides={
            "blocks.*": {"topk": 0.2, "feature_map": "relu"},
            "blocks.0.*": {"topk": 0.3, "gate": "per_head", "min_tokens": 5},
        },
    )
    first, second, other = (config.for_site(p) for p in ("blocks.0.attn1", "blocks.1.attn1", "mid"))
    assert (first.topk, first.feature_map, first.gate, first.min_tokens) == (0.3, "relu", "per_head", 5)
    assert (second.topk, second.feature_map, second.gate) == (0.2, "relu", "shared")
    assert (other.topk, other.feature_map) == (0.1, "softmax")
    for site in (first, second, other):
        assert site.block_q == 32
        assert site.overrides == {}
        assert site.for_site("blocks.0.attn1") == site
    reversed_order = dataclasses.replace(config, overrides=dict(reversed(list(config.overrides.items()))))
    assert reversed_order.for_site("blocks.0.attn1").topk == 0.2
    assert reversed_order != config
    assert reversed_order.fingerprint() != config.fingerprint()


def test_override_may_set_every_site_field() -> None:
    changes = {name: FULL[name] for name in SITE_FIELDS}
    site = SLAConfig(overrides={"*": changes}).for_site("x")
    assert {name: getattr(site, name) for name in SITE_FIELDS} == changes


def test_overrides_are_checked() -> None:
    with fails_with(
        "unknown field 'top_k' of SLAConfig.overrides['a.*']: got 0.1 (float); accepted: topk, bottomk,",
        "nearest known: 'topk'",
    ):
        SLAConfig(overrides={"a.*": {"top_k": 0.1}})
    with fails_with("unknown field 'inner' of SLAConfig.overrides['a.*']: got 'eager'"):
        SLAConfig(overrides={"a.*": {"inner": "eager"}})
    with fails_with("SLAConfig.overrides['a.*']: got 0.1 (float); accepted: a mapping of glob patterns"):
        SLAConfig(overrides={"a.*": 0.1})  # type: ignore[dict-item]
    with fails_with("SLAConfig.overrides[3]: got {} (dict); accepted: a mapping of glob patterns"):
        SLAConfig(overrides={3: {}})  # type: ignore[dict-item]
    with fails_with("SLAConfig.overrides['a.*']: got topk=0.95, bottomk=0.2; accepted: topk + bottomk up to 1"):
        SLAConfig(bottomk=0.2, overrides={"a.*": {"topk": 0.95}})
    meeting = SLAConfig(overrides={"a.*": {"topk": 0.75}, "*.b": {"bottomk": 0.5}})
    assert meeting.for_site("a.c").topk == 0.75
    with fails_with("SLAConfig.overrides ['a.*', '*.b'] at 'a.b': got topk=0.75, bottomk=0.5; accepted"):
        meeting.for_site("a.b")


@pytest.mark.parametrize(
    ("field", "value", "default"),
    [("feature_map", "elu", "softmax"), ("gate", "per_head", "shared"), ("sparse_scale", True, False)],
)
def test_what_virtual_keys_do_not_read_is_refused_where_it_is_said(field: str, value: Any, default: Any) -> None:
    problem = f"got {field}={value!r} with linear='taylor', the default; accepted: {field}={default!r}, or linear='marg"
    with fails_with(f"SLAConfig: {problem}"):
        SLAConfig.from_options({field: value})
    with fails_with(f"SLAConfig.overrides['a.*']: {problem}"):
        SLAConfig(overrides={"a.*": {field: value}})
    with fails_with(f"SLAConfig: {problem}"):
        SLAConfig.from_options({"linear": "taylor", field: value})
    with fails_with(f"SLAConfig.overrides['a.*']: {problem}"):
        SLAConfig(overrides={"a.*": {"linear": "taylor", field: value}})
    with fails_with(f"SLAConfig.overrides['a.*']: {problem}"):
        SLAConfig(linear="taylor", overrides={"a.*": {field: value}})

    said: dict[str, Any] = {field: value}
    assert getattr(SLAConfig.from_options({"linear": "taylor", field: default}), field) == default

    # inherited, and read by other sites: a site of virtual keys has it at its default
    mixed = SLAConfig(linear="marginal", **said, overrides={"a.*": {"linear": "taylor"}})
    assert getattr(mixed.for_site("a.b"), field) == default
    assert getattr(mixed.for_site("b"), field) == value
    assert mixed.for_site("a.b").for_site("a.b") == mixed.for_site("a.b")
    reverse = SLAConfig(linear="taylor", **said, overrides={"a.*": {"linear": "all"}})
    assert getattr(reverse.for_site("a.b"), field) == value
    assert getattr(reverse.for_site("b"), field) == default
    meeting = SLAConfig(linear="marginal", overrides={"a.*": {"linear": "taylor"}, "*.b": said})
    assert getattr(meeting.for_site("c.b"), field) == value
    with fails_with(f"SLAConfig.overrides ['a.*', '*.b'] at 'a.b': {problem}"):
        meeting.for_site("a.b")


def test_a_mode_is_options_of_inductor() -> None:
    """How ``docs/settings.md`` says to have both, which ``torch.compile`` refuses."""
    from torch._inductor import list_mode_options

    both = SLAConfig.from_options({"topk": 0.5, **list_mode_options("max-autotune")})
    assert both == SLAConfig.from_options({"topk": 0.5}, mode="max-autotune")


def test_bottomk_gives_way_to_topk_unless_it_is_said() -> None:
    paper = SLAConfig(linear="marginal")
    assert [paper.changed({"topk": topk}).bottomk for topk in (1.0, 0.93, 0.9)] == [0.0, 0.07, 0.1]
    assert SLAConfig.from_options({"topk": 1.0, "linear": "all"}).bottomk == 0.0
    with fails_with("SLAConfig: got topk=1.0, bottomk=0.1; accepted: topk + bottomk up to 1"):
        SLAConfig(topk=1.0, bottomk=0.1)
    topks = {"a.*": {"topk": 1.0}, "b.*": {"topk": 0.5}, "*.c": {"bottomk": 0.01}}
    config = SLAConfig(linear="marginal", topk=0.95, overrides=topks)
    paths = {"a.b": 0.0, "b.a": 0.1, "d": 0.05, "b.c": 0.01}
    assert {path: config.for_site(path).bottomk for path in paths} == paths
    assert SLAConfig.from_json(config.to_json()) == config
    said = SLAConfig(bottomk=0.2, overrides={"a.*": {"topk": 0.5}})
    assert said.for_site("a.b").bottomk == said.changed({"topk": 0.3}).bottomk == 0.2
    assert SLAConfig(topk=0.5).bottomk == SLAConfig().changed({"topk": 1.0}).bottomk == 0.0
    assert SLAConfig(overrides={"a.*": {"linear": "none"}}).for_site("a.b").bottomk == 0.1


def test_kernel_options_are_the_keyword_arguments_of_the_op() -> None:
    assert SLAConfig(**FULL).kernel_options() == {
        "topk": 0.125,
        "bottomk": 0.25,
        "block_q": 128,
        "block_k": 32,
        "feature_map": "elu",
        "linear": "all",
    }


@pytest.mark.parametrize("fields", [{}, FULL, {"inner": "eager"}], ids=["default", "full", "eager"])
def test_json_round_trip(fields: dict[str, Any]) -> None:
    config = SLAConfig(**fields)
    text = config.to_json()
    data = json.loads(text)
    assert data == config.to_dict()
    assert data["version"] == 1
    assert set(data) == {"version", *FULL}
    for twin in (
        SLAConfig.from_json(text),
        SLAConfig.from_dict(data),
        SLAConfig.from_options(config.to_dict()),
    ):
        assert twin == config
        assert twin.to_json() == text
        assert list(twin.overrides) == list(config.overrides)


def test_to_dict_is_plain_and_the_callers_own() -> None:
    config = SLAConfig(**FULL)
    data = config.to_dict()
    assert (type(data["inductor"]), type(data["overrides"]["z.*"]), type(data["include"])) == (
        dict,
        dict,
        list,
    )
    data["overrides"]["z.*"]["topk"] = 0.25
    assert config.overrides["z.*"]["topk"] == 0.5


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ("SLAConfig JSON: got '{' (str); accepted: JSON text (",)),
        (None, ("SLAConfig JSON: got None (NoneType); accepted: JSON text",)),
        ("[1]", ("SLAConfig: got [1] (list); accepted: a mapping of fields",)),
        ("{}", ("SLAConfig version: got None (NoneType); accepted: 1",)),
        ('{"version": 2}', ("SLAConfig version: got 2 (int); accepted: 1",)),
        ('{"version": true}', ("SLAConfig version: got True (bool); accepted: 1",)),
        ('{"version": 1, "topk": NaN}', ("SLAConfig.topk: got nan (float)", SHARE_OF_TOPK)),
        (
            '{"version": 1, "tokp": 0.1}',
            ("unknown field 'tokp' of SLAConfig: got 0.1", "nearest known: 'topk'"),
        ),
    ],
)
def test_bad_json_is_refused(text: Any, parts: tuple[str, ...]) -> None:
    with fails_with(*parts):
        SLAConfig.from_json(text)


def test_missing_fields_of_json_have_their_defaults() -> None:
    assert SLAConfig.from_json('{"version": 1, "topk": 0.25}') == SLAConfig(topk=0.25)


def test_options_sort_fields_from_inductor_options() -> None:
    assert SLAConfig.from_options(None) == SLAConfig.from_options({}) == SLAConfig()
    config = SLAConfig(topk=0.25)
    assert SLAConfig.from_options(config) is config
    mixed = SLAConfig.from_options(
        OrderedDict({"max-autotune": True, "block-q": 32, "inductor": {"epilogue_fusion": False}, "topk": 1 / 4})
    )
    assert mixed == SLAConfig(topk=0.25, block_q=32, inductor={"epilogue_fusion": False, "max_autotune": True})
    assert list(mixed.inductor) == ["epilogue_fusion", "max_autotune"]
    assert SLAConfig.from_options({"inductor": {"epilogue-fusion": False}}).inductor == {"epilogue_fusion": False}


def test_no_field_is_also_an_inductor_option() -> None:
    from torch._inductor import list_options

    assert not {*FULL, "version"} & set(list_options())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            {"top_k": 0.1},
            ("unknown option 'top_k': got 0.1 (float); accepted: SLAConfig's fields (topk, bottomk",),
        ),
        ({"top_k": 0.1}, ("nearest known: 'topk'",)),
        (
            {"max_autotun": True},
            ("unknown option 'max_autotun': got True (bool)", "nearest known: 'max_autotune'"),
        ),
        ({3: 4}, ("unknown option 3: got 4 (int)", "list_options()")),
        ({"version": 2}, ("SLAConfig version: got 2 (int); accepted: 1",)),
        ("topk", ("options: got 'topk' (str); accepted: a mapping or an SLAConfig",)),
        ([("topk", 0.1)], ("options: got [('topk', 0.1)] (list); accepted: a mapping or an SLAConfig",)),
        ({"block-q": 32, "block_q": 64}, ("option 'block_q': got 64 (int); accepted: 'block_q' once",)),
        (
            {"max-autotune": True, "max_autotune": False},
            ("Inductor option 'max_autotune': got False (bool); accepted: 'max_autotune' once",),
        ),
        (
            {"max_autotune": True, "inductor": {"max_autotune": False}},
            ("option 'max_autotune': got True (bool); accepted: it once, not under 'inductor' too",),
        ),
        ({"max_autotune": 3}, ("Inductor option 'max_autotune': got 3 (int); accepted: bool",)),
        (
            {"inductor": {"fx_graph_cach": True}},
            ("unknown Inductor option 'fx_graph_cach': got True (bool)",),
        ),
        ({"inductor": {"fx_graph_cach": True}}, ("nearest known: 'fx_graph_cache'",)),
        ({"max_autotune": True, "inductor": 3}, ("SLAConfig.inductor: got 3 (int)",)),
        (
            {"post_grad_custom_post_pass": print},
            (
                "Inductor option 'post_grad_custom_post_pass': got <built-in",
                "accepted: a value that JSON can hold",
            ),
        ),
        (
            {"aggressive_fusion": True, "inner": "eager"},
            ("SLAConfig.inductor: got {'aggressive_fusion': True} with inner='eager'; accepted:",),
        ),
    ],
)
def test_bad_options_are_refused(options: Any, parts: tuple[str, ...]) -> None:
    with fails_with(*parts):
        SLAConfig.from_options(options)


def test_inductor_values_keep_the_type_inductor_wants() -> None:
    config = SLAConfig(inductor={"cuda.cutlass_dynamic_cluster_shape": (1, 1, 1)})
    assert config.inductor["cuda.cutlass_dynamic_cluster_shape"] == (1, 1, 1)
    assert SLAConfig.from_json(config.to_json()).inductor["cuda.cutlass_dynamic_cluster_shape"] == (1, 1, 1)


def test_every_inductor_default_that_json_holds_is_accepted() -> None:
    from torch._inductor import config as inductor_config

    SLAConfig(inductor=inductor_config.get_config_copy())


def test_options_become_inductors_own() -> None:
    config = SLAConfig.from_options({"max-autotune": True}, mode="reduce-overhead")
    from torch._inductor.compile_fx import get_patched_config_dict

    patched = get_patched_config_dict(config_patches=dict(config.inductor))
    assert (patched["max_autotune"], patched["triton.cudagraphs"]) == (True, True)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_mode_goes_beneath_explicit_options(mode: str) -> None:
    from torch._inductor import list_mode_options

    given = list_mode_options(mode)
    assert SLAConfig.from_options(mode=mode) == SLAConfig(inductor=given)
    for options in (dict.fromkeys(given, False), SLAConfig(inductor=dict.fromkeys(given, False))):
        config = SLAConfig.from_options(options, mode=mode)
        assert set(config.inductor) == set(given)
        assert not any(config.inductor.values())
    assert SLAConfig.from_options({"topk": 0.25}, mode=mode).topk == 0.25


def test_default_mode_changes_nothing() -> None:
    assert SLAConfig.from_options(mode="default") == SLAConfig()
    assert SLAConfig.from_options({"inner": "eager"}, mode="default") == SLAConfig(inner="eager")


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_mode_needs_inductor(inner: str) -> None:
    with fails_with(f"mode: got 'max-autotune' (str); accepted: only with inner='inductor', not with inner={inner!r}"):
        SLAConfig.from_options({"inner": inner}, mode="max-autotune")


@pytest.mark.parametrize(
    ("mode", "parts"),
    [
        (
            "max_autotune",
            ("mode: got 'max_autotune' (str); accepted: one of 'default',", "known: 'max-autotune'"),
        ),
        ("fast", ("mode: got 'fast' (str); accepted: one of 'default', 'reduce-overhead', 'max-autotune'",)),
        (3, ("mode: got 3 (int); accepted: one of 'default'",)),
        (["default"], ("mode: got ['default'] (list); accepted: one of 'default'",)),
    ],
)
def test_unknown_mode_is_refused(mode: Any, parts: tuple[str, ...]) -> None:
    with fails_with(*parts):
        SLAConfig.from_options(mode=mode)


def test_fingerprint_changes_with_every_field_and_with_nothing_else() -> None:
    prints = {SLAConfig().fingerprint()}
    for name, value in FULL.items():
        changed: dict[str, Any] = {"inner": "eager"} if name == "inner" else {name: value}
        if name == "topk_by":
            changed |= {"max_topk": 0.5}
        if name in ("feature_map", "gate", "sparse_scale"):
            prints.add(SLAConfig(linear="none").fingerprint())
            changed |= {"linear": "none"}
        if name == "grid_start":
            changed["grid"] = (8, 30, 52)
        prints.add(SLAConfig(**changed).fingerprint())
    assert len(prints) == len(FULL) + 2
    shuffled = dict(reversed(list(FULL.items())))
    shuffled["inductor"] = dict(reversed(list(FULL["inductor"].items())))
    shuffled["overrides"] = {p: dict(reversed(list(c.items()))) for p, c in FULL["overrides"].items()}
    assert SLAConfig(**shuffled).fingerprint() == SLAConfig(**FULL).fingerprint()


def test_fresh_process_imports_no_inductor_and_no_triton_and_agrees_on_the_fingerprint() -> None:
    program = (
        "import sys; from sla_compile.config import SLAConfig\n"
        "config = SLAConfig(topk=0.25, overrides={'a': {'topk': 0.5}}); config.for_site('a')\n"
        "loaded = [m for m in sys.modules if m == 'triton' or m.startswith('torch._inductor')]\n"
        "print(loaded, config.fingerprint())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = SLAConfig(topk=0.25, overrides={"a": {"topk": 0.5}}).fingerprint()
    assert ran.stdout.split() == ["[]", expected]
