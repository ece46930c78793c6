"""Paths of modules as the model itself has them, whatever has been wrapped around it or a part of it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["module_paths"]

WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
"""Modules that hold the one they wrap as ``module``; ``torch.compile``'s holds it as ``_orig_mod``."""


def module_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without what ``torch.compile`` and DistributedDataParallel put into names.

    A wrapper and the module inside have one path, the wrapper first.
    """
    paths: dict[str, str] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        outer, _, child = name.rpartition(".")
        if name in inside or child == "_orig_mod":
            path = paths[outer]
        else:
            path = f"{paths[outer]}.{child}".lstrip(".") if name else ""
        paths[name] = path
        if isinstance(module, WRAPPERS):
            inside.add(f"{name}.module".lstrip("."))
        yield path, module
