"""``compare``: its numbers against the definition, and that nothing in the model changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sla_compile
from sla_compile.__main__ import main
from sla_compile.fitting.observer import GatedCall
from sla_compile.kernels import reference
from tests.support.calibration import assert_same_state, batches, defined_error, made, recorded, state
from tests.support.closeness import relative_error
from tests.support.models import OPTIONS, Model, random_input, randomize_gates
from tests.support.reports import assert_fits

EAGER: dict[str, Any] = {"inner": "eager", "repeats": 1}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


def by_definition(call: GatedCall) -> Tensor:
    options = {**call.gate.config.kernel_options(), "scale": call.scale}
    return reference.sparse_linear_attention(
        call.query, call.key, call.value, call.gate.weight, call.gate.bias, **options
    )


def test_errors_are_those_of_the_definition() -> None:
    model, data = made(), batches(2)
    randomize_gates(model)
    calls = recorded(model, data)
    report = sla_compile.compare(model, data, inner=None)
    assert [site.path for site in report.sites] == list(calls)
    zero, none = torch.zeros(16, 16).double(), torch.zeros(16).double()
    for site in report.sites:
        assert site.calls == 2
        assert site.errors.now == pytest.approx(defined_error(calls[site.path]), rel=1e-6)
        assert site.errors.sparse_only == pytest.approx(defined_error(calls[site.path], zero, none), rel=1e-6)
        assert site.errors.fitted < site.errors.sparse_only
    from sla_compile.fitting.observer import gated_calls

    with torch.no_grad():
        dense = torch.cat([model(*args) for args in data])
        with gated_calls(model, by_definition):
            sparse = torch.cat([model(*args) for args in data])
    assert report.output.now == pytest.approx(relative_error(sparse, dense), rel=1e-6)
    assert (report.dense, report.sla) == (None, None)


def test_a_plain_model_is_left_as_it_is() -> None:
    model, data = Model().double(), batches(1)
    before, random_state = state(model), torch.get_rng_state()
    report = sla_compile.compare(model, data, OPTIONS, **EAGER)
    assert_same_state(state(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sla_compile.gates(model) == {}
    assert report.output.now == report.output.sparse_only > 0
    assert report.dense is not None
    assert report.sla is not None
    assert report.sla.milliseconds > 0
    assert report.sla.peak_bytes is None
    assert report.inner == "eager"


def test_a_compiled_model_is_not_compiled_again_and_reports_the_same() -> None:
    model = made(max_topk=1.0)
    randomize_gates(model)
    sla_compile.set_sparsity(model, topk=0.5)
    compiled: Any = torch.compile(model, backend="sla", options={"inner": "eager"})
    x = random_input()
    out, before, told = compiled(x), state(model), sla_compile.report(compiled).to_json()
    kept = sla_compile.compare(compiled, [(x,)], **EAGER)
    other = sla_compile.compare(compiled, [(x,)], {**OPTIONS, "topk": 1.0, "bottomk": 0.0}, **EAGER)
    assert other.sites[0].errors.sparse_only < 1e-6 < kept.sites[0].errors.sparse_only
    assert_same_state(state(model), before)
    assert sla_compile.report(compiled).to_json() == told
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), out)


def test_text_data_and_pictures(tmp_path: Path) -> None:
    report = sla_compile.compare(Model(), [(torch.randn(1, 100, 32),)], OPTIONS, **EAGER)
    assert_fits(report)
    assert "blocks.1.attention.sla" in str(report)
    assert json.loads(report.to_json())["sites"][0]["path"] == "blocks.0.attention.sla"
    pytest.importorskip("matplotlib")
    for ending in ("png", "svg", "json"):
        report.save(tmp_path / f"report.{ending}")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "report.svg").read_text()
    with pytest.raises(ValueError, match=r"ends in one of \.png, \.svg, \.pdf, \.json"):
        report.save(tmp_path / "report.doc")


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_of_compare.py").write_text(
        "import torch\nfrom tests.support.models import Model, WIDTH\n"
        "def make():\n    return Model(1), (torch.randn(1, 100, WIDTH),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    small = [word for name in ("min_tokens=0", "block_q=16", "block_k=16") for word in ("--config", name)]
    command = ["compare", "factory_of_compare:make", *small]
    assert main([*command, "--inner", "eager", "--width", "100", "--out", str(tmp_path / "a.json")]) == 0
    assert "output of the model" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["sla"]["milliseconds"] > 0
    assert main([*command, "--inner", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sla"] is None
    assert main([*command, "--out", str(tmp_path / "a.html")]) == 2
    assert "accepted: a name that ends in one of .png, .svg, .pdf, .json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"topk": 2.0}}, "SLAConfig.topk: got 2.0"),
        ({"config": {}}, "short sequence, 100 tokens"),
        ({"batches": []}, "batches: empty"),
        ({"repeats": 0}, "repeats: got 0"),
        ({"max_batches": 0}, "max_batches: got 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:prepare")
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    model = Model().double()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        sla_compile.compare(model, **{"batches": batches(1), "config": OPTIONS, **EAGER, **changes})
    assert_same_state(state(model), before)
