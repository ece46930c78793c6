"""Videos and captions of a folder: found, decoded and written, by whatever decoder is installed."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import Tensor

from examples.wan import Refused

__all__ = ["SUFFIXES", "Clip", "clips_in", "read_frames", "save_video", "side_by_side"]

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp")
_BY_PILLOW = (".gif", ".webp")
_TABLES = ("metadata.csv", "metadata.jsonl")
_FILE, _CAPTION = ("file_name", "file", "video", "path"), ("caption", "text", "prompt")
_EARLY = 0.4
"""How many frames too early one may be taken: times in files are rounded, in a GIF to hundredths of a second."""
_SHOWN = 3
"""How many videos an error names."""


@dataclass(frozen=True)
class Clip:
    """A video file and what is to be seen in it."""

    path: Path
    caption: str


def clips_in(folder: Path, caption: str | None = None) -> list[Clip]:
    """The videos below ``folder``, by name, each with its caption.

    Captions are in ``metadata.csv`` or ``metadata.jsonl`` in ``folder``, with a column ``file_name`` (or file, video,
    path; from ``folder`` on) and a column ``caption`` (or text, prompt); of a video that is in neither, in a ``.txt``
    beside it. ``caption`` is for those that have none at all. Refused where there is no video, or one is without.
    """
    if not folder.is_dir():
        raise Refused(f"--videos: got {str(folder)!r}, which is no folder; accepted: a folder of videos")
    known = _captions(folder)
    found, missing = [], []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        name, text = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
        own = known.get(name) or (text.read_text().strip() if text.is_file() else None) or caption
        if own is None:
            missing.append(name)
        else:
            found.append(Clip(path, own))
    if missing:
        raise Refused(
            f"--videos: {len(missing)} of {str(folder)!r} have no caption ({', '.join(missing[:_SHOWN])}); accepted: a "
            f".txt beside each, rows in {' or '.join(_TABLES)} (columns file_name and caption), or --caption for all"
        )
    if not found:
        raise Refused(f"--videos: no video in {str(folder)!r}; accepted: files {', '.join(SUFFIXES)}")
    return found


def _captions(folder: Path) -> dict[str, str]:
    """Captions by file name, from the tables in ``folder``."""
    captions = {}
    for table in (folder / name for name in _TABLES):
        if not table.is_file():
            continue
        with table.open(newline="") as file:
            rows: Iterator[Any] = csv.DictReader(file) if table.suffix == ".csv" else map(json.loads, file)
            for number, row in enumerate(rows, 1):
                file_name, caption = (next((row[k] for k in keys if row.get(k)), None) for keys in (_FILE, _CAPTION))
                if file_name is None:
                    raise Refused(f"{table}: row {number} has no file; accepted: a column {' or '.join(_FILE)}")
                if caption is not None:
                    captions[Path(file_name).as_posix()] = str(caption)
    return captions


def read_frames(path: Path, frames: int, size: tuple[int, int], fps: float) -> Tensor | None:
    """``frames`` frames from the start of a video, taken ``fps`` a second: (3, frames, H, W) in [-1, 1], float32.

    Scaled so that ``size`` (H, W) is covered, and cropped to its middle. None where the video is shorter.
    """
    taken: list[Tensor] = []
    for time, frame in _decoded(path):
        while len(taken) < frames and time >= (len(taken) - _EARLY) / fps:
            taken.append(frame)
        if len(taken) == frames:
            break
    if len(taken) < frames:
        return None
    video = torch.stack([_fitted(frame, size) for frame in taken], dim=1)
    return video / 127.5 - 1


def _fitted(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """A frame (H, W, 3), uint8, as (3, *size), float32 in [0, 255]."""
    scale = max(size[0] / frame.shape[0], size[1] / frame.shape[1])
    covering = [max(wanted, round(scale * own)) for wanted, own in zip(size, frame.shape[:2], strict=True)]
    image = F.interpolate(frame.permute(2, 0, 1)[None].float(), covering, mode="bilinear", antialias=True)[0]
    top, left = (own - wanted for own, wanted in zip(covering, size, strict=True))
    return image[:, top // 2 : top // 2 + size[0], left // 2 : left // 2 + size[1]].clamp(0, 255)


def _decoded(path: Path) -> Iterator[tuple[float, Tensor]]:
    """Time in seconds and pixels (H, W, 3), uint8, of each frame."""
    if path.suffix.lower() in _BY_PILLOW:
        time = 0.0
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield time, torch.from_numpy(np.array(frame.convert("RGB")))
                time += frame.info.get("duration", 100) / 1000
        return
    for name, decode in (("av", _by_av), ("cv2", _by_opencv), ("imageio_ffmpeg", _by_imageio)):
        if (module := _optional(name)) is not None:
            yield from decode(module, path)
            return
    raise Refused(
        f"{path}: nothing that decodes {path.suffix} is installed; accepted: one of the packages av, opencv-python and "
        f"imageio-ffmpeg (pip install 'sla-compile[wan]'), or videos as {', '.join(_BY_PILLOW)}"
    )


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _by_av(av: Any, path: Path) -> Iterator[tuple[float, Tensor]]:
    with av.open(str(path)) as container:
        first = None
        for frame in container.decode(video=0):
            first = frame.time if first is None else first
            yield frame.time - first, torch.from_numpy(frame.to_ndarray(format="rgb24"))


def _by_opencv(cv2: Any, path: Path) -> Iterator[tuple[float, Tensor]]:
    video = cv2.VideoCapture(str(path))
    rate, number = video.get(cv2.CAP_PROP_FPS) or 25.0, 0
    while True:
        is_there, frame = video.read()
        if not is_there:
            break
        yield number / rate, torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        number += 1
    video.release()


def _by_imageio(imageio_ffmpeg: Any, path: Path) -> Iterator[tuple[float, Tensor]]:
    frames = imageio_ffmpeg.read_frames(str(path))
    about = next(frames)
    width, height = about["size"]
    for number, frame in enumerate(frames):
        pixels = np.frombuffer(frame, np.uint8).reshape(height, width, 3).copy()
        yield number / about["fps"], torch.from_numpy(pixels)


def side_by_side(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Videos (T, H, W, 3) of equal sizes, from left to right."""
    return np.concatenate(list(videos), axis=2)


def save_video(video: np.ndarray, path: Path, fps: float) -> Path:
    """Write (T, H, W, 3) in [0, 1] to ``path``, as MP4 by diffusers, or as GIF where no encoder is installed.

    Returns the path that was written; its suffix says which it is.
    """
    from diffusers.utils import export_to_gif, export_to_video

    path.parent.mkdir(parents=True, exist_ok=True)
    has_imageio = _optional("imageio") is not None and _optional("imageio_ffmpeg") is not None
    if path.suffix != ".gif" and (has_imageio or _optional("cv2") is not None):
        export_to_video(list(video), str(path.with_suffix(".mp4")), fps=round(fps))
        return path.with_suffix(".mp4")
    pictures = [Image.fromarray((255 * frame).round().astype(np.uint8)) for frame in video]
    export_to_gif(pictures, str(path.with_suffix(".gif")), fps=round(fps))
    return path.with_suffix(".gif")
