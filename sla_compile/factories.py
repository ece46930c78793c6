"""The factory that a command line names, ``package.module:name``: imported, called, and what it returns read."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["UsageError", "call_factory", "error_line", "key_values", "model_and_inputs"]


class UsageError(Exception):
    """A mistake in the command line or in what it names; `main` prints it in one line."""


def call_factory(name: str, given: Sequence[str]) -> Any:
    """What the factory ``package.module:name`` returns, called with the ``--args`` that were ``given``."""
    factory = _import_factory(name)
    positional = [_json_or_text(text) for text in given if "=" not in text]
    keywords = key_values("--args", [text for text in given if "=" in text])
    try:
        return factory(*positional, **keywords)
    except Exception as error:
        raise UsageError(f"{name} raised {error_line(error)}") from error


def _import_factory(name: str) -> Any:
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise UsageError(f"FACTORY: got {name!r}; accepted: package.module:factory")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        where = "" if f"{module_name}.".startswith(f"{error.name}.") else f", needed by {module_name!r}"
        raise UsageError(f"no module {error.name!r}{where} (searched from {os.getcwd()})") from error
    except Exception as error:
        raise UsageError(f"import of {module_name!r} raised {error_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            import difflib

            close = difflib.get_close_matches(part, dir(found), 1)
            nearest = f"; nearest known: {close[0]!r}" if close else ""
            raise UsageError(f"no factory {path!r} in {module_name!r}{nearest}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{name} is a {type(found).__name__}; accepted: a callable")
    return found


def model_and_inputs(name: str, made: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Model, args and kwargs, from what the factory ``name`` returned (``made``)."""
    if isinstance(made, nn.Module) and hasattr(made, "example_inputs"):
        inputs: Any = made.example_inputs
        made = (made, (), inputs) if isinstance(inputs, Mapping) else (made, inputs)
    if isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module):
        model, args, kwargs = (*made, {})[:3]
        if isinstance(args, tuple | list) and isinstance(kwargs, Mapping):
            return model, tuple(args), dict(kwargs)
    kinds = type(made).__name__
    if isinstance(made, tuple):
        kinds = f"a tuple of ({', '.join(type(item).__name__ for item in made)})"
    raise UsageError(
        f"{name} returned {kinds}; accepted: (model, args tuple), (model, args tuple, kwargs dict), "
        f"or a model with an attribute example_inputs"
    )


def key_values(option: str, texts: Sequence[str]) -> dict[str, Any]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UsageError(f"{option}: got {text!r}; accepted: KEY=VALUE")
        pairs[key] = _json_or_text(value)
    return pairs


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def error_line(error: Exception) -> str:
    """Class, first line of the message, and file and line that raised, in one line."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}: {message}{place}"
