"""Patterns of ``include``, ``exclude`` and ``overrides`` that do nothing, or not what they say, are told by name.

Patterns are of module paths in the whole model. ``prepare`` and ``explain`` know those. A compile knows the paths in
the module that Dynamo starts at, which may be a block compiled by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from sla_compile.compat import Frame, modules_under_way
from sla_compile.compiler.sites import Site
from sla_compile.config import SLAConfig
from sla_compile.config_values import nearest_hint
from sla_compile.gate import PREPARED, Gate
from sla_compile.memory import remember_told, was_told
from sla_compile.module_paths import module_paths
from sla_compile.user_warnings import UnmatchedPatternWarning, warn_user

__all__ = ["check_patterns", "warn_unmatched"]


def _patterns(config: SLAConfig) -> list[tuple[str, str]]:
    """Each pattern with the field that it stands in."""
    fields = (("include", config.include), ("exclude", config.exclude), ("overrides", config.overrides))
    return [(field, pattern) for field, patterns in fields for pattern in patterns if pattern != "*"]


def _matches(paths: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(path, pattern) for path in paths)


def _nearest(paths: Collection[str], pattern: str) -> str:
    if _matches(paths, below := f"{pattern}.*"):
        return f"; nearest: {below!r}"
    return nearest_hint(pattern, tuple(paths), always=True).replace("nearest known", "nearest")


def warn_unmatched(model: nn.Module, config: SLAConfig, paths: Collection[str]) -> None:
    """Warn of each pattern that matches none of ``paths``, those of all attention of ``model``."""
    for field, pattern in _patterns(config):
        if paths and not _matches(paths, pattern):
            _warn(model, field, pattern, paths)


def _warn(model: nn.Module, field: str, pattern: str, paths: Collection[str]) -> None:
    warn_user(
        f"{field} pattern {pattern!r} matches no attention of {type(model).__name__}{_nearest(paths, pattern)}",
        UnmatchedPatternWarning,
    )


def check_patterns(sites: Sequence[Site], config: SLAConfig, frame: Frame) -> None:
    """Warn of patterns that match nothing in the model that is compiled, once for each model.

    Raises ValueError where a part of a model is compiled by itself, without having been prepared, and a pattern means
    something else in the whole model: which of its blocks this is, or will be, nobody can tell.
    """
    patterns = _patterns(config)
    new = [site for site in sites if site.owner is not None and PREPARED not in site.owner.__dict__ and not site.gate]
    if not patterns or not new:
        return
    paths = {site.path for site in sites}
    unmatched = [(field, pattern) for field, pattern in patterns if not _matches(paths, pattern)]
    root = frame.root_module()
    if unmatched:
        inside = [site.path for site in new]
        for part in [root] if root is not None else [site.owner for site in new]:
            if part is not None:
                _refuse_paths_of_the_whole(part, inside if part is root else [""], unmatched)
    if root is None:
        return
    for field, pattern in unmatched:
        named = [path for path, module in module_paths(root) if path and not isinstance(module, Gate)]
        # After a graph break other attention is in other graphs. Wrong is what names no module, or one around some.
        around = any(fnmatchcase(path, pattern) and _matches(paths, f"{path}.*") for path in named)
        if (around or not _matches(named, pattern)) and not was_told(root, pattern):
            remember_told(root, pattern)
            _warn(root, field, pattern, paths)


def _refuse_paths_of_the_whole(part: nn.Module, inside: list[str], patterns: list[tuple[str, str]]) -> None:
    """Raise ValueError if a pattern matches a path in the model that calls ``part``, or in a module on the way there.

    ``inside`` are the paths in ``part``, which it does not match.
    """
    kind = type(part).__name__
    for outer in reversed([*modules_under_way()]):
        places = [place for place, module in module_paths(outer) if type(module) is type(part) and place]
        whole = [f"{place}.{path}".rstrip(".") for place in places for path in inside]
        for field, pattern in patterns:
            for path in whole:
                if fnmatchcase(path, pattern):
                    raise ValueError(
                        f"{field} pattern {pattern!r} matches {path!r} in {type(outer).__name__}, but a {kind} is "
                        f"compiled by itself, where that path is not known; accepted: prepare(model, ..., config=...) "
                        f"first, or a pattern of paths in {kind}{_nearest(inside, pattern)}"
                    )
