"""The library ops ``sla::forward``, ``backward``, ``reorder`` and ``gate``: importing this registers them."""

from __future__ import annotations

import sys

from sla_compile.ops import attention, gate_marker, reorder  # noqa: F401  each registers its ops

if "torch.utils.flop_counter" in sys.modules:
    from sla_compile.ops import flops  # noqa: F401
