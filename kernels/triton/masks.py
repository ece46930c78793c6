"""What the launchers make of a key mask and of token ranges that are always critical, once a call.

A mask becomes a float32 bias b (B or 1, Lk) of the logits, at most 0 and -inf at masked keys, whose weights in
the linear branch and in the block means are exp(b). Plain PyTorch on the device, with no host sync.
"""

from __future__ import annotations

import torch

from sla_compile.common.blocks import forced_blocks, num_blocks
from sla_compile.common.limits import MASKED_BELOW

__all__ = ["batch_stride", "block_tiers", "key_bias"]


def key_bias(key_mask: torch.Tensor) -> torch.Tensor:
    """The bias (B or 1, Lk) float32 of a mask (B or 1, Lk): bool, true where a key is attended to, or additive.

    Attention does not change when b shifts, so its maximum over a row is taken off. What then lies below -64,
    a weight of 1e-28, is masked.
    """
    if key_mask.dtype == torch.bool:
        bias = torch.zeros(key_mask.shape, dtype=torch.float32, device=key_mask.device)
        return bias.masked_fill_(~key_mask, float("-inf"))
    # the kernels read dense rows
    bias = key_mask.detach().to(torch.float32).contiguous()
    bias = bias - bias.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    return bias.masked_fill_(bias < MASKED_BELOW, float("-inf"))


def batch_stride(bias: torch.Tensor | None) -> int:
    """Elements from one batch row of a contiguous (B or 1, ...) to the next: 0 where all share one."""
    return 0 if bias is None or bias.shape[0] == 1 else bias.stride(0)


def block_tiers(
    bias: torch.Tensor | None, always_critical: tuple[int, ...], keys: int, block_k: int, device: torch.device
) -> torch.Tensor | None:
    """(B or 1, Tn) int8: 1 where a key block is critical without ranking, 0 where it is ranked, -1 where it is dead.

    None where all blocks of all rows are ranked.
    """
    ranges = forced_blocks(always_critical, keys, block_k)
    if bias is None and not ranges:
        return None
    blocks = num_blocks(keys, block_k)
    tiers = torch.zeros((1, blocks), dtype=torch.int8, device=device)
    for first, last in ranges:
        tiers[:, first:last] = 1
    if bias is None:
        return tiers
    padded = torch.nn.functional.pad(bias, (0, blocks * block_k - keys), value=float("-inf"))
    dead = padded.view(-1, blocks, block_k).amax(dim=2) == float("-inf")
    return torch.where(dead, -1, tiers)
