"""A Wan checkpoint of a few thousand random weights, as ``save_pretrained`` writes it, and clips to train it on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

__all__ = ["CAPTIONS", "save_clips", "save_tiny_wan"]

CAPTIONS = ["a ball moves left", "a ball moves right", "a ball moves up", "a ball moves down"]


def save_tiny_wan(folder: Path) -> Path:
    """A WanPipeline: tokenizer of ten words, UMT5, VAE, transformer of one block, and the sampler of Wan2.1."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "ball", "moves", "left", "right", "up", "down"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    text = UMT5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    block = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32}
    WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokens, **special),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=AutoencoderKLWan(**vae, temperal_downsample=[False, True, True]).eval(),
        transformer=WanTransformer3DModel(**block, text_dim=32, freq_dim=32),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(folder)
    return folder


def save_clips(folder: Path, frames: int = 9) -> Path:
    """A GIF of 70 x 100 pixels for each of CAPTIONS: the first two have theirs in a table, the others beside them."""
    folder.mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        pictures = []
        for time in range(frames):
            picture = np.zeros((70, 100, 3), np.uint8)
            picture[10 + 4 * number : 30 + 4 * number, 4 * time + 5 : 4 * time + 25] = (255, 80 * number, 200)
            pictures.append(Image.fromarray(picture))
        path = folder / f"clip{number}.gif"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=62)
        if number > 1:
            path.with_suffix(".txt").write_text(caption)
    rows = [f"clip{number}.gif,{CAPTIONS[number]}" for number in range(2)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]))
    return folder
