"""Examples of the Wan family: Wan and the models that were made from its code."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.registry import Parts, example, randn


def wan_config(**changes: Any) -> dict[str, Any]:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 1,
    }
    return {**config, **changes}


def wan_inputs(channels: int = 4, frames: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, channels, frames, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, 12, 16),
    }


@example("WanTransformer3DModel")
def wan() -> Parts:
    return wan_config(num_layers=2), wan_inputs()


@example("WanVACETransformer3DModel")
def wan_vace() -> Parts:
    config = wan_config(num_layers=3, vace_layers=[0, 2], vace_in_channels=8)
    return config, {**wan_inputs(), "control_hidden_states": randn(1, 8, 3, 16, 16)}


@example("WanAnimateTransformer3DModel")
def wan_animate() -> Parts:
    config = wan_config(
        num_layers=2,
        in_channels=12,
        latent_channels=4,
        image_dim=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    inputs = {
        **wan_inputs(channels=12, frames=3),
        "encoder_hidden_states_image": randn(1, 12, 16),
        "pose_hidden_states": randn(1, 4, 2, 16, 16),
        "face_pixel_values": randn(1, 3, 5, 16, 16),
    }
    return config, inputs


@example("SkyReelsV2Transformer3DModel")
def skyreels() -> Parts:
    return wan_config(), wan_inputs()


@example("ChronoEditTransformer3DModel")
def chronoedit() -> Parts:
    return wan_config(rope_temporal_skip_len=8), {**wan_inputs(frames=2), "encoder_hidden_states_image": None}


@example("AnyFlowTransformer3DModel")
def anyflow() -> Parts:
    inputs = {
        "hidden_states": randn(1, 3, 4, 16, 16),
        "timestep": torch.full((1, 3), 500.0),
        "r_timestep": torch.full((1, 3), 250.0),
        "encoder_hidden_states": randn(1, 12, 16),
    }
    return wan_config(rope_max_seq_len=32, gate_value=0.25, deltatime_type="r"), inputs


@example("AnyFlowFARTransformer3DModel")
def anyflow_far() -> Parts:
    config = wan_config(
        compressed_patch_size=(1, 4, 4), full_chunk_limit=3, rope_max_seq_len=32, gate_value=0.25, deltatime_type="r"
    )
    inputs = {
        "hidden_states": randn(1, 4, 4, 16, 16),
        "timestep": torch.full((1, 4), 500.0),
        "r_timestep": torch.full((1, 4), 250.0),
        "encoder_hidden_states": randn(1, 12, 16),
        "chunk_partition": [2, 2],
    }
    return config, inputs


@example("HeliosTransformer3DModel")
def helios() -> Parts:
    config = wan_config(rope_dim=(4, 6, 6), has_multi_term_memory_patch=True, guidance_cross_attn=True)
    inputs = {
        **wan_inputs(frames=2),
        "indices_hidden_states": torch.ones(1, 2),
        "indices_latents_history_short": torch.ones(1, 1),
        "indices_latents_history_mid": torch.ones(1, 1),
        "indices_latents_history_long": torch.ones(1, 4),
        "latents_history_short": randn(1, 4, 1, 16, 16),
        "latents_history_mid": randn(1, 4, 1, 16, 16),
        "latents_history_long": randn(1, 4, 4, 16, 16),
    }
    return config, inputs
