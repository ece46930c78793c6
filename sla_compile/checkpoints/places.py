"""Where a file of gates is: a path of the user's as the file that is read or replaced, and what a folder holds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sla_compile.config_values import short

__all__ = ["FILE_NAME", "file_to_read", "folder_with_gates", "is_gate_tensor", "path_text", "replace_file"]

FILE_NAME = "sla_gates.safetensors"
"""The file that ``save`` writes into a folder, and that ``load`` finds there."""

KINDS = {stat.S_IFCHR: "a character device", stat.S_IFBLK: "a block device", stat.S_IFIFO: "a named pipe"}
KINDS |= {stat.S_IFSOCK: "a socket"}
MOST_FILES = 1000
"""Files of a folder that are looked into."""


def is_gate_tensor(name: str) -> bool:
    """Whether ``name`` is that of a parameter of a gate in a state dict."""
    return re.fullmatch(r"(.*\.)?sla(_[1-9]\d*)?\.(.*\.)?(weight|bias|log_scale|shift|sparsity)", name) is not None


def path_text(action: str, path: Any) -> str:
    """``path`` as a str; TypeError where it is none (bytes, say), ValueError where it is empty or no path at all."""
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        raise TypeError(f"{action}: got the path {short(path)} ({type(path).__name__}); accepted: a str or os.PathLike")
    if not name or "\0" in name:
        raise ValueError(f"{action}: got the path {short(name)}; accepted: the path of a file, or of a folder")
    return name


def replace_file(path: Any, content: bytes) -> None:
    """Replace ``path`` (or what it links to; in a folder, `FILE_NAME`) in one step: a crash leaves the old or the new.

    An existing file keeps its mode, and its owner where that is allowed. TypeError, ValueError, FileNotFoundError,
    IsADirectoryError or another OSError, with the path as it was given, where it cannot be done.
    """
    name = path_text("save", path)
    is_folder = os.path.isdir(name) or name.endswith(os.sep)
    target = os.path.realpath(os.path.join(name, FILE_NAME) if is_folder else name)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"save to {name!r}: there is no folder {folder!r}")
    old = os.stat(target) if os.path.lexists(target) else None
    if old is not None and stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(f"save to {name!r}: {target!r} is a folder; accepted: a file")
    if old is not None and not stat.S_ISREG(old.st_mode):
        kind = KINDS.get(stat.S_IFMT(old.st_mode), "no regular file")
        raise ValueError(f"save to {name!r}: it is {kind}; accepted: a regular file, or a new one")
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        _write_new(temporary, content, old)
        os.replace(temporary, target)
    except OSError as error:
        if error.filename == temporary:
            raise type(error)(error.errno, error.strerror, name) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write_new(path: str, content: bytes, like: os.stat_result | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if like is None else 0o600)
    with open(descriptor, "wb") as handle:
        if like is not None:
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, like.st_uid, like.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
        handle.write(content)
        handle.flush()
        os.fsync(descriptor)


def file_to_read(path: Any) -> str:
    """The file of gates at ``path``, or in the folder ``path``; FileNotFoundError or ValueError where there is none."""
    name = path_text("load", path)
    if os.path.isfile(name):
        return name
    if not os.path.isdir(name):
        if os.path.exists(name):
            raise ValueError(f"load: {name!r} is no file; accepted: a file that sla_compile.save wrote")
        raise FileNotFoundError(f"load: no file {name!r}")
    inside = os.path.join(name, FILE_NAME)
    if os.path.isfile(inside):
        return inside
    below = sorted(found.parent.name for found in Path(name).glob(f"*/{FILE_NAME}"))
    hint = f"; there is one in {below[0]!r}" if below else ""
    if not below and any(map(is_gate_tensor, _tensor_names(Path(name)))):
        hint = "; its weights hold gates, without their settings: prepare the model, then load_state_dict"
    raise FileNotFoundError(f"load: no {FILE_NAME!r} in the folder {name!r}{hint}")


def folder_with_gates(model: Any) -> str:
    """The folder that ``model`` says it was loaded from (diffusers' ``from_pretrained``), if gates are there; or ""."""
    config = getattr(model, "config", None)
    name = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
    if not isinstance(name, str | os.PathLike) or not name or not os.path.isdir(name):
        return ""
    for folder in (Path(name), *sorted(Path(name).iterdir())):  # a pipeline's folder has one of each model's name
        if _holds(folder, type(model).__name__) and (
            (folder / FILE_NAME).is_file() or any(map(is_gate_tensor, _tensor_names(folder)))
        ):
            return str(folder)
    return ""


def _holds(folder: Path, kind: str) -> bool:
    """Whether ``folder`` has the configuration of a model of class ``kind``."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        data = json.loads((folder / "config.json").read_text())
        return isinstance(data, dict) and data.get("_class_name") == kind
    return False


def _tensor_names(folder: Path) -> Iterator[str]:
    """The names of the tensors in the safetensors files of ``folder``; their headers alone are read."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors"))[:MOST_FILES]:
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, framework="pt") as opened:
            yield from opened.keys()
