"""Where save writes and load reads: what is there keeps its mode or is left alone, and errors name the user's path."""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sla_compile.checkpoints.places import FILE_NAME, file_to_read, folder_with_gates, is_gate_tensor, replace_file


def refused(kind: type[Exception], *parts: str) -> Any:
    return pytest.raises(kind, match=".*".join(re.escape(part) for part in parts))


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    replace_file(tmp_path / "new", b"new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o777])
def test_an_existing_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_what_is_no_regular_file_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("/dev/null")
    for name, kind in (("pipe", "a named pipe"), ("socket", "a socket"), ("link", "a character device")):
        path = tmp_path / name
        before = path.lstat().st_mode
        with refused(ValueError, f"save to {str(path)!r}: it is {kind}; accepted: a regular file, or a new one"):
            replace_file(path, b"new")
        assert path.lstat().st_mode == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["link", "pipe", "socket"]


def test_a_folder_gets_a_file_of_a_fixed_name(tmp_path: Path) -> None:
    replace_file(tmp_path, b"one")
    assert (tmp_path / FILE_NAME).read_bytes() == b"one"
    replace_file(f"{tmp_path}/", b"two")
    assert file_to_read(tmp_path) == str(tmp_path / FILE_NAME)
    assert (tmp_path / FILE_NAME).read_bytes() == b"two"
    with refused(FileNotFoundError, f"save to {f'{tmp_path}/none/'!r}: there is no folder"):
        replace_file(f"{tmp_path}/none/", b"three")
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    replace_file(tmp_path / "pipeline" / "transformer", b"three")
    with refused(FileNotFoundError, f"no {FILE_NAME!r} in the folder", "; there is one in 'transformer'"):
        file_to_read(tmp_path / "pipeline")
    (tmp_path / "taken" / FILE_NAME).mkdir(parents=True)
    with refused(IsADirectoryError, f"save to {str(tmp_path / 'taken')!r}: ", "is a folder; accepted: a file"):
        replace_file(tmp_path / "taken", b"four")


@pytest.mark.parametrize("action", ["save", "load"])
def test_paths_that_are_none(action: str, tmp_path: Path) -> None:
    def go(path: Any) -> None:
        if action == "save":
            replace_file(path, b"new")
        else:
            file_to_read(path)

    accepted = "accepted: a str or os.PathLike"
    with refused(TypeError, f"{action}: got the path b'gates' (bytes); {accepted}"):
        go(b"gates")
    with refused(TypeError, f"{action}: got the path 3 (int); {accepted}"):
        go(3)
    with refused(ValueError, f"{action}: got the path ''; accepted: the path of a file, or of a folder"):
        go("")
    with refused(ValueError, f"{action}: got the path 'a\\x00b'; accepted: the path of a file, or of a folder"):
        go("a\0b")


@pytest.mark.parametrize("step", ["open", "replace"])
def test_the_system_s_error_names_the_user_s_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def denied(path: str, *others: Any) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, step, denied)
    with pytest.raises(PermissionError) as caught:
        replace_file(tmp_path / "gates", b"new")
    assert str(caught.value) == f"[Errno 13] Permission denied: {str(tmp_path / 'gates')!r}"
    assert not list(tmp_path.iterdir())


def test_a_name_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("g" * 255)
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("sla.weight", True),
        ("blocks.0.attn1.sla_2.bias", True),
        ("blocks.0.attn1.sla.modules_to_save.default.weight", True),
        ("blocks.0.attn1.sla.sparsity", True),
        ("blocks.0.attn1.sla.weight.more", False),
        ("blocks.0.translation.weight", False),
        ("slab.weight", False),
        ("a.sla_0.weight", False),
    ],
)
def test_names_of_gate_tensors(name: str, is_one: bool) -> None:
    assert is_gate_tensor(name) == is_one


class Config(dict[str, Any]):
    """As diffusers keeps it."""


class Net:
    def __init__(self, folder: Any) -> None:
        self.config = Config(_name_or_path=folder)


@pytest.mark.parametrize("inside", ["", "transformer"])
@pytest.mark.parametrize("kind", ["file", "weights"])
def test_the_folder_of_a_model_is_known_to_hold_gates(tmp_path: Path, inside: str, kind: str) -> None:
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"_class_name": "Net"}')
    save_file({"linear.weight": torch.zeros(1)}, folder / "model.safetensors")
    assert folder_with_gates(Net(str(tmp_path))) == ""
    if kind == "file":
        (folder / FILE_NAME).touch()
    else:
        save_file({"block.sla.weight": torch.zeros(1)}, folder / "model-2.safetensors")
    assert folder_with_gates(Net(str(tmp_path))) == folder_with_gates(Net(tmp_path)) == str(folder)
    (folder / "config.json").write_text('{"_class_name": "Another"}')
    assert folder_with_gates(Net(str(tmp_path))) == ""


@pytest.mark.parametrize("name", [None, 3, "", "owner/model", "/none"])
def test_a_model_from_elsewhere_has_no_folder(name: Any) -> None:
    assert folder_with_gates(Net(name)) == ""
    assert folder_with_gates(object()) == ""
