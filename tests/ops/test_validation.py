"""What the ops refuse: the same errors in eager mode, compiled, and from the op itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sla_compile.ops.attention import sparse_linear_attention

OPTIONS: dict[str, Any] = {"topk": 0.3, "bottomk": 0.2, "block_q": 16, "block_k": 32, "linear": "marginal"}


def make_inputs() -> list[Tensor]:
    """q, k, v, weight, bias."""
    return [torch.randn(shape) for shape in (*((1, 2, 40, 16),) * 3, (16, 16), (16,))]


def arguments_with(**changed: Any) -> tuple[list[Any], dict[str, Any]]:
    names = ("q", "k", "v", "weight", "bias")
    given = dict(zip(names, make_inputs(), strict=True)) | OPTIONS | changed
    return [given.pop(name) for name in names], given


x = torch.randn


VALUE_ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("rank", {"q": x(2, 40, 16)}, ValueError, "q has shape (2, 40, 16), accepted are four axes"),
    ("rank_0", {"q": x(())}, ValueError, "q has shape (), accepted are four axes"),
    (
        "cross",
        {"k": x(1, 2, 41, 16)},
        ValueError,
        "v has shape (1, 2, 40, 16), accepted is that of k, (1, 2, 41, 16)",
    ),
    (
        "grouped",
        {"q": x(1, 3, 40, 16)},
        ValueError,
        "k has shape (1, 2, 40, 16), accepted is that of q, (1, 3, 40, 16), but for the number of tokens, and for",
    ),
    (
        "causal_cross",
        {"k": x(1, 2, 41, 16), "v": x(1, 2, 41, 16), "causal": True},
        ValueError,
        "causal=True with 40 queries and 41 keys, accepted is one number of tokens in q and k",
    ),
    (
        "mask_shape",
        {"key_mask": x(40)},
        ValueError,
        "key_mask has shape (40,), accepted are (1, 40) or (1, 40), (batch, keys)",
    ),
    ("mask_keys", {"key_mask": x(1, 41)}, ValueError, "key_mask has shape (1, 41), accepted are (1, 40)"),
    ("mask_dtype", {"key_mask": torch.ones(1, 40).int()}, TypeError, "key_mask has dtype torch.int32, accepted are"),
    (
        "mask_device",
        {"key_mask": x(1, 40, device="meta")},
        ValueError,
        "key_mask is on meta, accepted is the device of q",
    ),
    (
        "sparsity_dtype",
        {"sparsity": torch.ones(2)},
        TypeError,
        "sparsity has dtype torch.float32, accepted is torch.int64, [topk, bottomk] in millionths",
    ),
    ("sparsity_shape", {"sparsity": torch.ones(3).long()}, ValueError, "sparsity has shape (3,), accepted are (2,)"),
    (
        "sparsity_device",
        {"sparsity": torch.ones(2, device="meta").long()},
        ValueError,
        "sparsity is on meta, accepted is the device of q, cpu",
    ),
    (
        "always_odd",
        {"always_critical": [1, 2, 3]},
        ValueError,
        "always_critical=[1, 2, 3], accepted is an even number of tokens [start, stop, start, stop, ...]",
    ),
    (
        "always_order",
        {"always_critical": [0, 4, 7, 7]},
        ValueError,
        "always_critical has the range 7 to 7, accepted is start < stop",
    ),
    ("dtype", {"k": x(1, 2, 40, 16).half()}, TypeError, "k has dtype torch.float16, accepted is that of q"),
    (
        "int",
        {"q": torch.ones(1, 2, 40, 16).int()},
        TypeError,
        "q has dtype torch.int32, accepted are torch.float32",
    ),
    (
        "device",
        {"k": x(1, 2, 40, 16, device="meta")},
        ValueError,
        "k is on meta, accepted is the device of q, cpu",
    ),
    ("dim", {n: x(1, 2, 40, 8) for n in "qkv"}, ValueError, "head dimension 8, accepted is 16 to 256"),
    ("empty", {n: x(1, 2, 0, 16) for n in "qkv"}, ValueError, "q has no tokens, accepted is at least one"),
    (
        "weight",
        {"weight": x(3, 16, 16)},
        ValueError,
        "weight has shape (3, 16, 16), accepted are (16, 16) or (2, 16, 16)",
    ),
    (
        "weight_rank",
        {"weight": x(16)},
        ValueError,
        "weight has shape (16,), accepted are (16, 16) or (2, 16, 16)",
    ),
    ("bias", {"bias": x(1, 16)}, ValueError, "bias has shape (1, 16), accepted are (16,) or (2, 16)"),
    (
        "bias_dtype",
        {"bias": torch.ones(16).long()},
        TypeError,
        "bias has dtype torch.int64, accepted are torch.float32",
    ),
    ("topk_0", {"topk": 0.0}, ValueError, "topk=0.0, accepted is 0 < topk <= 1"),
    ("topk_nan", {"topk": float("nan")}, ValueError, "topk=nan, accepted is 0 < topk <= 1"),
    ("bottomk", {"bottomk": 1.0}, ValueError, "bottomk=1.0, accepted is 0 <= bottomk < 1"),
    (
        "sum",
        {"topk": 0.75, "bottomk": 0.5},
        ValueError,
        "topk=0.75 and bottomk=0.5 add up to 1.25, accepted is at most 1",
    ),
    ("scale", {"scale": float("inf")}, ValueError, "scale=inf, accepted is a finite number"),
    ("block_q", {"block_q": 48}, ValueError, "block_q=48, accepted is one of (16, 32, 64, 128, 256)"),
    (
        "feature",
        {"feature_map": "softmx"},
        ValueError,
        "feature_map='softmx', accepted is one of ('softmax', 'elu', 'relu'); nearest is 'softmax'",
    ),
    ("linear", {"linear": "marginals"}, ValueError, "nearest is 'marginal'"),
]


TYPE_ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("list", {"q": [1.0]}, TypeError, "q is list, accepted is a torch.Tensor"),
    ("none", {"v": None}, TypeError, "v is NoneType, accepted is a torch.Tensor"),
    ("weight_number", {"weight": 1.0}, TypeError, "weight is float, accepted is a torch.Tensor"),
    ("topk_str", {"topk": "5%"}, TypeError, "topk='5%', accepted is a number"),
    ("topk_bool", {"topk": True}, TypeError, "topk=True, accepted is a number"),
    ("block_float", {"block_k": 64.0}, TypeError, "block_k=64.0, accepted is an int"),
    ("causal_int", {"causal": 1}, TypeError, "causal=1, accepted is a bool"),
    ("mask_list", {"key_mask": [True]}, TypeError, "key_mask is list, accepted is a torch.Tensor"),
    ("always_float", {"always_critical": [0, 1.5]}, TypeError, "always_critical=[0, 1.5], accepted is a list of ints"),
    ("linear_none", {"linear": None}, TypeError, "linear=None, accepted is a str"),
]


IDS = [case[0] for case in VALUE_ERRORS + TYPE_ERRORS]


@pytest.mark.parametrize(("_", "changed", "error", "text"), VALUE_ERRORS + TYPE_ERRORS, ids=IDS)
@pytest.mark.parametrize("mode", ["eager", "compiled", "dynamic"])
def test_errors_are_the_same_eager_and_compiled(
    _: str, changed: dict[str, Any], error: type[Exception], text: str, mode: str
) -> None:
    tensors, options = arguments_with(**changed)
    function: Callable[..., Tensor] = sparse_linear_attention
    if mode != "eager":
        torch._dynamo.reset()
        function = torch.compile(function, backend="eager", dynamic=mode == "dynamic" or None)
    with pytest.raises(error) as raised:
        function(*tensors, **options)
    assert text in str(raised.value)


@pytest.mark.parametrize(("_", "changed", "error", "text"), VALUE_ERRORS, ids=[case[0] for case in VALUE_ERRORS])
def test_errors_are_not_skipped_under_fullgraph(
    _: str, changed: dict[str, Any], error: type[Exception], text: str
) -> None:
    torch._dynamo.reset()
    tensors, options = arguments_with(**changed)
    # Dynamo's own error: without fullgraph it breaks the graph there and the error above is raised
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(sparse_linear_attention, backend="eager", fullgraph=True)(*tensors, **options)


@pytest.mark.parametrize(("_", "changed", "error", "text"), VALUE_ERRORS, ids=[case[0] for case in VALUE_ERRORS])
def test_the_op_itself_checks_too(_: str, changed: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"key_mask": None, "sparsity": None, "scale": 0.25, "feature_map": "softmax", "linear": "all"} | changed
    tensors, options = arguments_with(**given)
    with pytest.raises(error) as raised:
        torch.ops.sla.forward.default(*tensors, **options)
    assert text in str(raised.value)
