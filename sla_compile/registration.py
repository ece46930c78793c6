"""``backend="sla"`` for who imports the package from a checkout, where no installed entry point names it.

Nothing is imported for it: the name is added once torch's list of backends is there, which ``torch.compile`` imports.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["register"]

_REGISTRY = "torch._dynamo.backends.registry"


def register() -> None:
    """Have torch know a backend "sla", now or when its list of backends is imported.

    Remove when ``torch._dynamo.register_backend`` takes a name without importing Dynamo, which takes a second.
    """
    if _REGISTRY in sys.modules:
        _add(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _AfterRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterRegistry())


def _add(registry: Any) -> None:
    """What Dynamo makes of an installed entry point, which replaces this one."""
    from importlib.metadata import EntryPoint

    entry = EntryPoint(name="sla", value="sla_compile.backend:sla", group="torch_dynamo_backends")
    registry._BACKENDS.setdefault(entry.name, entry)


class _AfterRegistry:
    """Finds no module by itself: sees one import, of torch's list of backends, adds to it and goes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = PathFinder.find_spec(name, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            load = loader.exec_module

            def load_and_add(module: ModuleType) -> None:
                load(module)
                _add(module)

            loader.exec_module = load_and_add
        return spec
