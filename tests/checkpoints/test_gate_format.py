"""A file of gates is read as something that anybody may have written: it is a whole one, or it is refused by name."""

from __future__ import annotations

import copy
import json
import random
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sla_compile
from sla_compile.checkpoints.gate_format import LARGEST_SIZE, read_gate_file
from sla_compile.config import SLAConfig
from sla_compile.gate_attachment import attach_gate
from sla_compile.gate_settings import GateSpec
from sla_compile.passes.token_order import Grid

PATH = "0.sla"
CONFIG = SLAConfig(
    linear="marginal",
    topk=0.25,
    max_topk=0.5,
    sparse_scale=True,
    topk_by="head",
    reorder="tiles",
    grid=(2, 4, 4),
    always_critical=((0, 16),),
    overrides={"0.*": {"block_q": 16}},
)


def model_with_gates() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    spec = GateSpec(heads=2, head_dim=16, config=CONFIG, path=PATH, seen=(Grid((2, 4, 4), 0, 32), None))
    attach_gate(model[0], spec, device="cpu", dtype=torch.float32)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    sla_compile.save(model_with_gates(), tmp_path / "gates")
    return tmp_path / "gates"


def content(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata, its JSON read, and the tensors."""
    with safe_open(path, "pt") as opened:
        metadata = dict(opened.metadata())
    return {**metadata, **{name: json.loads(metadata[name]) for name in ("config", "sites")}}, load_file(path)


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    save_file(tensors, path, texts)


def refused(path: Path, *parts: str) -> Any:
    start = f"load: {str(path)!r} has metadata that cannot be read: "
    return pytest.raises(ValueError, match=re.escape(start) + ".*".join(re.escape(part) for part in parts))


SITE = f"sites[0], {PATH!r}: "
SIZE = f"accepted: an integer from 1 to {LARGEST_SIZE}"
GRIDS = "accepted: [grid, grid], or two for each size, each None or [sizes, start, tokens] in integers"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("heads", -1, f"{SITE}heads: got -1 (int); {SIZE}"),
        ("heads", 0, f"{SITE}heads: got 0 (int); {SIZE}"),
        ("head_dim", 10**9, f"{SITE}head_dim: got 1000000000 (int); {SIZE}"),
        ("head_dim", True, f"{SITE}head_dim: got True (bool); {SIZE}"),
        ("path", 3, "sites[0]: path: got 3 (int); accepted: the module path of a gate"),
        ("config", [], f"{SITE}config: got [] (list); accepted: a mapping"),
        ("seen", [[[0, 4], 0, 4], None], f"{SITE}seen: got "),
        ("seen", [[[2, 4], 0], None], f"{SITE}seen: got [[[2, 4], 0], None] (list); {GRIDS}"),
        ("seen", [], f"{SITE}seen: got [] (list); {GRIDS}"),
        ("seen", [None, None, None], f"{SITE}seen: got [None, None, None] (list); {GRIDS}"),
        ("seen", 1, f"{SITE}seen: got 1 (int); {GRIDS}"),
    ],
)
def test_fields_of_a_site(saved: Path, key: str, value: Any, message: str) -> None:
    metadata, tensors = content(saved)
    metadata["sites"][0][key] = value
    write(saved, metadata, tensors)
    with refused(saved, message):
        read_gate_file(saved)


def test_a_setting_of_a_site_names_the_site(saved: Path) -> None:
    metadata, tensors = content(saved)
    metadata["sites"][0]["config"]["topk"] = 7
    write(saved, metadata, tensors)
    with refused(saved, f"{SITE}SLAConfig.topk: got 7 (int); accepted: a number above 0 and up to 1"):
        read_gate_file(saved)


def test_a_gate_twice(saved: Path) -> None:
    metadata, tensors = content(saved)
    metadata["sites"] *= 2
    write(saved, metadata, tensors)
    with refused(saved, f"sites[1]: got {PATH!r} again; accepted: each gate once"):
        read_gate_file(saved)


@pytest.mark.parametrize("shares", [[0, 0], [-1, 0], [10**6, 1], [1, -5], [2**62, 2**62]])
def test_a_sparsity_out_of_range(saved: Path, shares: list[int]) -> None:
    metadata, tensors = content(saved)
    write(saved, metadata, {**tensors, f"{PATH}.sparsity": torch.tensor([[1000, 0], shares])})
    with pytest.raises(ValueError, match=re.escape(f"{PATH}.sparsity: {shares} in the file; accepted: topk above 0")):
        sla_compile.load(nn.Sequential(nn.Linear(4, 4)), saved)


@pytest.mark.parametrize("where", ["config", "site"])
@pytest.mark.parametrize("field", ["feature_map", "reorder", "f" * 10_000])
def test_a_very_long_name_is_not_searched_for(saved: Path, where: str, field: str) -> None:
    metadata, tensors = content(saved)
    settings = metadata["config"] if where == "config" else metadata["sites"][0]["config"]
    settings[field] = "softmax" * 500_000
    write(saved, metadata, tensors)
    start = time.process_time()
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read_gate_file(saved)
    assert time.process_time() - start < 2
    assert len(str(caught.value)) < 1000


def test_tensors_of_another_shape_are_not_even_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a large model, or one that only says that it is of gates, costs no memory."""
    metadata, tensors = content(saved)
    write(saved, metadata, {**tensors, f"{PATH}.weight": torch.zeros(64, 64), "other": torch.zeros(64)})
    file = read_gate_file(saved)
    assert file.problems == [
        f"{PATH}.weight: shape (64, 64) in the file, its site needs (16, 16)",
        "other: extra in the file, of no site in its list",
    ]
    assert "weight" not in file.gates[PATH].tensors


def test_an_error_lists_so_many_problems_and_counts_the_others(saved: Path) -> None:
    metadata, tensors = content(saved)
    extra = {f"extra_{number}": torch.zeros(1) for number in range(500)}
    write(saved, metadata, {**tensors, **extra, "\x1b[31m" + "n" * 1000: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"(?s)501 problem\(s\), .*\n  and 451 more$") as caught:
        sla_compile.load(nn.Sequential(nn.Linear(4, 4)), saved)
    assert len(str(caught.value).splitlines()) == 52
    assert str(caught.value).replace("\n", "").isprintable()


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    config = SLAConfig(include=("*", "x" * 1001))
    attach_gate(model[0], GateSpec(heads=2, head_dim=16, config=config, path=PATH), device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=re.escape("config['include'][1]: got 'xxxx")):
        sla_compile.save(model, tmp_path / "gates")
    assert not list(tmp_path.iterdir())


# Hostile files: each is the file of before but for one or two places.

SEED, FILES = 20261127, 400
NESTED: Any = 1
for _ in range(50):
    NESTED = [NESTED]
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, 1e999, float("nan")),
    *("", "*", "x", "softmax", "per_head", "\x1b[2J", "../../etc/passwd", "__class__", "a" * 3000, "*a" * 400),
    *([], {}, [[]], [None, None], NESTED, {"cpp.cxx": ["/tmp/evil"]}, {"a": {"topk": 0.1}}, [0] * 20_000),
]


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in ``data`` with each of its keys."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(entries):
        yield data, key
        yield from places(value)


def changed(source: random.Random, metadata: dict[str, Any]) -> dict[str, Any]:
    """``metadata`` with one place replaced, dropped, renamed or doubled; or a text that is no JSON."""
    metadata = copy.deepcopy(metadata)
    roots = [metadata["config"], metadata["sites"]]
    for _ in range(source.choice((1, 1, 2))):
        container, key = source.choice([place for root in roots for place in places(root)])
        kind = source.random()
        if key not in (container if isinstance(container, dict) else range(len(container))):
            continue  # an earlier change took it
        if kind < 0.7:
            container[key] = copy.deepcopy(source.choice(HOSTILE))
        elif kind < 0.8:
            del container[key]
        elif isinstance(container, dict):
            container[str(source.choice(HOSTILE))] = container[key]
        else:
            container.append(container[key])
    if source.random() < 0.1:
        name = source.choice(("config", "sites"))
        text = json.dumps(metadata[name])
        metadata[name] = source.choice(("[" * 50_000, text[: len(text) // 2], "9" * 6000, '"' + "s" * 100_000 + '"'))
    return metadata


def damaged(source: random.Random, raw: bytes) -> bytes:
    """``raw`` with a few bytes of its header changed, or cut."""
    data = bytearray(raw)
    for _ in range(source.choice((1, 3))):
        data[source.randrange(min(len(data), 3000))] = source.randrange(256)
    return bytes(data[: source.choice((len(data), len(data), source.randrange(len(data))))])


def test_hostile_files_are_loaded_whole_or_refused_by_name(saved: Path) -> None:
    source = random.Random(SEED)
    metadata, tensors = content(saved)
    raw = saved.read_bytes()
    path = saved.with_name("hostile")
    loaded = 0
    for number in range(FILES):
        if number % 4:
            write(path, changed(source, metadata), tensors)
        else:
            path.write_bytes(damaged(source, raw))
        model = nn.Sequential(nn.Linear(4, 4))
        start = time.process_time()
        refusal = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sla_compile.load(model, path)
        except ValueError as error:
            refusal = str(error)
        if refusal:
            assert str(path) in refusal, (number, refusal)
            assert len(refusal) < 20_000, number
            assert not sla_compile.gates(model), number
        else:
            loaded += 1
            (gate,) = sla_compile.gates(model).values()
            assert {name: tuple(t.shape) for name, t in gate.state_dict().items()} == gate.spec().shapes(), number
            assert (gate.config.inner, gate.config.inductor) == (SLAConfig().inner, {}), number
            sla_compile.save(model, saved.with_name("again"))
        assert time.process_time() - start < 2, number
    assert 20 < loaded < FILES / 2
