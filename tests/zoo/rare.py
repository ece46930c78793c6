"""Examples of transformers with an unusual call: several streams, caches, cameras, molecules."""

from __future__ import annotations

import torch

from tests.zoo.registry import Parts, example, grid, padded, randn


@example("MiniMaxH3Transformer3DModel")
def minimax_h3() -> Parts:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 24,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "in_channels": 4,
        "audio_in_channels": 6,
        "patch_size": (1, 2, 2),
        "text_dim": 8,
        "freq_dim": 8,
        "time_embed_hidden_dim": 24,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    }
    text, audio, video = 12, 20, 64
    times = torch.tensor([0] * text + [1] * audio + [0] * video)
    tags = torch.tensor([1] * text + [2] * audio + [0] * video)
    indices = torch.arange(text + audio + video)
    inputs = {
        "hidden_states": randn(1, video, 16),
        "audio_hidden_states": randn(1, audio, 6),
        "encoder_hidden_states": randn(1, text, 8),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": times,
        "token_tags": tags,
        "position_ids": torch.cat([grid(text + audio, 1, 1), grid(1, 8, 8)]),
        "text_indices": indices[:text],
        "audio_indices": indices[text : text + audio],
        "video_indices": indices[text + audio :],
    }
    return config, inputs


@example("Kandinsky6SRTransformer3DModel")
def kandinsky6_sr() -> Parts:
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 8,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 32,
        "num_visual_blocks": 1,
        "axes_dims": (4, 6, 6),
        "nabla_window": (3, 3, 3),
    }
    return config, {"hidden_states": randn(1, 2, 16, 16, 9), "timestep": torch.tensor([500.0])}


@example("Cosmos3OmniTransformer")
def cosmos3() -> Parts:
    config = {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 32,
        "latent_channel": 2,
        "latent_patch_size": 1,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "patch_latent_dim": 2,
        "rope_axes_dim": [2, 3, 3],
        "vocab_size": 32,
    }
    text, image = 12, 100
    indices = torch.arange(text, text + image)
    inputs = {
        "input_ids": torch.arange(text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(text + image).expand(3, -1),
        "und_len": text,
        "sequence_length": text + image,
        "vision_tokens": [randn(1, 2, 1, 10, 10)],
        "vision_token_shapes": [(1, 10, 10)],
        "vision_sequence_indexes": indices,
        "vision_mse_loss_indexes": indices,
        "vision_timesteps": torch.ones(image),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }
    return config, inputs


@example("WanAnimate2Transformer3DModel")
def wan_animate2() -> Parts:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    config = {
        "patch_size": (1, 2, 2),
        "text_len": 12,
        "in_dim": 8,
        "dim": 64,
        "ffn_dim": 64,
        "freq_dim": 16,
        "text_dim": 16,
        "out_dim": 4,
        "num_heads": 2,
        "num_layers": 1,
        "use_img_emb": True,
    }
    inputs = {
        "hidden_states": [randn(4, 2, 16, 16)],
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": [randn(8, 16)],
        "condition_latents": [randn(4, 2, 16, 16)],
        "encoder_hidden_states_image": randn(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(1),
        "kv_cache_mode": "extract",
        "seq_len": 128,
        "offset_grid_sizes": torch.tensor([[2, 8, 8]]),
    }
    return config, inputs


@example("SanaWMTransformer3DModel")
def sana_wm() -> Parts:
    config = {
        "in_channels": 4,
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "softmax_every_n": 2,
        "linear_head_dim": 16,
        "chunk_plucker_channels": 6,
        "chunk_plucker_post_attn_blocks": 2,
        "caption_channels": 16,
    }
    inputs = {
        "hidden_states": randn(1, 4, 2, 8, 8),
        "timestep": torch.full((1, 1, 2), 500.0),
        "encoder_hidden_states": randn(1, 1, 12, 16),
        "mask": torch.ones(1, 12),
    }
    return config, inputs


@example("SanaWMLTX2RefinerTransformer3DModel")
def sana_wm_refiner() -> Parts:
    config = {
        "in_channels": 4,
        "out_channels": 4,
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
        "encoder_hidden_states": randn(1, 12, 16),
        "timestep": torch.full((1, 128), 500.0),
        "video_rotary_emb": (randn(1, 128, 32).cos(), randn(1, 128, 32).sin()),
        "encoder_attention_mask": padded(12),
    }
    return config, inputs


@example("RFD4ProteinaTransformer")
def rfd4_proteina() -> Parts:
    config = {
        "nlayers": 1,
        "token_dim": 32,
        "nheads": 2,
        "dim_cond": 16,
        "pair_repr_dim": 8,
        "latent_dim": 4,
        "token_type_emb_dim": 4,
        "t_emb_dim": 16,
        "tri_mult_c": 8,
        "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
        "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
        "feats_pair_repr": ("xt_bb_ca_pair_dists",),
    }
    tokens = 96
    real = torch.ones(1, tokens, dtype=torch.bool)
    inputs = {
        "bb_ca": randn(1, tokens, 3),
        "local_latents": randn(1, tokens, 4),
        "bb_ca_time": torch.tensor([0.5]),
        "local_latents_time": torch.tensor([0.5]),
        "padding_mask": real,
        "token_type": torch.zeros(1, tokens, dtype=torch.long),
        "conditioning": {"is_in_context_conditioning": ~real, "supports_local_latent": real},
    }
    return config, inputs
