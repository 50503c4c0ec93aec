"""Table, picture and ratios of `bench growth`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Case = tuple[int, str, str]


def summary(seconds: Mapping[Case, Sequence[float]], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the ratios of interest; ratios of times are medians of the ratio within a round."""

    def over(case: Case, other: Case) -> float:
        return statistics.median(a / b for a, b in zip(seconds[case], seconds[other], strict=True))

    counts = sorted({steps for steps, _, _ in seconds})
    first = counts[0]
    peak = {(row["steps"], row["variant"], row["mode"]): row["peak_mb"] for row in rows}
    found: dict[str, float] = {}
    for steps in counts:
        ours = (steps, "ours", "infer")
        if ours not in seconds:
            break
        found[f"inference at t = {steps}: ours over eager unpruned, images/s"] = over((steps, "eager_unpruned", "infer"), ours)
        found[f"inference at t = {steps}: ours over one dense network, time"] = over(ours, (steps, "dense_single", "infer"))
        exported = (steps, "onnx_unpruned", "infer")
        if exported in seconds:
            name = f"inference at t = {steps}: ONNX Runtime, ours over unpruned, images/s"
            found[name] = over(exported, (steps, "onnx_ours", "infer"))
            found[f"{name}, whole blocks"] = over(exported, (steps, "onnx_blocks", "infer"))
    for variant in ("ours", "ours_settled", "eager_unpruned"):
        for steps in counts[1:]:
            later, start = (steps, variant, "train"), (first, variant, "train")
            if later not in seconds:
                break
            found[f"training at t = {steps} over t = {first}: {variant}, time"] = over(later, start)
            found[f"training at t = {steps} over t = {first}: {variant}, peak memory"] = peak[later] / peak[start]
    return found


def schedule_ratios(seconds: Mapping[Case, Sequence[float]], epochs: int, masked: int, views: int) -> dict[str, float]:
    """Return a whole step's time at t over that at the first t, with fresh crops and with kept features; medians over rounds.

    Args:
        seconds: of every round, by (t, part, 'schedule').
        epochs: of a step.
        masked: how many of them learn masks.
        views: how many compute a view first.
    """

    def spent(steps: int, kept: str) -> list[float]:
        parts = [seconds[steps, name, "schedule"] for name in (f"masked{kept}", f"settled{kept}", "view")]
        return [masked * one + (epochs - masked) * two + (views * three if kept else 0) for one, two, three in zip(*parts, strict=True)]

    counts = sorted({steps for steps, _, mode in seconds if mode == "schedule"})
    return {
        f"whole step at t = {steps} over t = {counts[0]}: {name}, time": statistics.median(
            later / start for later, start in zip(spent(steps, kept), spent(counts[0], ""), strict=True)
        )
        for name, kept in (("fresh", ""), ("views", "_kept"))
        for steps in counts[1:]
    }


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float]) -> None:
    """Write both as Markdown."""
    counts = sorted({row["steps"] for row in rows})
    lines = ["| mode | variant | " + " | ".join(f"t = {steps}" for steps in counts) + " |", "|---|---|" + "---:|" * len(counts)]
    for mode, variant in dict.fromkeys((row["mode"], row["variant"]) for row in rows):
        cells = {
            row["steps"]: f"{row['images_per_s']:.1f} ({row['peak_mb']:.0f} MB)"
            for row in rows
            if (row["mode"], row["variant"]) == (mode, variant)
        }
        lines.append(f"| {mode} | {variant} | " + " | ".join(cells.get(steps, "") for steps in counts) + " |")
    lines += [
        "",
        "images/s (peak memory of the process)",
        "",
        "| ratio | |",
        "|---|---:|",
        *(f"| {name} | {value:.2f} |" for name, value in ratios.items()),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_picture(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw images/s against steps, training and inference side by side."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, mode in zip(figure.subplots(1, 2), ("train", "infer"), strict=True):
        for variant in dict.fromkeys(row["variant"] for row in rows if row["mode"] == mode):
            line = sorted((row["steps"], row["images_per_s"]) for row in rows if (row["mode"], row["variant"]) == (mode, variant))
            axes.plot(*zip(*line, strict=True), marker="o", label=variant)
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="images/s", title=mode)
        axes.set_xticks(sorted({row["steps"] for row in rows}), sorted({row["steps"] for row in rows}))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
