"""README.md cannot rot: its Python runs, and what it names is there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sla_compile
from sla_compile.config import SLAConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib")

from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}.*?\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def commands() -> list[str]:
    """Every command line of README.md."""
    shell = [line for block in blocks("bash") for line in block.splitlines()]
    table = [cells[0].strip("`") for cells in rows(section("Start"))]
    return [part.strip() for line in shell + table for part in line.split("&&")]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_python_runs_from_top_to_bottom(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")))
    output = run(sys.executable, str(script), cwd=tmp_path)
    assert "2 of 4 attentions are sparse-linear" in output
    assert "['blocks.0.attn1.sla', 'blocks.1.attn1.sla']" in output
    assert "blocks.0.attn1 True self-attention 5120 tokens" in output
    assert "blocks.0.attn2 False cross-attention" in output
    assert "4 of 4 attentions would be sparse-linear" in output


def test_every_path_is_there() -> None:
    text = README.replace("runs/quickstart/gates.safetensors", "examples/quickstart.py")  # what that one writes
    named = set(re.findall(r"(?<![\w/.])(?:[\w.]+/)+[\w.]+", re.sub(r"https?://\S+", "", text)))
    named |= set(re.findall(r"\]\((?!http)([^)]+)\)", README))
    assert len(named) >= 5
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    assert '"runs/quickstart"' in quickstart
    assert '"gates.safetensors"' in quickstart


def test_every_command_is_known() -> None:
    assert commands()[:3] == ['pip install -e ".[dev]"', "python examples/quickstart.py", "pytest -n 2"]
    for command in commands():
        words = command.split()
        if words[:2] == ["python", "-m"]:
            assert words[2] == "sla_compile"
        elif words[0] in ("python", "bash"):
            assert (ROOT / words[1]).is_file(), command
        else:
            assert command in ('pip install -e ".[dev]"', "pytest -n 2")
    assert "dev" in PROJECT["optional-dependencies"]


@pytest.mark.parametrize("script", sorted({c.split()[1] for c in commands() if c.startswith("python ") and ".py" in c}))
def test_every_flag_is_in_the_script_s_help(script: str) -> None:
    known = run(sys.executable, script, "--help", cwd=ROOT)
    flags = {word for c in commands() if script in c for word in c.split() if word.startswith("--")}
    assert not [flag for flag in flags if flag not in known]


def test_the_command_line_explains_the_example() -> None:
    (command,) = (c for c in commands() if "explain" in c)
    output = run(sys.executable, *command.split()[1:], cwd=ROOT)
    assert "4 of 4 attentions would be sparse-linear" in output


def test_every_setting_has_its_default() -> None:
    table = {cells[0].strip("`"): ast.literal_eval(cells[1].strip("`")) for cells in rows(section("Settings"))}
    config = SLAConfig()
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert table == fields


def test_every_public_name_is_told_with_its_real_parameters() -> None:
    calls = re.findall(r"`((?:sla_compile|torch)\.[\w.]+)(?:\(([^`]*)\))?`", section("Functions"))
    assert {name.removeprefix("sla_compile.") for name, _ in calls} - {"torch.compile"} == set(sla_compile.__all__)
    for name, arguments in calls:
        if not arguments or name == "torch.compile":
            continue
        parameters = inspect.signature(getattr(sla_compile, name.removeprefix("sla_compile."))).parameters
        named = [argument.partition("=")[0].strip() for argument in arguments.split(",")]
        assert not [n for n in named if n != "..." and n not in parameters], name


def test_every_common_reason_is_one_that_the_code_gives() -> None:
    names = ("passes/decide", "passes/masks", "sla_compile/backend", "sla_compile/sites", "sla_compile/config")
    code = "".join((ROOT / f"{name}.py").read_text() for name in names)
    for cells in rows(section("What is kept dense")):
        for reason in cells[0].split(", "):
            pattern = re.escape(reason).replace("key", r"(?:key|\{name\})").replace("value", r"(?:value|\{name\})")
            assert re.search(pattern, code), reason


def test_versions_are_those_of_the_project() -> None:
    (torch_range,) = (d for d in PROJECT["dependencies"] if d.startswith("torch"))
    least, limit = re.findall(r"2\.(\d+)", torch_range)
    assert f"PyTorch 2.{least} to 2.{int(limit) - 1}" in README
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer" in README


def test_every_figure_is_a_measured_one() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    figures = [cell.removesuffix(" ms") for cells in rows(section("Benchmarks")) for cell in cells[1:3]]
    assert len(figures) >= 10
    missing = [figure for figure in figures if not re.search(rf"\| {re.escape(figure)} \(", results)]
    assert not missing
