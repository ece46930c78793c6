"""Pictures of an experiment: its results as CSV and as a plot, its samples as PNG and GIF."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.study.arms import ARMS

__all__ = ["COLUMNS", "aggregate", "save_csv", "save_plot", "save_samples"]

COLUMNS = (
    *("arm", "sparsity", "seed", "before", "after", "frechet", "error_sparse", "error_gated", "step_ms", "seconds"),
)
"""Columns of the CSV: held-out loss before and after, Fréchet distance, attention errors, and times."""

Results = Mapping[str, Mapping[str, Any]]


def rows_of(results: Results) -> list[Mapping[str, Any]]:
    """The rows of arms, in the order of ``ARMS``, then by falling sparsity, then by seed."""
    order = list(ARMS)
    rows = [row for row in results.values() if "arm" in row]
    return sorted(rows, key=lambda row: (order.index(row["arm"]), -(row["sparsity"] or 0), row["seed"]))


def aggregate(results: Results) -> dict[tuple[str, float | None], list[Mapping[str, Any]]]:
    """The rows of each arm and sparsity: one for each seed."""
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for row in rows_of(results):
        groups.setdefault((row["arm"], row["sparsity"]), []).append(row)
    return groups


def save_csv(results: Results, path: Path) -> None:
    """One line for each arm, sparsity and seed."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows_of(results))


def save_plot(results: Results, path: Path) -> None:
    """Held-out loss and Frechet distance against sparsity: the mean over seeds, a bar from least to most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = aggregate(results)
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 4.5), layout="constrained")
    for axis, column, label in zip(axes, ("after", "frechet"), ("held-out loss", "Fréchet distance"), strict=True):
        for number, (name, arm) in enumerate(ARMS.items()):
            found = {key[1]: [row[column] for row in rows] for key, rows in groups.items() if key[0] == name}
            if not found:
                continue
            colour = pyplot.get_cmap("tab20")(number)
            if arm.sparse:
                ordered = sorted((100 * float(share or 0), values) for share, values in found.items())
                means = [statistics.fmean(values) for _, values in ordered]
                reach = [
                    [mean - min(values) for mean, (_, values) in zip(means, ordered, strict=True)],
                    [max(values) - mean for mean, (_, values) in zip(means, ordered, strict=True)],
                ]
                shares = [share for share, _ in ordered]
                axis.errorbar(shares, means, reach, marker="o", capsize=3, color=colour, label=arm.title)
            else:
                axis.axhline(statistics.fmean(found[None]), linestyle="--", color=colour, label=arm.title)
        axis.set_xlabel("sparsity, %")
        axis.set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save_samples(samples: Mapping[str, Tensor], folder: Path, name: str = "samples", scale: int = 2) -> None:
    """``folder/name.png``, a row of frames for each entry, and ``name.gif``, which moves.

    ``samples``: uint8 videos (n, 3, T, H, W) by the name of their arm, of which the first is shown.
    """
    from PIL import Image

    videos = [video[0] for video in samples.values()]
    frames = videos[0].shape[1]
    shown = torch.linspace(0, frames - 1, min(frames, 8)).long()
    strips = [_framed(video[:, moment] for moment in shown.tolist()) for video in videos]
    _image(torch.cat(strips, dim=1), Image, scale).save(folder / f"{name}.png")
    moving = [_image(_grid([video[:, t] for video in videos]), Image, scale) for t in range(frames)]
    moving[0].save(folder / f"{name}.gif", save_all=True, append_images=moving[1:], duration=80, loop=0)


def _framed(pictures: Iterable[Tensor]) -> Tensor:
    """Pictures (3, H, W) side by side, each with a white edge at its right and below."""
    return torch.cat([torch.nn.functional.pad(picture, (0, 2, 0, 2), value=255) for picture in pictures], dim=2)


def _grid(pictures: Sequence[Tensor], columns: int = 5) -> Tensor:
    blank = torch.full_like(pictures[0], 255)
    padded = [*pictures, *[blank] * (-len(pictures) % columns)]
    return torch.cat([_framed(padded[i : i + columns]) for i in range(0, len(padded), columns)], dim=1)


def _image(picture: Tensor, module: Any, scale: int) -> Any:
    image = module.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return image.resize((scale * image.width, scale * image.height), module.Resampling.NEAREST)
