"""Refuse, while Dynamo traces it, an attention that an engine spreads over ranks in a way that cannot be rewritten."""

from __future__ import annotations

from sla_compile.compat import backend_function, current_frame, modules_under_way, user_errors
from sla_compile.gate import PREPARED
from sla_compile.memory import is_our_backend
from sla_compile.module_paths import module_paths

__all__ = ["refuse_engine"]


def refuse_engine(seen: str, accepted: str) -> None:
    """Raise ValueError for the attention that is traced now, unless another backend or the settings leave it alone.

    ``seen`` is how the engine spreads it over ranks.
    """
    frame = current_frame()
    if frame is None or not _is_ours(backend_function(frame.compiler)):
        return
    # where Dynamo starts at a function, its module's call is under way in Python
    modules = [*reversed([*modules_under_way()]), *frame.modules_under_trace()]
    path = ""
    if modules and PREPARED in modules[-1].__dict__:
        config, path = modules[-1].__dict__[PREPARED]
        if not config.selects(path):
            return
    elif modules:
        path = next((path for path, module in module_paths(modules[0]) if module is modules[-1]), "")
    with user_errors():
        raise ValueError(
            f"{path or 'the compiled module'}: {seen} cannot be sparse-linear, which needs all tokens of a head on one "
            f"rank; accepted: {accepted}"
        )


def _is_ours(backend: object) -> bool:
    """Also the backend of a dry run, which is remembered nowhere."""
    return is_our_backend(backend) or str(getattr(backend, "__module__", "")).partition(".")[0] == "sla_compile"
