"""The Triton kernels in Triton's interpreter, float32 on the CPU, against the definition in float64.

Triton decides at its import whether kernels are interpreted, and an earlier test may have imported it: the
checks run in one fresh process, which pytest starts on this same file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sla_compile.common.limits import TAYLOR
from sla_compile.kernels import reference
from sla_compile.kernels.triton.launches import KERNELS, Launch, trying
from tests.support.closeness import assert_close
from tests.support.interpreter import INTERPRETED
from tests.support.triton_cases import (
    GROUPED,
    OPTIONS,
    VIRTUAL,
    Case,
    Inputs,
    call_of,
    check,
    expected_classes,
    inputs,
    key_mask,
    run_kernels,
)


def why_not() -> str | None:
    """What keeps Triton's interpreter from running here, if anything does."""
    versions = []
    for name in ("triton", "numpy"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
        found = importlib.import_module(name).__version__
        versions.append(tuple(int(part) for part in found.split(".")[:2]))
    if versions[0] <= (3, 6) and versions[1] >= (2, 4):
        return "the interpreter of Triton 3.6 takes int() of one-element arrays, which numpy 2.4 refuses"
    return None


if not INTERPRETED:

    @pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
    def test_in_the_interpreter() -> None:
        environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONSAFEPATH="1")
        environment = {n: v for n, v in environment.items() if not n.startswith("PYTEST_XDIST")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
        assert "skipped" not in process.stdout, process.stdout

else:
    pytestmark = pytest.mark.usefixtures("nan_fresh_buffers")

    SHAPES = [
        Case(),
        Case(tokens=63, head_dim=40, batch=2),
        Case(tokens=65, head_dim=80, block_q=32, block_k=16, feature_map="elu"),
        Case(tokens=130, head_dim=128, layout="head_major"),
        Case(tokens=150, head_dim=16, block_q=16, block_k=64, feature_map="relu"),
        Case(tokens=100, head_dim=72, block_q=128, block_k=32, layout="packed"),
        Case(tokens=130, head_dim=96, heads=1, layout="dim_before_token"),
        Case(tokens=40, head_dim=256, block_k=16),
        Case(tokens=1, head_dim=16),
        Case(tokens=100, head_dim=33, layout="slice"),
        Case(tokens=100, head_dim=36, layout="slice"),
        Case(tokens=100, head_dim=32, layout="slice"),
        Case(tokens=100, head_dim=32, layout="off by one"),
    ]
    GATES = [
        Case(weight="per_head", bias="per_head", head_dim=32),
        Case(weight="per_head", bias="none", feature_map="relu", block_k=32),
        Case(weight="none", head_dim=32),
        Case(weight="none", bias="none", head_dim=32),
        Case(linear="none", head_dim=32),
        Case(linear="all", feature_map="elu", block_q=32),
        Case(linear="all", weight="per_head", head_dim=128, tokens=70),
        Case(linear="all", topk=1.0, bottomk=0.0, feature_map="relu", tokens=100, head_dim=32),
        Case(topk=1.0, bottomk=0.0, tokens=130, head_dim=32),
        Case(topk=0.5, bottomk=0.5, tokens=250, head_dim=32),
        Case(gate_dtype=torch.float64, head_dim=32),
        Case(block_q=128, block_k=64, tokens=250, head_dim=32),
        Case(block_q=128, block_k=256, tokens=520, head_dim=16),
        Case(block_q=256, block_k=128, tokens=300, head_dim=16),
    ]

    def check_heads(case: Case) -> None:
        """Two heads where they matter: in the base, which sums gradients of a shared gate, and for gates of each."""
        if case != Case() and "per_head" not in (case.weight, case.bias):
            case = replace(case, heads=1)
        check(case, inputs(case, torch.float32, "cpu"), 1e-5, 1e-5)

    @pytest.mark.parametrize("case", SHAPES, ids=str)
    def test_shapes(case: Case) -> None:
        check_heads(case)

    @pytest.mark.parametrize(
        "case",
        [
            Case(tokens=150, heads=1, head_dim=136, block_q=64, block_k=128),
            Case(tokens=150, head_dim=136, group=2, block_k=128, mask="moderate", causal=True, linear="all"),
        ],
        ids=str,
    )
    def test_wide_heads(case: Case) -> None:
        """Tiles of which dK and dV have a launch each, and of which the states make phi once."""
        with trying({(kernel, 256, "single"): Launch(64, 128, 64, 8, 1) for kernel in KERNELS}):
            check(case, inputs(case, torch.float32, "cpu"), 1e-5, 1e-5)

    @pytest.mark.parametrize("case", GATES, ids=str)
    def test_gates(case: Case) -> None:
        check_heads(case)

    def block_map_of(case: Case, tensors: Inputs) -> torch.Tensor:
        """The kernels' classes, with no more launched than they need."""
        from sla_compile.kernels.triton import attention

        call = call_of(case, [*tensors[:3], None, None])
        return attention.forward(call, replace(case, linear="none").attention_options).block_map

    def check_smaller(case: Case) -> None:
        heads = 1 if case.linear != TAYLOR else case.heads
        case = replace(case, heads=heads, tokens=case.tokens // 2 + 1, keys=case.keys and case.keys // 2 + 1)
        tensors = inputs(case, torch.float32, "cpu")
        assert torch.equal(check(case, tensors, 1e-5, 1e-5), expected_classes(case, tensors))

    @pytest.mark.parametrize("case", [case for case in OPTIONS if case.mask != "none"], ids=str)
    def test_masks(case: Case) -> None:
        check_smaller(case)

    @pytest.mark.parametrize("case", [case for case in OPTIONS if case.mask == "none"], ids=str)
    def test_options(case: Case) -> None:
        check_smaller(case)

    @pytest.mark.parametrize("case", VIRTUAL[::3], ids=str)
    def test_virtual(case: Case) -> None:
        check_smaller(case)

    @pytest.mark.parametrize("mask", ["none", "moderate"])
    def test_virtual_slopes_are_zero_past_the_last_block(mask: str) -> None:
        from sla_compile.kernels.steps import KernelInputs
        from sla_compile.kernels.triton.masks import key_weights
        from sla_compile.kernels.triton.moments import key_moments

        case = Case(tokens=140, head_dim=40, batch=2, block_k=16, linear="taylor", mask=mask)
        q, k, v, *_ = inputs(case, torch.float32, "cpu")
        given = key_mask(case, "cpu")
        weights = None if given is None else key_weights(given, 16)
        moments = key_moments(KernelInputs(q, k, v, None, None, weights), case.attention_options)
        assert moments.sizes.shape == (2, 2, 9)
        assert moments.slopes.shape == (2, 2, 16, 40, 40)
        assert torch.isfinite(moments.slopes).all()
        assert moments.slopes[:, :, :9].any()
        assert not moments.slopes[:, :, 9:].any()

    @pytest.mark.parametrize(
        "case",
        [
            Case(tokens=130, head_dim=32, heads=1, block_q=32, block_k=16, bottomk=0.0, linear="taylor"),
            Case(tokens=270, head_dim=16, heads=4, group=2, block_q=256, block_k=64, bottomk=0.0, linear="taylor"),
        ],
        ids=str,
    )
    def test_virtual_products_have_rows_of_multiples_of_8(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """Or cuBLAS leaves its fast kernels."""
        multiply, products = torch.bmm, 0

        def checked(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
            nonlocal products
            products += 1
            for x in (left, right, out):
                row, pitch = (x.shape[2], x.stride(1)) if x.stride(2) == 1 else (x.shape[1], x.stride(2))
                assert row % 8 == pitch % 8 == x.stride(0) % 8 == 0, (x.shape, x.stride())
                assert torch.isfinite(x).all() or x is out
            return multiply(left, right, out=out)

        monkeypatch.setattr(torch, "bmm", checked)
        tensors = inputs(case, torch.float32, "cpu")
        check(case, tensors, 1e-5, 1e-5)
        assert products == 4

    @pytest.mark.parametrize("case", GROUPED[1::2], ids=str)
    def test_grouped_queries(case: Case) -> None:
        tensors = inputs(case, torch.float32, "cpu")
        assert torch.equal(check(case, tensors, 1e-5, 1e-5), expected_classes(case, tensors))

    @pytest.mark.parametrize("topk", [1 / 3, 0.3, 0.07, 1e-9])
    def test_options_have_exact_shares_when_causal(topk: float) -> None:
        case = Case(tokens=400, heads=1, block_q=32, block_k=16, head_dim=16, causal=True, topk=topk, bottomk=0.29)
        tensors = inputs(case, torch.float32, "cpu")
        expected = expected_classes(case, tensors)
        if topk == 1 / 3:
            # 16 decimals are taken as the third that they stand for
            expected = expected_classes(replace(case, topk=0.33333333333333337), tensors)
        assert torch.equal(block_map_of(case, tensors), expected)

    @pytest.mark.parametrize("linear", ["marginal", "all", "taylor"])
    @pytest.mark.parametrize("group", [1, 2])
    def test_shapes_without_a_batch(linear: str, group: int) -> None:
        case = Case(batch=0, tokens=100, head_dim=32, linear=linear, group=group)
        actual, _ = run_kernels(case, inputs(case, torch.float32, "cpu"))
        assert actual["out"].shape == actual["dq"].shape == (0, case.heads, 100, 32)
        assert actual["dk"].shape == (0, case.heads // group, 100, 32)
        assert not actual["dweight"].any()

    def test_gates_dense_identity() -> None:
        case = Case(topk=1.0, bottomk=0.0, bias="none", tokens=130, head_dim=32)
        tensors = inputs(case, torch.float32, "cpu")
        actual, _ = run_kernels(case, tensors)
        q, k, v = (x.double() for x in tensors[:3])
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert_close("out", actual["out"], dense, 1e-6)
        assert not actual["dweight"].any()

    EXTREMES = {
        "logits of 1e6": lambda x: x * 1e3 * 32**0.25,
        "equal keys": lambda x: torch.ones_like(x),
        "zeros": lambda x: torch.zeros_like(x),
        "negative": lambda x: -x.abs() - 1,
    }

    @pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
    @pytest.mark.parametrize("name", EXTREMES)
    def test_gates_finite(name: str, feature_map: str) -> None:
        case = Case(tokens=100, head_dim=32, block_q=32, block_k=32, heads=1, feature_map=feature_map)
        q, k, *rest = inputs(case, torch.float32, "cpu")
        assert q is not None
        assert k is not None
        actual, _ = run_kernels(case, [EXTREMES[name](q), EXTREMES[name](k), *rest])
        for tensor_name, value in actual.items():
            assert torch.isfinite(value).all(), tensor_name

    def test_gates_logits_far_below_zero() -> None:
        # exp(-lse) overflows: what pads the last block must be masked, not multiplied by zero
        case = Case(tokens=100, head_dim=32, block_q=32, block_k=32, topk=1.0, bottomk=0.0)
        q, k, *rest = inputs(case, torch.float32, "cpu")
        assert q is not None
        assert k is not None
        check(case, [q.abs() * 4 + 8, -k.abs() - 8, *rest], 1e-4, 1e-4)

    def classes_of(scores: torch.Tensor, critical: int, negligible: int) -> torch.Tensor:
        rank = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
        block_map = torch.zeros_like(rank, dtype=torch.int8)
        block_map[rank < critical] = 1
        block_map[rank >= scores.shape[-1] - negligible] = -1
        return block_map

    @pytest.mark.parametrize(("critical", "negligible"), [(1, 0), (3, 4), (7, 30), (37, 0), (1, 36)])
    def test_classes_with_ties(critical: int, negligible: int) -> None:
        from sla_compile.kernels.triton.classify import classify_rows, critical_lists

        generator = torch.Generator().manual_seed(0)
        scores = torch.randint(-3, 4, (1, 2, 8, 37), generator=generator).float() / 4
        scores[0, 0, 0] = 0.0
        scores[0, 0, 0, ::3] = -0.0
        scores[0, 0, 1] = torch.randn(37, generator=generator)
        scores[0, 0, 2, 5] = float("inf")
        scores[0, 0, 3, :20] = float("-inf")
        scores[0, 0, 4] *= 1e38
        scores[0, 0, 5] *= 1e-45
        block_map, (lists, counts, _) = classify_rows(scores, critical, negligible)
        assert counts is None
        expected = classes_of(scores, critical, negligible)
        assert torch.equal(block_map, expected)
        for line, row in zip(lists.view(-1, critical), expected.view(-1, 37), strict=True):
            assert torch.equal(line.long(), (row == 1).nonzero().flatten())
        for by_column, lines in ((False, expected), (True, expected.mT)):
            members, counts, _ = critical_lists(block_map, by_column=by_column)
            assert counts is not None
            assert torch.equal(counts.long(), (lines == 1).sum(-1))
            for member, count, line in zip(
                members.flatten(0, 2), counts.flatten(), lines.reshape(-1, lines.shape[-1]), strict=True
            ):
                assert torch.equal(member[:count].long(), (line == 1).nonzero().flatten())

    @pytest.mark.parametrize("columns", [1, 31, 50, 64])
    def test_classes_with_the_matrix_of_the_marginal(columns: int) -> None:
        from sla_compile.kernels.triton.classify import classify_rows
        from sla_compile.kernels.triton.states import empty_matrix, marginal_matrix

        scores = torch.randn(2, 2, 5, columns, generator=torch.Generator().manual_seed(0))
        matrix = empty_matrix(scores.shape, torch.float32, scores.device)
        block_map, _ = classify_rows(scores, 1 + columns // 8, columns // 4, matrix)
        expected = marginal_matrix(block_map, torch.float32)
        assert matrix.stride() == expected.stride()
        padded = [x.as_strided((*x.shape[:2], x.stride(1)), x.stride()) for x in (matrix, expected)]
        assert torch.equal(*padded)

    @pytest.mark.parametrize("lines", [5, 131, 300, 9000])
    def test_classes_popular_columns_come_first(lines: int) -> None:
        from sla_compile.kernels.steps import BlockLists
        from sla_compile.kernels.triton.classify import longest_first

        counts = torch.randint(0, 1000, (2, 1, lines), generator=torch.Generator().manual_seed(0)).int()
        counts[0, 0, 1], counts[1, 0, 2] = 0, 1000
        *order, taken = longest_first(BlockLists(counts, counts), 1000).tolist()
        assert taken == 0
        assert sorted(order) == [*range(2 * lines)]
        lengths = [counts.flatten()[line].item() * 32 // 1001 for line in order]
        assert lengths == sorted(lengths, reverse=True)
        assert all(i < j for (i, a), (j, b) in pairwise(zip(order, lengths, strict=True)) if a == b)

    @pytest.mark.parametrize("lines", [5, 131, 600])
    def test_classes_long_columns_are_cut(lines: int) -> None:
        from sla_compile.kernels.hopper.column_parts import cut_columns
        from sla_compile.kernels.steps import BlockLists

        generator = torch.Generator().manual_seed(0)
        counts = (torch.rand(1, 1, lines, generator=generator) ** 8 * 300).int()
        counts[0, 0, 1], counts[0, 0, 2] = 0, 300
        blocks = counts.new_empty(1, 1, lines, 300)
        work, sums = cut_columns(BlockLists(blocks, counts), lines, 2, 7), lines
        counts = counts.flatten()
        longest = max(7, math.ceil(counts.sum().item() / sums))
        expected = [max(1, math.ceil(count / longest)) for count in counts.tolist()]
        taken, how_many = work[:2].tolist()
        order = work[2 : 2 + how_many]
        parts, first_sums, meetings = work[2 + lines + sums :].split([lines, lines, 2 * sums])
        assert taken == 0
        assert meetings.count_nonzero() == 0
        assert parts.tolist() == expected
        assert max(expected) > 1
        # a sum less than there are parts, each with a place of its own
        assert first_sums.tolist() == [*itertools.accumulate((n - 1 for n in expected), initial=0)][:-1]
        assert sum(expected) - lines <= sums
        listed = [divmod(entry, lines) for entry in order.tolist()]
        assert sorted(listed) == sorted((part, line) for line, n in enumerate(expected) for part in range(n))
        lengths = [math.ceil(counts[line].item() / expected[line]) * 32 // 301 for _, line in listed]
        assert lengths == sorted(lengths, reverse=True)

    @pytest.mark.parametrize("case", [Case(tokens=401, block_k=16), Case(tokens=250, block_q=16, block_k=32)], ids=str)
    def test_classes_of_inputs(case: Case) -> None:
        tensors = inputs(case, torch.float32, "cpu")
        q, k, *_ = tensors
        expected = reference.classify(
            q, k, scale=case.head_dim**-0.5, topk=case.topk, bottomk=case.bottomk, block_q=case.block_q,
            block_k=case.block_k,
        )  # fmt: skip
        assert torch.equal(block_map_of(case, tensors), expected)

    def test_classes_equal_keys_go_to_the_lower_index() -> None:
        case = Case(tokens=200, head_dim=32, block_k=16, topk=0.3, bottomk=0.3)
        q, k, v, weight, bias, grad_out = inputs(case, torch.float32, "cpu")
        # sixteenths: every sum is exact, in whatever order it is taken
        tensors = (q * 16).round() / 16, torch.full_like(k, 0.5), v, weight, bias, grad_out
        block_map = block_map_of(case, tensors)
        row = torch.tensor([1] * 3 + [0] * 7 + [-1] * 3, dtype=torch.int8)
        assert torch.equal(block_map, row.expand_as(block_map))

    @pytest.mark.parametrize("mask", ["bool", "one row", "dead row", "moderate"])
    def test_classes_of_a_mask(mask: str) -> None:
        """Lists hold no block without a key, and those in which something is weighed last."""
        from sla_compile.kernels.steps import KernelInputs
        from sla_compile.kernels.triton.classify import classes, critical_lists
        from sla_compile.kernels.triton.masks import key_weights

        case = Case(tokens=170, batch=2, heads=1, block_q=64, block_k=16, head_dim=32, topk=0.4, always=(40, 60))
        case = replace(case, mask=mask)
        given = key_mask(case, "cpu")
        assert given is not None
        weights = key_weights(given, 16)
        bias = torch.nn.functional.pad(reference.key_bias(given, torch.zeros(1, 1, 170, 1)), (0, 6), value=-math.inf)
        assert torch.equal(weights.bias, bias)
        blocks = bias.view(-1, 11, 16)
        dead, whole = (blocks == -math.inf).all(-1), (blocks == 0).all(-1)
        assert torch.equal(weights.blocks, torch.where(dead, -1, torch.where(whole, 0, 2)).to(torch.int8))

        q, k, v, *_ = inputs(case, torch.float32, "cpu")
        scores = torch.randn(2, 1, 3, 11, generator=torch.Generator().manual_seed(0))
        block_map, of_scores = classes(scores, KernelInputs(q, k, v, None, None, weights), None, case.attention_options)
        assert not ((block_map == 1) & dead[:, None, None]).any()
        for lists in (of_scores, critical_lists(block_map, by_column=False, weights=weights)):
            assert lists.counts is not None
            assert lists.partial is not None
            for item, row in itertools.product(range(2), range(3)):
                chosen = (block_map[item, 0, row] == 1).nonzero().flatten().tolist()
                weighed = [block for block in chosen if not whole[item % len(whole), block]]
                expected = [block for block in chosen if block not in weighed] + weighed
                assert lists.blocks[item, 0, row, : len(expected)].tolist() == expected
                assert [int(n[item, 0, row]) for n in (lists.counts, lists.partial)] == [len(expected), len(weighed)]

    def test_classes_refuse_what_the_kernels_lack() -> None:
        case = Case(tokens=10)
        tensors = inputs(case, torch.float64, "cpu")
        with pytest.raises(TypeError, match=r"float64; accepted: torch.float32, torch.float16, torch.bfloat16"):
            run_kernels(case, tensors)
        tensors = inputs(case, torch.float32, "cpu")
        with pytest.raises(ValueError, match="block_q is 48; accepted: 16, 32, 64, 128, 256"):
            run_kernels(Case(tokens=10, block_q=48), tensors)
        with pytest.raises(ValueError, match="feature_map is 'hedgehog'; accepted: softmax, elu, relu"):
            run_kernels(Case(tokens=10, feature_map="hedgehog"), tensors)
        wide = Case(tokens=10, head_dim=257)
        with pytest.raises(ValueError, match="head dimension is 257; accepted: 16 to 256"):
            run_kernels(wide, inputs(wide, torch.float32, "cpu"))
