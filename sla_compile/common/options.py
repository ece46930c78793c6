"""The options of one sparse-linear attention, built once in the op and handed on to its kernels as one object."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AttentionOptions", "BackwardOptions"]


@dataclass(frozen=True, kw_only=True)
class BackwardOptions:
    """The options that both directions read, all that ``sla::backward`` has. Values are checked by the op."""

    scale: float
    """Factor of the logits, finite."""
    block_q: int
    """Queries in a block, one of ``limits.BLOCK_SIZES``."""
    block_k: int
    """Keys in a block, one of ``limits.BLOCK_SIZES``."""
    feature_map: str
    """phi of the linear branch, one of ``limits.FEATURE_MAPS``."""
    linear: str
    """Which key blocks the linear branch sums, one of ``limits.LINEAR_BRANCHES``."""
    causal: bool = False
    """Whether a query attends only to the keys up to its own position."""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(BackwardOptions):
    """The options of ``sla::forward``: those of both directions, and those that choose each block's class."""

    topk: float
    """Share of a row's key blocks that is critical, in (0, 1]; at least one block, without ``causal``."""
    bottomk: float
    """Share of a row's key blocks that is negligible, in [0, 1)."""
    always_critical: tuple[int, ...] = ()
    """Token ranges (start, stop, start, stop, ...) of the keys, as in slices, whose blocks are critical besides."""
