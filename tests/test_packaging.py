"""The wheel and the editable install, each in an environment that has everything but this project."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

SOURCES = ("sla_compile", "passes", "kernels", "pyproject.toml", "README.md", "LICENSE")

FACTS = """\
import importlib.metadata as metadata, importlib.util as util, json
import sla_compile, sla_compile.passes, sla_compile.kernels
print(json.dumps({
    "package": sla_compile.__file__,
    "passes": sla_compile.passes.__file__,
    "kernels": sla_compile.kernels.__file__,
    "dist": str(metadata.distribution("sla-compile").locate_file("")),
    "version": [metadata.version("sla-compile"), sla_compile.__version__],
    "strays": [name for name in ("passes", "kernels") if util.find_spec(name)],
    "triton": util.find_spec("triton") is not None,
}))
"""

# backend="sla" with no import of ours: forward and backward, against topk=1, which is dense attention.
COMPILES = """\
import json, sys, torch, torch.nn.functional as F

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

torch.manual_seed(0)
model, x = Attention(), torch.randn(1, 96, 32)
dense = model(x).detach()
options = {"min_tokens": 0, "topk": 1.0, "bottomk": 0.0, "block_q": 16, "block_k": 16, "inner": sys.argv[1]}
out = torch.compile(model, backend="sla", options=options)(x)
out.square().sum().backward()
print(json.dumps({
    "gates": sorted(name for name, _ in model.named_parameters() if ".sla." in f".{name}"),
    "error": ((out - dense).norm() / dense.norm()).item(),
    "gradient": bool(torch.isfinite(model.qkv.weight.grad).all() and model.qkv.weight.grad.any()),
    "triton": sys.modules.get("triton") is not None,
}))
"""

LEAN = """\
import json, sys
import sla_compile
bare = "torch" in sys.modules
for name in sla_compile.__all__:
    getattr(sla_compile, name)
import torch
print(json.dumps({
    "torch on import": bare,
    "compilers": [name for name in ("torch._inductor", "torch._dynamo", "triton") if name in sys.modules],
    "cuda": torch.cuda.is_initialized(),
}))
"""


def run_python(python: str | Path, code: str, *arguments: str, cwd: Path) -> Any:
    """The JSON that ``code`` prints last, in a process of its own."""
    done = subprocess.run([str(python), "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def pip(*arguments: str, python: Path | None = None) -> None:
    command = [sys.executable, "-m", "pip", *(["--python", str(python)] if python else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: building writes into the tree."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(sources), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder))
    (built,) = folder.glob("*.whl")
    return built


def make_environment(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """A virtual environment with this one's packages except sla-compile and ``without``; its Python."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    unwanted = ("sla_compile", "__editable__", "distutils-precedence", *without)
    for site in (Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
        for entry in site.iterdir():
            wanted = not entry.name.startswith(unwanted) and "sla_compile" not in entry.name
            if wanted and not (packages / entry.name).is_symlink():
                (packages / entry.name).symlink_to(entry)
    venv.create(folder / "env", symlinks=True)
    scripts = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    (own_site,) = (folder / "env").rglob("site-packages")
    (own_site / "dependencies.pth").write_text(f"{packages}\n")
    return scripts / "python"


def test_wheel_holds_the_three_rooms_and_the_entry_point(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        listed = archive.namelist()
        names = set(listed)
        (metadata,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        entry_points = archive.read(metadata).decode()
        licences = [name for name in names if name.endswith("licenses/LICENSE")]
    packaged = [name for name in listed if ".dist-info/" not in name]
    expected = [
        f"{prefix}{file.relative_to(ROOT)}"
        for folder, prefix in (("sla_compile", ""), ("passes", "sla_compile/"), ("kernels", "sla_compile/"))
        for file in (ROOT / folder).rglob("*.py")  # which does not follow the links to the other two
    ]
    assert sorted(packaged) == sorted([*expected, "sla_compile/py.typed"])
    assert entry_points.split() == ["[torch_dynamo_backends]", "sla", "=", "sla_compile.backend:sla"]
    assert licences


@pytest.mark.slow
def test_wheel_works_without_triton(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path, without=("triton",))
    assert (
        run_python(python, "import importlib.util as u; print(int(bool(u.find_spec('sla_compile'))))", cwd=tmp_path)
        == 0
    )
    pip("install", str(wheel), "--no-deps", "--no-index", python=python)
    facts = run_python(python, FACTS, cwd=tmp_path)
    for name in ("package", "passes", "kernels", "dist"):
        assert str(facts[name]).startswith(str(tmp_path / "env")), name
    assert facts["strays"] == []
    assert facts["triton"] is False
    assert len(set(facts["version"])) == 1
    compiled = run_python(python, COMPILES, "inductor", cwd=tmp_path)
    assert compiled["gates"] == ["sla.shift"]
    assert compiled["error"] < 1e-5
    assert compiled["gradient"]
    assert not compiled["triton"]


def test_a_checkout_is_enough_where_it_is_imported(tmp_path: Path) -> None:
    """No entry point: the import of the package makes the backend known, and imports nothing for that."""
    python = make_environment(tmp_path)
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "sla_compile").symlink_to(ROOT / "sla_compile")
    imported = 'import sla_compile, sys\nassert "torch" not in sys.modules\n'
    assert run_python(python, imported + COMPILES, "eager", cwd=tmp_path / "checkout")["gates"]


def test_an_entry_point_and_what_is_registered_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends import registry

    from sla_compile.registration import register

    finders = [*sys.meta_path]
    known: dict[str, Any] = {"sla": None}
    monkeypatch.setattr(registry, "_BACKENDS", known)
    register()
    assert known == {"sla": None}, "of the user's"
    known.clear()
    register()
    assert known["sla"].load() is importlib.import_module("sla_compile.backend").sla
    assert sys.meta_path == finders


def test_editable_install_follows_the_sources(sources: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path)
    pip("install", "-e", str(sources), "--no-deps", "--no-build-isolation", "--no-index", python=python)
    facts = run_python(python, FACTS, cwd=tmp_path)
    assert facts["package"] == str(sources / "sla_compile" / "__init__.py")
    assert facts["passes"] == str(sources / "sla_compile" / "passes" / "__init__.py")
    assert facts["kernels"] == str(sources / "sla_compile" / "kernels" / "__init__.py")
    assert facts["strays"] == []
    compiled = run_python(python, COMPILES, "eager", cwd=tmp_path)
    assert compiled["gates"] == ["sla.shift"]
    assert compiled["error"] < 1e-5
    assert compiled["gradient"]


def test_a_second_checkout_tests_itself(sources: Path, tmp_path: Path) -> None:
    """Beside an editable install of another clone, a checkout's tests run on the checkout's own code."""
    python = make_environment(tmp_path)
    pip("install", "-e", str(sources), "--no-deps", "--no-build-isolation", "--no-index", python=python)
    second = tmp_path / "second"
    shutil.copytree(sources, second, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    shutil.copytree(ROOT / "tests", second / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    run_tests = tmp_path / "elsewhere" / "run_tests.py"  # as the `pytest` script: its own folder is on sys.path
    run_tests.parent.mkdir()
    run_tests.write_text("import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))\n")
    command = [str(python), str(run_tests), "-q", "-p", "no:cacheprovider", "tests/passes/test_profitability.py"]
    passed = subprocess.run(command, cwd=second, capture_output=True, text=True, timeout=300)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    with (second / "passes" / "profitability.py").open("a") as file:
        file.write('\nraise RuntimeError("the second checkout")\n')
    failed = subprocess.run(command, cwd=second, capture_output=True, text=True, timeout=300)
    assert failed.returncode != 0
    assert "RuntimeError: the second checkout" in failed.stdout


def test_importing_every_public_name_loads_no_compiler_and_touches_no_device(tmp_path: Path) -> None:
    facts = run_python(sys.executable, LEAN, cwd=tmp_path)
    assert facts == {"torch on import": False, "compilers": [], "cuda": False}
