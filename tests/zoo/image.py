"""Examples of image transformers outside the Flux family."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.registry import Parts, example, padded, randn


@example("SD3Transformer2DModel")
def sd3() -> Parts:
    config = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "out_channels": 4,
        "dual_attention_layers": (0,),
    }
    inputs = {
        "hidden_states": randn(1, 4, 24, 24),
        "encoder_hidden_states": randn(1, 12, 32),
        "pooled_projections": randn(1, 32),
        "timestep": torch.tensor([500]),
    }
    return config, inputs


def caption_inputs(channels: int = 16, tokens: int = 12) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 24, 24),
        "encoder_hidden_states": randn(1, tokens, channels),
        "timestep": torch.tensor([500]),
    }


@example("AuraFlowTransformer2DModel")
def auraflow() -> Parts:
    config = {
        "sample_size": 24,
        "patch_size": 2,
        "in_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_projection_dim": 32,
        "joint_attention_dim": 16,
        "out_channels": 4,
        "pos_embed_max_size": 256,
    }
    return config, caption_inputs()


@example("PixArtTransformer2DModel")
def pixart() -> Parts:
    config = {
        "sample_size": 24,
        "num_layers": 1,
        "patch_size": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "in_channels": 4,
        "cross_attention_dim": 32,
        "out_channels": 8,
        "caption_channels": 16,
        "use_additional_conditions": False,
    }
    inputs = {**caption_inputs(), "added_cond_kwargs": {"aspect_ratio": None, "resolution": None}}
    return config, inputs


def dit_config(**changes: Any) -> dict[str, Any]:
    config = {
        "in_channels": 4,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_embeds_ada_norm": 8,
        "patch_size": 2,
        "sample_size": 24,
    }
    return {**config, **changes}


def dit_inputs() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 24, 24),
        "timestep": torch.tensor([5]),
        "class_labels": torch.tensor([3]),
    }


@example("DiTTransformer2DModel")
def dit() -> Parts:
    return dit_config(), dit_inputs()


@example("Transformer2DModel")
def transformer_2d() -> Parts:
    config = dit_config(norm_type="ada_norm_zero", norm_elementwise_affine=False, attention_bias=True)
    return config, dit_inputs()


@example("DreamLiteTransformer2DModel")
def dreamlite() -> Parts:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 32,
        "num_layers": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    }
    return config, {"hidden_states": randn(1, 32, 12, 12), "encoder_hidden_states": randn(1, 12, 16)}


@example("HunyuanDiT2DModel")
def hunyuan_dit() -> Parts:
    config = {
        "sample_size": 24,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "cross_attention_dim": 8,
        "cross_attention_dim_t5": 8,
        "pooled_projection_dim": 4,
        "hidden_size": 32,
        "text_len": 4,
        "text_len_t5": 4,
    }
    inputs = {
        "hidden_states": randn(1, 4, 24, 24),
        "encoder_hidden_states": randn(1, 4, 8),
        "text_embedding_mask": torch.ones(1, 4),
        "encoder_hidden_states_t5": randn(1, 4, 8),
        "text_embedding_mask_t5": torch.ones(1, 4),
        "timestep": torch.tensor([500.0]),
        "image_meta_size": torch.tensor([[1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0]]),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": [torch.ones(144, 16), torch.zeros(144, 16)],
    }
    return config, inputs


@example("HunyuanImageTransformer2DModel")
def hunyuan_image() -> Parts:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": (2, 2),
        "text_embed_dim": 16,
        "rope_axes_dim": (8, 8),
    }
    inputs = {**caption_inputs(), "timestep": torch.tensor([500.0])}
    return config, {**inputs, "encoder_attention_mask": padded(12)}


@example("LuminaNextDiT2DModel")
def lumina_next() -> Parts:
    config = {
        "sample_size": 24,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 64,
        "num_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "norm_eps": 1e-5,
        "learn_sigma": False,
        "cross_attention_dim": 16,
    }
    inputs = {
        **caption_inputs(),
        "timestep": torch.tensor([0.5]),
        "encoder_mask": padded(12),
        "image_rotary_emb": torch.polar(torch.ones(32, 32, 8), randn(32, 32, 8)),
        "cross_attention_kwargs": {},
    }
    return config, inputs


@example("Lumina2Transformer2DModel")
def lumina2() -> Parts:
    config = {
        "sample_size": 24,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 64,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 2,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (128, 128, 128),
        "cap_feat_dim": 16,
    }
    inputs = {**caption_inputs(), "timestep": torch.tensor([0.5])}
    return config, {**inputs, "encoder_attention_mask": padded(12, dtype=torch.bool)}


@example("ZImageTransformer2DModel")
def z_image() -> Parts:
    config = {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 6, 6],
        "axes_lens": [256, 32, 32],
    }
    return config, {"x": [randn(4, 1, 24, 24)], "cap_feats": [randn(16, 16)], "t": torch.tensor([0.5])}


def cogview_inputs() -> dict[str, Any]:
    size = torch.tensor([[192, 192]])
    return {
        **caption_inputs(),
        "original_size": size,
        "target_size": size.clone(),
        "crop_coords": torch.tensor([[0, 0]]),
    }


def cogview_config(**changes: Any) -> dict[str, Any]:
    config = {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "out_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "condition_dim": 4,
    }
    return {**config, **changes}


@example("CogView3PlusTransformer2DModel")
def cogview3plus() -> Parts:
    return cogview_config(pos_embed_max_size=24, sample_size=24), cogview_inputs()


@example("CogView4Transformer2DModel")
def cogview4() -> Parts:
    return cogview_config(rope_axes_dim=(24, 24)), cogview_inputs()


@example("GlmImageTransformer2DModel")
def glm_image() -> Parts:
    inputs = {
        **caption_inputs(),
        "prior_token_id": torch.randint(0, 64, (1, 144)),
        "prior_token_drop": torch.zeros(1, 144, dtype=torch.bool),
        "target_size": torch.tensor([[192.0, 192.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
    }
    return cogview_config(prior_vq_quantizer_codebook_size=64), inputs


@example("SanaTransformer2DModel")
def sana() -> Parts:
    config = {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 16,
        "sample_size": 24,
    }
    return config, caption_inputs()


@example("HiDreamImageTransformer2DModel")
def hidream() -> Parts:
    config = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_channels": [16, 8],
        "text_emb_dim": 8,
        "num_routed_experts": 2,
        "num_activated_experts": 2,
        "axes_dims_rope": (8, 4, 4),
        "max_resolution": (24, 24),
        "llama_layers": (0, 1),
        "force_inference_output": True,
    }
    inputs = {
        "hidden_states": randn(1, 4, 24, 24),
        "timesteps": torch.tensor([500]),
        "encoder_hidden_states_t5": randn(1, 8, 16),
        "encoder_hidden_states_llama3": randn(2, 1, 8, 8),
        "pooled_embeds": randn(1, 8),
    }
    return config, inputs


@example("PRXTransformer2DModel")
def prx() -> Parts:
    config = {
        "in_channels": 4,
        "patch_size": 2,
        "context_in_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 1,
        "axes_dim": [8, 8],
    }
    return config, {**caption_inputs(), "timestep": torch.tensor([0.5])}


@example("ErnieImageTransformer2DModel")
def ernie_image() -> Parts:
    config = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 1,
        "ffn_hidden_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 1,
        "text_in_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    }
    inputs = {
        "hidden_states": randn(1, 4, 12, 12),
        "timestep": torch.tensor([1.0]),
        "text_bth": randn(1, 12, 16),
        "text_lens": torch.tensor([9]),
    }
    return config, inputs


@example("OmniGenTransformer2DModel")
def omnigen() -> Parts:
    config = {
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "num_layers": 1,
        "pad_token_id": 0,
        "vocab_size": 100,
        "time_step_dim": 4,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    }
    tokens = 80 + 1 + 64
    inputs = {
        "hidden_states": randn(1, 4, 16, 16),
        "timestep": torch.tensor([0.5]),
        "input_ids": torch.randint(0, 100, (1, 80)),
        "input_img_latents": [randn(1, 4, 16, 16)],
        "input_image_sizes": {0: [[0, 64]]},
        "attention_mask": torch.ones(1, tokens, tokens),
        "position_ids": torch.arange(tokens)[None],
    }
    return config, inputs
