"""Prepared models that were pickled before modules were renamed can still be loaded."""

from __future__ import annotations

import dataclasses
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sla_compile
from sla_compile.gate_settings import settings_to_json
from sla_compile.passes.token_order import Grid
from tests.support.models import OPTIONS, Model, TwoAttentions, assert_follows_definition, random_input, randomize_gates
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "float64")

# What a pickle written before the modules got their present names says instead of the present name.
FORMER_NAMES = {"sla_compile.config_values": "sla_compile.accepts"}
# Names that pickles have always had, and so must keep.
PERMANENT = {
    ("sla_compile.compiler.call_watch", "CallEnd"),
    ("sla_compile.compiler.call_watch", "CallStart"),
    ("sla_compile.config", "SLAConfig"),
    ("sla_compile.gate", "Gate"),
    ("sla_compile.gate", "GateMarker"),
    ("sla_compile.passes.token_order", "Grid"),
}


def prepared() -> tuple[Model, torch.Tensor]:
    model, x = Model(), random_input()
    sla_compile.prepare(model, (x,), config={**OPTIONS, "overrides": {"blocks.1.*": {"topk": 0.5}}})
    randomize_gates(model)
    for gate in sla_compile.gates(model).values():
        gate.seen = (Grid((4, 5, 5), 0, 100), None)
    return model, x


def globals_of(pickled: bytes) -> set[tuple[str, str]]:
    """(module, name) of every class and function that a pickle of protocol 2 names."""
    found = (argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL")
    return {(module, name) for module, name in (str(argument).split(" ") for argument in found)}


def as_formerly(pickled: bytes) -> bytes:
    """The pickle with today's module names replaced by those of before."""
    for now, formerly in FORMER_NAMES.items():
        assert pickled.count(f"c{now}\n".encode()) == 1
        pickled = pickled.replace(f"c{now}\n".encode(), f"c{formerly}\n".encode())
    return pickled


def test_the_names_in_a_pickle_of_a_prepared_model_stay() -> None:
    named = globals_of(pickle.dumps(prepared()[0], protocol=2))
    ours = {(module, name) for module, name in named if module.startswith("sla_compile")}
    assert ours == PERMANENT | {("sla_compile.config_values", "FrozenMapping")}


def configs(model: torch.nn.Module) -> list[sla_compile.SLAConfig]:
    return [gate.config for gate in sla_compile.gates(model).values()]


def test_a_model_pickled_under_former_names_loads_and_computes_the_same() -> None:
    model, x = prepared()
    back = pickle.loads(as_formerly(pickle.dumps(model, protocol=2)))
    assert configs(back) == configs(model)
    assert all(gate.seen == (Grid((4, 5, 5), 0, 100), None) for gate in sla_compile.gates(back).values())
    assert_follows_definition(torch.compile(back, backend="sla", options={"inner": "eager"}), back, x)


def test_a_pickle_from_before_there_were_call_sites_binds_its_gates_by_their_order() -> None:
    torch.manual_seed(0)
    model, x = TwoAttentions(), random_input()
    sla_compile.prepare(model, (x,), config=OPTIONS)
    randomize_gates(model)
    expected = {path: gate.call_site for path, gate in sla_compile.gates(model).items()}
    for gate in sla_compile.gates(model).values():
        del gate.__dict__["call_site"], gate.__dict__["_process"]
        gate.settings = settings_to_json(gate.config, gate.seen)
    back = pickle.loads(pickle.dumps(model))
    assert [gate.call_site for gate in sla_compile.gates(back).values()] == ["", ""]
    assert_follows_definition(torch.compile(back, backend="sla", options={"inner": "eager"}), back, x)
    assert {path: gate.call_site for path, gate in sla_compile.gates(back).items()} == expected


def test_settings_from_before_min_tokens_had_a_default_by_device_keep_their_number() -> None:
    config = sla_compile.SLAConfig(min_tokens=4096)
    assert pickle.loads(pickle.dumps(config)) == config == sla_compile.SLAConfig.from_json(config.to_json())
    model, x = Model(), random_input(800, 1)
    sla_compile.prepare(model, (x,), config={"inner": "eager"})
    assert len(sla_compile.gates(model)) == 2, "800 tokens are enough on a CPU"
    for gate in sla_compile.gates(model).values():
        gate.config = dataclasses.replace(gate.config, min_tokens=4096)
        gate.settings = settings_to_json(gate.config, gate.seen, gate.call_site)
    back = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(torch.compile(back, backend="sla", options={"inner": "eager"})(x), back(x))
    assert {site.accepted for site in sla_compile.report(back).sites} == {"at least min_tokens=4096"}


def test_settings_load_in_a_process_that_has_imported_nothing(tmp_path: Path) -> None:
    """The former name must be known as soon as the pickle's first class is imported."""
    config = configs(prepared()[0])[0]
    (tmp_path / "config.pkl").write_bytes(as_formerly(pickle.dumps(config, protocol=2)))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).fingerprint())"
    command = [sys.executable, "-c", code, str(tmp_path / "config.pkl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == config.fingerprint(), done.stderr
