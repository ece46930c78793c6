"""README.md, the pages of docs/ and CONTRIBUTING.md cannot rot: their Python runs, and what they name is there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import sla_compile
from sla_compile.config import SITE_FIELDS, SLAConfig
from tests.support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCS = [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS]

MOST_README_LINES = 150


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of ``page`` in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)


def section(page: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}.*?\n(.*?)(?=^## |\Z)", text_of(page), flags=re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table in ``text``, without its head."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        lines = table.splitlines()[2:]
        found += [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return found


def prose(page: str) -> str:
    """``page`` without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the ``python ...`` of a page prints, in this process: importing torch takes longer."""
    _, *arguments = command.split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", arguments[1:] if arguments[0] == "-m" else arguments)
    module = arguments[0] == "-m"
    start = partial(runpy.run_module, arguments[1]) if module else partial(runpy.run_path, arguments[0])
    with pytest.raises(SystemExit) as end:
        start(run_name="__main__")
    assert not end.value.code, capsys.readouterr()
    return capsys.readouterr().out


# Python


def in_order(lines: list[str], text: str) -> bool:
    """Whether ``lines`` are among the lines of ``text``, in this order."""
    left: Iterator[str] = iter(text.splitlines())
    return all(any(line == other for other in left) for line in lines)


def _as_it_is(gm: fx.GraphModule, *_: Any, **__: Any) -> Callable[..., Any]:
    return gm.forward


PRINTED = {
    "docs/fine-tuning.md": ["['blocks.0.attn1.sla', 'blocks.1.attn1.sla']"],
    "docs/saving.md": ["['blocks.0.attn1.sla', 'blocks.1.attn1.sla']"],
    "docs/reports.md": [
        "blocks.0.attn1 True self-attention 5120 tokens",
        "blocks.0.attn2 False cross-attention 5120 queries, 16 keys",
    ],
    "docs/kept-dense.md": ["short sequence 512 tokens at least min_tokens=768, the default on cpu"],
    "docs/masks-and-cross-attention.md": [
        "((0, 512, 0, 512), (512, 1024, 0, 1024))",
        "WanTransformer3DModel: 4 of 4 attentions would be sparse-linear",
    ],
    "docs/token-order.md": [
        "{'kind': 'tiles', 'grid': [5, 16, 16], 'start': 0}",
        "{'kind': 'hilbert', 'grid': [5, 16, 16], 'start': 0}",
    ],
    "docs/trainers-and-pipelines.md": [
        "['transformer_blocks.0.attn1.sla', 'transformer_blocks.1.attn1.sla']",
        "2 of 2",
    ],
    "docs/many-gpus.md": ["['blocks.0.attn1.sla']"],
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("page", [page for page in ("README.md", *DOCS) if blocks(page, "python")])
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each page by itself. Rewritten graphs run as they are: Inductor compiles a Wan in the test of the quickstart."""
    pytest.importorskip("diffusers")
    import torch._inductor.compile_fx

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", _as_it_is)
    monkeypatch.chdir(tmp_path)
    source = "\n".join(blocks(page, "python"))
    exec(compile(source, page, "exec"), {"__name__": "__main__"})
    output = capsys.readouterr().out
    shown = [line for block in blocks(page, "text") for line in block.splitlines()]
    assert in_order([*PRINTED.get(page, []), *shown], output), output
    saved = re.findall(r'sla_compile.save\(\w+, "([^"]+)"\)', source)
    assert all((tmp_path / path).exists() for path in saved)


# Paths, links and commands


def anchors(page: str) -> set[str]:
    """The names that links to sections of ``page`` have, by GitHub's rules."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text_of(page)):
        target, _, anchor = link.partition("#")
        path = (folder / target).resolve() if target else ROOT / page
        assert path.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(str(path.relative_to(ROOT))), f"{page} links to {link}"


# Written by a command that the same page has, or by the reader.
MADE = {"runs/quickstart/gates.safetensors", "runs/quickstart"}
FOLDERS = ("sla_compile", "passes", "kernels", "tests", "examples", "benchmarks", "docs", ".ci")


@pytest.mark.parametrize("page", PAGES)
def test_every_path_is_there(page: str) -> None:
    text = re.sub(r"\]\([^)]*\)|https?://\S+", "", text_of(page))
    if page == "docs/diffusers.md":
        text = text.partition("| class |")[0]
    named = set(re.findall(rf"(?<![\w/.])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*", text)) - MADE
    named = {name.rstrip(".") for name in named}
    missing = [name for name in sorted(named) if not (any(ROOT.glob(name)) if "*" in name else (ROOT / name).exists())]
    assert not missing


def test_every_test_that_is_named_is_there() -> None:
    known = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", text_of(page))}
    assert len(named) >= 10
    assert named <= known


def commands() -> list[str]:
    """Every command line of README.md, CONTRIBUTING.md and docs/README.md."""
    shell = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    table = [cells[0].strip("`") for cells in rows(section("docs/README.md", "Things to run"))]
    parts = [part.partition("#")[0].strip() for line in shell + table for part in line.split("&&")]
    return list(dict.fromkeys(part for part in parts if part))


TOOLS = ("accelerate", "torchrun", "pip", "pytest", "ruff", "mypy", "pre-commit", "python3", "source")


def test_every_command_is_known() -> None:
    assert [line.split(" && ") for line in blocks("README.md", "bash")[0].splitlines()] == [
        ['pip install -e ".[dev]"', "python examples/quickstart.py"],
        ["pytest -n 2"],
    ]
    for command in commands():
        words = [word for word in command.split() if not re.fullmatch(r"[A-Z_]+=\S+", word)]
        if words[:2] == ["python", "-m"]:
            if words[2] != "sla_compile":
                assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), command
        elif words[0] in ("python", "bash"):
            assert (ROOT / words[1]).is_file(), command
        else:
            assert words[0] in TOOLS, command
    assert "dev" in PROJECT["optional-dependencies"]
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    assert '"runs/quickstart"' in quickstart
    assert '"gates.safetensors"' in quickstart


def test_every_folder_and_file_that_pytest_is_given_is_there() -> None:
    for command in commands():
        if "pytest" in command.split():
            given = [word for word in command.split() if word.startswith("tests")]
            assert not [word for word in given if not (ROOT / word).exists()], command


@pytest.mark.parametrize("script", sorted({c.split()[1] for c in commands() if c.startswith("python ") and ".py" in c}))
def test_every_flag_is_in_the_script_s_help(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = run(f"python {script} --help", monkeypatch, capsys)
    flags = {word for c in commands() if script in c for word in c.split() if word.startswith("--")}
    assert not [flag for flag in flags if flag not in known]


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_command_line_explains_the_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = (c for c in commands() if "explain" in c)
    output = run(command, monkeypatch, capsys)
    assert "4 of 4 attentions would be sparse-linear" in output


# What the pages say of the code


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= MOST_README_LINES


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text_of("docs/README.md")))
    assert linked == {Path(page).name for page in DOCS} - {"README.md"}


def test_every_setting_has_its_default() -> None:
    table = {cells[0].strip("`"): cells[1].strip("`") for cells in rows(text_of("docs/settings.md")) if len(cells) == 3}
    config = SLAConfig()
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert {name: ast.literal_eval(default) for name, default in table.items()} == fields
    names = list(table)
    assert set(names[: names.index("grid_start") + 1]) == set(SITE_FIELDS), "the page says which an override takes"


def test_every_public_name_is_told_with_its_real_parameters() -> None:
    table = "\n".join(cells[0] for cells in rows(text_of("docs/api.md")))
    calls = re.findall(r"`((?:sla_compile|torch)\.[\w.]+)(?:\(([^`]*)\))?`", table)
    assert {name.removeprefix("sla_compile.") for name, _ in calls} - {"torch.compile"} == set(sla_compile.__all__)
    for name, arguments in calls:
        if not arguments or name == "torch.compile":
            continue
        parameters = inspect.signature(getattr(sla_compile, name.removeprefix("sla_compile."))).parameters
        named = [argument.partition("=")[0].strip() for argument in arguments.split(",")]
        assert not [n for n in named if n != "..." and n not in parameters], name


@cache
def strings_of_the_code() -> tuple[str, ...]:
    """Every string in the code; the values in an f-string are "..."."""
    found = []
    for folder in ("sla_compile", "passes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    pieces = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                    found.append("".join(map(str, pieces)).replace("{{", "{").replace("}}", "}"))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def test_every_message_is_one_that_the_code_gives() -> None:
    messages = []
    for title in re.findall(r"^## ((?:Warnings|Errors).*)$", text_of("docs/troubleshooting.md"), flags=re.MULTILINE):
        for cells in rows(section("docs/troubleshooting.md", title)):
            *kind, message = re.findall(r"`([^`]+)`", cells[0])
            assert not [name for name in kind if not issubclass(getattr(sla_compile, name), UserWarning)]
            messages.append(message)
    assert len(messages) >= 30
    missing = [message for message in messages if not any(message in text for text in strings_of_the_code())]
    assert not missing


def test_every_common_reason_is_one_that_the_code_gives() -> None:
    reasons = [reason for cells in rows(text_of("docs/kept-dense.md")) for reason in cells[0].split(", ")]
    assert len(reasons) >= 15
    for reason in reasons:
        pattern = re.escape(reason).replace("key", r"(?:key|\.\.\.)").replace("value", r"(?:value|\.\.\.)")
        assert any(re.search(pattern, text) for text in strings_of_the_code()), reason


def test_every_key_of_a_site_is_told() -> None:
    named = {name for cells in rows(text_of("docs/reports.md")) for name in re.findall(r"`(\w+)`", cells[0])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = sla_compile.explain(torch.nn.MultiheadAttention(32, 2), (torch.randn(64, 1, 32),) * 3)
    (site,) = report.to_dict()["sites"]
    assert named == set(site)


def test_versions_are_those_of_the_project() -> None:
    (torch_range,) = (d for d in PROJECT["dependencies"] if d.startswith("torch"))
    least, limit = re.findall(r"2\.(\d+)", torch_range)
    assert f"PyTorch 2.{least} to 2.{int(limit) - 1}" in text_of("README.md")
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer" in text_of("README.md")
    assert f"## {PROJECT['version']}" in text_of("CHANGELOG.md")


@pytest.mark.parametrize(("page", "least"), [("README.md", 5), ("docs/speed.md", 10)])
def test_every_figure_is_a_measured_one(page: str, least: int) -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    timed = [cells for cells in rows(text_of(page)) if len(cells) == 4 and cells[1].endswith(" ms")]
    assert len(timed) >= least
    figures = [cell.removesuffix(" ms") for cells in timed for cell in cells[1:3]]
    missing = [figure for figure in figures if not re.search(rf"\| {re.escape(figure)} \(", results)]
    assert not missing


def test_speed_ups_are_those_of_the_figures() -> None:
    for page in ("README.md", "docs/speed.md"):
        for cells in rows(text_of(page)):
            if len(cells) == 4 and cells[1].endswith(" ms"):
                dense, ours = (float(cell.removesuffix(" ms")) for cell in cells[1:3])
                told = cells[3].removesuffix("x")
                digits = len(told.partition(".")[2])
                assert abs(dense / ours - float(told)) < 10**-digits, cells
