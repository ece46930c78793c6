"""The warnings that users can filter by class; all are public as ``sla_compile.<name>``."""

from __future__ import annotations

__all__ = ["RecompileLimitWarning", "TokenOrderWarning", "UntrainedGatesWarning"]


class UntrainedGatesWarning(UserWarning):
    """Attention was made sparse whose gates are still zero."""


class RecompileLimitWarning(UserWarning):
    """Dynamo reached a recompile limit: calls that need code it has not compiled run dense."""


class TokenOrderWarning(UserWarning):
    """The token order that was asked for by ``reorder`` cannot be had, so the model's own stays."""
