"""What PyTorch's compile caches must know of this package: a cached graph has our op's shapes and backward in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch.compiler.config as compiler_config

import sla_compile

__all__ = ["in_cache_key", "package_key"]

Function = TypeVar("Function", bound=Callable[..., Any])

_TRACED = ("ops/*.py", "common/*.py", "compat/*.py")
"""Files whose code ends up in a compiled graph. Kernels run behind the op, and so are always those of now."""


@cache
def package_key() -> str:
    """Version and source of what a compiled graph holds of this package; another one never shares an entry."""
    source = hashlib.sha256()
    package = Path(sla_compile.__file__).parent
    for file in sorted(file for pattern in _TRACED for file in package.glob(pattern)):
        source.update(file.read_bytes())
    return f"sla_compile {sla_compile.__version__} {source.hexdigest()}"


def in_cache_key(function: Function) -> Function:
    """``function``, with ``package_key`` in every key it makes for a compile cache, beside the user's own tag.

    Settings need no help: they are constants in the rewritten graph, which is in the key itself.
    """

    @wraps(function)
    def keyed(*args: Any, **kwargs: Any) -> Any:
        tag = compiler_config.cache_key_tag
        if package_key() not in tag:
            tag = f"{tag} {package_key()}".lstrip()
        with compiler_config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return function(*args, **kwargs)

    return keyed  # type: ignore[return-value]
