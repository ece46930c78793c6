"""FLOPs of ``sla::forward`` and ``sla::backward`` for ``torch.utils.flop_counter.FlopCounterMode``.

The counts are those of ``passes/cost.py``: a multiply-add is two FLOPs, exponentials are left out, and a backward
counts its scores again once, as PyTorch does for its own attention.

Importing this module imports PyTorch's counter, and with it Triton. So `sla_compile.ops` does that only where the
counter is imported already; the backend does it too, and `sparse_linear_attention` where the counter came later.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sla_compile.common.blocks import forced_blocks
from sla_compile.common.limits import TAYLOR
from sla_compile.compat import count_in_running_counters
from sla_compile.passes.cost import (
    BATCH,
    CRITICAL_BLOCKS,
    HEAD_DIM,
    HEADS,
    KEY_TOKENS,
    TOKENS,
    evaluate,
    sla_backward_cost,
    sla_cost,
)

__all__ = ["backward_flops", "forward_flops"]


def forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    sparsity: Tensor | None,
    scale: float,
    topk: float,
    bottomk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
    causal: bool = False,
    always_critical: list[int] | None = None,
    shift: Tensor | None = None,
    **_: Any,
) -> int:
    """FLOPs of one forward, from shapes alone; where ``sparsity`` sets another topk, those of ``topk``, its maximum."""
    touched = forced_blocks(always_critical or (), k.shape[2], block_k)
    forced = len({block for first, last in touched for block in range(first, last)})
    branch = linear if weight is not None or linear == TAYLOR else "none"
    form = {"cross": q.shape[2] != k.shape[2], "causal": causal, "group": _group(q, k)}
    cost = sla_cost(topk, block_q, block_k, branch, forced=forced, **form)
    return evaluate(cost.flops, _sizes(q, k))


def backward_flops(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    linear_out: Tensor,
    lse: Tensor,
    block_map: Tensor,
    state_sums: Tensor,
    normalizer_sums: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear: str,
    causal: bool = False,
    shift: Tensor | None = None,
    **_: Any,
) -> int:
    """FLOPs of one backward. The critical blocks are counted in the block map, so this waits for the device.

    Raises:
        NotImplementedError: ``block_map`` has no values (a fake or meta tensor), so they cannot be counted.
    """
    if block_map.is_meta or type(block_map) is not torch.Tensor:
        raise NotImplementedError("FLOPs of sla::backward need its block map's values; accepted: a run on real tensors")
    branch = linear if weight is not None or linear == TAYLOR else "none"
    form = {"cross": q.shape[2] != k.shape[2], "causal": causal, "group": _group(q, k)}
    cost = sla_backward_cost(block_q, block_k, branch, **form)
    rows = block_map.shape[0] * block_map.shape[1] * block_map.shape[2]
    mean = sympy.Rational(int(torch.count_nonzero(block_map == 1)), max(rows, 1))
    return int(cost.flops.subs({**_sizes(q, k), CRITICAL_BLOCKS: mean}))


def _group(q: Tensor, k: Tensor) -> int:
    """Query heads to one key head."""
    return q.shape[1] // max(1, k.shape[1])


def _sizes(q: Tensor, k: Tensor) -> dict[Any, int]:
    batch, heads, tokens, head_dim = q.shape
    return {BATCH: batch, HEADS: heads, TOKENS: tokens, KEY_TOKENS: k.shape[2], HEAD_DIM: head_dim}


for _packet, _formula in ((torch.ops.sla.forward, forward_flops), (torch.ops.sla.backward, backward_flops)):
    register_flop_formula(_packet, get_raw=True)(_formula)
    count_in_running_counters(_packet, _formula)
