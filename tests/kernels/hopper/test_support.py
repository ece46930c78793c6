"""Which calls the Gluon kernels take; what they compute is tested on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from sla_compile.common.options import BackwardOptions
from sla_compile.kernels.hopper import support as hopper
from sla_compile.kernels.triton import attention
from sla_compile.kernels.triton import steps as triton_steps

OPTIONS = BackwardOptions(scale=0.1, block_q=64, block_k=64, feature_map="softmax", linear="marginal")


class OnCuda(Tensor):
    """A CPU tensor that says it lies on a GPU."""

    is_cuda = True


def on_cuda(x: Tensor) -> Tensor:
    return x.as_subclass(OnCuda)


@pytest.fixture(autouse=True)
def a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "available", lambda device: True)


def activations(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return on_cuda(torch.zeros(1, 128, 2, head_dim, dtype=dtype).transpose(1, 2))


@pytest.mark.parametrize("head_dim", [40, 64, 128, 136, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_takes(head_dim: int, dtype: torch.dtype) -> None:
    x = activations(head_dim, dtype)
    for block_q, block_k in ((64, 64), (128, 64), (256, 128)):
        assert hopper.usable(x, x, x, options=replace(OPTIONS, block_q=block_q, block_k=block_k), has_key_mask=False)


@pytest.mark.parametrize(
    "change", [{"scale": -0.1}, {"scale": 0.0}, {"block_q": 32}, {"block_k": 256}, {"block_k": 16}]
)
def test_leaves_options(change: dict[str, Any]) -> None:
    x = activations()
    assert not hopper.usable(x, x, x, options=replace(OPTIONS, **change), has_key_mask=False)


def test_takes_masks_of_keys_and_causal_attention_but_not_both() -> None:
    x, longer = activations(), on_cuda(torch.zeros(1, 256, 2, 64, dtype=torch.bfloat16).transpose(1, 2))
    causal = replace(OPTIONS, causal=True)
    assert hopper.usable(x, x, x, options=OPTIONS, has_key_mask=True)
    assert hopper.usable(x, longer, longer, options=OPTIONS, has_key_mask=True)
    assert hopper.usable(x, x, x, options=causal, has_key_mask=False)
    assert not hopper.usable(x, x, x, options=causal, has_key_mask=True)
    assert not hopper.usable(x, longer, longer, options=causal, has_key_mask=False)


def test_takes_wide_heads_only_without_mask_order_and_virtual_keys() -> None:
    x = activations(head_dim=256)
    assert hopper.usable(x, x, x, options=replace(OPTIONS, linear="none"), has_key_mask=False)
    assert not hopper.usable(x, x, x, options=OPTIONS, has_key_mask=True)
    for change in ({"causal": True}, {"linear": "taylor"}):
        assert not hopper.usable(x, x, x, options=replace(OPTIONS, **change), has_key_mask=False)


def test_leaves_tensors() -> None:
    x = activations()
    on_the_cpu = torch.zeros(1, 2, 128, 64).bfloat16()
    for other in (activations(head_dim=36), activations(head_dim=250), activations(dtype=torch.float32), on_the_cpu):
        assert not hopper.usable(other, other, other, options=OPTIONS, has_key_mask=False)
    # TMA wants strides above zero
    expanded = on_cuda(torch.zeros(1, 2, 128, 64, dtype=torch.bfloat16).expand(3, 2, 128, 64))
    assert not hopper.usable(expanded, x, x, options=OPTIONS, has_key_mask=False)
    assert not hopper.usable(x, x, expanded, options=OPTIONS, has_key_mask=False)


def test_leaves_other_gpus_and_unknown_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.undo()
    for capability, version, expected in (
        ((9, 0), "3.6.0", True),
        ((9, 0), "3.9.1", True),
        ((9, 0), "3.5.1", False),
        ((9, 0), "4.0.0", False),
        ((8, 0), "3.6.0", False),
        ((10, 0), "3.6.0", False),
    ):
        hopper.available.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(triton, "__version__", version)
        assert hopper.available(0) is expected, (capability, version)
    hopper.available.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not hopper.available(0)
    hopper.available.cache_clear()


@pytest.mark.parametrize(
    ("head_dim", "module"), [(64, "steps"), (128, "steps"), (136, "wide_steps"), (256, "wide_steps")]
)
def test_wide_heads_have_steps_of_their_own(head_dim: int, module: str) -> None:
    x = activations(head_dim)
    steps: Any = attention._steps(x, x, x, options=OPTIONS, has_key_mask=False)
    assert steps.__name__ == f"sla_compile.kernels.hopper.{module}"
    assert {*steps.__all__} == {*triton_steps.__all__}
    own = {name for name in steps.__all__ if ".hopper." in getattr(steps, name).__module__}
    assert own == {"attention_forward", "attention_backward_query", "attention_backward_key"} or module == "steps"
