"""Triton's interpreter, without what it does over and over."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["INTERPRETED", "patch_language_once"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton, which decides at its import, runs kernels in its interpreter in this process."""


def patch_language_once() -> None:
    """From here on, in this process, a launch patches each module of ``triton.language`` once.

    The interpreter does it again at every call of a device function, and searches the whole language for it: more than
    a third of its time. Nor does it compute any longer whether an integer overflows, which it asserts in debug mode
    alone: a third of the rest.
    """
    from dataclasses import replace

    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch = interpreter._patch_lang
    patched: set[int] = set()

    def once(function: Any) -> Any:
        names = function.__globals__.values()
        languages = {id(language) for language in (tl, tl.core) if any(value is language for value in names)}
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
