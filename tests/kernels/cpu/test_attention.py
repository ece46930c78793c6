"""The CPU kernels against the definition: output, block map and all five gradients, in float64."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult, Gradients
from sla_compile.common.options import AttentionOptions
from sla_compile.kernels import reference
from sla_compile.kernels.cpu import attention as cpu
from sla_compile.kernels.cpu import gathered
from tests.support.closeness import assert_close

pytestmark = pytest.mark.usefixtures("nan_fresh_buffers")

NAMES = ("dq", "dk", "dv", "dweight", "dbias")


@dataclass(frozen=True)
class Case:
    batch: int = 1
    heads: int = 2
    tokens: int = 200
    dim: int = 16
    block_q: int = 64
    block_k: int = 64
    topk: float = 0.3
    bottomk: float = 0.2
    feature_map: str = "softmax"
    linear: str = "marginal"
    gate: str = "shared"
    layout: str = "dense"
    dtype: torch.dtype = torch.float64
    gate_dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        default = Case()
        changed = {n: getattr(self, n) for n in vars(default) if getattr(self, n) != getattr(default, n)}
        return "-".join(f"{name}={value}" for name, value in changed.items()) or "default"

    @property
    def options(self) -> AttentionOptions:
        return AttentionOptions(
            scale=self.dim**-0.5,
            topk=self.topk,
            bottomk=self.bottomk,
            block_q=self.block_q,
            block_k=self.block_k,
            feature_map=self.feature_map,
            linear=self.linear,
        )

    def inputs(self) -> list[Tensor]:
        """q, k, v, weight, bias."""
        torch.manual_seed(zlib.crc32(str(self).encode()))
        b, h, n, d = self.batch, self.heads, self.tokens, self.dim
        if self.layout == "dense":
            activations = list(torch.randn(3, b, h, n, d, dtype=self.dtype).unbind(0))
        elif self.layout == "token_major":
            activations = [torch.randn(b, n, h, d, dtype=self.dtype).transpose(1, 2) for _ in range(3)]
        else:
            fused = torch.randn(b, n, 3, h, d, dtype=self.dtype)
            activations = [x.transpose(1, 2) for x in fused.unbind(2)]
        heads = (h,) if self.gate == "per_head" else ()
        weight, bias = torch.randn(*heads, d, d), torch.randn(*heads, d)
        return [*activations, weight.to(self.gate_dtype), bias.to(self.gate_dtype)]


def run(case: Case, inputs: list[Tensor], grad_out: Tensor) -> tuple[ForwardResult, Gradients]:
    call = AttentionInputs(*inputs)
    saved = cpu.forward(call, case.options)
    gradients = cpu.backward(grad_out, call, saved, case.options)
    assert gradients.dshift.shape == (0,)
    return saved, gradients


def expected(
    case: Case, inputs: list[Tensor], grad_out: Tensor, block_map: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    options = case.options
    out = reference.sparse_linear_attention(
        *leaves,
        block_map=block_map,
        scale=options.scale,
        block_q=options.block_q,
        block_k=options.block_k,
        feature_map=options.feature_map,
        linear=options.linear,
    )
    gradients = torch.autograd.grad(out, leaves, grad_out.double(), materialize_grads=True)
    return out.detach(), gradients


def check(case: Case, budget: float = 1e-10) -> None:
    inputs = case.inputs()
    grad_out = torch.randn(inputs[0].shape).to(case.dtype)
    saved, gradients = run(case, inputs, grad_out)
    out, linear_out, lse, block_map = saved[:4]
    if case.dtype == torch.float64:
        classes = reference.classify(
            *inputs[:2],
            scale=case.dim**-0.5,
            topk=case.topk,
            bottomk=case.bottomk,
            block_q=case.block_q,
            block_k=case.block_k,
        )
        assert torch.equal(block_map, classes)
    expected_out, expected_gradients = expected(case, inputs, grad_out, block_map)
    assert_close("out", out, expected_out, budget)
    for name, actual, wanted, given in zip(NAMES, gradients[:-1], expected_gradients, inputs, strict=True):
        assert actual.dtype == given.dtype, name
        rounding = torch.finfo(given.dtype).eps if given.dtype != case.dtype else 0.0
        assert_close(name, actual, wanted, max(budget, rounding))
    assert out.transpose(1, 2).is_contiguous()
    assert out.dtype == case.dtype
    assert torch.isfinite(lse).all()
    assert linear_out.shape == (out.shape if case.linear != "none" else (0,))


CASES = [
    *(Case(tokens=n, batch=2) for n in (1, 63, 64, 65, 200, 333)),
    *(Case(dim=d, gate="per_head") for d in (40, 64, 72, 80, 96, 128)),
    Case(dim=256, tokens=130),
    *(Case(tokens=333, layout=layout, batch=2, heads=3) for layout in ("token_major", "fused")),
    Case(tokens=256, layout="fused"),
    *(Case(tokens=333, block_q=q, block_k=k) for q, k in ((16, 64), (128, 16), (64, 32), (256, 256))),
    *(
        Case(tokens=333, block_q=32, block_k=16, feature_map=f, linear=branch, gate=gate)
        for f in ("softmax", "elu", "relu")
        for branch in ("marginal", "all", "none")
        for gate in ("shared", "per_head")
    ),
    Case(tokens=333, gate_dtype=torch.float32),
    Case(tokens=333, block_k=16, topk=1.0, bottomk=0.0),
    Case(tokens=333, block_k=16, topk=0.05, bottomk=0.95),
    Case(tokens=320, block_q=16, block_k=16, heads=20, batch=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("elements_per_chunk", [1, 1 << 14])
def test_chunks_and_groups_change_nothing(elements_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "_ELEMENTS_PER_CHUNK", elements_per_chunk)
    monkeypatch.setattr(gathered, "_ROWS_PER_GROUP", 50)
    check(Case(tokens=333, block_q=16, block_k=32, heads=5, batch=2, gate="per_head"))
    check(Case(tokens=333, block_q=16, block_k=32, heads=5, layout="fused"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_errs_by_its_rounding(dtype: torch.dtype) -> None:
    budget = {torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    for case in (Case(tokens=333, dim=72, layout="fused"), Case(tokens=500, dim=64, feature_map="elu")):
        check(replace(case, dtype=dtype, gate_dtype=torch.float32), budget)
        check(replace(case, dtype=dtype, gate_dtype=dtype), budget)


def test_lse_is_the_logarithm_of_the_sparse_denominator() -> None:
    case = Case(tokens=150, block_q=16, block_k=32)
    inputs = case.inputs()
    _, _, lse, block_map = cpu.forward(AttentionInputs(*inputs), case.options)[:4]
    critical = (block_map == 1).repeat_interleave(16, 2).repeat_interleave(32, 3)[:, :, :150, :150]
    logits = (inputs[0] @ inputs[1].mT * case.dim**-0.5).masked_fill(~critical, float("-inf"))
    assert_close("lse", lse, logits.logsumexp(-1), 1e-14)


def test_linear_out_is_the_branch_before_the_gate() -> None:
    case = Case(tokens=333, block_k=32)
    q, k, v, _, _ = case.inputs()
    identity = torch.eye(case.dim, dtype=torch.float64)
    with_branch, linear_out = cpu.forward(AttentionInputs(q, k, v, identity, None), case.options)[:2]
    without, empty = cpu.forward(AttentionInputs(q, k, v, None, None), case.options)[:2]
    assert_close("linear_out", linear_out, with_branch - without, 1e-13)
    assert empty.shape == (0,)


@pytest.mark.parametrize("gates", ["both", "weight", "bias", "neither"])
def test_topk_1_is_dense_attention(gates: str) -> None:
    case = Case(tokens=333, block_k=16, topk=1.0, bottomk=0.0)
    q, k, v, weight, bias = case.inputs()
    bias.zero_()
    given = (weight if gates in ("both", "weight") else None, bias if gates in ("both", "bias") else None)
    call = AttentionInputs(q, k, v, *given)
    saved = cpu.forward(call, case.options)
    out = saved.out
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dense = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2])
    assert_close("out", out, dense, 1e-14)
    grad_out = torch.randn_like(out)
    *gradients, _ = cpu.backward(grad_out, call, saved, case.options)
    for name, actual, wanted in zip(NAMES, gradients, torch.autograd.grad(dense, leaves, grad_out), strict=False):
        assert_close(name, actual, wanted, 1e-12)
    assert [g.shape for g in gradients[3:]] == [(0,) if g is None else g.shape for g in given]


def hard_inputs(kind: str, dtype: torch.dtype) -> tuple[Case, list[Tensor]]:
    case = Case(tokens=333, dim=32, block_q=16, block_k=16, dtype=dtype, gate_dtype=dtype)
    q, k, v, weight, bias = case.inputs()
    if kind == "logits_1e6":
        q, k = q * 1e3, k * 1e3 * case.dim**0.5
    elif kind == "features_apart":
        # one-hot features far apart: denominators below every normal number
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        q[..., 0], k[..., 1] = 95.0, torch.linspace(80, 120, 333, dtype=dtype)
    elif kind == "equal_keys":
        k = k[:, :, :1].expand_as(k)
    elif kind == "zero_queries":
        q = torch.zeros_like(q)
    elif kind == "negative":
        q, k = -q.abs(), -k.abs()
    return case, [q, k, v, weight, bias]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize(
    "kind", ["logits_1e6", "features_apart", "equal_keys", "zero_queries", "negative", "no_marginal"]
)
def test_finite_on_hard_inputs(kind: str, feature_map: str, dtype: torch.dtype) -> None:
    case, inputs = hard_inputs(kind, dtype)
    case = replace(case, feature_map=feature_map)
    if kind == "no_marginal":
        case = replace(case, topk=0.5, bottomk=0.5)
    grad_out = torch.randn_like(inputs[0])
    saved, gradients = run(case, inputs, grad_out)
    for name, tensor in zip(("out", "linear_out", "lse", *NAMES), (*saved[:3], *gradients[:-1]), strict=True):
        assert torch.isfinite(tensor).all(), name
    if dtype == torch.float64:
        out, expected_gradients = expected(case, inputs, grad_out, saved[3])
        assert_close("out", saved[0], out, 1e-10)
        # together: some of these gradients are zero but for rounding
        together, wanted = (torch.cat([g.flatten() for g in gs]) for gs in (gradients, expected_gradients))
        assert_close("gradients", together, wanted, 1e-10)


def test_repeats_to_the_bit() -> None:
    case = Case(tokens=1000, dim=32, heads=3, block_q=16, block_k=16, dtype=torch.float32)
    inputs = case.inputs()
    grad_out = torch.randn_like(inputs[0])
    (first, gradients), (second, repeated) = (run(case, inputs, grad_out) for _ in range(2))
    for a, b in zip((*first[:4], *gradients), (*second[:4], *repeated), strict=True):
        assert torch.equal(a, b)


class Largest(TorchDispatchMode):
    """Records the most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_buffer_grows_with_the_square_of_the_tokens() -> None:
    case = Case(tokens=8192, heads=1, topk=0.05, dtype=torch.float32)
    inputs = case.inputs()
    grad_out = torch.randn_like(inputs[0])
    with Largest() as largest:
        run(case, inputs, grad_out)
    assert largest.elements < 8192 * 8192 / 50


def test_work_falls_with_topk() -> None:
    def work(topk: float) -> int:
        case = Case(tokens=2560, heads=1, topk=topk, bottomk=0.0, linear="none", dtype=torch.float32)
        inputs = case.inputs()
        counter = FlopCounterMode(display=False)
        with counter:
            run(case, inputs, torch.randn_like(inputs[0]))
        return int(counter.get_total_flops())

    dense = 7 * 2 * 2560 * 2560 * 16
    assert work(1.0) <= 1.05 * dense
    assert work(0.05) <= 0.06 * dense
