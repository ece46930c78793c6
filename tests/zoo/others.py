"""Examples of audio transformers, of those with an unusual call, and of the older ones."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.registry import Parts, example, grid, padded, randn


def kandinsky_config(**changes: Any) -> dict[str, Any]:
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 8,
        "time_dim": 16,
        "patch_size": (1, 2, 2),
        "model_dim": 32,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (4, 6, 6),
    }
    return {**config, **changes}


@example("Kandinsky5Transformer3DModel")
def kandinsky5() -> Parts:
    inputs = {
        "hidden_states": randn(1, 2, 16, 16, 4),
        "encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": randn(1, 8),
        "visual_rope_pos": [torch.arange(2), torch.arange(8), torch.arange(8)],
        "text_rope_pos": torch.arange(12),
    }
    return kandinsky_config(), inputs


@example("Kandinsky6Transformer3DModel")
def kandinsky6() -> Parts:
    inputs = {
        "hidden_states": randn(1, 2, 16, 16, 4),
        "encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": randn(1, 8),
        "visual_rope_pos": (torch.arange(2), torch.arange(8), torch.arange(8)),
    }
    return kandinsky_config(visual_cond=False), inputs


@example("StableAudioDiTModel")
def stable_audio() -> Parts:
    config = {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_attention_heads": 2,
        "cross_attention_dim": 32,
        "time_proj_dim": 16,
        "global_states_input_dim": 16,
        "cross_attention_input_dim": 16,
    }
    inputs = {
        "hidden_states": randn(1, 4, 127),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": randn(1, 12, 16),
        "global_hidden_states": randn(1, 1, 16),
        "rotary_embedding": (randn(128, 8), randn(128, 8)),
    }
    return config, inputs


@example("StableAudio3DiTModel")
def stable_audio3() -> Parts:
    config = {
        "io_channels": 4,
        "embed_dim": 64,
        "depth": 1,
        "num_heads": 2,
        "cond_token_dim": 16,
        "global_cond_dim": 16,
        "local_add_cond_dim": 4,
        "timestep_features_dim": 16,
        "num_memory_tokens": 8,
    }
    inputs = {
        "hidden_states": randn(1, 4, 128),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": randn(1, 12, 16),
        "global_hidden_states": randn(1, 16),
    }
    return config, inputs


@example("AceStepTransformer1DModel")
def ace_step() -> Parts:
    config = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,  # one of a window, one of all tokens
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "in_channels": 24,
        "audio_acoustic_hidden_dim": 8,
        "patch_size": 2,
        "sliding_window": 16,
    }
    inputs = {
        "hidden_states": randn(1, 160, 8),
        "timestep": torch.tensor([0.5]),
        "timestep_r": torch.tensor([0.5]),
        "encoder_hidden_states": randn(1, 10, 64),
        "context_latents": randn(1, 160, 16),
    }
    return config, inputs


@example("LongCatAudioDiTTransformer")
def longcat_audio() -> Parts:
    config = {
        "dit_dim": 64,
        "dit_depth": 1,
        "dit_heads": 4,
        "dit_text_dim": 32,
        "latent_dim": 8,
        "text_conv": False,
    }
    inputs = {
        "hidden_states": randn(1, 100, 8),
        "encoder_hidden_states": randn(1, 10, 32),
        "encoder_attention_mask": padded(10, dtype=torch.bool),
        "attention_mask": padded(100, dtype=torch.bool),
        "timestep": torch.ones(1),
    }
    return config, inputs


@example("MiniMaxMusic3Transformer1DModel")
def minimax_music() -> Parts:
    config = {
        "in_channels": 8,
        "condition_dim": 16,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "ff_inner_dim": 32,
        "rotary_dim": 8,
        "fourier_embedding_dim": 8,
    }
    inputs = {
        "hidden_states": randn(1, 8, 100),
        "encoder_hidden_states": randn(1, 100, 16),
        "timestep": torch.tensor([0.5]),
    }
    return config, inputs


@example("MiniMaxMusic3RVQDepthDecoder")
def minimax_rvq() -> Parts:
    config = {
        "hidden_size": 32,
        "num_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "audio_vocab_size": 16,
        "num_codebooks": 8,
        "max_position_embeddings": 128,
    }
    return config, {"inputs_embeds": randn(1, 100, 32)}


@example("TransformerTemporalModel")
def temporal() -> Parts:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "num_layers": 1,
        "norm_num_groups": 1,
    }
    return config, {"hidden_states": randn(80, 4, 4, 4), "timestep": torch.tensor([500]), "num_frames": 80}


@example("PriorTransformer")
def prior() -> Parts:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "embedding_dim": 8,
        "num_embeddings": 77,
        "additional_embeddings": 4,
    }
    inputs = {
        "hidden_states": randn(1, 8),
        "timestep": 2,
        "proj_embedding": randn(1, 8),
        "encoder_hidden_states": randn(1, 77, 8),
    }
    return config, inputs


@example("T5FilmDecoder")
def t5_film() -> Parts:
    config = {
        "input_dims": 8,
        "targets_length": 96,
        "d_model": 32,
        "num_layers": 1,
        "num_heads": 2,
        "d_kv": 16,
        "d_ff": 32,
        "dropout_rate": 0.0,
    }
    inputs = {
        "encodings_and_masks": [(randn(1, 12, 32), torch.ones(1, 12))],
        "decoder_input_tokens": randn(1, 96, 8),
        "decoder_noise_time": torch.tensor([0.5]),
    }
    return config, inputs


def joy_config() -> dict[str, Any]:
    return {
        "patch_size": [1, 2, 2],
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": 16,
        "num_layers": 1,
        "rope_dim_list": [4, 6, 6],
    }


@example("JoyImageEditTransformer3DModel")
def joyimage() -> Parts:
    inputs = {
        "hidden_states": randn(1, 4, 1, 20, 20),
        "encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.tensor([1.0]),
    }
    return joy_config(), inputs


@example("JoyImageEditPlusTransformer3DModel")
def joyimage_plus() -> Parts:
    inputs = {
        "hidden_states": randn(1, 128, 4, 1, 2, 2),
        "encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.tensor([1.0]),
        "shape_list": [[(1, 8, 8), (1, 8, 8)]],
    }
    return joy_config(), inputs


@example("Ideogram4Transformer2DModel")
def ideogram4() -> Parts:
    config = {
        "in_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": 16,
        "mrope_section": (4, 2, 2),
    }
    from diffusers.models.transformers import transformer_ideogram4 as source

    text, image = 12, 100
    positions = torch.cat([torch.arange(text)[:, None].expand(text, 3), grid(1, 10, 10).long() + 4096])
    indicator = [source.LLM_TOKEN_INDICATOR] * text + [source.OUTPUT_IMAGE_INDICATOR] * image
    inputs = {
        "hidden_states": randn(1, text + image, 4),
        "encoder_hidden_states": randn(1, text + image, 16),
        "timestep": torch.tensor([0.5]),
        "position_ids": positions[None],
        "segment_ids": torch.ones(1, text + image, dtype=torch.long),
        "indicator": torch.tensor([indicator]),
    }
    return config, inputs


@example("Krea2Transformer2DModel")
def krea2() -> Parts:
    config = {
        "in_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "timestep_embed_dim": 8,
        "text_hidden_dim": 32,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (8, 4, 4),
    }
    inputs = {
        "hidden_states": randn(1, 100, 4),
        "encoder_hidden_states": randn(1, 12, 2, 32),
        "timestep": torch.tensor([0.5]),
        "position_ids": torch.cat([torch.zeros(12, 3), grid(1, 10, 10)]),
        "encoder_attention_mask": padded(12, dtype=torch.bool),
    }
    return config, inputs
