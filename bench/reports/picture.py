"""The README's picture: accuracy and parameters over the steps, from bench/results/cifar10.jsonl, for light and dark pages."""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = "docs/pictures"
NAME = "steps"
# Text, faint lines, and each variant, on a light and on a dark page.
THEMES = {
    "light": {"ink": "#1d2733", "faint": "#dfe4ea", "pruned": "#2563a8", "unpruned": "#8a95a1", "without expansion": "#d9772b"},
    "dark": {"ink": "#e6edf3", "faint": "#303842", "pruned": "#6cb0f5", "unpruned": "#8b98a5", "without expansion": "#f0a35e"},
}
NAMES = {"pruned": "DER, pruned", "unpruned": "DER, unpruned", "without expansion": "one network, same memory"}
CLASSES_PER_STEP = 2


def curves(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[list[float]]]:
    """Return the values of all seeds, variant → step → values."""
    found: dict[str, list[list[float]]] = {}
    for variant in NAMES:
        seeds = [row[key] for row in rows if row["variant"] == variant]
        if seeds:
            found[variant] = [list(values) for values in zip(*seeds, strict=True)]
    return found


def svg(rows: Sequence[Mapping[str, Any]], theme: Mapping[str, str]) -> str:
    """Return the picture as SVG. The same rows give the same text: no date, no random names."""
    style: Any = {"svg.hashsalt": "der_fast", "svg.fonttype": "path", "font.family": ["DejaVu Sans"], "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme["ink"])
    style |= {"axes.edgecolor": theme["faint"], "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        accuracy, parameters = figure.subplots(1, 2)
        _draw(accuracy, curves(rows, "top1"), theme, "accuracy on all classes so far, %")
        _draw(parameters, curves(rows, "params"), theme, "parameters, millions", 1e-6)
        accuracy.legend(loc="upper right")
        parameters.set_ylim(bottom=0)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+\n", "\n", text.getvalue())


def _draw(axes: Axes, values: Mapping[str, Sequence[Sequence[float]]], theme: Mapping[str, str], title: str, scale: float = 1.0) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color=theme["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    for variant, steps in values.items():
        classes = [CLASSES_PER_STEP * number for number in range(1, len(steps) + 1)]
        means = [scale * statistics.mean(step) for step in steps]
        spreads = [scale * statistics.stdev(step) if len(step) > 1 else 0.0 for step in steps]
        axes.plot(classes, means, color=theme[variant], marker="o", markersize=4, linewidth=2.2, label=NAMES[variant])
        low, high = ([mean + sign * spread for mean, spread in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(classes, low, high, color=theme[variant], alpha=0.18, linewidth=0)
        axes.set_xticks(classes)
    axes.set_xlabel("classes learned")


def draw(root: Path, results: Path) -> list[Path]:
    """Write the pictures below `root` and return where they are."""
    rows = [json.loads(line) for line in (results / "cifar10.jsonl").read_text(encoding="utf-8").splitlines()]
    paths = []
    for name, theme in THEMES.items():
        path = root / FOLDER / f"{NAME}-{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(svg(rows, theme), encoding="utf-8")
        paths.append(path)
    return paths
