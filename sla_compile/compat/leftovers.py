"""What Dynamo keeps for good of code that it compiled and that serves no more: found, and let go."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

__all__ = ["forget_backend", "let_go_of_guards", "superseded_guards"]


@functools.cache
def superseded_guards() -> Any:
    """What stands for the guards of an entry that is dead: one for all, as it differs in nothing."""
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    deleted: Any = DeletedGuardManagerWrapper("superseded by sla_compile")
    # A dead entry counts towards recompile_limit unless it is of another module's.
    deleted.id_matched_objs = {"": weakref.ref(superseded_guards)}
    return deleted


def let_go_of_guards(dropped: Iterable[Any]) -> None:
    """Take back the finalizers by which ``dropped`` guards would learn that an object of theirs is gone.

    They are on classes, functions and modules that live as long as the process, and each holds all that the guards
    were made from. Remove when Dynamo does so where it invalidates an entry.
    """
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    gone = {id(guards) for guards in dropped}
    if not gone:
        return
    registered: Any = weakref.finalize._registry  # type: ignore[attr-defined]
    for finalizer in list(registered):
        pending = finalizer.peek()
        maker = getattr(getattr(pending and pending[1], "func", None), "__self__", None)
        if type(maker).__name__ != "CheckFunctionManager":
            continue
        guards = getattr(maker, "guard_manager", None)
        if id(guards) in gone or isinstance(guards, DeletedGuardManagerWrapper):
            finalizer.detach()


def forget_backend(backend: Any) -> None:
    """Drop ``backend`` from Dynamo's list of all that were ever used. Remove when that list holds them weakly."""
    from torch._dynamo import eval_frame

    for key, known in list(eval_frame.cached_backends.items()):
        if eval_frame.innermost_backend(known) is backend:
            del eval_frame.cached_backends[key]
