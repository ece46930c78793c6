"""Examples of video transformers outside the Wan family."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.registry import Parts, example, grid, padded, randn


@example("CogVideoXTransformer3DModel")
def cogvideox() -> Parts:
    return cogvideox_config(num_layers=2), cogvideox_inputs()


def cogvideox_config(**changes: Any) -> dict[str, Any]:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "sample_width": 16,
        "sample_height": 16,
        "sample_frames": 9,
        "patch_size": 2,
        "max_text_seq_length": 12,
    }
    return {**config, **changes}


def cogvideox_inputs() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 3, 4, 16, 16),
        "encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.tensor([500]),
    }


@example("ConsisIDTransformer3DModel")
def consisid() -> Parts:
    config = cogvideox_config(
        num_layers=1,
        cross_attn_interval=1,
        cross_attn_dim_head=16,
        cross_attn_num_heads=2,
        LFE_id_dim=2,
        LFE_vit_dim=2,
        LFE_depth=5,
        LFE_dim_head=16,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=1,
        is_train_face=True,
    )
    return config, {**cogvideox_inputs(), "id_vit_hidden": [randn(1, 2, 2)], "id_cond": randn(1, 2)}


def hunyuan_video_config(**changes: Any) -> dict[str, Any]:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
    return {**config, **changes}


def hunyuan_video_inputs() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 3, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, 12, 16),
        "encoder_attention_mask": padded(12),
        "pooled_projections": randn(1, 8),
        "guidance": torch.tensor([1000.0]),
    }


@example("HunyuanVideoTransformer3DModel")
def hunyuan_video() -> Parts:
    return hunyuan_video_config(), hunyuan_video_inputs()


@example("HunyuanVideoFramepackTransformer3DModel")
def hunyuan_video_framepack() -> Parts:
    config = hunyuan_video_config(has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True)
    inputs = {
        **hunyuan_video_inputs(),
        "image_embeds": randn(1, 12, 16),
        "indices_latents": torch.ones(3),
        "latents_clean": randn(1, 4, 2, 16, 16),
        "indices_latents_clean": torch.ones(2),
        "latents_history_2x": randn(1, 4, 2, 16, 16),
        "indices_latents_history_2x": torch.ones(2),
        "latents_history_4x": randn(1, 4, 8, 16, 16),
        "indices_latents_history_4x": torch.ones(8),
    }
    return config, inputs


@example("HunyuanVideo15Transformer3DModel")
def hunyuan_video_15() -> Parts:
    config = hunyuan_video_config(
        num_layers=1, patch_size=1, text_embed_2_dim=8, image_embed_dim=16, target_size=16, task_type="t2v"
    )
    config.pop("num_single_layers")
    config.pop("pooled_projection_dim")
    inputs = {
        "hidden_states": randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": randn(1, 6, 16),
        "encoder_hidden_states_2": randn(1, 4, 8),
        "encoder_attention_mask": padded(6),
        "encoder_attention_mask_2": padded(4),
        "image_embeds": torch.zeros(1, 3, 16),
    }
    return config, inputs


@example("LTXVideoTransformer3DModel")
def ltx() -> Parts:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 1,
        "caption_channels": 16,
    }
    inputs = {
        "hidden_states": randn(1, 128, 4),
        "encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": padded(12, dtype=torch.bool),
        "num_frames": 2,
        "height": 8,
        "width": 8,
    }
    return config, inputs


@example("LTX2VideoTransformer3DModel")
def ltx2() -> Parts:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": 32,
        "num_layers": 1,
        "caption_channels": 16,
        "rope_double_precision": False,
    }
    inputs = {
        "hidden_states": randn(1, 128, 4),
        "audio_hidden_states": randn(1, 70, 4),
        "encoder_hidden_states": randn(1, 12, 16),
        "audio_encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": padded(12, dtype=torch.bool),
        "num_frames": 2,
        "height": 8,
        "width": 8,
        "audio_num_frames": 70,
        "fps": 25.0,
    }
    return config, inputs


@example("MochiTransformer3DModel")
def mochi() -> Parts:
    config = {
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "pooled_projection_dim": 32,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "max_sequence_length": 16,
    }
    inputs = {
        "hidden_states": randn(1, 4, 2, 16, 16),
        "encoder_hidden_states": randn(1, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": padded(16, dtype=torch.bool),
    }
    return config, inputs


@example("AllegroTransformer3DModel")
def allegro() -> Parts:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "cross_attention_dim": 48,
        "sample_width": 16,
        "sample_height": 16,
        "sample_frames": 3,
        "caption_channels": 8,
    }
    positions = [axis[None] for axis in grid(3, 8, 8).long().unbind(-1)]
    rotary = [(randn(size, 8).cos(), randn(size, 8).sin()) for size in (3, 8, 8)]
    inputs = {
        "hidden_states": randn(1, 4, 3, 16, 16),
        "encoder_hidden_states": randn(1, 12, 8),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (rotary, positions),
    }
    return config, inputs


@example("LatteTransformer3DModel")
def latte() -> Parts:
    config = {
        "sample_size": 16,
        "num_layers": 1,
        "patch_size": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_channels": 8,
        "in_channels": 4,
        "cross_attention_dim": 32,
        "out_channels": 8,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "video_length": 2,
    }
    inputs = {
        "hidden_states": randn(1, 4, 2, 16, 16),
        "encoder_hidden_states": randn(1, 12, 8),
        "timestep": torch.tensor([500]),
    }
    return config, inputs


@example("CosmosTransformer3DModel")
def cosmos() -> Parts:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "mlp_ratio": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "extra_pos_embed_type": "learnable",
        "concat_padding_mask": False,  # it needs torchvision
    }
    inputs = {
        "hidden_states": randn(1, 4, 2, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, 12, 16),
        "attention_mask": padded(12),
        "fps": 30,
    }
    return config, inputs


@example("EasyAnimateTransformer3DModel")
def easyanimate() -> Parts:
    config = {
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "in_channels": 4,
        "out_channels": 4,
        "mmdit_layers": 1,
        "num_layers": 1,
        "patch_size": 2,
        "sample_height": 16,
        "sample_width": 16,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
    }
    inputs = {
        "hidden_states": randn(1, 4, 2, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, 12, 16),
    }
    return config, inputs


@example("MotifVideoTransformer3DModel")
def motif_video() -> Parts:
    config = {
        "in_channels": 33,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_decoder_layers": 0,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 32,
        "image_embed_dim": 4,
        "rope_axes_dim": (4, 6, 6),
    }
    inputs = {
        "hidden_states": randn(1, 33, 2, 8, 8),
        "encoder_hidden_states": randn(1, 12, 32),
        "timestep": torch.tensor([500]),
    }
    return config, inputs


@example("SanaVideoTransformer3DModel")
def sana_video() -> Parts:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 16,
        "sample_size": 8,
        "patch_size": (1, 2, 2),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    inputs = {
        "hidden_states": randn(1, 4, 2, 16, 16),
        "encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.tensor([500]),
    }
    return config, inputs
