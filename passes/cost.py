"""What an attention costs, dense and as SLA: FLOPs and bytes as sympy expressions.

Symbols: B batch, H heads, N tokens, d head dimension, s bytes per element. The block counts of a configuration
are put in exactly, so an expression also holds for a symbolic number of tokens. A multiply-add is two FLOPs.
Exponentials and other per-element work are left out, as in the papers' tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from sla_compile.blocks import exact_fraction

__all__ = ["BATCH", "ELEMENT_BYTES", "HEADS", "HEAD_DIM", "TOKENS", "Cost", "dense_cost", "evaluate", "sla_cost"]

BATCH, HEADS, TOKENS, HEAD_DIM, ELEMENT_BYTES = sympy.symbols("B H N d s", integer=True, positive=True)


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of device memory traffic of one forward, by stage; ``flops`` and ``bytes`` are the sums."""

    stages: dict[str, sympy.Expr]
    traffic: dict[str, sympy.Expr]

    @property
    def flops(self) -> sympy.Expr:
        return sympy.Add(*self.stages.values())

    @property
    def bytes(self) -> sympy.Expr:
        return sympy.Add(*self.traffic.values())


def dense_cost() -> Cost:
    """Dense softmax attention by a fused kernel: Q K^T and P V; reads Q, K, V, writes O."""
    matmul = 2 * BATCH * HEADS * TOKENS**2 * HEAD_DIM
    tensor = BATCH * HEADS * TOKENS * HEAD_DIM * ELEMENT_BYTES
    return Cost({"scores": matmul, "values": matmul}, {"inputs": 3 * tensor, "output": tensor})


def sla_cost(topk: float, bottomk: float, block_q: int, block_k: int, linear: str) -> Cost:
    """Sparse-Linear Attention, everything counted (paper, section 4; stages as in ``kernels/``)."""
    query_blocks = sympy.ceiling(TOKENS / block_q)
    key_blocks = sympy.ceiling(TOKENS / block_k)
    critical = sympy.Max(1, sympy.floor(_rational(topk) * key_blocks))
    negligible = sympy.Min(key_blocks - critical, sympy.floor(_rational(bottomk) * key_blocks))
    rows = BATCH * HEADS
    tensor = rows * TOKENS * HEAD_DIM * ELEMENT_BYTES
    pair = query_blocks * block_q * block_k * critical  # query-key pairs that get exact attention
    stages = {
        "classify": 2 * rows * query_blocks * key_blocks * HEAD_DIM,
        "sparse": 4 * rows * pair * HEAD_DIM,
    }
    traffic = {
        "pooling": 2 * tensor,
        "sparse": 2 * tensor + 2 * rows * query_blocks * critical * block_k * HEAD_DIM * ELEMENT_BYTES,
    }
    if linear != "none":
        states = rows * HEAD_DIM * (HEAD_DIM + 1)
        summed = key_blocks - critical - negligible if linear == "marginal" else key_blocks
        row_states = query_blocks if linear == "marginal" else 1
        stages["states"] = 2 * rows * TOKENS * HEAD_DIM**2
        stages["combine"] = 2 * states * row_states * summed
        stages["linear"] = 2 * rows * TOKENS * HEAD_DIM**2
        stages["gate"] = 2 * rows * TOKENS * HEAD_DIM**2
        traffic["states"] = 2 * tensor + 2 * states * (key_blocks + row_states) * ELEMENT_BYTES
    return Cost(stages, traffic)


def _rational(share: float) -> sympy.Rational:
    exact = exact_fraction(share)
    return sympy.Rational(exact.numerator, exact.denominator)


def evaluate(expression: sympy.Expr, values: dict[sympy.Symbol, Any]) -> int:
    """``expression`` as a whole number at integer ``values``."""
    return int(expression.subs(values))
