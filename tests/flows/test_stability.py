"""Inputs at the edges of floating point: outputs stay finite, gradients those of the definition in float64.

On the CPU here, and with the Triton kernels in Triton's interpreter (float32 alone: it computes bfloat16 wrongly), in
a process of its own; on a CUDA device with all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from sla_compile.common.kernel_interface import Kernels
from sla_compile.kernels import reference
from tests.kernels.triton.test_attention import why_not
from tests.support.interpreter import INTERPRETED
from tests.support.triton_cases import NAMES, Case, inputs, run_kernels

Tensors = list[torch.Tensor]

BASE = Case(tokens=250, head_dim=32, heads=2, topk=0.3, bottomk=0.3)
FLOORS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Situation:
    """A case and what is done to its q, k, v, weight, bias, grad_out."""

    name: str
    case: Case
    change: Callable[[Tensors], None]
    cancels: bool = False
    """Whether a gradient is zero only because large terms cancel."""
    vanishes: bool = False
    """Whether every denominator of the linear branch is too small to divide by: the branch is then 0."""

    def __str__(self) -> str:
        return self.name


def nothing(tensors: Tensors) -> None:
    pass


def equal_keys(tensors: Tensors) -> None:
    tensors[1].copy_(tensors[1][:, :, :1].expand_as(tensors[1]).clone())


def huge_logits(tensors: Tensors) -> None:
    """|q k| * scale of tens of thousands: each query's softmax has one key."""
    tensors[0] *= 200.0
    tensors[1] *= 200.0


def huge_equal_logits(tensors: Tensors) -> None:
    """All logits of a query are the same large number."""
    tensors[0].fill_(100.0)
    tensors[1].fill_(100.0)


def zero_queries(tensors: Tensors) -> None:
    tensors[0].zero_()


def some_zero_queries(tensors: Tensors) -> None:
    tensors[0][:, :, ::3] = 0


def zero_values(tensors: Tensors) -> None:
    tensors[2].zero_()


def times(factor: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[0] *= factor
        tensors[1] *= factor

    return change


def all_negative(tensors: Tensors) -> None:
    """relu features of 0: the linear branch has no weight at all."""
    tensors[0].abs_().neg_()
    tensors[1].abs_().neg_()


def far_below_zero(tensors: Tensors) -> None:
    """elu features of e^-46 or so: a product of two is subnormal in float32."""
    tensors[0].sub_(46.0)
    tensors[1].sub_(46.0)


def one_hot_features(tensors: Tensors) -> None:
    """softmax features of queries and keys that lie in different dimensions, e^-90 elsewhere."""
    tensors[0][..., 0] += 90.0
    tensors[1][..., 1] += 90.0


SITUATIONS = [
    Situation("no marginal block", replace(BASE, topk=0.5, bottomk=0.5), nothing),
    Situation("no marginal block, relu", replace(BASE, topk=0.5, bottomk=0.5, feature_map="relu"), nothing),
    Situation("one block", replace(BASE, tokens=20), nothing),
    Situation("equal keys", BASE, equal_keys, cancels=True),
    Situation("huge logits", BASE, huge_logits),
    Situation("huge logits, elu", replace(BASE, feature_map="elu"), huge_logits),
    Situation("huge equal logits", BASE, huge_equal_logits, cancels=True),
    Situation("zero queries", BASE, zero_queries, cancels=True),
    Situation("zero queries, relu", replace(BASE, feature_map="relu"), zero_queries),
    Situation("some zero queries, relu", replace(BASE, feature_map="relu"), some_zero_queries),
    Situation("zero values", BASE, zero_values),
    Situation("all negative, relu", replace(BASE, feature_map="relu"), all_negative),
    Situation("small features, relu", replace(BASE, feature_map="relu"), times(1e-15)),
    Situation("subnormal denominator, relu", replace(BASE, feature_map="relu"), times(1e-20), vanishes=True),
    Situation(
        "subnormal denominator, relu, all",
        replace(BASE, feature_map="relu", linear="all"),
        times(1e-20),
        vanishes=True,
    ),
    Situation("subnormal denominator, elu", replace(BASE, feature_map="elu"), far_below_zero, vanishes=True),
    Situation("subnormal denominator, softmax", BASE, one_hot_features, vanishes=True),
]


def check_situation(
    situation: Situation, dtype: torch.dtype, device: str = "cpu", kernels: Kernels | None = None
) -> None:
    """Finite, and as close to the definition in float64 as float32 allows, or as the definition in low precision is."""
    tensors: Tensors = list(inputs(situation.case, torch.float32, device))  # type: ignore[arg-type]
    situation.change(tensors)
    tensors = [x.to(dtype) for x in tensors]
    results, block_map = run_kernels(situation.case, list(tensors), kernels)
    case = replace(situation.case, linear="none") if situation.vanishes else situation.case
    expected = definition(case, tensors, block_map, torch.float64)
    low = definition(case, tensors, block_map, dtype if situation.cancels else torch.float32)
    problems = []
    for name, wanted in expected.items():
        assert torch.isfinite(wanted).all(), f"{name}: the definition in float64 is not finite"
        error = (results[name].double() - wanted).norm().item()
        budget = FLOORS[dtype] * wanted.norm().item() + rounding(case, tensors, name, wanted)
        budget = max(budget, 8 * (low[name].double() - wanted).norm().item())
        if not error <= budget:
            problems.append(f"{name}: error {error:.3g}, budget {budget:.3g}, norm {wanted.norm():.3g}")
    assert not problems, "; ".join(problems)


def rounding(case: Case, tensors: Tensors, name: str, wanted: torch.Tensor) -> float:
    """What float32 in a backward of FlashAttention's form costs, in the norm of the whole gradient.

    Probabilities come from the logits and their stored log-sum-exp again, so they are off by the rounding of these,
    of a sum over the head's dimensions each: half an eps for each term where they are added one after the other. And
    dP - D, where one key has all the weight, is the difference of two equal numbers, of which D comes from the stored
    output: on a GPU in its own precision, as in FlashAttention.
    """
    if name in ("out", "dweight", "dbias"):
        return 0.0
    eps = torch.finfo(torch.float32).eps
    stored = torch.finfo(tensors[0].dtype).eps if tensors[0].is_cuda else eps
    q, k, v, _, _, grad_out = (x.double() for x in tensors)
    scale = case.options["scale"]
    largest = {key: x.norm(dim=-1).max().item() for key, x in (("q", q), ("k", k), ("v", v), ("dO", grad_out))}
    logit = (q @ k.mT).abs().max().item() * scale
    other = {"dq": largest["k"], "dk": largest["q"], "dv": 0.0}[name]
    cancelled = largest["dO"] * largest["v"] * other * scale * (wanted.numel() / wanted.shape[-1]) ** 0.5
    return q.shape[-1] / 2 * eps * logit * wanted.norm().item() + max(stored, 4 * eps) * cancelled


def definition(case: Case, tensors: Tensors, block_map: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """out and gradients of the definition, computed in ``dtype``."""
    *leaves, grad_out = (x.detach().to(dtype).requires_grad_() for x in tensors)
    out = reference.sparse_linear_attention(*leaves, block_map=block_map, **case.options)
    gradients = torch.autograd.grad(out, leaves, grad_out, allow_unused=True, materialize_grads=True)
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


if not INTERPRETED:

    @pytest.mark.parametrize("situation", SITUATIONS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_on_the_cpu(situation: Situation, dtype: torch.dtype) -> None:
        from sla_compile.kernels.cpu import attention as cpu

        check_situation(situation, dtype, kernels=cpu)

    @pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
    def test_in_the_interpreter() -> None:
        environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONSAFEPATH="1")
        environment = {n: v for n, v in environment.items() if not n.startswith("PYTEST_XDIST")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
        assert "skipped" not in process.stdout, process.stdout

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("situation", SITUATIONS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_on_a_gpu(situation: Situation, dtype: torch.dtype) -> None:
        check_situation(situation, dtype, "cuda")

else:

    @pytest.mark.parametrize("situation", SITUATIONS, ids=str)
    def test_triton(situation: Situation) -> None:
        """Of one head: the interpreter runs one program after the other."""
        check_situation(replace(situation, case=replace(situation.case, heads=1)), torch.float32)
