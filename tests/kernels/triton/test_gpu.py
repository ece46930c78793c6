"""The Triton kernels on a CUDA device: every dtype and head dimension against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla_compile.common.kernel_interface import AttentionInputs
from sla_compile.kernels import reference
from sla_compile.kernels.hopper import support as hopper
from sla_compile.kernels.triton import overlap
from tests.support.closeness import assert_close, relative_error
from tests.support.triton_cases import (
    GROUPED,
    NAMES,
    OPTIONS,
    VIRTUAL,
    Case,
    check,
    expected_classes,
    inputs,
    key_mask,
    run_kernels,
    run_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("nan_fresh_buffers"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BUDGETS = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-2, 2e-2), torch.bfloat16: (1e-2, 2e-2)}


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh buffers are filled here, so kernels must wait for each other; hopper/test_overlap.py has the rest."""
    monkeypatch.setattr(overlap, "may_overlap", lambda: False)


@pytest.mark.parametrize("head_dim", [16, 36, 40, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_head_dims(dtype: torch.dtype, head_dim: int) -> None:
    case = Case(tokens=1003, head_dim=head_dim, batch=2, topk=0.2, bottomk=0.2)
    check(case, inputs(case, dtype, "cuda"), *BUDGETS[dtype])


CASES = [
    Case(tokens=999, feature_map="elu"),
    Case(tokens=999, feature_map="relu"),
    Case(tokens=999, linear="all"),
    Case(tokens=999, linear="none"),
    Case(tokens=999, weight="none"),
    Case(tokens=999, weight="none", bias="none"),
    Case(tokens=999, weight="per_head", bias="per_head", heads=3),
    Case(tokens=999, gate_dtype=torch.float32),
    Case(tokens=999, layout="packed"),
    Case(tokens=999, layout="head_major"),
    Case(tokens=999, layout="dim_before_token"),
    Case(tokens=999, layout="slice"),
    Case(tokens=999, layout="off by one"),
    Case(tokens=999, layout="slice", head_dim=33),
    Case(tokens=999, head_dim=36),
    Case(tokens=999, head_dim=100, heads=3),
    Case(tokens=999, head_dim=72, heads=3),
    Case(tokens=999, topk=0.4, bottomk=0.6),
    Case(tokens=63),
    Case(tokens=640, topk=0.05, bottomk=0.1),
    *(
        Case(tokens=1001, head_dim=head_dim, block_q=block_q, block_k=block_k)
        for head_dim, block_q, block_k in [
            (128, 128, 128),
            (128, 128, 64),
            (128, 32, 64),
            (128, 16, 16),
            (64, 64, 32),
            (64, 256, 128),
            (64, 64, 256),
            (256, 128, 32),
        ]
    ),
]


LARGE_BLOCKS = [
    Case(tokens=999, head_dim=128, block_q=128, block_k=128, batch=2, topk=0.2, bottomk=0.2),
    Case(tokens=999, head_dim=72, block_q=256, block_k=128, topk=0.3, feature_map="elu", linear="all"),
    Case(tokens=999, head_dim=64, block_q=128, topk=0.2, feature_map="relu"),
    Case(tokens=999, keys=700, head_dim=128, block_k=128, topk=0.3, weight="none"),
]
PAIRS_OF_BLOCKS = [
    Case(tokens=999, head_dim=128, batch=2, topk=0.2),
    Case(tokens=667, head_dim=128, topk=0.2),  # an odd number of blocks
]
# more than two tiles for each of an H100's 132 programs, of other heads with other gates
MANY_TILES = [
    Case(tokens=1003, heads=36, head_dim=128, weight="per_head", bias="per_head", topk=0.2),
    Case(tokens=1003, heads=36, head_dim=128, weight="per_head", bias="per_head", topk=0.2, block_q=128, block_k=128),
    Case(tokens=1003, heads=36, head_dim=64, weight="per_head", bias="per_head", topk=0.2),
]
WIDE_HEADS = [
    Case(tokens=2003, head_dim=256, batch=2, block_q=128, block_k=128, topk=0.1),
    Case(tokens=1003, head_dim=200, heads=4, group=2, block_q=128, block_k=128, feature_map="elu", linear="all"),
    Case(tokens=1003, head_dim=256, batch=2, block_q=128, block_k=128, mask="bool"),
    Case(tokens=1003, head_dim=256, block_q=256, block_k=128, causal=True, weight="per_head", bias="per_head"),
    Case(tokens=1003, head_dim=256, topk=0.2, weight="none", bias="none"),
    Case(tokens=2003, keys=300, head_dim=136, block_q=128, block_k=64, topk=0.4, linear="none", bias="none"),
    Case(tokens=1003, keys=2070, heads=6, group=3, head_dim=256, block_k=128, feature_map="relu", topk=0.2),
    # more than two tiles for each of an H100's programs
    Case(tokens=1003, heads=36, head_dim=256, block_q=128, block_k=128, topk=0.2, weight="per_head", bias="per_head"),
    # in which the keys came before both consumers' parts of the linear branch's dQ
    Case(tokens=999, head_dim=256, block_q=128, feature_map="elu", topk=0.2),
    Case(tokens=2003, head_dim=256, batch=2, block_q=128, block_k=128, topk=0.4, sparsity=(120_000, 300_000)),
    # lists of one and of two blocks, no more tiles than one, all blocks
    *(Case(tokens=999, head_dim=256, block_q=128, feature_map="elu", topk=topk) for topk in (0.05, 0.14)),
    Case(tokens=130, head_dim=256, block_q=128, feature_map="elu"),
    Case(tokens=40, head_dim=256, batch=2),
    Case(tokens=1003, head_dim=256, block_q=128, block_k=128, topk=1.0, bottomk=0.0),
    Case(tokens=2003, keys=300, head_dim=256, block_q=128, block_k=128, topk=0.4),
    Case(tokens=1061, head_dim=256, block_q=256, topk=0.2),
    Case(tokens=1003, head_dim=160, batch=3, block_q=128, topk=0.2),
    Case(tokens=1003, head_dim=192, heads=4, group=4, block_q=128, block_k=128, topk=0.2),
]
SPARSE_ALONE = [
    Case(tokens=1003, heads=36, head_dim=128, topk=0.2, block_q=128, block_k=128, weight="none", bias="none"),
    Case(tokens=1003, heads=36, head_dim=72, batch=2, topk=0.2, weight="none", bias="none"),
    # the last block has a tile without a query
    Case(tokens=300, head_dim=64, block_q=256, topk=0.5, weight="none", bias="none"),
]

KEY_MASKS = [
    Case(tokens=1003, heads=3, head_dim=128, batch=2, topk=0.2, block_q=128, block_k=128, mask="tail"),
    Case(tokens=1003, heads=3, head_dim=128, batch=2, topk=0.2, mask="tail"),
    Case(tokens=1003, heads=3, head_dim=128, batch=2, topk=0.4, block_q=128, block_k=128, mask="bool"),
    Case(tokens=1003, head_dim=72, batch=2, block_q=256, block_k=128, feature_map="elu", linear="all", mask="moderate"),
    Case(tokens=1003, head_dim=64, batch=2, block_q=128, feature_map="relu", mask="bool"),
    # no bias: where a query has one key, dq is 0, and the rounding of a bias in the output would be all that is seen
    Case(tokens=1003, head_dim=64, batch=2, block_q=128, mask="one key", bias="none"),
    Case(tokens=1003, head_dim=40, batch=2, topk=0.2, mask="bool", weight="per_head", bias="per_head"),
    Case(tokens=1003, head_dim=96, batch=2, block_k=128, mask="dead row"),
    Case(tokens=1003, keys=700, head_dim=80, batch=3, block_q=128, block_k=128, mask="-inf", weight="none"),
    Case(tokens=1003, keys=2050, head_dim=128, mask="front", weight="none", bias="none"),
    Case(tokens=1003, head_dim=128, batch=2, block_q=128, block_k=128, mask="dead row", weight="none", bias="none"),
    Case(tokens=1003, head_dim=128, batch=2, mask="bool", linear="none", block_k=128, layout="packed"),
    # more than two tiles for each of an H100's programs
    Case(tokens=1003, heads=36, head_dim=128, batch=2, topk=0.2, block_q=128, block_k=128, mask="one row"),
    Case(tokens=1003, heads=36, head_dim=64, batch=2, topk=0.2, mask="moderate"),
    Case(tokens=3003, head_dim=64, batch=2, mask="bool", sparsity=(100_000, 300_000), always=(60, 200, -70, 10**9)),
]

CAUSAL = [
    Case(tokens=1003, heads=3, head_dim=128, batch=2, topk=0.2, block_q=128, block_k=128, causal=True),
    Case(tokens=1003, heads=36, head_dim=128, batch=2, topk=0.2, causal=True),
    Case(tokens=1003, head_dim=72, block_q=256, topk=0.3, feature_map="elu", linear="all", causal=True),
    Case(tokens=999, head_dim=128, block_k=128, topk=0.3, bottomk=0.5, feature_map="relu", causal=True),
    Case(tokens=1001, head_dim=96, block_q=128, topk=0.2, sparsity=(100_000, 200_000), always=(0, 70), causal=True),
    Case(tokens=300, head_dim=64, block_q=256, block_k=128, topk=0.5, weight="none", bias="none", causal=True),
    Case(tokens=1003, heads=36, head_dim=128, block_q=128, block_k=128, weight="none", bias="none", causal=True),
    Case(tokens=1003, heads=3, head_dim=128, topk=0.2, block_q=128, block_k=128, linear="taylor", causal=True),
    Case(tokens=1003, head_dim=72, batch=2, topk=0.1, bottomk=0.0, linear="taylor", causal=True),
    Case(tokens=1003, head_dim=64, block_q=256, topk=0.1, bottomk=0.0, linear="taylor", causal=True),
]

VIRTUAL_KEYS = [
    Case(tokens=1003, heads=3, head_dim=128, topk=0.2, block_q=128, block_k=128, linear="taylor"),
    Case(tokens=1003, heads=3, head_dim=72, batch=2, topk=0.1, bottomk=0.0, linear="taylor"),
    Case(tokens=1003, keys=2050, heads=3, head_dim=64, topk=0.1, block_q=256, linear="taylor"),
    Case(tokens=667, keys=1003, heads=3, head_dim=128, batch=2, topk=0.2, bottomk=0.0, linear="taylor"),
    Case(tokens=1003, head_dim=96, block_q=128, sparsity=((90_000, 0), (300_000, 100_000)), linear="taylor"),
    # more than two tiles for each of an H100's programs; a last block that has a tile without a query
    Case(tokens=1003, heads=36, head_dim=128, topk=0.2, block_q=128, block_k=128, linear="taylor"),
    Case(tokens=1003, heads=36, head_dim=128, topk=0.2, linear="taylor"),
    Case(tokens=300, head_dim=128, block_q=256, block_k=128, topk=0.5, bottomk=0.0, linear="taylor"),
    Case(tokens=999, head_dim=64, block_k=128, topk=1.0, bottomk=0.0, linear="taylor"),
]

MASKED_VIRTUAL_KEYS = [
    Case(tokens=1003, heads=3, head_dim=128, batch=2, topk=0.2, block_q=128, block_k=128, mask="tail", linear="taylor"),
    Case(tokens=1003, heads=3, head_dim=128, batch=2, topk=0.2, mask="bool", linear="taylor"),
    Case(tokens=1003, keys=2050, head_dim=72, batch=2, topk=0.1, bottomk=0.0, mask="moderate", linear="taylor"),
    Case(tokens=1003, head_dim=64, batch=2, block_q=256, mask="dead row", linear="taylor"),
    Case(tokens=667, keys=1003, head_dim=96, batch=2, block_q=128, bottomk=0.0, mask="one key", linear="taylor"),
    Case(tokens=1003, heads=36, head_dim=128, batch=2, topk=0.2, block_k=128, mask="-inf", linear="taylor"),
]


GROUPED_QUERIES = [
    *(
        Case(tokens=1003, heads=8, group=group, head_dim=dim, batch=2, block_q=q, block_k=k, **form)
        for group, dim, q, k, form in (
            (2, 128, 128, 128, {}),
            (4, 80, 64, 64, {"weight": "per_head", "mask": "bool"}),
            (8, 64, 64, 128, {"causal": True}),
            (4, 128, 128, 128, {"causal": True, "linear": "all"}),
            (2, 80, 256, 64, {"causal": True, "linear": "none"}),
            (4, 128, 128, 128, {"topk": 0.1, "linear": "taylor"}),
            (8, 80, 64, 64, {"topk": 0.1, "linear": "taylor", "mask": "moderate"}),
            (2, 64, 128, 64, {"topk": 0.1, "linear": "taylor", "causal": True}),
        )
    ),
    Case(tokens=667, keys=1003, heads=9, group=3, head_dim=72, linear="all", mask="tail"),
]


@pytest.mark.parametrize("gluon", [True, False], ids=["gluon", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize(
    "case",
    [
        *LARGE_BLOCKS,
        *PAIRS_OF_BLOCKS,
        *MANY_TILES,
        *WIDE_HEADS,
        *SPARSE_ALONE,
        *KEY_MASKS,
        *CAUSAL,
        *VIRTUAL_KEYS,
        *MASKED_VIRTUAL_KEYS,
        *GROUPED_QUERIES,
    ],
    ids=str,
)
def test_gluon_and_triton(case: Case, dtype: torch.dtype, gluon: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if gluon and not hopper.available(0):
        pytest.skip("needs a Hopper GPU and a Triton whose Gluon is known")
    if not gluon:
        monkeypatch.setattr(hopper, "usable", lambda *tensors, **settings: False)
    check(case, inputs(case, dtype, "cuda"), *BUDGETS[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize(
    "case", [*CASES, *WIDE_HEADS, *VIRTUAL, Case(tokens=999, head_dim=256, linear="taylor")], ids=str
)
def test_settings(case: Case, dtype: torch.dtype) -> None:
    check(case, inputs(case, dtype, "cuda"), *BUDGETS[dtype])


@pytest.mark.parametrize("case", [Case(tokens=1), Case(tokens=65, topk=0.05, bottomk=0.1)], ids=str)
def test_single_keys(case: Case) -> None:
    # queries with one key have dq = 0: in 16 bits the difference of two roundings is all there is
    check(case, inputs(case, torch.float32, "cuda"), 1e-5, 1e-5)
    actual, _ = run_kernels(case, inputs(case, torch.bfloat16, "cuda"))
    for name, value in actual.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_topk_one_is_as_good_as_dense_attention(dtype: torch.dtype, head_dim: int) -> None:
    case = Case(tokens=2003, head_dim=head_dim, topk=1.0, bottomk=0.0, bias="none")
    tensors = inputs(case, dtype, "cuda")
    actual, block_map = run_kernels(case, tensors)
    expected = run_reference(case, tensors, block_map)
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v)
    dense = dict(zip(NAMES, (out, *torch.autograd.grad(out, (q, k, v), tensors[5])), strict=False))
    for name, value in dense.items():
        ours, theirs = relative_error(actual[name], expected[name]), relative_error(value, expected[name])
        assert ours <= 2 * theirs, f"{name}: error {ours:.3e}, dense SDPA's {theirs:.3e}"


def test_many_tokens() -> None:
    case = Case(tokens=10007, head_dim=128, topk=0.05, bottomk=0.1)
    check(case, inputs(case, torch.bfloat16, "cuda"), 1e-2, 2e-2)


POPULAR = [
    Case(block_q=128, tokens=6007, head_dim=128, heads=1, bottomk=0.1),
    Case(block_q=128, tokens=6007, head_dim=128, heads=5, bottomk=0.1),
    Case(block_q=128, tokens=5003, head_dim=64, heads=3, bottomk=0.1),
    Case(tokens=4001, head_dim=72, heads=3, block_q=64, bottomk=0.1, linear="taylor"),
    Case(block_q=128, tokens=4001, head_dim=128, heads=4, group=2, bottomk=0.1),
    Case(tokens=4001, head_dim=128, heads=4, group=2, block_q=64, bottomk=0.1, causal=True),
    Case(block_q=128, tokens=4001, head_dim=128, batch=2, bottomk=0.1, mask="bool"),
    Case(tokens=4001, head_dim=128, batch=2, block_q=256, bottomk=0.1, mask="moderate", linear="taylor"),
    Case(tokens=4001, head_dim=128, heads=3, block_q=256, bottomk=0.0, causal=True, weight="none", bias="none"),
    Case(tokens=4001, head_dim=96, heads=3, block_q=64, bottomk=0.0, causal=True, linear="taylor"),
    Case(block_q=128, tokens=4001, head_dim=128, heads=8, group=8, bottomk=0.1, causal=True, linear="all"),
]


@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("case", POPULAR, ids=str)
def test_popular_keys(case: Case, block_k: int) -> None:
    """Some blocks of keys are chosen by every query, others by hardly one: long columns, which several programs share,
    and the bits are the same every time."""
    case = replace(case, block_k=block_k, topk=0.05)
    tensors = inputs(case, torch.float16 if case.head_dim in (64, 96) else torch.bfloat16, "cuda")
    q, k = tensors[:2]
    assert q is not None
    assert k is not None
    q[..., 0] += 8.0
    k[:, :, : 2 * block_k, 0] += 8.0
    block_map = check(case, tensors, 1e-2, 2e-2)
    chosen = (block_map == 1).sum(-2)
    assert chosen.max() > 4 * chosen.float().mean()
    first, _ = run_kernels(case, tensors)
    for _ in range(10):
        again, _ = run_kernels(case, tensors)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize(
    "case",
    [
        *(Case(tokens=3001, head_dim=head_dim, heads=4, topk=0.1) for head_dim in (64, 128, 256)),
        *WIDE_HEADS,
        # thousands of blocks: a race is seen in some of them
        *(
            Case(tokens=16001, head_dim=128, heads=24, topk=0.05, block_q=block, block_k=block, linear="taylor")
            for block in (32, 64, 128)
        ),
    ],
    ids=str,
)
def test_bits_are_the_same_every_time(case: Case) -> None:
    tensors = inputs(case, torch.bfloat16, "cuda")
    first, first_map = run_kernels(case, tensors)
    for _ in range(3):
        again, again_map = run_kernels(case, tensors)
        assert torch.equal(first_map, again_map)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("block", [64, 128])
def test_an_empty_batch(block: int) -> None:
    from sla_compile.kernels.triton import attention as triton_attention

    q = torch.empty(0, 3, 1000, 64, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.ones(64, 64, device="cuda"), torch.ones(64, device="cuda")
    call = AttentionInputs(q, q, q, weight, bias)
    options = Case(block_q=block, block_k=block, topk=0.1, bottomk=0.1).attention_options
    saved = triton_attention.forward(call, options)
    found = triton_attention.backward(q, call, saved, options)
    assert [x.shape for x in (saved.out, *found[:3])] == [q.shape] * 4
    assert all(torch.equal(x, torch.zeros_like(like)) for x, like in zip(found[3:5], (weight, bias), strict=True))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per head"])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("tokens", [333, 700, 1000, 32760])
def test_gate_gradients_at_any_length(head_dim: int, tokens: int, shared: bool) -> None:
    """With two stages and four warps, Triton 3.6's pipeline overwrote tiles that a product still read."""
    from sla_compile.kernels.triton.linear_backward import gate_backward

    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, tokens, 4, head_dim)
    grad_out, linear_out = (
        torch.randn(shape, generator=generator, device="cuda").bfloat16().transpose(1, 2) for _ in range(2)
    )
    heads = () if shared else (4,)
    weight, bias = (torch.zeros(*heads, *dims, device="cuda") for dims in ((head_dim, head_dim), (head_dim,)))
    expected = torch.einsum("bhni,bhnj->hij", grad_out.double(), linear_out.double())
    sums = grad_out.double().sum((0, 2))
    if shared:
        expected, sums = expected.sum(0), sums.sum(0)
    first, *others = (gate_backward(grad_out, linear_out, weight, bias, True)() for _ in range(8))
    assert_close("dweight", first[0], expected, 1e-5)
    assert_close("dbias", first[1], sums, 1e-5)
    for found in others:
        assert torch.equal(found[0], first[0])
        assert torch.equal(found[1], first[1])


@pytest.mark.parametrize("transpose", [False, True])
def test_sums_of_normalizers_are_those_of_float32(transpose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sla_compile.kernels.triton.states import marginal_matrix, sum_of_normalizers

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    generator = torch.Generator("cuda").manual_seed(0)
    block_map = torch.randint(-1, 2, (2, 3, 77, 131), dtype=torch.int8, generator=generator, device="cuda")
    marginal = (block_map == 0).double()
    marginal = marginal.mT if transpose else marginal
    normalizers = torch.rand(2, 3, marginal.shape[3], 72, generator=generator, device="cuda") * 128
    sums = sum_of_normalizers(marginal_matrix(block_map, torch.bfloat16), normalizers, 3, transpose=transpose)
    assert_close("sums", sums, marginal @ normalizers.double(), 2e-6)


@pytest.mark.parametrize("most_for_the_kernel", [16384, 16], ids=["order by the kernel", "order by a sort"])
def test_capture_in_a_cuda_graph(most_for_the_kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sla_compile.kernels.triton.classify._ORDER_SORTED", most_for_the_kernel)
    case = Case(tokens=1003, head_dim=128)
    tensors = inputs(case, torch.bfloat16, "cuda")
    run_kernels(case, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_map = run_kernels(case, tensors)
    for tensor, fresh in zip(tensors, inputs(case, torch.bfloat16, "cuda", seed=1), strict=True):
        if tensor is not None and fresh is not None:
            tensor.copy_(fresh)
    graph.replay()
    expected, expected_map = run_kernels(case, tensors)
    assert torch.equal(captured_map, expected_map)
    for name, value in expected.items():
        assert torch.equal(captured[name], value), name


def test_classes_match_the_definition() -> None:
    case = Case(tokens=8011, head_dim=128, topk=0.1, bottomk=0.2)
    q, k, *rest = inputs(case, torch.bfloat16, "cuda")
    assert q is not None
    assert k is not None
    _, block_map = run_kernels(case, [q, k, *rest])
    settings = {
        "scale": case.head_dim**-0.5,
        "topk": case.topk,
        "bottomk": case.bottomk,
        "block_q": 64,
        "block_k": 64,
    }
    expected = reference.classify(q.double(), k.double(), **settings)
    # only pairs of scores closer than float32 rounding may be ranked otherwise
    assert (block_map != expected).float().mean().item() < 1e-3
    critical, negligible = case.counts
    assert ((block_map == 1).sum(-1) == critical).all()
    assert ((block_map == -1).sum(-1) == negligible).all()


def test_equal_keys_go_to_the_lower_index() -> None:
    case = Case(tokens=2000, head_dim=128, topk=0.1, bottomk=0.1)
    q, k, *rest = inputs(case, torch.bfloat16, "cuda")
    assert k is not None
    _, block_map = run_kernels(case, [q, torch.full_like(k, 0.3), *rest])
    critical, negligible = case.counts
    blocks = block_map.shape[-1]
    row = torch.tensor([1] * critical + [0] * (blocks - critical - negligible) + [-1] * negligible)
    assert torch.equal(block_map.cpu(), row.to(torch.int8).expand(block_map.shape))


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("keys", ["logits of 1e6", "equal", "zero", "negative"])
def test_finite(keys: str, dtype: torch.dtype, feature_map: str) -> None:
    case = Case(tokens=500, head_dim=64, feature_map=feature_map)
    q, k, *rest = inputs(case, dtype, "cuda")
    assert q is not None
    assert k is not None
    change = {
        "logits of 1e6": lambda x: x * 1e3 * 64**0.25,
        "equal": torch.ones_like,
        "zero": torch.zeros_like,
        "negative": lambda x: -x.abs() - 1,
    }[keys]
    actual, _ = run_kernels(case, [change(q), change(k), *rest])
    for name, value in actual.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_logits_far_below_zero(dtype: torch.dtype) -> None:
    # exp(-lse) overflows: what pads the last block must be masked, not multiplied by zero
    case = Case(tokens=500, head_dim=64, topk=1.0, bottomk=0.0)
    q, k, *rest = inputs(case, dtype, "cuda")
    assert q is not None
    assert k is not None
    actual, _ = run_kernels(case, [q.abs() * 4 + 8, -k.abs() - 8, *rest])
    for name, value in actual.items():
        assert torch.isfinite(value).all(), name


def test_addresses_beyond_32_bits() -> None:
    case = Case(tokens=300, head_dim=64, heads=1)
    tensors = inputs(case, torch.bfloat16, "cuda")
    near, _ = run_kernels(case, tensors)
    pitch = 2**23
    far = []
    for x in tensors[:3]:
        assert x is not None
        memory = torch.zeros(case.tokens * pitch, dtype=x.dtype, device="cuda")
        view = memory.as_strided(x.shape, (case.tokens * pitch, case.tokens * pitch, pitch, 1))
        view.copy_(x)
        far.append(view)
    spread, _ = run_kernels(case, [*far, *tensors[3:]])
    for name, value in near.items():
        assert torch.equal(value, spread[name]), name


@pytest.mark.parametrize("expanded", [False, True])
def test_grad_out_of_any_strides(expanded: bool) -> None:
    case = Case(tokens=300, head_dim=64)
    *arguments, grad_out = inputs(case, torch.float32, "cuda")
    assert grad_out is not None
    grad_out = grad_out[:, :, :, :1].expand_as(grad_out) if expanded else grad_out.contiguous()
    check(case, [*arguments, grad_out], 1e-5, 1e-5)


def larger(case: Case) -> Case:
    """A case for the interpreter at five times the tokens, still no multiple of a block."""
    scaled = [start * 5 for start in case.always]
    return replace(case, tokens=case.tokens * 5 + 3, keys=case.keys and case.keys * 5 + 1, always=tuple(scaled))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [*OPTIONS, *GROUPED], ids=str)
def test_options(case: Case, dtype: torch.dtype) -> None:
    case = larger(case)
    tensors = inputs(case, dtype, "cuda")
    block_map = check(case, tensors, *BUDGETS[dtype])
    # only pairs of scores closer than float32 rounding may be ranked otherwise
    assert (block_map != expected_classes(case, tensors)).float().mean().item() < 1e-2


@pytest.mark.parametrize("head_dim", [40, 64, 72, 128, 256])
@pytest.mark.parametrize("options", [{"mask": "-inf"}, {"causal": True}, {"keys": 777, "mask": "bool"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_options_at_head_dims(dtype: torch.dtype, options: dict[str, Any], head_dim: int) -> None:
    for block_q, block_k in ((64, 64), (128, 64), (64, 128)):
        case = replace(Case(tokens=1003, head_dim=head_dim, batch=2, block_q=block_q, block_k=block_k), **options)
        check(case, inputs(case, dtype, "cuda"), *BUDGETS[dtype])


@pytest.mark.parametrize("mask", ["bool", "dead row", "-inf", "-10000", "all -10000", "moderate", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_topk_one_is_dense_attention_under_the_mask(dtype: torch.dtype, mask: str) -> None:
    case = Case(tokens=1003, batch=2, topk=1.0, bottomk=0.0, bias="none", causal=mask == "causal")
    case = replace(case, mask="none" if case.causal else mask)
    tensors = inputs(case, dtype, "cuda")
    actual, _ = run_kernels(case, tensors)
    q, k, v = (x.detach().double().requires_grad_() for x in tensors[:3] if x is not None)
    given = key_mask(case, "cuda")
    if given is not None and given.dtype != torch.bool:
        given = given.double()
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if given is None else given[:, None, None], is_causal=case.causal
        )
    assert tensors[5] is not None
    expected = (out, *torch.autograd.grad(out, (q, k, v), tensors[5].double()))
    for name, value, budget in zip(NAMES, expected, (BUDGETS[dtype][0], *(BUDGETS[dtype][1],) * 3), strict=False):
        assert_close(name, actual[name], value, budget)


def test_options_wait_for_nothing_and_are_captured() -> None:
    case = Case(tokens=1003, head_dim=64, batch=2, mask="bool", always=(0, 100), topk=0.5, bottomk=0.5)
    q, k, v, weight, bias, grad_out = inputs(case, torch.bfloat16, "cuda")
    mask = key_mask(case, "cuda")
    assert mask is not None
    sparsity = torch.tensor([100_000, 200_000], device="cuda")

    def run() -> list[torch.Tensor]:
        from sla_compile.kernels.triton import attention as triton_attention

        call, options = AttentionInputs(q, k, v, weight, bias, mask, sparsity), case.attention_options
        saved = triton_attention.forward(call, options)
        return [*saved[:4], *triton_attention.backward(grad_out, call, saved, options)]

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    sparsity.copy_(torch.tensor([300_000, 100_000]))
    mask.copy_(mask.flip(0))
    graph.replay()
    for name, a, b in zip(("out", "linear", "lse", "map", *NAMES[1:], "dshift"), captured, run(), strict=True):
        assert torch.equal(a, b), name


def test_sparsity_gives_the_classes_of_the_arguments() -> None:
    case = Case(tokens=4001, head_dim=64, topk=0.1, bottomk=0.2)
    tensors = inputs(case, torch.bfloat16, "cuda")
    expected, expected_map = run_kernels(case, tensors)
    actual, block_map = run_kernels(replace(case, topk=0.5, bottomk=0.0, sparsity=(100_000, 200_000)), tensors)
    assert torch.equal(block_map, expected_map)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
