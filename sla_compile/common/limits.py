"""What Sparse-Linear Attention takes: block sizes, head dimensions, feature maps, linear branches, gates and dtypes.

The one place for each of these. Settings, the op, the passes and the launchers of the kernels all read them here.
"""

from __future__ import annotations

import torch

__all__ = [
    "BLOCK_SIZES",
    "DTYPES",
    "FEATURE_MAPS",
    "FLOATING_DTYPES",
    "GATE_FORMS",
    "LINEAR_BRANCHES",
    "MASKED_BELOW",
    "MAX_HEAD_DIM",
    "MIN_HEAD_DIM",
    "TAYLOR",
    "TEXT",
    "TOPK_OWNERS",
]

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Tokens in a block of queries or of keys."""

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256

FEATURE_MAPS = ("softmax", "elu", "relu")
"""phi of the linear branch: softmax over the head dimension, elu(x) + 1, or relu."""

TAYLOR = "taylor"
LINEAR_BRANCHES = ("marginal", "all", "none", TAYLOR)
"""What stands for the key blocks that are not critical: a linear branch that sums the marginal ones (the paper) or all
(the authors' code), nothing, or virtual keys in the softmax of the critical ones (``kernels/reference.py``)."""

GATE_FORMS = ("shared", "per_head")
"""One gate for the heads of an attention, or one for each."""

TOPK_OWNERS = ("site", "head")
"""What has a topk of its own: an attention, or each of its heads."""

TEXT = "text"
"""The value of ``always_critical`` that stands for the tokens outside the grid of the video."""

MASKED_BELOW = -64.0
"""An additive key mask this far below its row's largest masks the key: its weight would be 1e-28."""

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of gates and of additive masks, on any device."""

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": FLOATING_DTYPES,
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "meta": FLOATING_DTYPES,
}
"""Dtypes of q, k and v by device. A model on meta is prepared there for another device."""
