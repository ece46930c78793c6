"""What this process remembers from compile to compile: all of it, and until when.

A backend sees one graph at a time, but some questions span several: was an attention kept dense in code that Dynamo may
still serve, which attentions of an owner came before a graph break, what was compiled for a module. The answers live
here and nowhere else. Keys are held weakly, so an entry goes, at the latest, with its module, class or code object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from sla_compile.compiler.site_report import GraphBreak, SiteReport
    from sla_compile.gate_settings import NumberedSite

__all__ = [
    "accounts_by_code",
    "accounts_of_class",
    "accounts_of_owner",
    "await_marker",
    "breaks_in",
    "forget_awaited",
    "is_awaited",
    "limit_callbacks",
    "remember_break",
    "remember_class_account",
    "remember_code_accounts",
    "remember_dense",
    "remember_given",
    "remember_injected",
    "remember_limit_callback",
    "remember_owner_account",
    "remember_site",
    "remember_told",
    "remembered_sites",
    "take_dense_code",
    "was_given",
    "was_injected",
    "was_told",
]

Accounts = tuple["SiteReport", ...]
"""The reports of one attention, one for each call in a forward."""

# Gates just injected, whose marker the restarted frame must show; until that frame comes again.
_awaited_gates: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
# Gates that compiles made: one may add to its siblings' then, but not to those of a model that was prepared or loaded.
_injected: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Code compiled while an attention of the owner was dense; until the owner gets a gate, when it must not serve any more.
_dense_code: weakref.WeakKeyDictionary[nn.Module, set[CodeType]] = weakref.WeakKeyDictionary()
# The attentions of an owner by number, with or without a gate: each keeps its number, whatever graph it comes in next.
_sites: weakref.WeakKeyDictionary[nn.Module, dict[int, NumberedSite]] = weakref.WeakKeyDictionary()
# Whom to tell when Dynamo reaches a recompile limit and compiles a code no more.
_limit_callbacks: weakref.WeakKeyDictionary[CodeType, Callable[[str], None]] = weakref.WeakKeyDictionary()
# For `report`: what was compiled last for each site, by its owner; by class and settings, for siblings that run code
# compiled for another of their class; and by code, where no module owns the attention.
_by_owner: weakref.WeakKeyDictionary[nn.Module, dict[int, Accounts]] = weakref.WeakKeyDictionary()
_by_class: weakref.WeakKeyDictionary[type, dict[tuple[int, str], Accounts]] = weakref.WeakKeyDictionary()
_by_code: weakref.WeakKeyDictionary[CodeType, list[SiteReport]] = weakref.WeakKeyDictionary()
# For `report`: the graph breaks in the forward of a module.
_breaks: weakref.WeakKeyDictionary[nn.Module, dict[GraphBreak, None]] = weakref.WeakKeyDictionary()
# Warnings that are given once for each model.
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
# Warnings that are given once in a process.
_warned: set[str] = set()


def await_marker(owner: nn.Module, ordinal: int) -> None:
    """A gate was injected for attention ``ordinal`` of ``owner``: the restarted frame must show its marker."""
    _awaited_gates.setdefault(owner, set()).add(ordinal)


def is_awaited(owner: nn.Module, ordinal: int) -> bool:
    """True if that gate was injected and its frame was not seen again yet."""
    return ordinal in _awaited_gates.get(owner, ())


def forget_awaited(owner: nn.Module, ordinal: int) -> None:
    """The frame came again; no frame is restarted twice for one gate."""
    _awaited_gates.get(owner, set()).discard(ordinal)


def remember_dense(owner: nn.Module, code: CodeType) -> None:
    """``code`` was compiled with an attention of ``owner`` left dense."""
    _dense_code.setdefault(owner, set()).add(code)


def remember_injected(gate: nn.Module) -> None:
    """A compile made ``gate``, not ``prepare`` or a file."""
    _injected.add(gate)


def was_injected(gate: nn.Module) -> bool:
    """True if a compile of this process made ``gate``; False of a copy of it."""
    return gate in _injected


def take_dense_code(owner: nn.Module) -> set[CodeType]:
    """The code compiled with an attention of ``owner`` left dense, forgotten with this call."""
    return _dense_code.pop(owner, set())


def remember_site(owner: nn.Module, ordinal: int, site: NumberedSite) -> None:
    """The attention of ``owner`` at this call site has the number ``ordinal``."""
    _sites.setdefault(owner, {})[ordinal] = site


def remembered_sites(owner: nn.Module) -> dict[int, NumberedSite]:
    """The attentions of ``owner`` met so far, by number."""
    return dict(_sites.get(owner, {}))


def remember_limit_callback(code: CodeType, callback: Callable[[str], None]) -> None:
    """Call ``callback`` with the limit's name when Dynamo compiles ``code`` no more."""
    _limit_callbacks[code] = callback


def limit_callbacks() -> Iterator[tuple[CodeType, Callable[[str], None]]]:
    """Every code with such a callback."""
    yield from list(_limit_callbacks.items())


def remember_owner_account(owner: nn.Module, ordinal: int, accounts: Accounts) -> None:
    """What was compiled last for attention ``ordinal`` of ``owner``."""
    _by_owner.setdefault(owner, {})[ordinal] = accounts


def accounts_of_owner(owner: nn.Module) -> dict[int, Accounts]:
    """What was compiled last for each attention of ``owner``, by ordinal."""
    return dict(_by_owner.get(owner, {}))


def remember_class_account(kind: type, ordinal: int, settings: str, accounts: Accounts) -> None:
    """What was compiled last for attention ``ordinal`` of an owner of class ``kind`` with these settings."""
    _by_class.setdefault(kind, {})[ordinal, settings] = accounts


def accounts_of_class(kind: type, ordinal: int, settings: str) -> Accounts | None:
    """The reverse: modules that run code compiled for another of their class have no entry of their own."""
    return _by_class.get(kind, {}).get((ordinal, settings))


def remember_code_accounts(code: CodeType, accounts: list[SiteReport]) -> None:
    """Attention in the graph of ``code`` that no module owns."""
    if accounts:
        _by_code[code] = accounts
    else:
        _by_code.pop(code, None)


def accounts_by_code() -> Iterator[tuple[CodeType, list[SiteReport]]]:
    """Every code with such attention."""
    yield from list(_by_code.items())


def remember_break(root: nn.Module, found: GraphBreak) -> None:
    """A graph of the forward of ``root`` ended in a graph break."""
    _breaks.setdefault(root, {})[found] = None


def breaks_in(module: nn.Module) -> list[GraphBreak]:
    """The graph breaks in the forward of ``module`` itself, each once."""
    return list(_breaks.get(module, ()))


def was_given(warning: str) -> bool:
    """True if this process has given ``warning`` already."""
    return warning in _warned


def remember_given(warning: str) -> None:
    """``warning`` is given once in a process, and now was."""
    _warned.add(warning)


def was_told(model: nn.Module, warning: str) -> bool:
    """True if ``warning`` was given for ``model`` already."""
    return warning in _told.get(model, ())


def remember_told(model: nn.Module, warning: str) -> None:
    """``warning`` is given once for each model, and now was for ``model``."""
    _told.setdefault(model, set()).add(warning)
