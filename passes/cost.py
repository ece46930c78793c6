"""What an attention costs, dense and as SLA: FLOPs and bytes of one forward as sympy expressions.

Symbols: B batch, H heads, N tokens, L key tokens of a cross-attention, d head dimension, s bytes per element; in the
short form also bq and bk block sizes, Tq and Tk query and key blocks, C critical blocks in a row. The exact form is
in B, H, N, d and s alone, with the rounding of the block counts in it, so it also holds for a symbolic N.

A multiply-add is two FLOPs. Exponentials and other work per element are left out, as in the papers' tables. A byte
counts each time a kernel reads an input or writes an output; what a cache serves again within a kernel does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import sympy

from sla_compile.common.blocks import exact_fraction, num_blocks
from sla_compile.common.limits import TAYLOR

__all__ = [
    "BATCH",
    "CRITICAL_BLOCKS",
    "ELEMENT_BYTES",
    "HEADS",
    "HEAD_DIM",
    "KEY_TOKENS",
    "TOKENS",
    "Cost",
    "dense_cost",
    "evaluate",
    "readable",
    "sla_backward_cost",
    "sla_cost",
    "sla_cost_in_runs",
    "substitute",
]

_NAMES = "B H N L d s bq bk Tq Tk C"
_SYMBOLS = sympy.symbols(_NAMES, integer=True, positive=True)
BATCH, HEADS, TOKENS, KEY_TOKENS, HEAD_DIM, ELEMENT_BYTES = _SYMBOLS[:6]
_BLOCK_Q, _BLOCK_K, _QUERY_BLOCKS, _KEY_BLOCKS, CRITICAL_BLOCKS = _SYMBOLS[6:]

_FLOAT32, _INT32, _INT8 = 4, 4, 1


@dataclass(frozen=True)
class Cost:
    """FLOPs (``stages``) and device memory traffic in bytes (``traffic``) by stage, in the short form."""

    stages: dict[str, sympy.Expr]
    traffic: dict[str, sympy.Expr]
    definitions: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    """What the symbols of the short form stand for, each in symbols that come later or in B, H, N, d."""
    where: tuple[str, ...] = ()
    """``definitions`` as text."""

    @cached_property
    def flops(self) -> sympy.Expr:
        """The sum of all stages, exact."""
        return self.exact(sympy.Add(*self.stages.values()))

    @cached_property
    def expression(self) -> str:
        """`flops` as text."""
        return str(self.flops)

    @cached_property
    def bytes(self) -> sympy.Expr:
        """The sum of all traffic, exact."""
        return self.exact(sympy.Add(*self.traffic.values()))

    @cached_property
    def formula(self) -> str:
        """FLOPs in the short form, stage by stage: ``4*B*H*N^2*d``."""
        return readable(*self.stages.values())

    def exact(self, expression: sympy.Expr) -> sympy.Expr:
        """``expression`` with every definition put in."""
        for symbol, meaning in self.definitions.items():
            expression = expression.subs(symbol, meaning)
        return expression


@lru_cache
def dense_cost(cross: bool = False, causal: bool = False, group: int = 1) -> Cost:
    """Dense softmax attention by a fused kernel, over L key tokens where ``cross``, whose heads serve a ``group`` each.

    A mask saves nothing here; a ``causal`` kernel skips what lies above the diagonal.
    """
    keys = KEY_TOKENS if cross else TOKENS
    rows = BATCH * HEADS
    matmul = rows * TOKENS * (TOKENS + 1) * HEAD_DIM if causal else 2 * rows * TOKENS * keys * HEAD_DIM
    token = rows * HEAD_DIM * ELEMENT_BYTES
    traffic = {"inputs": token * (TOKENS + 2 * keys / sympy.Integer(group)), "output": token * TOKENS}
    return Cost({"scores": matmul, "values": matmul}, traffic)


@lru_cache
def sla_cost(
    topk: float,
    block_q: int,
    block_k: int,
    linear: str,
    *,
    cross: bool = False,
    causal: bool = False,
    forced: int = 0,
    group: int = 1,
) -> Cost:
    """Sparse-Linear Attention (paper, section 4) in the stages of ``kernels/``.

    The sums of block states are one matrix product over all key blocks, whatever their classes, so ``bottomk``
    saves no FLOPs; with ``linear="all"`` they are one sum for all rows. Gates are there, so they are counted.
    With ``linear="taylor"`` virtual keys take the linear branch's place; there is no gate that costs anything.
    ``forced`` key blocks are critical in every row, beside ``topk``. Where ``causal``, C is that of the mean row. What
    is made of keys alone is made once for the ``group`` of query heads that share them.
    """
    rows, pairs = BATCH * HEADS, _QUERY_BLOCKS * _KEY_BLOCKS
    keys, key_rows = KEY_TOKENS if cross else TOKENS, rows / sympy.Integer(group)
    token, key_token = rows * HEAD_DIM * ELEMENT_BYTES, key_rows * HEAD_DIM * ELEMENT_BYTES
    stages = {
        "sparse": 4 * rows * _QUERY_BLOCKS * _BLOCK_Q * CRITICAL_BLOCKS * _BLOCK_K * HEAD_DIM,
        "classify": 2 * rows * pairs * HEAD_DIM,
    }
    means = (rows * _QUERY_BLOCKS + key_rows * _KEY_BLOCKS) * HEAD_DIM * _FLOAT32
    lists = rows * _QUERY_BLOCKS * CRITICAL_BLOCKS * _INT32
    traffic = {
        "pooling": token * TOKENS + (key_token * keys if linear == "none" else 0) + means,
        "classify": means + rows * pairs * (2 * _FLOAT32 + _INT8) + lists,
        "attention": 2 * token * TOKENS + 2 * key_token * keys + lists + rows * TOKENS * _FLOAT32,
    }
    state = rows * (HEAD_DIM**2 * ELEMENT_BYTES + HEAD_DIM * _FLOAT32)
    key_states = state * _KEY_BLOCKS / group
    if linear == TAYLOR:
        stages["classify"] *= 2  # logits, and what the spread of the keys adds
        stages["states"] = 2 * key_rows * keys * HEAD_DIM**2
        stages["combine"] = 2 * rows * pairs * HEAD_DIM**2
        stages["virtual"] = 4 * rows * _QUERY_BLOCKS * _BLOCK_Q * _KEY_BLOCKS * HEAD_DIM
        stages["slope"] = 2 * rows * TOKENS * HEAD_DIM**2
        traffic["pooling"] = token * TOKENS + 2 * means
        traffic["classify"] += rows * pairs * _FLOAT32
        traffic["states"] = 2 * key_token * keys + key_states
        traffic["combine"] = key_states + state * _QUERY_BLOCKS + rows * pairs * (_INT8 + 3 * _FLOAT32)
        traffic["virtual"] = 3 * token * TOKENS + state * _QUERY_BLOCKS + rows * (pairs + 2 * TOKENS) * _FLOAT32
    elif linear != "none":
        row_states = 1 if linear == "all" and not causal else _QUERY_BLOCKS
        additions = 2 * pairs if linear == "marginal" or causal else _KEY_BLOCKS / sympy.Integer(group)
        stages["states"] = 2 * key_rows * keys * HEAD_DIM**2
        stages["combine"] = rows * additions * (HEAD_DIM**2 + HEAD_DIM)
        stages["linear"] = 2 * rows * TOKENS * HEAD_DIM**2 + 2 * rows * TOKENS * HEAD_DIM
        stages["gate"] = 2 * rows * TOKENS * HEAD_DIM**2
        traffic["states"] = 2 * key_token * keys + key_states
        traffic["combine"] = key_states + state * row_states
        if linear == "marginal" or causal:
            traffic["combine"] += rows * pairs * (_INT8 + 2 * ELEMENT_BYTES)
        traffic["linear"] = state * row_states + token * TOKENS
    definitions = _definitions(topk, block_q, block_k, forced, cross=cross, causal=causal)
    return Cost(stages, traffic, definitions, _where(topk, block_q, block_k, forced, cross=cross, causal=causal))


@lru_cache
def sla_cost_in_runs(
    topk: float, block_q: int, block_k: int, linear: str, runs: tuple[tuple[int, int, int], ...], group: int = 1
) -> Cost:
    """The sum of `sla_cost` over ``runs``, so many queries, keys and forced key blocks each, in B, H, d and s."""
    stages: dict[str, sympy.Expr] = {}
    traffic: dict[str, sympy.Expr] = {}
    for queries, keys, forced in runs:
        cost = sla_cost(topk, block_q, block_k, linear, cross=True, forced=forced, group=group)
        for total, terms in ((stages, cost.stages), (traffic, cost.traffic)):
            for name, term in terms.items():
                here = substitute(cost.exact(term), {TOKENS: queries, KEY_TOKENS: keys})
                total[name] = total.get(name, sympy.Integer(0)) + here
    return Cost(stages, traffic, {}, (f"in {len(runs)} runs of queries, each over its own keys",))


@lru_cache
def sla_backward_cost(
    block_q: int, block_k: int, linear: str, *, cross: bool = False, causal: bool = False, group: int = 1
) -> Cost:
    """FLOPs of one backward in the stages of ``kernels/``, its critical blocks in a mean row left as a symbol.

    The sparse branch is five products for the forward's two: scores again, and the gradients of probabilities, v, q and
    k. Block states and their sums are made again. ``traffic`` is empty.
    """
    keys = KEY_TOKENS if cross else TOKENS
    rows = BATCH * HEADS
    key_rows = rows / sympy.Integer(group)
    pairs = _QUERY_BLOCKS * _KEY_BLOCKS
    stages = {"sparse": 10 * rows * _QUERY_BLOCKS * _BLOCK_Q * CRITICAL_BLOCKS * _BLOCK_K * HEAD_DIM}
    if linear == TAYLOR:
        stages["classify"] = 12 * rows * pairs * HEAD_DIM  # logits and spreads, and their gradients on both sides
        stages["states"] = 2 * key_rows * keys * HEAD_DIM**2
        stages["combine"] = 2 * rows * pairs * HEAD_DIM**2
        stages["virtual"] = 10 * rows * _QUERY_BLOCKS * _BLOCK_Q * _KEY_BLOCKS * HEAD_DIM
        stages["slope"] = 4 * rows * TOKENS * HEAD_DIM**2
        stages["combine back"] = 4 * rows * pairs * HEAD_DIM**2
        stages["keys"] = 4 * key_rows * keys * HEAD_DIM**2
    elif linear != "none":
        additions = 2 * pairs if linear == "marginal" or causal else _KEY_BLOCKS / sympy.Integer(group)
        state = HEAD_DIM**2 + HEAD_DIM
        stages["states"] = 2 * key_rows * keys * HEAD_DIM**2
        stages["combine"] = rows * additions * state
        stages["gate"] = 4 * rows * TOKENS * HEAD_DIM**2  # of the linear branch's output, and of the weight
        stages["linear"] = 4 * rows * TOKENS * HEAD_DIM**2  # phi(Q) and H
        stages["combine back"] = rows * additions * state
        stages["keys"] = 4 * key_rows * keys * HEAD_DIM**2  # phi(K) and V
    definitions = {
        _QUERY_BLOCKS: sympy.ceiling(TOKENS / _BLOCK_Q),
        _KEY_BLOCKS: sympy.ceiling(keys / _BLOCK_K),
        _BLOCK_Q: sympy.Integer(block_q),
        _BLOCK_K: sympy.Integer(block_k),
    }
    return Cost(stages, {}, definitions)


def _definitions(
    topk: float, block_q: int, block_k: int, forced: int, *, cross: bool, causal: bool
) -> dict[sympy.Symbol, sympy.Expr]:
    share = exact_fraction(topk)
    rational = sympy.Rational(share.numerator, share.denominator)
    if causal:  # of the mean row: the diagonal, and its share of half of the other blocks
        diagonal = num_blocks(block_q, block_k)
        critical = sympy.Min(diagonal + forced + rational * (_KEY_BLOCKS - diagonal) / 2, (_KEY_BLOCKS + diagonal) / 2)
    else:
        critical = sympy.Max(1, sympy.floor(rational * _KEY_BLOCKS))
        critical = sympy.Min(_KEY_BLOCKS, forced + critical) if forced else critical
    return {
        CRITICAL_BLOCKS: critical,
        _QUERY_BLOCKS: sympy.ceiling(TOKENS / _BLOCK_Q),
        _KEY_BLOCKS: sympy.ceiling((KEY_TOKENS if cross else TOKENS) / _BLOCK_K),
        _BLOCK_Q: sympy.Integer(block_q),
        _BLOCK_K: sympy.Integer(block_k),
    }


def _where(topk: float, block_q: int, block_k: int, forced: int, *, cross: bool, causal: bool) -> tuple[str, ...]:
    critical = f"max(1, floor({topk}*Tk))"
    if causal:
        diagonal = num_blocks(block_q, block_k)
        critical = f"min({diagonal + forced} + {topk}*(Tk - {diagonal})/2, (Tk + {diagonal})/2), the mean row's"
    elif forced:
        critical = f"min(Tk, {forced} + {critical})"
    return (
        f"bq = {block_q}",
        f"bk = {block_k}",
        "Tq = ceil(N/bq)",
        f"Tk = ceil({'L' if cross else 'N'}/bk)",
        f"C = {critical}",
    )


def readable(*terms: sympy.Expr) -> str:
    """The sum of ``terms``, polynomials with B*H in each, in their order: ``B*H*(2*N^2*d + 4*N*d)``."""
    merged: dict[tuple[int, ...], Any] = {}
    for term in terms:
        for powers, coefficient in sympy.Poly(sympy.expand(term / (BATCH * HEADS)), *_SYMBOLS).terms():
            merged[powers] = merged.get(powers, 0) + coefficient
    order = sorted(range(len(_SYMBOLS)), key=lambda i: _ORDER.index(str(_SYMBOLS[i])))
    texts = [
        "*".join(
            (*([str(coefficient)] if coefficient != 1 else []), *(_power(i, powers[i]) for i in order if powers[i]))
        )
        for powers, coefficient in merged.items()
    ]
    if len(texts) > 1:
        return f"B*H*({' + '.join(texts)})"
    head, star, tail = texts[0].partition("*")
    return f"{head}*B*H{star}{tail}" if head.isdigit() else f"B*H*{texts[0]}"


_ORDER = ("B", "H", "N", "L", "Tq", "bq", "C", "Tk", "bk", "d", "s")


def _power(index: int, power: int) -> str:
    return f"{_SYMBOLS[index]}^{power}" if power > 1 else str(_SYMBOLS[index])


def substitute(expression: sympy.Expr, values: Mapping[sympy.Symbol, Any]) -> sympy.Expr:
    """``expression`` at ``values``, ints or SymInts: of these the symbol goes in, and no guard is added."""
    plain = {symbol: value if isinstance(value, int) else value.node.expr for symbol, value in values.items()}
    return expression.subs(plain)


def evaluate(expression: sympy.Expr, values: Mapping[sympy.Symbol, int]) -> int:
    """``expression`` as a whole number at integer ``values``."""
    return _evaluated(expression, tuple(values.items()))


@lru_cache(1024)  # every compile of a site asks again
def _evaluated(expression: sympy.Expr, values: tuple[tuple[sympy.Symbol, int], ...]) -> int:
    return int(substitute(expression, dict(values)))
