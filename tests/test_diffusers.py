"""Real diffusers transformers, small: at topk=1 exactly dense attention, below it right gates with gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import sla_compile
from tests.helpers import assert_close

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

Example = tuple[torch.nn.Module, dict[str, Any], int]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def wan() -> Example:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }
    return model, inputs, 2


def flux() -> Example:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.randn(1, 100, 4),
        "encoder_hidden_states": torch.randn(1, 12, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(100, 3),
        "txt_ids": torch.randn(12, 3),
        "guidance": None,
    }
    return model, inputs, 2


def sd3() -> Example:
    model = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        dual_attention_layers=(0,),
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 24, 24),
        "encoder_hidden_states": torch.randn(1, 12, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([500]),
    }
    return model, inputs, 3


def cogvideox() -> Example:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=12,
    )
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 16, 16),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "timestep": torch.tensor([500]),
    }
    return model, inputs, 2


EXAMPLES: dict[str, Callable[[], Example]] = {"wan": wan, "flux": flux, "sd3": sd3, "cogvideox": cogvideox}
OPTIONS = {"inner": "aot_eager", "min_tokens": 64, "block_q": 16, "block_k": 16}


@pytest.mark.parametrize("name", EXAMPLES)
def test_topk_of_one_is_dense_attention(name: str) -> None:
    model, inputs, sites = EXAMPLES[name]()
    compiled = torch.compile(model, backend="sla", options={**OPTIONS, "topk": 1.0, "bottomk": 0.0})
    with torch.no_grad():
        dense = model(**inputs, return_dict=False)[0]
        sparse = compiled(**inputs, return_dict=False)[0]
    assert len(sla_compile.gates(model)) == sites
    assert sum(site.rewritten for site in sla_compile.report(model).sites) == sites
    assert_close(name, sparse, dense, 1e-5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_gate_gets_a_gradient(name: str) -> None:
    model, inputs, _ = EXAMPLES[name]()
    compiled = torch.compile(model, backend="sla", options=OPTIONS)
    with torch.no_grad():
        compiled(**inputs, return_dict=False)
        for parameter in sla_compile.gate_parameters(model):
            parameter.normal_()
    compiled(**inputs, return_dict=False)[0].square().mean().backward()
    for path, gate in sla_compile.gates(model).items():
        for parameter in (gate.weight, gate.bias):
            assert parameter.grad is not None, path
            assert parameter.grad.isfinite().all(), path
            assert parameter.grad.norm() > 0, path


def test_cross_attention_of_wan_stays_dense_with_its_reason() -> None:
    model, inputs, _ = wan()
    report = sla_compile.explain(model, (), inputs, config={"min_tokens": 64}).to_dict()
    decisions = {site["path"]: (site["rewritten"], site["reason"]) for site in report["sites"]}
    assert decisions == {
        "blocks.0.attn1": (True, "self-attention"),
        "blocks.0.attn2": (False, "cross-attention"),
        "blocks.1.attn1": (True, "self-attention"),
        "blocks.1.attn2": (False, "cross-attention"),
    }
    assert not sla_compile.gates(model)


def test_compile_repeated_blocks() -> None:
    model, inputs, sites = wan()
    with torch.no_grad():
        dense = model(**inputs, return_dict=False)[0]
        model.compile_repeated_blocks(backend="sla", options={**OPTIONS, "topk": 1.0, "bottomk": 0.0})
        sparse = model(**inputs, return_dict=False)[0]
    assert len(sla_compile.gates(model)) == sites
    assert_close("regional", sparse, dense, 1e-5)
