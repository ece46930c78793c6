"""What this process remembers from compile to compile: all of it, and until when.

A backend sees one graph at a time, but some questions span several: was an attention kept dense in code that Dynamo may
still serve, which attentions of an owner came before a graph break, what was compiled for a module. The answers live
here and nowhere else. Keys are held weakly, so an entry goes, at the latest, with its module, class or code object.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from sla_compile.compiler.site_report import GraphBreak, SiteReport
    from sla_compile.gate_settings import NumberedSite

OwnerKey = tuple["weakref.ref[nn.Module] | None", int]
"""The module at whose forward Dynamo started (None: at a function), and which attention of its owner."""
Unproven = tuple["weakref.ref[nn.Module]", "weakref.ref[nn.Module]", int]
"""The module that is compiled, or one that will share its code; in it, the owner of a gate, and which attention."""
ClassKey = tuple[str, int, str]
"""The owner's path in the module at whose forward Dynamo started, which attention, and the settings of its gate."""

__all__ = [
    "accounts_by_code",
    "accounts_of_class",
    "accounts_of_owner",
    "await_marker",
    "breaks_in",
    "clear_dense_run",
    "count_run",
    "dense_run",
    "eager_runs_are_measured",
    "forget_awaited",
    "gate_folder",
    "is_awaited",
    "is_our_backend",
    "last_start",
    "limit_callbacks",
    "ran_since_eager_start",
    "ran_since_start",
    "remember_backend",
    "remember_break",
    "remember_class_account",
    "remember_code_accounts",
    "remember_dense",
    "remember_dense_run",
    "remember_eager_start",
    "remember_gate_folder",
    "remember_injected",
    "remember_limit_callback",
    "remember_owner_account",
    "remember_site",
    "remember_start",
    "remember_told",
    "remember_unproven",
    "remembered_sites",
    "settings_of_last_compile",
    "settings_of_owner",
    "take_dense_code",
    "take_unproven",
    "was_injected",
    "was_told",
]

Accounts = tuple["SiteReport", ...]
"""The reports of one attention, one for each call in a forward."""

# Gates just injected, whose marker the restarted frame must show; until that frame comes again.
_awaited_gates: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
# Gates that compiles made: one may add to its siblings' then, but not to those of a model that was prepared or loaded.
_injected: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Owners and attentions that the compile of a code gave a gate; until it has succeeded, or failed and they are gone.
_unproven: weakref.WeakKeyDictionary[CodeType, list[Unproven]] = weakref.WeakKeyDictionary()
# Code compiled while an attention of the owner was dense; until the owner gets a gate, when it must not serve any more.
_dense_code: weakref.WeakKeyDictionary[nn.Module, set[CodeType]] = weakref.WeakKeyDictionary()
# The attentions of an owner by number, with or without a gate: each keeps its number, whatever graph it comes in next.
_sites: weakref.WeakKeyDictionary[nn.Module, dict[int, NumberedSite]] = weakref.WeakKeyDictionary()
# Whom to tell when Dynamo reaches a recompile limit and compiles a code no more.
_limit_callbacks: weakref.WeakKeyDictionary[CodeType, Callable[[str], None]] = weakref.WeakKeyDictionary()
# The settings of the gates that a code was compiled for last: its entry in Dynamo's cache is made only after that.
_last_settings: weakref.WeakKeyDictionary[CodeType, str] = weakref.WeakKeyDictionary()
# For `report`: what was compiled for each site, by its owner and the module at which Dynamo started; by the class of
# that module, for siblings that run code compiled for another of their class; and by code, where no module owns the
# attention. The last of each list was compiled last; the others are for other sizes and may still serve.
_by_owner: weakref.WeakKeyDictionary[nn.Module, dict[OwnerKey, list[Accounts]]] = weakref.WeakKeyDictionary()
_owner_settings: weakref.WeakKeyDictionary[nn.Module, dict[OwnerKey, str]] = weakref.WeakKeyDictionary()
_by_class: weakref.WeakKeyDictionary[type, dict[ClassKey, list[Accounts]]] = weakref.WeakKeyDictionary()
_by_code: weakref.WeakKeyDictionary[CodeType, list[SiteReport]] = weakref.WeakKeyDictionary()
# For `report`: the graph breaks in the forward of a module.
_breaks: weakref.WeakKeyDictionary[nn.Module, dict[GraphBreak, None]] = weakref.WeakKeyDictionary()
# Where gates lie that the module, or an owner in it, was not loaded with; "" where there are none, or it was told.
_gate_folders: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
# Warnings that are given once for a module, by their kind.
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
# The backend functions whose compiles reach this package: ours, and those of users that call it.
_backends: weakref.WeakSet[Any] = weakref.WeakSet()
# The modules that were called from Python within a compiled call, which is where Dynamo starts: when, as a running
# number, and how often the op had run by then.
_starts: weakref.WeakKeyDictionary[nn.Module, tuple[int, int]] = weakref.WeakKeyDictionary()
# How often the op had run when an owner was last called with no compile around it.
_eager_starts: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
# Owners whose last call from Python ran no attention of theirs in a graph of ours: when, and whether that call was
# within a compiled one.
_dense_runs: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()
_measuring = [0]  # how many contexts now run models eagerly to measure them
_clock = itertools.count(1)
_runs = [0]  # of the op sla::forward in this process


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


def remember_unproven(code: CodeType, root: nn.Module, owner: nn.Module, ordinal: int) -> None:
    """The compile of ``code`` gave attention ``ordinal`` of ``owner``, in ``root``, a gate, and may fail yet."""
    _unproven.setdefault(code, []).append((weakref.ref(root), weakref.ref(owner), ordinal))


def take_unproven(code: CodeType) -> list[tuple[nn.Module, nn.Module, int]]:
    """Those that are alive, forgotten with this call."""
    found = ((root(), owner(), ordinal) for root, owner, ordinal in _unproven.pop(code, []))
    return [(root, owner, ordinal) for root, owner, ordinal in found if root is not None and owner is not None]


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


def settings_of_last_compile(code: CodeType, now: str) -> str:
    """The settings that ``code`` was compiled for before this, which is for those of ``now``; "" for the first time."""
    last = _last_settings.get(code, "")
    _last_settings[code] = now
    return last


def remember_owner_account(
    owner: nn.Module, root: nn.Module | None, ordinal: int, accounts: Accounts, settings: str = ""
) -> None:
    """What was compiled for attention ``ordinal`` of ``owner`` in a frame of ``root``'s forward, or of a function; at
    last for a gate of these settings."""
    key = (None if root is None else weakref.ref(root), ordinal)
    _owner_settings.setdefault(owner, {})[key] = settings
    _add(_by_owner.setdefault(owner, {}).setdefault(key, []), accounts)


def accounts_of_owner(owner: nn.Module) -> dict[OwnerKey, list[Accounts]]:
    """What was compiled for each attention of ``owner``."""
    return dict(_by_owner.get(owner, {}))


def settings_of_owner(owner: nn.Module) -> dict[OwnerKey, str]:
    """The settings of the gates that it was compiled for."""
    return dict(_owner_settings.get(owner, {}))


def remember_class_account(kind: type, path: str, ordinal: int, settings: str, accounts: Accounts) -> None:
    """What was compiled for an attention, of these settings, of the module at ``path`` in one of class ``kind``."""
    _add(_by_class.setdefault(kind, {}).setdefault((path, ordinal, settings), []), accounts)


def accounts_of_class(kind: type) -> dict[ClassKey, list[Accounts]]:
    """The reverse: modules that run code compiled for another of their class have no entry of their own."""
    return dict(_by_class.get(kind, {}))


def _add(known: list[Accounts], accounts: Accounts) -> None:
    """Append ``accounts``; keep of the earlier ones those with another outcome at other sizes."""
    new = accounts[-1]
    known[:] = [old for old in known if _outcome(old[-1]) != _outcome(new) and old[-1].traced != new.traced]
    known.append(accounts)


def _outcome(report: SiteReport) -> tuple[bool, str]:
    return report.rewritten, "" if report.rewritten else report.reason


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


def remember_gate_folder(module: nn.Module, folder: str) -> None:
    """``module`` comes from ``folder``, where gates are; "" for none, or none that have to be told of."""
    _gate_folders[module] = folder


def gate_folder(module: nn.Module) -> str | None:
    """The reverse; None where nobody has looked."""
    return _gate_folders.get(module)


def was_told(module: nn.Module, warning: str) -> bool:
    """True if ``warning`` was given for ``module`` already."""
    return warning in _told.get(module, ())


def remember_told(module: nn.Module, warning: str) -> None:
    """``warning`` is given once for ``module``, and now was."""
    _told.setdefault(module, set()).add(warning)


def remember_backend(function: Callable[..., Any]) -> None:
    """Compiles by the backend ``function`` reach this package."""
    with contextlib.suppress(TypeError):  # one that has no weak references or no hash is not remembered
        _backends.add(function)


def is_our_backend(function: Any) -> bool:
    """True if compiles by the backend ``function`` are known to reach this package."""
    with contextlib.suppress(TypeError):
        return function in _backends
    return False


def remember_start(module: nn.Module) -> None:
    """``module`` is called from Python within a compiled call."""
    _starts[module] = next(_clock), _runs[0]


def last_start(module: nn.Module) -> int:
    """When ``module`` was called so last, as a running number; 0 for never."""
    return _starts.get(module, (0, 0))[0]


def ran_since_start(module: nn.Module) -> bool:
    """True if the op ran since then."""
    return _runs[0] > _starts.get(module, (0, 0))[1]


def remember_eager_start(owner: nn.Module) -> None:
    """``owner`` is called, and nothing around it is compiled."""
    _eager_starts[owner] = _runs[0]


def ran_since_eager_start(owner: nn.Module) -> bool:
    """True if the op ran since then, or nobody saw that start."""
    return _runs[0] > _eager_starts.get(owner, -1)


@contextlib.contextmanager
def eager_runs_are_measured() -> Iterator[None]:
    """Within this context, calls of models that are not compiled are ours, and nothing to remember."""
    _measuring[0] += 1
    try:
        yield
    finally:
        _measuring[0] -= 1


def remember_dense_run(owner: nn.Module, *, compiled: bool) -> None:
    """The call of ``owner`` that just ended, ``compiled`` or not, ran its attention outside every graph of ours."""
    if compiled or not _measuring[0]:
        _dense_runs[owner] = next(_clock), compiled


def clear_dense_run(owner: nn.Module) -> None:
    """The call of ``owner`` that just ended ran the op."""
    _dense_runs.pop(owner, None)


def dense_run(owner: nn.Module) -> tuple[int, bool]:
    """When ``owner`` last ran so, if its last call from Python did, else 0; and whether that call was compiled."""
    return _dense_runs.get(owner, (0, False))


def count_run() -> None:
    """The op ran once more (not called where a CUDA graph replays it)."""
    _runs[0] += 1
