"""Call sites: where, within its owner's forward, an attention is called; by this a gate knows its attention.

A call site is a text such as ``forward+4:8 > attend+2:11``: the user's functions from the forward of the owner down to
the call; of each the line, counted from its ``def``, and from Python 3.11 on the column, counted from the start of that
line. It says nothing of files and of what comes before or after these functions, so that it stays the same where a
model is moved or its file edited elsewhere. A loop is one call site, however often it runs.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType, FrameType

import torch
from torch import nn

from sla_compile.compat import forward_codes, is_attention_dispatch, plain_function_name

__all__ = ["LEVEL", "call_site", "running_frames", "traced_frames"]

LEVEL = " > "
"""Between the levels of a call site."""

_TORCH = os.path.dirname(torch.__file__) + os.sep
_UNINTERESTING = (contextlib.__file__, functools.__file__)
_FRAME = re.compile(r'\s*File "(.+)", line (\d+), in (.+)')
_CARETS = re.compile(r"\s*[~^]+")
_ANY_DEF = re.compile(r"\s*(async\s+)?def\s")
# Functions of their own up to Python 3.11 or for ever; they belong to the function that they are written in.
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


@dataclass(frozen=True)
class _Call:
    """One level of a stack: a line of a function, where the next level, or the attention, is called."""

    file: str
    line: int
    function: str
    column: int = 0
    """Counted from the first character of the line that is no blank; 0 where it is not known."""

    @functools.cached_property
    def first_line(self) -> int:
        """The line of the function's ``def``; 0 where there is no source."""
        named = re.compile(rf"\s*(async\s+)?def\s+{self.function}\b") if self.function.isidentifier() else _ANY_DEF
        lines = _source(self.file)[: self.line]
        return next((number for number in range(len(lines), 0, -1) if named.match(lines[number - 1])), 0)

    def runs(self, code: CodeType) -> bool:
        """Whether this is a line of ``code``, or of what resumes it after a graph break."""
        if (self.file, self.function) != (code.co_filename, code.co_name):
            return False
        lines = [line for _, _, line in code.co_lines() if line is not None]
        return min(lines) <= self.line <= max(lines)

    def __str__(self) -> str:
        return f"{self.function}+{self.line - self.first_line}" + (f":{self.column}" if self.column else "")


@functools.cache
def _source(file: str) -> Sequence[str]:
    """The lines of ``file`` as first seen: an edit while the process runs does not move what it has compiled."""
    return tuple(linecache.getlines(file))


def _column(file: str, line: int, absolute: int) -> int:
    lines = _source(file)
    text = lines[line - 1] if line <= len(lines) else ""
    return max(absolute - len(text) + len(text.lstrip()), 0)


def traced_frames(stack_trace: str) -> list[_Call]:
    """The stack in ``fx.Node.stack_trace``, as Dynamo writes it, outermost call first."""
    calls: list[_Call] = []
    open_for_carets = False
    for text in stack_trace.splitlines():
        if found := _FRAME.fullmatch(text):
            calls.append(_Call(found[1], int(found[2]), plain_function_name(found[3])))
            open_for_carets = True
        elif open_for_carets and _CARETS.fullmatch(text):
            open_for_carets = False
            call = calls[-1]
            now = linecache.getline(call.file, call.line)
            absolute = len(text) - len(text.lstrip()) - 4 + len(now) - len(now.lstrip())
            calls[-1] = _Call(call.file, call.line, call.function, _column(call.file, call.line, absolute))
    return calls


def running_frames(frame: FrameType | None) -> list[_Call]:
    """The same of a running ``frame`` and its callers."""
    calls: list[_Call] = []
    while frame is not None:
        code, column = frame.f_code, 0
        if sys.version_info >= (3, 11):
            position = list(code.co_positions())[frame.f_lasti // 2]
            lines = _source(code.co_filename)
            if position[2] is not None and frame.f_lineno <= len(lines):
                before = lines[frame.f_lineno - 1].encode()[: position[2]].decode(errors="ignore")
                column = _column(code.co_filename, frame.f_lineno, len(before))
        calls.append(_Call(code.co_filename, frame.f_lineno, code.co_name, column))
        frame = frame.f_back
    return calls[::-1]


def call_site(calls: Sequence[_Call], modules: Sequence[nn.Module]) -> str:
    """The call site of the attention that the innermost of ``calls`` calls.

    Args:
        calls: the stack, outermost call first.
        modules: the modules whose forwards run, outermost first; the last is the attention's owner. Empty: no module
            owns it, and the call site is the whole stack.
    """
    calls = [call for call in calls if not call.file.startswith(_TORCH) and call.file not in _UNINTERESTING]
    # Which kernel and which ranks diffusers takes is no other attention: a gate is its own on one GPU and on many.
    calls = [call for call in calls if not is_attention_dispatch(call.file)]
    start = 0
    for level, module in enumerate(modules, 1):
        if (found := _forward_in(calls, module, start)) is not None:
            start = found if level == len(modules) else found + 1
    merged: list[_Call] = []
    for call in calls[start:]:
        if call.function in _COMPREHENSIONS and merged:
            outer = merged[-1]
            if (call.file, call.first_line) == (outer.file, outer.first_line):
                merged[-1] = _Call(call.file, call.line, outer.function, call.column)
                continue
        merged.append(call)
    return LEVEL.join(map(str, merged)) or "forward"  # PyTorch's own modules hide their lines


def _forward_in(calls: Sequence[_Call], module: nn.Module, start: int) -> int | None:
    """The first of ``calls``, from ``start`` on, that is of ``module``'s forward (or of what that wraps)."""
    for code in reversed(list(forward_codes(module))):  # of a wrapped one that of the innermost first
        for number in range(start, len(calls)):
            if calls[number].runs(code):
                return number
    return None
