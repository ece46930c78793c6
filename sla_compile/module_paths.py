"""Module paths as in the plain model, without the prefixes that ``torch.compile`` and data-parallel wrappers add."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["module_paths"]

WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
"""Their wrapped module is the attribute ``module``; that of ``torch.compile``'s wrapper is ``_orig_mod``."""


def module_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without the names ``_orig_mod`` and ``module`` of wrappers.

    A wrapper and the module it wraps both come with the same path, the wrapper first.
    """
    paths: dict[str, str] = {}
    wrapped: set[str] = set()
    for name, module in model.named_modules():
        parent, _, child = name.rpartition(".")
        if name in wrapped or child == "_orig_mod":
            path = paths[parent]
        else:
            path = f"{paths[parent]}.{child}".lstrip(".") if name else ""
        paths[name] = path
        if isinstance(module, WRAPPERS):
            wrapped.add(f"{name}.module".lstrip("."))
        yield path, module
