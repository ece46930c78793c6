"""Triton's interpreter, without what it does over and over."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["INTERPRETED", "speed_up_interpreter"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton, which decides at its import, runs kernels in its interpreter in this process."""


def speed_up_interpreter() -> None:
    """From here on, in this process, the interpreter does once what it does at every operation and call.

    Nor does it compute any longer whether an integer overflows, which it asserts in debug mode alone.
    """
    from dataclasses import replace

    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    _patch_language_once()
    _make_types_once()


def _patch_language_once() -> None:
    """A launch patches each module of ``triton.language`` once.

    The interpreter does it again at every call of a device function, and searches the whole language for it.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[int] = set()
    named: dict[str, set[int]] = {}

    def once(function: Any) -> Any:
        if function.__module__ not in named:
            names = function.__globals__.values()
            named[function.__module__] = {id(x) for x in (tl, tl.core) if any(value is x for value in names)}
        languages = named[function.__module__]
        if patched and languages <= patched:
            return None  # the caller of a device function does not look at it
        scope, first = patch(function), not patched
        patched.update(languages)
        if first:
            restore = scope.restore

            def restored() -> None:
                patched.clear()
                restore()

            scope.restore = restored
        return scope

    interpreter._patch_lang = once


def _make_types_once() -> None:
    """What follows from a type alone is found once for each: every operation makes it for its result."""
    from triton.language import core
    from triton.runtime import interpreter

    numpy_of, make_block, make_tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    numpy_types: dict[str, Any] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def numpy_type(kind: Any) -> Any:
        if kind.name not in numpy_types:
            numpy_types[kind.name] = numpy_of(kind)
        return numpy_types[kind.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = {
                name: value for name, value in self.__dict__.items() if name not in ("handle", "type")
            }
        self.__dict__.update(tensors[type.name], handle=handle, type=type)

    interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__ = numpy_type, block, tensor
