"""Who looks at each run of the op, until they stop: counters that a user asked for."""

from __future__ import annotations

from collections.abc import Callable

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult

__all__ = ["RunWatcher", "show_run", "unwatch_runs", "watch_runs"]

RunWatcher = Callable[[AttentionInputs, ForwardResult], None]
"""Is shown what a run of the op took and gave; it must not wait for the device."""

_watchers: list[RunWatcher] = []


def watch_runs(watcher: RunWatcher) -> None:
    """Show ``watcher`` every run of the op from now on."""
    _watchers.append(watcher)


def unwatch_runs(watcher: RunWatcher) -> None:
    """The end of `watch_runs`."""
    _watchers.remove(watcher)


def show_run(inputs: AttentionInputs, result: ForwardResult) -> None:
    """The op ran."""
    for watcher in list(_watchers):
        watcher(inputs, result)
