"""Which gate of a prepared model each gate of a file is for: by call site, as names go by the order of first calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Protocol, TypeVar

from sla_compile.gate import Gate, owner_path
from sla_compile.gate_settings import GateSpec

__all__ = ["arranged"]


class _Saved(Protocol):
    @property
    def spec(self) -> GateSpec: ...


T = TypeVar("T", bound=_Saved)


def arranged(saved: Mapping[str, T], found: Mapping[str, Gate], file: str) -> dict[str, T]:
    """The gates of ``file`` by the module path of the model's gate that each is for; its own where there is none.

    Gates whose call site is none of the model's, as the source was edited since, are for those that are left, in
    order. A file from before there were call sites may have one gate for each call where the model has one gate for
    all: then the first is for it, and the others are left out, with a warning.
    """
    result: dict[str, T] = {}
    words = []
    for owner in dict.fromkeys(map(owner_path, saved)):
        theirs = {path: gate for path, gate in saved.items() if owner_path(path) == owner}
        ours = {path: gate for path, gate in found.items() if owner_path(path) == owner}
        if any(gate.spec.call_site for gate in theirs.values()):
            names, word = _by_call_site(theirs, ours)
        else:
            names, word = _by_name(theirs, ours)
        result.update({name: theirs[path] for path, name in names.items()})
        words += [word] if word else []
    if words:
        warnings.warn(f"load of {file!r}: {'; '.join(words)}", stacklevel=3)
    return result


def _by_call_site(theirs: Mapping[str, T], ours: Mapping[str, Gate]) -> tuple[dict[str, str], str]:
    """The model's name for each of the file's, and what is not certain about it."""
    if len(theirs) != len(ours):  # what is missing or extra will be named
        return {path: path for path in theirs}, ""
    places = {gate.call_site: path for path, gate in ours.items() if gate.call_site}
    names = {path: places[gate.spec.call_site] for path, gate in theirs.items() if gate.spec.call_site in places}
    left = [path for path in theirs if path not in names]
    free = [path for path in ours if path not in names.values()]
    certain = not names or not left
    names.update(zip(left, free, strict=True))
    bound = ", ".join(f"{names[path]} (was {theirs[path].spec.call_site})" for path in left)
    word = f"gates of call sites that this source does not have are bound by their order: {bound}"
    return names, "" if certain else word


def _by_name(theirs: Mapping[str, T], ours: Mapping[str, Gate]) -> tuple[dict[str, str], str]:
    if len(ours) != 1 or len(theirs) == 1 or (only := next(iter(ours))) not in theirs:
        return {path: path for path in theirs}, ""
    others = ", ".join(path for path in theirs if path != only)
    return {only: only}, f"it has a gate for each call where the model has one for all; {only} is used, not {others}"
