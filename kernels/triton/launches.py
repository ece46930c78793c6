"""How the Triton kernels are launched, and a user's file of launches that take the place of the shipped ones.

``SLA_COMPILE_LAUNCHES`` names the file, which ``python -m sla_compile tune`` writes:

    {"8.9": {"forward": {"128": {"half": {"tile_q": 64, "tile_k": 32, "chunk": 64, "warps": 4, "stages": 2}}}}}

by compute capability, kernel, head dimension in registers (64: up to 64) and inputs, "half" of 16 bits and "single" of
32. What it does not name keeps the shipped launch, in ``tiles.py``. It is read once, before the first launch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = [
    "KERNELS",
    "VARIABLE",
    "Key",
    "Launch",
    "check_environment",
    "content",
    "from_environment",
    "merge",
    "mistakes",
    "on_hopper",
    "read",
    "replaced",
    "trying",
]

VARIABLE = "SLA_COMPILE_LAUNCHES"
KERNELS = ("states", "forward", "linear_backward", "backward_query", "backward_key", "gate")
ROWS = (64, 128, 256)
PRECISIONS = ("half", "single")

Key = tuple[str, int, str]
"""A kernel, a head dimension in registers, of ``ROWS``, and one of ``PRECISIONS``."""


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched: largest tile of queries and of keys, columns a step, warps, stages."""

    tile_q: int
    tile_k: int
    chunk: int
    warps: int
    stages: int


_LIMITS = {"tile_q": (16, 256), "tile_k": (16, 256), "chunk": (16, 256), "warps": (1, 16), "stages": (1, 8)}


def mistakes(fields: Mapping[str, Any]) -> list[str]:
    """What no kernel accepts of the ``fields`` of a launch."""
    found = [f"{name!r} is no field; accepted: {', '.join(_LIMITS)}" for name in fields if name not in _LIMITS]
    for name, (least, most) in _LIMITS.items():
        value = fields.get(name)
        powers = name != "stages"
        accepted = f"accepted: {'a power of two' if powers else 'an integer'} from {least} to {most}"
        if name not in fields:
            found.append(f"{name} is missing; {accepted}")
        elif type(value) is not int or not least <= value <= most or (powers and value & (value - 1)):
            found.append(f"{name} is {value!r}; {accepted}")
    return found


_LEVELS = (
    ("a compute capability, as '8.9'", r"\d+\.\d+"),
    (", ".join(KERNELS), "|".join(KERNELS)),
    (", ".join(map(str, ROWS)), "|".join(map(str, ROWS))),
    (", ".join(PRECISIONS), "|".join(PRECISIONS)),
)


def _entries(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each launch's fields with the names that lead to it; ValueError for a name that is none."""
    entry = f"entry {'/'.join(place)}" if place else "the file"
    if not isinstance(value, dict):
        raise ValueError(f"{entry} is {json.dumps(value)[:60]}; accepted: an object")
    if len(place) == len(_LEVELS):
        yield place, value
        return
    accepted, pattern = _LEVELS[len(place)]
    for name, inner in value.items():
        if not re.fullmatch(pattern, name, re.ASCII):
            raise ValueError(f"{entry} has {name!r}; accepted: {accepted}")
        yield from _entries(inner, (*place, name))


def read(path: str) -> dict[str, dict[Key, Launch]]:
    """The launches in a file, by compute capability; ValueError with the file, the entry, the value and what is
    accepted."""
    launches: dict[str, dict[Key, Launch]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        for (capability, kernel, row, precision), fields in _entries(data):
            if wrong := mistakes(fields):
                raise ValueError(f"entry {capability}/{kernel}/{row}/{precision}: {wrong[0]}")
            launches.setdefault(capability, {})[kernel, int(row), precision] = Launch(**fields)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; accepted: a file that `tune` wrote") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no JSON ({error}); accepted: a file that `tune` wrote") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return launches


def merge(path: str, capability: str, found: Mapping[Key, Launch | None]) -> None:
    """Put ``found`` in the file in one step, whatever else it has kept; None takes an entry out."""
    launches = read(path) if os.path.exists(path) else {}
    launches[capability] = {
        key: launch for key, launch in {**launches.get(capability, {}), **found}.items() if launch is not None
    }
    data: dict[str, Any] = {}
    for major_minor, entries in sorted(launches.items()):
        for (kernel, row, precision), launch in sorted(entries.items()):
            rows = data.setdefault(major_minor, {}).setdefault(kernel, {})
            rows.setdefault(str(row), {})[precision] = asdict(launch)
    target = os.path.realpath(path)
    temporary = f"{target}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump(data, file, indent=2)
            file.write("\n")
        os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


@functools.cache
def from_environment() -> dict[str, dict[Key, Launch]]:
    """The launches in the file that ``SLA_COMPILE_LAUNCHES`` names, read once; ValueError as from `read`."""
    path = os.environ.get(VARIABLE)
    if not path:
        return {}
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from error


def content() -> bytes:
    """What stands in that file now; nothing where the variable is not set."""
    path = os.environ.get(VARIABLE)
    if not path:
        return b""
    with open(path, "rb") as file:
        return file.read()


_tried: dict[Key, Launch] | None = None
_NOTHING: dict[Key, Launch] = {}


def replaced() -> Mapping[Key, Launch]:
    """The launches that take the place of shipped ones on the current device."""
    if _tried is not None:
        return _tried
    launches = from_environment()
    if not launches:
        return _NOTHING
    return launches.get(_capability(torch.cuda.current_device()), _NOTHING)


def check_environment() -> None:
    """Raise the ValueError of `from_environment`, if there is one."""
    if _tried is None:
        from_environment()


def on_hopper() -> bool:
    """Whether the current device is a Hopper GPU; no where there is none."""
    try:
        return torch.version.hip is None and _capability(torch.cuda.current_device()).startswith("9.")
    except (AssertionError, RuntimeError):
        return False


@functools.cache
def _capability(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


@contextlib.contextmanager
def trying(launches: dict[Key, Launch]) -> Iterator[None]:
    """Under this, ``launches`` take the place of shipped ones on every device, and the user's file does not."""
    global _tried
    before, _tried = _tried, launches
    try:
        yield
    finally:
        _tried = before
