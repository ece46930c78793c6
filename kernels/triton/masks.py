"""What the launchers make of a key mask and of token ranges that are always critical, once a call, with no host sync.

A mask becomes a float32 bias b of the logits, at most 0 and -inf at masked keys, whose weights in the linear branch and
in the block means are exp(b); and of each block of keys, whether anything has to be weighed there at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sla_compile.common.blocks import forced_blocks, num_blocks
from sla_compile.common.limits import MASKED_BELOW

from ..steps import KeyWeights

__all__ = ["batch_stride", "block_tiers", "key_weights"]


@triton.jit(do_not_specialize=["stride_row", "stride_key", "num_keys", "masked_below"])
def key_weights_kernel(
    mask,
    largest,
    bias,
    blocks,
    stride_row,
    stride_key,
    num_keys,
    masked_below,
    BLOCK_K: tl.constexpr,
    IS_BOOL: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = keys < num_keys
    given = tl.load(mask + row * stride_row + keys.to(tl.int64) * stride_key, mask=inside, other=0)
    if IS_BOOL:
        weight = tl.where(inside & (given != 0), 0.0, float("-inf"))
    else:
        LEAST: tl.constexpr = -3.4028234663852886e38
        weight = given - tl.maximum(tl.load(largest + row), LEAST)
        weight = tl.where(weight < masked_below, float("-inf"), weight)
        weight = tl.where(inside, weight, float("-inf"))
    slot = row * tl.num_programs(0) + block
    tl.store(bias + slot * BLOCK_K + tl.arange(0, BLOCK_K), weight)
    kind = tl.where(tl.max(weight, 0) == float("-inf"), -1, tl.where(tl.min(weight, 0) == 0.0, 0, 2))
    tl.store(blocks + slot, kind.to(tl.int8))


def key_weights(key_mask: torch.Tensor, block_k: int) -> KeyWeights:
    """The weights of a mask (B or 1, Lk): bool, true where a key is attended to, or additive.

    Attention does not change when b shifts, so its maximum over a row is taken off. What then lies below -64,
    a weight of 1e-28, is masked.
    """
    rows, keys = key_mask.shape
    is_bool = key_mask.dtype == torch.bool
    mask = key_mask.view(torch.int8) if is_bool else key_mask.detach().to(torch.float32)
    tiles = num_blocks(keys, block_k)
    bias = torch.empty((rows, tiles * block_k), dtype=torch.float32, device=mask.device)
    blocks = torch.empty((rows, tiles), dtype=torch.int8, device=mask.device)
    key_weights_kernel[(tiles, rows)](
        mask,
        mask if is_bool else mask.amax(dim=1),
        bias,
        blocks,
        *mask.stride(),
        keys,
        float(MASKED_BELOW),
        BLOCK_K=block_k,
        IS_BOOL=is_bool,
        num_warps=1,
    )
    return KeyWeights(bias, blocks)


def batch_stride(x: torch.Tensor | None) -> int:
    """Elements from one batch row of a contiguous (B or 1, ...) to the next: 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def block_tiers(
    weights: KeyWeights | None, always_critical: tuple[int, ...], keys: int, block_k: int, device: torch.device
) -> torch.Tensor | None:
    """(B or 1, Tn) int8: 1 where a key block is critical without ranking, 0 where it is ranked, -1 where it is dead;
    2 more where not all its keys weigh 1.

    None where all blocks of all rows are ranked.
    """
    ranges = forced_blocks(always_critical, keys, block_k)
    if not ranges:
        return None if weights is None else weights.blocks
    forced = torch.zeros((1, num_blocks(keys, block_k)), dtype=torch.int8, device=device)
    for first, last in ranges:
        forced[:, first:last] = 1
    return forced if weights is None else torch.where(weights.blocks < 0, weights.blocks, weights.blocks + forced)
