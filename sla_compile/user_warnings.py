"""Warning classes, for users to filter by; public as ``sla_compile.<name>``."""

from __future__ import annotations

__all__ = ["RecompileLimitWarning", "TokenOrderWarning", "UntrainedGatesWarning"]


class UntrainedGatesWarning(UserWarning):
    """Attention was rewritten whose gates are still zero, so that only its sparse branch counts."""


class RecompileLimitWarning(UserWarning):
    """Dynamo reached a recompile limit: calls that would need another compile run the dense model."""


class TokenOrderWarning(UserWarning):
    """``reorder`` cannot be applied to an attention, which keeps the model's own token order."""
