"""Latents and text embeddings of the videos, made once by the pipeline's own parts and kept as safetensors.

A cache folder holds one file a video and one a caption; what is there is not made again. The VAE and the text encoder
are loaded only if something is missing, and are gone afterwards.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.study.training import write
from examples.wan import Refused
from examples.wan.clips import Clip, read_frames

__all__ = ["Cache", "Encoded", "VideoSize", "check_checkpoint", "normalised"]

TEXT_TOKENS = 512
"""How long text is for a Wan transformer: embeddings are filled up with zeros to as many tokens."""


@dataclass(frozen=True)
class VideoSize:
    """What each video is cut to."""

    frames: int
    height: int
    width: int
    fps: float


class Cache:
    """Encoded videos and captions of one checkpoint at one size, in ``folder``."""

    def __init__(self, folder: Path, checkpoint: str, size: VideoSize) -> None:
        self.folder, self.checkpoint, self.size = folder, checkpoint, size

    def video_path(self, clip: Clip) -> Path:
        about = clip.path.stat()
        key = _digest(self.checkpoint, str(clip.path.resolve()), about.st_size, about.st_mtime_ns, vars(self.size))
        return self.folder / f"video-{clip.path.stem[:40]}-{key}.safetensors"

    def text_path(self, caption: str) -> Path:
        return self.folder / f"text-{_digest(self.checkpoint, caption)}.safetensors"

    def latents(self, clip: Clip) -> Tensor:
        """Normalised latents (C, T, H, W), float32; empty of a video that is too short: see ``usable``."""
        return load_file(self.video_path(clip))["latents"].float()

    def usable(self, clip: Clip) -> bool:
        """Whether the video was long enough."""
        with safe_open(self.video_path(clip), "pt") as file:
            return len(file.get_slice("latents").get_shape()) == 4

    def text(self, caption: str) -> Tensor:
        """Embeddings (512, D) of a caption, with zeros behind its last token, as the pipeline has them."""
        tokens = load_file(self.text_path(caption))["text"]
        return torch.cat([tokens, tokens.new_zeros(TEXT_TOKENS - len(tokens), tokens.shape[1])])

    def fill(self, clips: Sequence[Clip], captions: Sequence[str], device: torch.device, console: Console) -> None:
        """Encode what is missing of ``clips`` and ``captions``; the encoders are freed before this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = [caption for caption in dict.fromkeys(captions) if not self.text_path(caption).exists()]
        videos = [clip for clip in clips if not self.video_path(clip).exists()]
        if texts:
            self._fill_texts(texts, device, console)
        if videos:
            self._fill_videos(videos, device, console)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _fill_texts(self, captions: Sequence[str], device: torch.device, console: Console) -> None:
        from diffusers import WanPipeline

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        pipe = WanPipeline.from_pretrained(self.checkpoint, transformer=None, vae=None, torch_dtype=dtype).to(device)
        for caption in track(captions, "captions", console=console):
            text, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
            used = int(text[0].abs().amax(dim=1).count_nonzero())
            _save({"text": text[0, : max(used, 1)]}, self.text_path(caption))

    @torch.no_grad()
    def _fill_videos(self, clips: Sequence[Clip], device: torch.device, console: Console) -> None:
        from diffusers import AutoencoderKLWan

        vae = AutoencoderKLWan.from_pretrained(self.checkpoint, subfolder="vae", torch_dtype=torch.float32).to(device)
        size = self.size
        for clip in track(clips, "videos", console=console):
            video = read_frames(clip.path, size.frames, (size.height, size.width), size.fps)
            latents = torch.empty(0)
            if video is None:
                console.print(f"{clip.path.name}: left out, it has fewer than {size.frames} frames at {size.fps:g} fps")
            else:
                latents = normalised(vae.encode(video[None].to(device)).latent_dist.mode(), vae.config)[0]
            _save({"latents": latents}, self.video_path(clip))


class Encoded(Sequence[tuple[Tensor, Tensor]]):
    """Latents and text of ``clips``, read from the cache one at a time."""

    def __init__(self, cache: Cache, clips: Sequence[Clip]) -> None:
        self.cache, self.clips = cache, clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: Any) -> Any:
        clip = self.clips[index]
        return self.cache.latents(clip), self.cache.text(clip.caption)


def normalised(latents: Tensor, vae_config: Any) -> Tensor:
    """Latents (B, C, T, H, W) of the VAE as the transformer takes them: (x - mean) / std of each channel."""
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for values in (vae_config.latents_mean, vae_config.latents_std)
    )
    return (latents - mean) / std


def check_checkpoint(checkpoint: str) -> None:
    """Raise Refused where ``checkpoint`` is no text-to-video Wan with one transformer."""
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(checkpoint)
    except OSError as error:
        raise Refused(f"--checkpoint: got {checkpoint!r}, which has no pipeline of diffusers: {error}") from error
    more = [name for name in ("transformer_2", "image_encoder") if (index.get(name) or [None])[0]]
    more += ["a time for each token"] if index.get("expand_timesteps") else []
    if index["_class_name"] != "WanPipeline" or more:
        found = " with ".join([index["_class_name"], *more])
        raise Refused(
            f"--checkpoint: got {checkpoint!r}, a {found}; accepted: a WanPipeline with one transformer (Wan2.1 text "
            f"to video, as Wan-AI/Wan2.1-T2V-1.3B-Diffusers)"
        )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}  # as safetensors wants it
    write(path, lambda temporary: save_file(held, temporary))
