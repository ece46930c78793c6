"""Diffusion transformers of diffusers as they are published: configuration, and one call of each at its true sizes.

A configuration here is what the published ``transformer/config.json`` has beside the defaults of the class. Sizes are
those of tokens: 81 frames of 480 x 832 pixels are (21, 30, 52) tokens of a Wan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FLOAT8", "PUBLISHED", "WANS", "Published", "tiny"]

Grid = tuple[int, ...]
Inputs = Callable[[Any, Grid, int], dict[str, Any]]
"""Keyword arguments of a call, for the configuration of a model, its grid of tokens and the tokens of its text."""

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Published:
    """A model at one size, with as many layers as are measured."""

    name: str
    of: str
    """The class in diffusers."""
    inputs: Inputs
    grid: Grid
    """Tokens of the video or image along each axis."""
    text: int
    """Tokens of the text."""
    layers: dict[str, int]
    """Arguments of the class that say how many layers it has, as they are here."""
    config: dict[str, Any] = field(default_factory=dict)
    joint: bool = False
    """Whether text and video are one sequence."""
    extra: int = 0
    """Tokens that are neither, in that sequence."""
    counts: bool = False
    """Whether it counts the tokens of its text on the device, and leaves out what pads it: Dynamo breaks there, unless
    it is told to go on."""

    @property
    def tokens(self) -> int:
        """Tokens of the self-attention that takes longest."""
        text = filled(self.text) if self.counts else self.text
        return math.prod(self.grid) + (text + self.extra if self.joint else 0)

    def build(self, device: str) -> nn.Module:
        """The model with random weights in bf16."""
        import diffusers

        diffusers.utils.logging.set_verbosity_error()  # that every part of it is in bf16
        torch.manual_seed(0)
        with torch.device(device):
            model: nn.Module = getattr(diffusers, self.of)(**{**self.config, **self.layers})
        return model.to(DTYPE).eval()

    def example(self, model: Any, device: str) -> dict[str, Any]:
        """Keyword arguments of one call of ``model``, random, on ``device``."""
        torch.manual_seed(0)
        with torch.device(device):
            return {**self.inputs(model.config, self.grid, self.text), "return_dict": False}

    def layers_in_words(self) -> str:
        """As many of as many as are published: "2 of 40"."""
        import inspect

        import diffusers

        defaults = inspect.signature(getattr(diffusers, self.of)).parameters
        all_of = [self.config.get(name, defaults[name].default) for name in self.layers]
        return ", ".join(f"{here} of {there}" for here, there in zip(self.layers.values(), all_of, strict=True))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE)


def filled(tokens: int) -> int:
    """How many of the ``tokens`` there is place for a text has."""
    return tokens * 3 // 4


def padded(tokens: int, dtype: torch.dtype) -> Tensor:
    """A mask (1, tokens) of such a text."""
    return (torch.arange(tokens) < filled(tokens))[None].to(dtype)


def positions(*grid: int) -> Tensor:
    """Coordinates of a grid in row-major order, (product of sizes, number of sizes)."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=DTYPE) for size in grid), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1)


def wan(config: Any, grid: Grid, text: int) -> dict[str, Any]:
    frames, height, width = (size * patch for size, patch in zip(grid, config.patch_size, strict=True))
    return {
        "hidden_states": randn(1, config.in_channels, frames, height, width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, text, config.text_dim),
    }


def hunyuan_video(config: Any, grid: Grid, text: int) -> dict[str, Any]:
    frames, height, width = grid[0] * config.patch_size_t, grid[1] * config.patch_size, grid[2] * config.patch_size
    return {
        "hidden_states": randn(1, config.in_channels, frames, height, width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, text, config.text_embed_dim),
        "encoder_attention_mask": padded(text, torch.long),
        "pooled_projections": randn(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0], dtype=DTYPE),
    }


BYT5, IMAGE = 256, 729
"""Tokens of HunyuanVideo 1.5's second text, and of an image: there is none, so that they are masked."""


def hunyuan_video_15(config: Any, grid: Grid, text: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, config.in_channels, *grid),
        "timestep": torch.tensor([500.0], dtype=DTYPE),
        "encoder_hidden_states": randn(1, text, config.text_embed_dim),
        "encoder_attention_mask": padded(text, torch.long),
        "encoder_hidden_states_2": randn(1, BYT5, config.text_embed_2_dim),
        "encoder_attention_mask_2": torch.zeros(1, BYT5, dtype=torch.long),
        "image_embeds": torch.zeros(1, IMAGE, config.image_embed_dim, dtype=DTYPE),
    }


def cogvideox(config: Any, grid: Grid, text: int) -> dict[str, Any]:
    angles = torch.randn(math.prod(grid), config.attention_head_dim)
    frames, height, width = grid[0], grid[1] * config.patch_size, grid[2] * config.patch_size
    return {
        "hidden_states": randn(1, frames, config.in_channels, height, width),
        "encoder_hidden_states": randn(1, text, config.text_embed_dim),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (angles.cos(), angles.sin()) if config.use_rotary_positional_embeddings else None,
    }


def ltx2(config: Any, grid: Grid, text: int) -> dict[str, Any]:
    seconds = (8 * grid[0] - 7) / 24
    sound = round(seconds * config.audio_sampling_rate / config.audio_hop_length / config.audio_scale_factor)
    return {
        "hidden_states": randn(1, math.prod(grid), config.in_channels),
        "audio_hidden_states": randn(1, sound, config.audio_in_channels),
        "encoder_hidden_states": randn(1, text, config.caption_channels),
        "audio_encoder_hidden_states": randn(1, text, config.caption_channels),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.long),
        "audio_encoder_attention_mask": torch.ones(1, text, dtype=torch.long),
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
        "fps": 24.0,
        "audio_num_frames": sound,
    }


def mochi(config: Any, grid: Grid, text: int) -> dict[str, Any]:
    height, width = grid[1] * config.patch_size, grid[2] * config.patch_size
    return {
        "hidden_states": randn(1, config.in_channels, grid[0], height, width),
        "encoder_hidden_states": randn(1, text, config.text_embed_dim),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": padded(text, torch.bool),
    }


def flux(config: Any, grid: Grid, text: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, math.prod(grid), config.in_channels),
        "encoder_hidden_states": randn(1, text, config.joint_attention_dim),
        "pooled_projections": randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], dtype=DTYPE),
        "img_ids": positions(1, *grid),
        "txt_ids": torch.zeros(text, 3, dtype=DTYPE),
        "guidance": torch.tensor([3.5], dtype=DTYPE) if config.guidance_embeds else None,
    }


def qwen_image(config: Any, grid: Grid, text: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, math.prod(grid), config.in_channels),
        "encoder_hidden_states": randn(1, text, config.joint_attention_dim),
        "encoder_hidden_states_mask": padded(text, torch.long),
        "timestep": torch.tensor([0.5], dtype=DTYPE),
        "img_shapes": [[(1, *grid)]],
    }


WAN_480P, WAN_720P = (21, 30, 52), (21, 45, 80)
WANS = {
    "1.3B": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "14B": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 1},
}
"""Configurations of Wan2.1's text-to-video models, and one to try things with."""


def _wan(name: str, size: str, grid: Grid, layers: int, **config: Any) -> Published:
    config = {**WANS[size], **config}
    return Published(name, "WanTransformer3DModel", wan, grid, 512, {"num_layers": layers}, config)


def _hunyuan(name: str, grid: Grid, **layers: int) -> Published:
    return Published(name, "HunyuanVideoTransformer3DModel", hunyuan_video, grid, 256, layers, joint=True)


def _image(
    name: str, of: str, inputs: Inputs, side: int, text: int, layers: dict[str, int], **config: Any
) -> Published:
    return Published(name, of, inputs, (side, side), text, layers, config, joint=True)


_FLUX = ("FluxTransformer2DModel", flux)
_QWEN = ("QwenImageTransformer2DModel", qwen_image)
_COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_LTX2 = ("LTX2VideoTransformer3DModel", ltx2)

PUBLISHED = {
    model.name: model
    for model in (
        _wan("Wan2.1-1.3B 480p", "1.3B", WAN_480P, 8),
        _wan("Wan2.1-1.3B 720p", "1.3B", WAN_720P, 4),
        _wan("Wan2.1-14B 480p", "14B", WAN_480P, 4),
        _wan("Wan2.1-14B 720p", "14B", WAN_720P, 2),
        _wan("Wan2.2-A14B 480p", "14B", WAN_480P, 4, in_channels=36),
        _wan("Wan2.2-A14B 720p", "14B", WAN_720P, 2, in_channels=36),
        _hunyuan("HunyuanVideo 720p", (33, 45, 80), num_layers=1, num_single_layers=1),
        Published(
            *("HunyuanVideo 1.5 480p", "HunyuanVideo15Transformer3DModel", hunyuan_video_15, (31, 30, 53), 1000),
            *({"num_layers": 2}, {"task_type": "t2v"}),
            joint=True,
            extra=BYT5 + IMAGE,
        ),
        Published(
            *("CogVideoX-5B", "CogVideoXTransformer3DModel", cogvideox, (13, 30, 45), 226, {"num_layers": 4}),
            _COGVIDEOX_5B,
            joint=True,
        ),
        Published("LTX-2 512p", *_LTX2, (16, 16, 24), 1024, {"num_layers": 3}, {"rope_type": "split"}),
        Published("LTX-2 1024p", *_LTX2, (16, 32, 48), 1024, {"num_layers": 2}, {"rope_type": "split"}),
        Published(
            *("Mochi 480p", "MochiTransformer3DModel", mochi, (28, 30, 53), 256, {"num_layers": 2}),
            joint=True,
            counts=True,
        ),
        _image("Flux 1024", *_FLUX, 64, 512, {"num_layers": 2, "num_single_layers": 4}, guidance_embeds=True),
        _image("Flux 2048", *_FLUX, 128, 512, {"num_layers": 2, "num_single_layers": 4}, guidance_embeds=True),
        _image("QwenImage 1024", *_QWEN, 64, 256, {"num_layers": 4}),
        _image("QwenImage 2048", *_QWEN, 128, 256, {"num_layers": 4}),
    )
}
"""Every model by its name."""

FLOAT8 = ("Wan2.1-1.3B 480p", "Wan2.1-14B 480p")
"""Those that are measured with float8 linear layers."""


def tiny(model: Published) -> Published:
    """The same class and call, so small that a CPU runs it at once: as in ``tests/zoo``."""
    from tests.zoo.registry import EXAMPLES

    grid = (8, 8) if len(model.grid) == 2 else (2, 6, 6)
    return replace(model, grid=grid, text=12, config=EXAMPLES[model.of]()[0], layers=dict.fromkeys(model.layers, 1))
