"""The tables of ``real_video.md`` from the results of ``study.py``.

python -m benchmarks.real_video.report runs/real_video/study/results.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_video.arms import ARMS

__all__ = ["tables"]

Results = Mapping[str, Mapping[str, Any]]


def above(row: Mapping[str, Any], dense: Mapping[str, Any]) -> list[float]:
    """Percent above the dense model's loss: of the mean, then of each quarter of the times."""
    return [100 * (mine / wanted - 1) for mine, wanted in zip(row["loss"], dense["loss"], strict=True)]


def cells(values: Sequence[float], form: str = "+.2f") -> str:
    """Joined for a table."""
    return " | ".join(format(value, form) for value in values)


def closed_table(results: Results) -> list[str]:
    """A row for each arm right after the switch, in the order of the arms."""
    lines = [
        "| arm | sparsity | above dense, % | least noise | 2nd | 3rd | most noise | PSNR, dB | features |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = [name for name in ARMS if name in results and name != "dense"]
    for name in sorted(names, key=lambda name: ("95% 90% 97%".index(ARMS[name].sparsity), list(ARMS).index(name))):
        row = results[name]
        samples = f"{row['psnr']:.1f} | {row['features']:.3f}" if "psnr" in row else "- | -"
        measured = f"{cells(above(row, results['dense']))} | {samples}"
        lines.append(f"| {ARMS[name].title} | {ARMS[name].sparsity} | {measured} |")
    return lines


def tuned_table(results: Results) -> list[str]:
    """A row for each arm that was fine-tuned: means over seeds, each seed beside the dense model trained on in it."""
    lines = [
        "| arm | sparsity | seeds | before | after | least noise | 2nd | 3rd | most noise | PSNR, dB | features |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ARMS:
        rows = {key.split("/")[1]: row for key, row in results.items() if key.split("/")[0] == name and "/" in key}
        pairs = [(row, results[f"dense/{seed}"]) for seed, row in rows.items() if f"dense/{seed}" in results]
        if not pairs:
            continue
        before = [100 * (row["before"][0] / results["dense"]["loss"][0] - 1) for row, _ in pairs]
        after = [above(row, dense) for row, dense in pairs]
        each = ", ".join(f"{value[0]:+.2f}" for value in after)
        means = [statistics.mean(values) for values in zip(*after, strict=True)]
        psnr, features = (statistics.mean(row[key] for row, _ in pairs) for key in ("psnr", "features"))
        lines.append(
            f"| {ARMS[name].title} | {ARMS[name].sparsity} | {len(pairs)} | {statistics.mean(before):+.2f} | "
            f"{means[0]:+.2f} ({each}) | {cells(means[1:])} | {psnr:.1f} | {features:.3f} |"
        )
    return lines


def dense_steps_table(results: Results) -> list[str]:
    """A row for each arm and number of first steps that the dense model made; nothing where there is none."""
    rows = [
        f"| {ARMS[name].title} | {ARMS[name].sparsity} | {steps} | {psnr:.1f} | {features:.3f} |"
        for name in ARMS
        for steps, (psnr, features) in results.get(name, {}).get("dense_steps", {}).items()
    ]
    head = ["| arm | sparsity | dense steps | PSNR, dB | features |", "| --- | --- | --- | --- | --- |"]
    return ["", "First denoising steps dense:", "", *head, *rows] if rows else []


def tables(results: Results) -> list[str]:
    """All of them, as Markdown."""
    closed, tuned = closed_table(results), tuned_table(results)
    return ["Right after the switch:", "", *closed, *dense_steps_table(results), "", "Fine-tuned:", "", *tuned]


if __name__ == "__main__":
    print("\n".join(tables(json.loads(Path(sys.argv[1]).read_text()))))
