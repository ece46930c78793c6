"""Warning classes, for users to filter by, public as ``sla_compile.<name>``; and how a warning is given."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

__all__ = [
    "DenseAttentionWarning",
    "LateGatesWarning",
    "RecompileLimitWarning",
    "TokenOrderWarning",
    "UnmatchedPatternWarning",
    "UntrainedGatesWarning",
    "warn_user",
]

_OURS = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}", contextlib.__file__, "<")
"""Where code lies that is not the user's: torch, this package, what Python and Dynamo generate."""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line: the innermost one outside torch and this package that leads here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class DenseAttentionWarning(UserWarning):
    """Attention that the settings select runs dense in a compiled call, and its gate, if it has one, is not used."""


class LateGatesWarning(UserWarning):
    """A compile made gates for a model whose optimizer was there before, and so does not train them."""


class UnmatchedPatternWarning(UserWarning):
    """A pattern in ``include``, ``exclude`` or ``overrides`` matches no attention, and so does nothing."""


class UntrainedGatesWarning(UserWarning):
    """Attention is rewritten whose gates are zero: only critical blocks count there; or saved gates were not loaded."""


class RecompileLimitWarning(UserWarning):
    """Dynamo reached a recompile limit: calls that would need another compile run the dense model."""


class TokenOrderWarning(UserWarning):
    """``reorder`` cannot be applied to an attention, which keeps the model's own token order, or serves one of two
    grids of as many tokens.
    """
