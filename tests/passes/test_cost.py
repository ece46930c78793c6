"""Costs against what the kernels count, against published figures, and with a symbolic number of tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sla_compile.common.blocks import num_blocks, num_critical
from sla_compile.common.kernel_interface import AttentionInputs
from sla_compile.common.options import AttentionOptions
from sla_compile.kernels.cpu import attention as cpu
from sla_compile.passes.cost import (
    BATCH,
    CRITICAL_BLOCKS,
    ELEMENT_BYTES,
    HEAD_DIM,
    HEADS,
    KEY_TOKENS,
    TOKENS,
    Cost,
    dense_cost,
    evaluate,
    readable,
    sla_backward_cost,
    sla_cost,
    substitute,
)

WAN = {BATCH: 1, HEADS: 12, TOKENS: 32760, HEAD_DIM: 128, ELEMENT_BYTES: 2}
"""Self-attention of Wan2.1-1.3B at 81 frames of 480 x 832, in bfloat16."""


def counted(function: Any, *args: Any, **kwargs: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return int(counter.get_total_flops())


def sizes(batch: int, heads: int, tokens: int, dim: int, itemsize: int = 4) -> dict[sympy.Symbol, int]:
    return {BATCH: batch, HEADS: heads, TOKENS: tokens, HEAD_DIM: dim, ELEMENT_BYTES: itemsize}


def by_stage(cost: Cost, values: dict[sympy.Symbol, int]) -> dict[str, int]:
    return {name: evaluate(cost.exact(stage), values) for name, stage in cost.stages.items()}


def run_cpu(
    tokens: int, topk: float, block_q: int, block_k: int, linear: str, keys: int = 0, group: int = 1, **form: Any
) -> int:
    dim = 16
    q, k, v = (torch.randn(2, 3, length, dim) for length in (tokens, keys or tokens, keys or tokens))
    q = q.repeat(1, group, 1, 1)
    options = AttentionOptions(
        scale=0.25,
        topk=topk,
        bottomk=0.1 if topk < 1 else 0.0,
        block_q=block_q,
        block_k=block_k,
        feature_map="softmax",
        linear=linear,
        **form,
    )
    gate = (None, None) if linear == "taylor" else (torch.zeros(dim, dim), torch.zeros(dim))
    return counted(cpu.forward, AttentionInputs(q, k, v, *gate), options)


@pytest.mark.parametrize("keys", [96, 40])
def test_dense_equals_the_count(keys: int) -> None:
    q, k, v = torch.randn(2, 3, 96, 16), torch.randn(2, 3, keys, 16), torch.randn(2, 3, keys, 16)
    values = {**sizes(2, 3, 96, 16), KEY_TOKENS: keys}
    flops = evaluate(dense_cost(keys != 96).flops, values)
    assert flops == counted(lambda: torch.softmax(q @ k.mT, -1) @ v)
    touched = sum(x.numel() * x.element_size() for x in (q, k, v, F.scaled_dot_product_attention(q, k, v)))
    assert evaluate(dense_cost(keys != 96).bytes, values) == touched


@pytest.mark.parametrize("linear", ["marginal", "none", "taylor"])
@pytest.mark.parametrize(
    ("tokens", "topk", "block_q", "block_k"), [(256, 0.25, 16, 16), (192, 0.05, 32, 16), (128, 1.0, 16, 64)]
)
def test_sla_equals_what_the_cpu_kernels_multiply(
    tokens: int, topk: float, block_q: int, block_k: int, linear: str
) -> None:
    flops = evaluate(sla_cost(topk, block_q, block_k, linear).flops, sizes(2, 3, tokens, 16))
    assert flops == run_cpu(tokens, topk, block_q, block_k, linear)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("linear", ["none", "taylor"])
def test_a_backward_equals_what_the_cpu_kernels_multiply(linear: str, group: int) -> None:
    torch.manual_seed(0)
    q, k, v, grad_out = (torch.randn(2, heads, 128, 16) for heads in (6, 6 // group, 6 // group, 6))
    options = AttentionOptions(
        scale=0.25, topk=0.25, bottomk=0.0, block_q=32, block_k=16, feature_map="softmax", linear=linear
    )
    call = AttentionInputs(q, k, v, None, None)
    result = cpu.forward(call, options)
    cost = sla_backward_cost(32, 16, linear, group=group).flops.subs({**sizes(2, 6, 128, 16), CRITICAL_BLOCKS: 2})
    assert cost == counted(lambda: cpu.backward(grad_out, call, result, options))


@pytest.mark.parametrize("linear", ["marginal", "none", "taylor"])
@pytest.mark.parametrize(("tokens", "keys"), [(256, 64), (64, 256)])
def test_cross_attention_equals_what_the_cpu_kernels_multiply(tokens: int, keys: int, linear: str) -> None:
    flops = evaluate(sla_cost(0.25, 16, 16, linear, cross=True).flops, {**sizes(2, 3, tokens, 16), KEY_TOKENS: keys})
    assert flops == run_cpu(tokens, 0.25, 16, 16, linear, keys)


@pytest.mark.parametrize("linear", ["marginal", "none", "taylor"])
def test_grouped_queries_equal_what_the_cpu_kernels_multiply(linear: str) -> None:
    flops = evaluate(sla_cost(0.25, 16, 16, linear, group=2).flops, sizes(2, 6, 128, 16))
    assert flops == run_cpu(128, 0.25, 16, 16, linear, group=2)
    assert flops < evaluate(sla_cost(0.25, 16, 16, linear).flops, sizes(2, 6, 128, 16)) or linear == "none"
    values = sizes(2, 6, 128, 16)
    read = evaluate(dense_cost().bytes - dense_cost(group=2).bytes, values)
    assert read == 2 * 2 * 3 * 128 * 16 * 4, "half of the keys and values"
    assert evaluate(sla_cost(0.25, 16, 16, linear, group=2).bytes, values) < evaluate(
        sla_cost(0.25, 16, 16, linear).bytes, values
    )


@pytest.mark.parametrize(("ranges", "blocks"), [([0, 40], 3), ([8, 24, 200, 256], 6), ([0, 256], 16)])
def test_blocks_that_are_always_critical_are_counted(ranges: list[int], blocks: int) -> None:
    flops = evaluate(sla_cost(0.25, 16, 16, "marginal", forced=blocks).flops, sizes(2, 3, 256, 16))
    assert flops == run_cpu(256, 0.25, 16, 16, "marginal", always_critical=tuple(ranges))


@pytest.mark.parametrize(("topk", "block_q", "block_k"), [(0.25, 16, 16), (0.25, 64, 16), (0.05, 16, 32), (1, 16, 16)])
def test_causal_attention_costs_its_mean_row(topk: float, block_q: int, block_k: int) -> None:
    """Against the critical blocks that are there; each row rounds its share down."""
    tokens = 1024
    sparse = by_stage(sla_cost(topk, block_q, block_k, "none", causal=True), sizes(1, 1, tokens, 16))["sparse"]
    q, k, v = torch.randn(3, 1, 1, tokens, 16)
    options = AttentionOptions(
        scale=0.25,
        topk=topk,
        bottomk=0.0,
        block_q=block_q,
        block_k=block_k,
        feature_map="softmax",
        linear="none",
        causal=True,
    )
    block_map = cpu.forward(AttentionInputs(q, k, v, None, None), options).block_map
    there = 4 * int((block_map == 1).sum()) * block_q * block_k * 16
    assert there <= sparse <= there + 4 * (tokens // block_q) * block_q * block_k * 16


def test_dense_causal_attention_has_the_pairs_below_the_diagonal() -> None:
    values = sizes(2, 3, 100, 16)
    assert evaluate(dense_cost(causal=True).flops, values) == 4 * 2 * 3 * 16 * sum(range(1, 101))
    assert dense_cost(causal=True).formula == "B*H*(2*N^2*d + 2*N*d)"


def test_short_last_blocks_cost_at_most_their_padding() -> None:
    tokens, block = 250, 16
    flops = evaluate(sla_cost(0.25, block, block, "marginal").flops, sizes(2, 3, tokens, 16))
    actual = run_cpu(tokens, 0.25, block, block, "marginal")
    assert flops <= actual <= flops * num_blocks(tokens, block) * block / tokens


def test_authors_form_sums_states_once_for_all_rows() -> None:
    values = sizes(2, 3, 256, 16)
    everything, marginal = (by_stage(sla_cost(0.25, 16, 16, name), values) for name in ("all", "marginal"))
    assert everything["combine"] == 2 * 3 * 16 * (16 * 16 + 16)  # B H Tk (d^2 + d) additions
    assert {**everything, "combine": 0} == {**marginal, "combine": 0}


def test_bytes_are_at_least_the_tensors_that_a_forward_returns_and_reads() -> None:
    batch, heads, tokens, dim, block = 2, 3, 256, 16, 16
    q, k, v = torch.randn(3, batch, heads, tokens, dim)
    blocks = tokens // block
    options = AttentionOptions(
        scale=0.25,
        topk=0.25,
        bottomk=0.1,
        block_q=block,
        block_k=block,
        feature_map="softmax",
        linear="marginal",
    )
    results = cpu.forward(AttentionInputs(q, k, v, torch.zeros(dim, dim), None), options)
    rows = batch * heads
    states = rows * blocks * (dim * dim + dim) * 4
    means, scores, lists = rows * blocks * dim * 4, rows * blocks * blocks * 4, rows * blocks * 4 * 4
    expected = (
        sum(x.numel() * x.element_size() for x in results[:4])  # written: out, linear_out, lse, block_map
        + q.nbytes + k.nbytes + v.nbytes  # read by the attention
        + q.nbytes + 2 * means + 2 * means + 2 * scores + 2 * lists  # pooled means, scores, lists of critical blocks
        + k.nbytes + v.nbytes + states  # states of key blocks written
        + states + states  # read and summed into the states of query blocks
        + scores // 4 + 2 * scores  # the block map read, 0/1 matrix written and read
        + states  # read by the attention
    )  # fmt: skip
    assert evaluate(sla_cost(0.25, block, block, "marginal").bytes, sizes(batch, heads, tokens, dim)) == expected


def test_published_figures() -> None:
    dense = evaluate(dense_cost().flops, WAN)
    assert dense == 4 * 12 * 32760**2 * 128
    assert f"{dense / 1e12:.2f}" == "6.59"
    stages = by_stage(sla_cost(0.05, 64, 64, "marginal"), WAN)
    assert dense / stages["sparse"] == pytest.approx(20, rel=0.03)
    # The paper's table has 52.75T dense and 2.74T as SLA: 5% of the dense products, and one product per token and
    # head of d x d for the linear branch.
    assert (0.05 * dense + stages["states"]) / dense == pytest.approx(2.74 / 52.75, rel=1e-3)
    assert dense / sum(stages.values()) > 14


def test_formulas_say_what_the_expressions_say() -> None:
    assert dense_cost().formula == "4*B*H*N^2*d"
    assert dense_cost(cross=True).formula == "4*B*H*N*L*d"
    for linear, group in (("marginal", 1), ("all", 4), ("none", 2)):
        cost = sla_cost(0.05, 64, 32, linear, group=group)
        names = {symbol.name: symbol for symbol in cost.flops.free_symbols | set(cost.definitions)}
        parsed = sympy.sympify(cost.formula.replace("^", "**"), locals=names)
        assert sympy.expand(parsed - sympy.Add(*cost.stages.values())) == 0
        definitions = dict(line.split(" = ") for line in cost.where)
        assert definitions == {
            "bq": "64",
            "bk": "32",
            "Tq": "ceil(N/bq)",
            "Tk": "ceil(N/bk)",
            "C": "max(1, floor(0.05*Tk))",
        }
        crossing = sla_cost(0.05, 64, 32, linear, cross=True, forced=3)
        assert crossing.where[3:] == ("Tk = ceil(L/bk)", "C = min(Tk, 3 + max(1, floor(0.05*Tk)))")
        assert {str(symbol) for symbol in cost.definitions} == set(definitions)
    assert readable(BATCH * HEADS * TOKENS) == "B*H*N"


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000, 6401])
@pytest.mark.parametrize("topk", [0.05, 0.29, 1.0])
def test_block_counts_are_those_of_blocks(tokens: int, topk: float) -> None:
    cost = sla_cost(topk, 64, 32, "none")
    values = sizes(1, 1, tokens, 16)
    critical = num_critical(topk, num_blocks(tokens, 32))
    assert by_stage(cost, values)["sparse"] == 4 * num_blocks(tokens, 64) * 64 * critical * 32 * 16


def test_a_symbolic_number_of_tokens_stays_symbolic_and_adds_no_guard() -> None:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    symbol = env.create_symbol(5000, source=ConstantSource("tokens"), dynamic_dim=DimDynamic.DYNAMIC)
    tokens = env.create_symintnode(symbol, hint=5000)
    guards = len(env.guards)
    cost = sla_cost(0.05, 64, 64, "marginal")
    symbolic = substitute(cost.flops, {BATCH: 1, HEADS: 2, TOKENS: tokens * 2, HEAD_DIM: 64})
    assert symbolic.free_symbols == {symbol}
    assert len(env.guards) == guards
    for value in (1000, 5000, 40000):
        assert int(symbolic.subs(symbol, value)) == evaluate(cost.flops, sizes(1, 2, 2 * value, 64))
    assert math.isclose(float(symbolic.subs(symbol, 5000)), evaluate(cost.flops, sizes(1, 2, 10000, 64)))
