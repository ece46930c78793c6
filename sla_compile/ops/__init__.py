"""The library ops ``sla::forward``, ``backward``, ``reorder`` and ``gate``: importing this registers them."""

from __future__ import annotations

from sla_compile.ops import attention, gate_marker, reorder  # noqa: F401  each registers its ops
