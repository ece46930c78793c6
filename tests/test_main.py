"""The command line, in this process for its logic and in fresh ones for what a user types."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import sla_compile
from sla_compile.__main__ import main
from tests.support.models import OPTIONS, Model, random_input, randomize_gates

FACTORIES = '''
"""Factories that the tests of the command line name."""

import torch
from torch import nn
from tests.support.models import Model, WIDTH


class Named(Model):
    def __init__(self, inputs):
        super().__init__()
        self.example_inputs = inputs


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Model()

    def forward(self, x, *, scale):
        return self.model(x) * scale


class Zoo:
    @staticmethod
    def make(tokens=100, blocks=2):
        return Model(blocks), (torch.randn(1, tokens, WIDTH),)


make = Zoo.make
x = torch.randn(1, 100, WIDTH)


def with_kwargs():
    return Pair(), (x,), {"scale": 2.0}


def named_args():
    return Named((x,))


def named_kwargs():
    return Named({"x": x})


def number():
    return 3


def triple():
    return Model(), x, 5


def fails():
    raise RuntimeError("first line\\nsecond line")


def wrong_shape():
    return Model(), (torch.randn(1, 100, WIDTH + 1),)
'''

SMALL = ["--config", "min_tokens=0", "--config", "block_q=16", "--config", "block_k=16"]


@pytest.fixture(autouse=True)
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factories_of_cli.py").write_text(textwrap.dedent(FACTORIES))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "factories_of_cli", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def explained(capsys: pytest.CaptureFixture[str], factory: str, *arguments: str) -> dict[str, object]:
    code, out, err = run(capsys, "explain", f"factories_of_cli:{factory}", "--json", *SMALL, *arguments)
    assert (code, err) == (0, "")
    data: dict[str, object] = json.loads(out)
    return data


@pytest.mark.parametrize("factory", ["make", "Zoo.make", "with_kwargs", "named_args", "named_kwargs"])
def test_every_form_of_factory(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    data = explained(capsys, factory)
    assert data["totals"]["attentions"] == data["totals"]["rewritten"] == 2  # type: ignore[index]


def test_factory_arguments_and_settings_arrive(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--config", "topk=0.5", "--config", 'exclude=["blocks.2.*"]']
    data = explained(capsys, "make", *settings, "--args", "90", "blocks=3")
    sites = data["sites"]
    assert isinstance(sites, list)
    assert [site["rewritten"] for site in sites] == [True, True, False]
    assert [site["shape"]["tokens"] for site in sites] == [90] * 3
    assert sites[0]["settings"]["topk"] == 0.5


def test_text_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", "factories_of_cli:make", *SMALL, "--width", "44"]
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 44
    assert "blocks.{0,1}.attention" in out
    assert "scaled_dot_product_attention" in out
    _, shorter, _ = run(capsys, *command, "--no-diff")
    assert "scaled_dot_product_attention" not in shorter
    assert "blocks.{0,1}.attention" in shorter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "no_such_package.x:make"], "no module 'no_such_package' (searched from "),
        (["explain", "factories_of_cli:mak"], "no factory 'mak' in 'factories_of_cli'; nearest known: 'make'"),
        (["explain", "factories_of_cli"], "got 'factories_of_cli'; accepted: package.module:factory"),
        (["explain", "factories_of_cli:x"], "factories_of_cli:x is a Tensor; accepted: a callable"),
        (["explain", "factories_of_cli:number"], "factories_of_cli:number returned int; accepted: (model, args"),
        (["explain", "factories_of_cli:triple"], "returned a tuple of (Model, Tensor, int); accepted: (model,"),
        (["explain", "factories_of_cli:fails"], "factories_of_cli:fails raised RuntimeError: first line at "),
        (["explain", "factories_of_cli:wrong_shape", "--config", "min_tokens=0"], "cannot be traced: "),
        (["explain", "factories_of_cli:make", "--config", "topkk=0.1"], "nearest known: 'topk'"),
        (["explain", "factories_of_cli:make", "--config", "topk=2"], "SLAConfig.topk: got 2 (int); accepted: "),
        (["explain", "factories_of_cli:make", "--config", "topk"], "--config: got 'topk'; accepted: KEY=VALUE"),
        (["explain", "factories_of_cli:make", "--args", "tokenz=3"], "unexpected keyword argument 'tokenz'"),
        (["explain", "factories_of_cli:make", "--width", "3"], "got '3'; accepted: an integer of at least 20"),
        (["explain", "factories_of_cli:make", "--jsn"], "unrecognized arguments: --jsn"),
        (["show", "missing.safetensors"], "no file 'missing.safetensors'"),
        (["show", "factories_of_cli.py"], "truncated or no safetensors file"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("sla_compile: error: ")
    assert err.count("\n") == 1
    assert message in err


def saved(path: Path) -> None:
    torch.manual_seed(0)
    model = Model(2).double()
    config = {**OPTIONS, "linear": "marginal", "overrides": {"blocks.1.*": {"gate": "per_head"}}}
    sla_compile.prepare(model, (random_input(),), config=config)
    randomize_gates(model)
    sla_compile.save(model, path)


def test_show_lists_the_gates_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved(tmp_path / "gates.safetensors")
    code, out, err = run(capsys, "show", "gates.safetensors", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert [gate["path"] for gate in data["gates"]] == ["blocks.0.attention.sla", "blocks.1.attention.sla"]
    assert [gate["shape"] for gate in data["gates"]] == [[16, 16], [2, 16, 16]]
    assert data["config"]["topk"] == OPTIONS["topk"]
    model = Model(2)
    sla_compile.load(model, tmp_path / "gates.safetensors")
    for shown, gate in zip(data["gates"], sla_compile.gates(model).values(), strict=True):
        assert shown["weight_norm"] == pytest.approx(gate.weight.norm().item(), rel=1e-5)
        assert shown["bias_norm"] == pytest.approx(gate.bias.norm().item(), rel=1e-5)
        assert shown["config"]["gate"] == gate.config.gate
    for width in ("40", "120"):
        code, out, _ = run(capsys, "show", "gates.safetensors", "--width", width)
        assert code == 0
        assert "blocks.1.attention.sla" in out
        assert "per head" in out
        assert max(map(len, out.splitlines())) <= int(width)


def test_show_says_that_each_head_has_a_shift(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = sla_compile.prepare(Model(1), (random_input(),), config=OPTIONS)
    with torch.no_grad():
        for parameter in sla_compile.gate_parameters(model):
            parameter.copy_(torch.tensor([-0.5, 1.25]))
    sla_compile.save(model, tmp_path / "gates.safetensors")
    for width in ("80", "120"):
        _, out, _ = run(capsys, "show", "gates.safetensors", "--width", width)
        assert "2 float32, one per head" in out
        assert "shift -0.5 to 1.25" in out
        assert "shared" not in out


def test_show_has_the_sparsity_that_was_set(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = sla_compile.prepare(Model(2), (torch.randn(1, 100, 32),), config={**OPTIONS, "max_topk": 1.0})
    sla_compile.set_sparsity(model, topk=0.625, bottomk=0.0, sites="blocks.1.*")
    sla_compile.save(model, tmp_path / "gates.safetensors")
    _, out, _ = run(capsys, "show", "gates.safetensors", "--json")
    configs = [gate["config"] for gate in json.loads(out)["gates"]]
    assert [(c["topk"], c["bottomk"]) for c in configs] == [(OPTIONS["topk"], OPTIONS["bottomk"]), (0.625, 0.0)]
    _, out, _ = run(capsys, "show", "gates.safetensors", "--width", "200")
    assert "topk 62.5% (at most 100%), bottomk 0%" in out


def test_as_typed_by_a_user(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Attention(torch.nn.Module):\n"
        "    def forward(self, q):\n"
        "        return torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "def make():\n"
        "    return Attention(), (torch.randn(1, 2, 64, 32),)\n"
    )
    command = [sys.executable, "-m", "sla_compile"]
    done = subprocess.run(
        [*command, "explain", "mine:make", "--width", "60"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "short sequence: 64 tokens" in " ".join(done.stdout.split())
    bad = subprocess.run([*command, "explain", "mine:mke"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "sla_compile: error: no factory 'mke' in 'mine'; nearest known: 'make'\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("explain", "atlas", "show", "doctor"))]
)
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "python -m sla_compile" in capsys.readouterr().out
