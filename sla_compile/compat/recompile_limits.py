"""Dynamo's limits of how often one code is compiled: who is told, and what counts."""

from __future__ import annotations

import logging
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

from sla_compile.compat.dynamo import backend_function, innermost_backend
from sla_compile.memory import is_our_backend, limit_callbacks, remember_limit_callback, settings_of_last_compile

__all__ = ["count_apart", "on_recompile_limit"]


def _watch_limits(record: logging.LogRecord) -> bool:
    """A filter of Dynamo's log, which is where it says that it compiles a function no more."""
    if str(record.msg).startswith("torch._dynamo hit config.") and isinstance(record.args, tuple) and _compiling_ours():
        limit, _, function = record.args[:3]
        for code, callback in limit_callbacks():
            if function == f"'{code.co_name}' ({code.co_filename}:{code.co_firstlineno})":
                callback(str(limit))
    return True


def on_recompile_limit(code: types.CodeType, callback: Callable[[str], None]) -> None:
    """Call ``callback`` with the name of a limit in ``torch._dynamo.config`` when a compile of ``code`` by a backend of
    ours reaches it: Dynamo runs it as it is written from then on.

    Remove when Dynamo has a public way to learn of it.
    """
    remember_limit_callback(code, callback)
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_watch_limits)


def _compiling_ours() -> bool:
    """False if Dynamo, further up the stack, compiles for the backend of another."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_compile" and "compiler_fn" in frame.f_locals:
            return is_our_backend(backend_function(frame.f_locals["compiler_fn"]))
        frame = frame.f_back
    return True


def count_apart(code: types.CodeType, compiler: Any, settings: str) -> None:
    """Let what is compiled for ``code`` with other settings than ``settings`` not count towards ``recompile_limit``.

    The limit is for one function that changes again and again, not for many modules that share its code: Dynamo does
    not count what it compiled for another module either, where it knows that by id. Remove when settings can be such a
    key of its cache (``torch.compile(isolate_recompiles=True)``, from torch 2.13 on, has one for each call of compile).
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    last = settings_of_last_compile(code, settings)
    for entry in _debug_get_cache_entry_list(code):
        guards: Any = entry.guard_manager
        if guards.extra_state is None or innermost_backend(entry.backend) != innermost_backend(compiler):
            continue
        if guards.__dict__.setdefault("sla_settings", last) == settings:
            guards.id_matched_objs.pop("", None)
        else:
            guards.id_matched_objs[""] = weakref.ref(count_apart)
