"""The rooms keep to themselves: who imports what, how long files are, and what the package makes public."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import sla_compile
from tests.support.paths import ROOT

ROOMS = {"passes": ROOT / "passes", "kernels": ROOT / "kernels", "sla_compile": ROOT / "sla_compile"}
# rglob does not follow the links sla_compile/passes and sla_compile/kernels, so each file is met once
FILES = [(room, path) for room, folder in ROOMS.items() for path in sorted(folder.rglob("*.py"))]
IDS = [str(path.relative_to(ROOT)) for _, path in FILES]

MOST_LINES, MOST_FUNCTION_LINES = 400, 60


def module_name(room: str, path: Path) -> str:
    """The dotted name under which ``path`` is imported."""
    package = "sla_compile" if room == "sla_compile" else f"sla_compile.{room}"
    inside = [part for part in path.relative_to(ROOMS[room]).with_suffix("").parts if part != "__init__"]
    return ".".join([package, *inside])


MODULES = {module_name(room, path): (room, path) for room, path in FILES}


def package_of(room: str, path: Path) -> str:
    name = module_name(room, path)
    return name if path.stem == "__init__" else name.rpartition(".")[0]


def imported(node: ast.AST, package: str) -> Iterator[str]:
    """Every module, and every name in a module, that one statement or call imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
        module = ".".join(part for part in (base, node.module or "") if part)
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
        yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def imports(room: str, path: Path) -> Iterator[str]:
    """Every module, and every name in a module, that ``path`` imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        yield from imported(node, package_of(room, path))


def imports_at_the_top(room: str, path: Path) -> Iterator[str]:
    """What ``path`` imports when it is imported itself: nothing for types only, nothing inside a function."""
    for node in ast.parse(path.read_text()).body:
        yield from imported(node, package_of(room, path))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbidden(room: str, path: Path) -> tuple[str, ...]:
    """The packages that this file must not import."""
    if room == "passes":
        return ("triton", "rich", "sla_compile.kernels")
    if room == "kernels":
        others = ["torch.fx", "torch._dynamo", "torch._inductor", "rich", "sla_compile.passes"]
        if path.stem == "reference":
            return (*others, "triton", *(f"sla_compile.kernels.{name}" for name in ("cpu", "triton", "hopper")))
        return (*others, "sla_compile.kernels.reference")
    draws = path.stem in ("terminal", "fit_tables", "__main__")
    tests = path.parent.name == "inspection" and path.stem == "self_test"
    return (*(() if tests else ("sla_compile.kernels.reference",)), *(() if draws else ("rich",)))


@pytest.mark.parametrize(("room", "path"), FILES, ids=IDS)
def test_imports(room: str, path: Path) -> None:
    bad = {name for name in imports(room, path) if within(name, *forbidden(room, path))}
    assert not bad, f"{room}/{path.name} imports {sorted(bad)}"


@pytest.mark.parametrize(("room", "path"), FILES, ids=IDS)
def test_only_common_is_shared(room: str, path: Path) -> None:
    """``passes`` and ``kernels`` import themselves and ``sla_compile.common``, which imports itself alone."""
    own = f"sla_compile.{room}"
    if room == "sla_compile":
        if "common" not in path.parts:
            return
        own = "sla_compile.common"
    ours = {name for name in imports(room, path) if name.startswith("sla_compile.")}
    bad = {name for name in ours if not within(name, own, "sla_compile.common")}
    assert not bad, f"{room}/{path.name} imports {sorted(bad)}"


def test_no_import_cycle() -> None:
    """No module needs another that needs it in turn, but for types."""
    needs = {
        name: {found for found in imports_at_the_top(room, path) if found in MODULES} - {name}
        for name, (room, path) in MODULES.items()
        if path.stem != "__init__"
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(needs.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in needs:
        visit(name, ())


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
    stems = {path.stem for path in (ROOT / "sla_compile").iterdir()}
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
        if path.parent.name in ("triton", "hopper") or path.stem == "__main__":
            continue
        module = importlib.import_module(module_name(room, path))
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"
