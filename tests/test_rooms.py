"""The rooms keep to themselves: who imports what, how long files are, and what the package makes public."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import sla_compile

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"passes": ROOT / "passes", "kernels": ROOT / "kernels", "sla_compile": ROOT / "sla_compile"}
FILES = [(room, path) for room, folder in ROOMS.items() for path in sorted(folder.glob("**/*.py"))]
IDS = [f"{room}/{path.name}" for room, path in FILES]

MOST_LINES, MOST_FUNCTION_LINES = 400, 60


def installed_name(room: str, path: Path) -> str:
    package = "sla_compile" if room == "sla_compile" else f"sla_compile.{room}"
    return package if path.stem == "__init__" else f"{package}.{path.stem}"


def imports(room: str, path: Path) -> Iterator[str]:
    """Every module, and every name in a module, that ``path`` imports, at its top or inside a function."""
    package = installed_name(room, path)
    if path.stem != "__init__":
        package = package.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbidden(room: str, path: Path) -> tuple[str, ...]:
    """The packages that this file must not import."""
    if room == "passes":
        return ("triton", "rich", "sla_compile.kernels")
    if room == "kernels":
        others = ["torch.fx", "torch._dynamo", "torch._inductor", "rich", "sla_compile.passes"]
        if path.stem == "reference":
            named = [p.stem for p in path.parent.glob("*.py") if p.stem not in ("__init__", "reference")]
            return (*others, "triton", *(f"sla_compile.kernels.{name}" for name in named))
        return (*others, "sla_compile.kernels.reference")
    draws = path.stem in ("render", "render_errors", "__main__")
    return ("sla_compile.kernels.reference", *(() if draws else ("rich",)))


@pytest.mark.parametrize(("room", "path"), FILES, ids=IDS)
def test_imports(room: str, path: Path) -> None:
    bad = {name for name in imports(room, path) if within(name, *forbidden(room, path))}
    assert not bad, f"{room}/{path.name} imports {sorted(bad)}"


def test_attributes_of_torch_do_not_stand_in_for_imports() -> None:
    """``torch._dynamo.x`` in a kernel reaches what an import may not."""
    for room, path in FILES:
        if room == "kernels":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) not in ("torch.fx", "torch._dynamo", "torch._inductor"), path.name


@pytest.mark.parametrize(("room", "path"), FILES, ids=IDS)
def test_lengths(room: str, path: Path) -> None:
    if room == "kernels":
        return
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES, f"{path.name} has more than {MOST_LINES} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MOST_FUNCTION_LINES, f"{path.name}: {node.name} has {length} lines"


def uncommented_copies(text: str) -> list[int]:
    """Lines that call ``.contiguous()`` with no comment on them or on the line above."""
    lines = text.splitlines()
    return [
        number
        for number, line in enumerate(lines, 1)
        if ".contiguous(" in line.partition("#")[0]
        and "#" not in line
        and not (number > 1 and lines[number - 2].lstrip().startswith("#"))
    ]


def test_copies_in_kernels_say_why() -> None:
    for room, path in FILES:
        if room == "kernels":
            assert not uncommented_copies(path.read_text()), f"kernels/{path.name}: a .contiguous() without a reason"


def test_uncommented_copies_are_found() -> None:
    assert uncommented_copies("x = y.contiguous()\nx = y.contiguous()  # why\n# why\nx = y.contiguous()") == [1]


def test_no_submodule_hides_a_public_name() -> None:
    stems = {path.stem for room, path in FILES if room == "sla_compile"} | set(ROOMS)
    assert not stems & set(sla_compile.__all__)


@pytest.mark.parametrize("name", sla_compile.__all__)
def test_public_names_resolve_and_have_a_docstring(name: str) -> None:
    value = getattr(sla_compile, name)
    assert value.__name__ == name
    assert value.__module__.startswith("sla_compile.")
    # A dataclass without a docstring gets its signature as one.
    assert (inspect.getdoc(value) or "").strip()
    assert not (inspect.getdoc(value) or "").startswith(f"{name}(")
    assert name in dir(sla_compile)


def test_public_names_of_every_module_exist() -> None:
    for room, path in FILES:
        if (room == "kernels" and path.stem.startswith("triton")) or path.stem == "__main__":
            continue
        module = importlib.import_module(installed_name(room, path))
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"
