"""The library ops and the public function: registration, compilation, autocast, imports."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sla_compile.config import SLAConfig
from sla_compile.kernels import reference
from sla_compile.ops.attention import _kernels, sparse_linear_attention
from tests.support.closeness import assert_close

OPTIONS: dict[str, Any] = {"topk": 0.3, "bottomk": 0.2, "block_q": 16, "block_k": 32, "linear": "marginal"}


def make_inputs(
    tokens: int = 130,
    *,
    dtype: torch.dtype = torch.float64,
    heads: int = 2,
    dim: int = 16,
    per_head: bool = False,
) -> list[Tensor]:
    """q, k, v, weight, bias that require grad."""
    shape, gate = (1, heads, tokens, dim), (heads,) if per_head else ()
    shapes = (shape, shape, shape, (*gate, dim, dim), (*gate, dim))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def op_arguments(
    inputs: Sequence[Tensor | None], feature_map: str = "softmax", linear: str = "marginal"
) -> tuple[Any, ...]:
    return (*inputs, None, None, 0.25, 0.3, 0.2, 16, 32, feature_map, linear)


@pytest.mark.parametrize("per_head", [False, True])
def test_matches_the_definition_through_autograd(per_head: bool) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(333, per_head=per_head)
    out = sparse_linear_attention(*inputs, **OPTIONS)
    expected = reference.sparse_linear_attention(*inputs, **OPTIONS)
    assert_close("out", out, expected, 1e-10)
    grad_out = torch.randn_like(out)
    pairs = zip(
        torch.autograd.grad(out, inputs, grad_out),
        torch.autograd.grad(expected, inputs, grad_out),
        strict=True,
    )
    for name, (actual, wanted) in zip(("dq", "dk", "dv", "dweight", "dbias"), pairs, strict=True):
        assert_close(name, actual, wanted, 1e-10)


def test_gradcheck() -> None:
    torch.manual_seed(1)
    assert torch.autograd.gradcheck(lambda *x: sparse_linear_attention(*x, **OPTIONS), make_inputs(33, heads=1))


def test_the_other_defaults_are_the_papers() -> None:
    torch.manual_seed(2)
    inputs = make_inputs(64 * 41)
    expected = reference.sparse_linear_attention(
        *inputs, scale=16**-0.5, topk=0.05, bottomk=0.10, block_q=64, block_k=64, feature_map="softmax"
    )
    assert_close("out", sparse_linear_attention(*inputs, linear="marginal"), expected, 1e-10)


@pytest.mark.parametrize("linear", ["taylor", "marginal"])
@pytest.mark.parametrize("topk", [0.25, 0.9333333333333333, 1.0])
def test_bottomk_is_by_default_that_of_the_settings(topk: float, linear: str) -> None:
    q, k, v, weight, _ = make_inputs(16 * 15)
    tensors = (q, k, v) if linear == "taylor" else (q, k, v, weight)
    options: dict[str, Any] = {"topk": topk, "linear": linear, "block_q": 16, "block_k": 16}
    out = sparse_linear_attention(*tensors, **options)
    said = sparse_linear_attention(*tensors, **options, bottomk=SLAConfig(topk=topk, linear=linear).bottomk)
    assert torch.equal(out, said)
    assert_close("out", out, reference.sparse_linear_attention(*tensors, **options), 1e-10)


@pytest.mark.parametrize("topk", [math.nan, math.inf, 1.5, 0.0])
def test_a_topk_that_is_refused_has_a_default_bottomk_too(topk: float) -> None:
    q, k, v, *_ = make_inputs(90)
    with pytest.raises(ValueError, match=f"topk={topk}, accepted is 0 < topk <= 1"):
        sparse_linear_attention(q, k, v, topk=topk, linear="marginal")


@pytest.mark.parametrize(("topk", "linear"), [(0.25, "taylor"), (1.0, "taylor"), (0.25, "marginal"), (1.0, "marginal")])
def test_bottomk_is_not_needed_in_a_compiled_call(topk: float, linear: str) -> None:
    torch._dynamo.reset()
    q, k, v, *_ = make_inputs(90)
    options: dict[str, Any] = {"topk": topk, "linear": linear, "block_q": 16, "block_k": 16}
    compiled = torch.compile(sparse_linear_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, **options), sparse_linear_attention(q, k, v, **options))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_topk_1_is_sdpa(scale: float | None) -> None:
    torch.manual_seed(3)
    q, k, v, weight, _ = make_inputs(333, dtype=torch.float32)
    out = sparse_linear_attention(q, k, v, weight, scale=scale, topk=1, bottomk=0, linear="marginal")
    assert_close("out", out, F.scaled_dot_product_attention(q, k, v, scale=scale), 1e-6)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("gates", "linear"),
    [("both", "marginal"), ("both", "all"), ("both", "none"), ("weight", "marginal"), ("none", "marginal")],
)
def test_opcheck(gates: str, linear: str, dynamic: bool) -> None:
    torch.manual_seed(4)
    q, k, v, weight, bias = make_inputs(130, dtype=torch.float32)
    given = {"both": (weight, bias), "weight": (weight, None), "none": (None, None)}[gates]
    checks = "test_aot_dispatch_dynamic" if dynamic else OPCHECKS
    arguments = op_arguments([q, k, v, *given], linear=linear)
    torch.library.opcheck(torch.ops.sla.forward.default, arguments, test_utils=checks)
    with torch.no_grad():
        saved = torch.ops.sla.forward.default(*arguments)
    detached = [None if x is None else x.detach() for x in (torch.randn_like(q), q, k, v, *given, None, *saved)]
    torch.library.opcheck(
        torch.ops.sla.backward.default, (*detached, 0.25, 16, 32, "softmax", linear), test_utils=checks
    )


def with_options(keys: int, key_heads: int = 2, **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v, weight, bias, of 130 queries and ``keys`` keys, and the op's other arguments."""
    q, _, _, weight, bias = make_inputs(130, dtype=torch.float32)
    k, v = make_inputs(keys, dtype=torch.float32, heads=key_heads)[1:3]
    given = {
        "key_mask": None,
        "sparsity": None,
        "scale": 0.25,
        "feature_map": "softmax",
    } | OPTIONS
    return [q, k, v, weight, bias], given | options


OP_OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "bool mask": (130, {"key_mask": torch.arange(130).lt(70)[None]}),
    "additive mask": (130, {"key_mask": torch.arange(130.0)[None] / -10, "linear": "all"}),
    "cross": (70, {"key_mask": torch.arange(70).lt(40)[None], "always_critical": [0, 17]}),
    "grouped": (70, {"key_heads": 1}),
    "sparsity": (130, {"sparsity": torch.tensor([200_000, 300_000])}),
    "causal": (130, {"causal": True}),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", OP_OPTIONS)
def test_opcheck_of_options(name: str, dynamic: bool) -> None:
    torch.manual_seed(4)
    keys, options = OP_OPTIONS[name]
    tensors, options = with_options(keys, **options)
    checks = "test_aot_dispatch_dynamic" if dynamic else OPCHECKS
    torch.library.opcheck(torch.ops.sla.forward.default, tuple(tensors), options, test_utils=checks)
    with torch.no_grad():
        saved = torch.ops.sla.forward.default(*tensors, **options)
    detached = [x.detach() for x in (torch.randn_like(tensors[0]), *tensors)]
    rest = (0.25, 16, 32, "softmax", options["linear"], options.get("causal", False))
    torch.library.opcheck(
        torch.ops.sla.backward.default, (*detached, options["key_mask"], *saved, *rest), test_utils=checks
    )


@pytest.mark.parametrize("name", OP_OPTIONS)
def test_options_match_the_definition_eager_and_compiled(name: str) -> None:
    torch.manual_seed(8)
    torch._dynamo.reset()
    keys, options = OP_OPTIONS[name]
    tensors, options = with_options(keys, **options)
    expected = reference.sparse_linear_attention(*tensors, **options)
    wanted = torch.autograd.grad(expected.square().sum(), tensors)
    for function in (sparse_linear_attention, torch.compile(sparse_linear_attention, fullgraph=True, dynamic=True)):
        out = function(*tensors, **options)
        assert_close("out", out, expected, 1e-6)
        gradients = torch.autograd.grad(out.square().sum(), tensors)
        for which, a, b in zip(("dq", "dk", "dv", "dweight", "dbias"), gradients, wanted, strict=True):
            assert_close(which, a, b, 3e-6)


def test_one_compilation_for_every_sparsity_mask_and_number_of_keys() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(sparse_linear_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for keys, share in ((90, 100_000), (200, 200_000), (333, 50_000)):
            tensors, options = with_options(keys)
            options |= {
                "key_mask": torch.rand(1, keys) < 0.8,
                "sparsity": torch.tensor([share, 2 * share]),
                "always_critical": [-20, 10**9],
            }
            out = compiled(*tensors, **options)
            assert_close("out", out, reference.sparse_linear_attention(*tensors, **options), 1e-6)


def test_a_mask_that_wants_a_gradient_is_refused() -> None:
    tensors, options = with_options(130)
    options["key_mask"] = torch.zeros(1, 130, requires_grad=True)
    with pytest.raises(ValueError, match="key_mask requires a gradient, accepted is a mask without one"):
        sparse_linear_attention(*tensors, **options)
    with torch.no_grad():
        sparse_linear_attention(*tensors, **options)


def test_autocast_leaves_the_mask() -> None:
    tensors, options = with_options(130)
    options["key_mask"] = torch.randn(1, 130) * 100
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_linear_attention(*tensors, **options)
    low = [x.to(torch.bfloat16) for x in tensors[:3]]
    assert_close("out", out, sparse_linear_attention(*low, *tensors[3:], **options), 0.0)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("layout", ["dense", "token_major", "fused"])
def test_fake_outputs_have_the_real_strides(layout: str, heads: int) -> None:
    fused = torch.randn(2, 130, 3, heads, 16)
    q, k, v = (x.transpose(1, 2) for x in fused.unbind(2))
    if layout != "fused":
        q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    if layout == "token_major":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    arguments = op_arguments([q, k, v, torch.randn(heads, 16, 16), torch.randn(heads, 16)])
    real = torch.ops.sla.forward.default(*arguments)
    gradients = torch.ops.sla.backward.default(
        torch.randn_like(q), *arguments[:6], *real, 0.25, 16, 32, "softmax", "marginal"
    )
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    fake = torch.ops.sla.forward.default(*meta)
    fake_gradients = torch.ops.sla.backward.default(meta[0], *meta[:6], *fake, 0.25, 16, 32, "softmax", "marginal")
    for a, b in zip((*real, *gradients), (*fake, *fake_gradients), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize(
    ("block", "linear", "causal", "rows"),
    [
        (64, "marginal", False, 16),
        (32, "marginal", False, 0),  # they would take twice the memory of q
        (32, "all", False, 1),
        (32, "all", True, 0),
        (64, "none", False, 0),
    ],
)
def test_a_gpu_keeps_sums_of_states_that_take_no_more_than_q(block: int, linear: str, causal: bool, rows: int) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 3, 1000, 64, device="cuda", dtype=torch.float16)
        weight = torch.empty(64, 64, device="cuda")
        rest = (None, None, None, 0.1, 0.1, 0.1, block, block, "softmax", linear, causal)
        states, normalizers = torch.ops.sla.forward.default(q, q, q, weight, *rest)[4:]
        assert (states.shape, states.dtype) == ((2, 3, rows, 64, 64), torch.bfloat16)
        assert (normalizers.shape, normalizers.dtype) == ((2, 3, rows, 64), torch.float32)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_for_any_length(backend: str) -> None:
    torch.manual_seed(5)
    torch._dynamo.reset()

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in x.unflatten(2, (3, 2, 16)).unbind(2))
        return sparse_linear_attention(q, k, v, weight, bias, **OPTIONS).transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (130, 200, 65, 333):
            leaves = [torch.randn(s, requires_grad=True) for s in ((1, tokens, 96), (16, 16), (16,))]
            out, expected = compiled(*leaves), block(*leaves)
            assert_close("out", out, expected, 1e-6)
            grad_out = torch.randn_like(out)
            for actual, wanted in zip(
                torch.autograd.grad(out, leaves, grad_out),
                torch.autograd.grad(expected, leaves, grad_out),
                strict=True,
            ):
                assert_close(f"gradients of {tokens} tokens", actual, wanted, 1e-6)


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4,), (0, 4)], ids=str)
def test_a_backward_of_some_inputs(wanted: tuple[int, ...]) -> None:
    torch.manual_seed(6)
    inputs = make_inputs(100)
    out = sparse_linear_attention(*inputs, **OPTIONS)
    grad_out = torch.randn_like(out)
    full = torch.autograd.grad(out, inputs, grad_out)
    frozen = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    sparse_linear_attention(*frozen, **OPTIONS).backward(grad_out)
    for i, x in enumerate(frozen):
        if i in wanted:
            assert x.grad is not None
            assert_close(str(i), x.grad, full[i], 0.0)
        else:
            assert x.grad is None


def test_only_the_output_is_differentiable() -> None:
    out, *others = torch.ops.sla.forward.default(*op_arguments(make_inputs()))
    assert out.requires_grad
    assert not any(x.requires_grad for x in others)


def test_forward_mode_is_refused() -> None:
    q, *rest = (x.detach() for x in make_inputs())
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: sparse_linear_attention(q, *rest, **OPTIONS), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.ops.sla.forward.default(*op_arguments((dual, *rest)))
        sparse_linear_attention(q, *rest, **OPTIONS)


def test_double_backward_is_refused() -> None:
    inputs = make_inputs()
    (dq,) = torch.autograd.grad(sparse_linear_attention(*inputs, **OPTIONS).sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="there is no double backward"):
        dq.sum().backward()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_activations_alone(dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(7)
    torch._dynamo.reset()
    inputs = make_inputs(200, dtype=torch.float32)
    function: Callable[..., Tensor] = sparse_linear_attention
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        out = function(inputs[0], inputs[1].double().float(), inputs[2].to(dtype), *inputs[3:], **OPTIONS)
        # a backward inside autocast must not let it into the kernels
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
    low = [x.detach().to(dtype) for x in inputs[:3]] + [x.detach() for x in inputs[3:]]
    low = [x.requires_grad_() for x in low]
    expected = sparse_linear_attention(*low, **OPTIONS)
    assert out.dtype == dtype
    assert_close("out", out, expected, 0.0)
    for x, actual, wanted in zip(
        inputs, gradients, torch.autograd.grad(expected.float().square().sum(), low), strict=True
    ):
        assert actual.dtype == x.dtype
        assert_close("gradient", actual, wanted, 1e-6)


def test_autocast_leaves_float64() -> None:
    inputs = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(
            "out",
            sparse_linear_attention(*inputs, **OPTIONS),
            sparse_linear_attention(*inputs, **OPTIONS).double(),
            0.0,
        )
        assert sparse_linear_attention(*inputs, **OPTIONS).dtype == torch.float64


def test_a_device_without_kernels_is_refused() -> None:
    class Elsewhere:
        device = torch.device("xpu")
        dtype = torch.float32

    with pytest.raises(ValueError, match="q is on xpu, accepted are cpu and cuda"):
        _kernels(Elsewhere())  # type: ignore[arg-type]


def run_fresh(code: str) -> str:
    """Standard output of a fresh process; its errors in the failure."""
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device, torch itself imports Triton")
def test_runs_where_triton_cannot_be_imported() -> None:
    run_fresh(
        """
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name == "triton" or name.startswith("triton."):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Blocked())
        import torch
        from sla_compile.ops.attention import sparse_linear_attention
        x = torch.randn(1, 2, 100, 16, requires_grad=True)
        eager = sparse_linear_attention(x, x, x, torch.eye(16), linear="marginal")
        compiled_function = torch.compile(sparse_linear_attention, fullgraph=True, backend="aot_eager")
        compiled = compiled_function(x, x, x, torch.eye(16), linear="marginal")
        compiled.sum().backward()
        assert torch.equal(eager, compiled) and x.grad.isfinite().all()
        assert "triton" not in sys.modules
        """
    )


def test_importing_touches_no_cuda_and_no_kernels() -> None:
    run_fresh(
        """
        import sys
        import torch
        def touched(*args, **kwargs):
            raise AssertionError("CUDA was touched")
        torch._C._cuda_getDeviceCount = touched
        torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
        before = set(sys.modules)
        import sla_compile.ops
        assert torch.ops.sla.forward.default and torch.ops.sla.backward.default
        new = [m for m in set(sys.modules) - before if m.startswith(("triton", "sla_compile.kernels."))]
        assert not new, new
        assert not torch.cuda.is_initialized()
        """
    )
