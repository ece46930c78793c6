"""Examples of the Flux family: image and text tokens in one sequence, positions given as ids."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.registry import Parts, example, grid, padded, randn


def flux_config(**changes: Any) -> dict[str, Any]:
    config = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    }
    return {**config, **changes}


def flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 100, 4),
        "encoder_hidden_states": randn(1, 12, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": grid(1, 10, 10),
        "txt_ids": torch.zeros(12, 3),
    }


@example("FluxTransformer2DModel")
def flux() -> Parts:
    inputs = {**flux_inputs(), "pooled_projections": randn(1, 32), "guidance": None}
    return flux_config(pooled_projection_dim=32), inputs


def flux2_inputs() -> dict[str, Any]:
    return {**flux_inputs(), "img_ids": grid(1, 10, 10, 1), "txt_ids": grid(1, 1, 1, 12)}


@example("Flux2Transformer2DModel")
def flux2() -> Parts:
    return flux_config(axes_dims_rope=(4, 4, 4, 4)), {**flux2_inputs(), "guidance": torch.tensor([1.0])}


@example("Flux3Transformer2DModel")
def flux3() -> Parts:
    config = flux_config(axes_dims_rope=(4, 4, 4, 4), cond_in_channels=4, timestep_channels=16)
    return config, flux2_inputs()


@example("ChromaTransformer2DModel")
def chroma() -> Parts:
    config = flux_config(approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
    return config, flux_inputs()


@example("BriaTransformer2DModel")
def bria() -> Parts:
    return flux_config(pooled_projection_dim=None), flux_inputs()


@example("BriaFiboTransformer2DModel")
def bria_fibo() -> Parts:
    inputs = {**flux_inputs(), "text_encoder_layers": [randn(1, 12, 16), randn(1, 12, 16)]}
    return flux_config(pooled_projection_dim=None, text_encoder_dim=16), inputs


@example("LongCatImageTransformer2DModel")
def longcat_image() -> Parts:
    return flux_config(pooled_projection_dim=32), {**flux_inputs(), "guidance": torch.tensor([3.5])}


@example("OvisImageTransformer2DModel")
def ovis_image() -> Parts:
    return flux_config(out_channels=4), flux_inputs()


def qwen_config(**changes: Any) -> dict[str, Any]:
    config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    return {**config, **changes}


def qwen_inputs() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 100, 16),
        "encoder_hidden_states": randn(1, 12, 16),
        "encoder_hidden_states_mask": padded(12, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 10, 10)],
    }


@example("QwenImageTransformer2DModel")
def qwen_image() -> Parts:
    return qwen_config(), qwen_inputs()


@example("NucleusMoEImageTransformer2DModel")
def nucleus_image() -> Parts:
    return qwen_config(moe_enabled=False, capacity_factors=[8.0, 8.0]), qwen_inputs()


@example("BriaFibo2Transformer2DModel")
def bria_fibo2() -> Parts:
    config = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 16,
        "injection_layer_ids": (0,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 16,
        "max_num_gist_tokens": 32,
        "gist_step": 8,
        "gist_min_text_len": 8,
        "gist_max_text_len": 64,
        "axes_dims": (4, 6, 6),
        "axes_lens": (64, 32, 32),
    }
    inputs = {
        "hidden_states": randn(1, 4, 24, 24),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": randn(1, 2, 12, 16),
    }
    return config, inputs


@example("QwenImage21Transformer2DModel")
def qwen_image21() -> Parts:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    slots = torch.tensor([[False] * 12 + [True] * 36])
    inputs = {
        "hidden_states": randn(1, 144, 4),
        "encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 12, 12)]],
        "img_mask": slots,
    }
    return config, inputs
