"""Accuracy against kept parameters: the rows of the study `pruning` as a table and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bench.reports.cpu_table import spread

Row = dict[str, Any]
_SETUP = ("data", "backbone", "width", "steps", "epochs", "held", "per_class", "precision")
_IDENTITY = (*_SETUP, "variant", "budget", "seed", "changes", "trial")
# Marks of the axis of kept parameters, in percent.
_TICKS = (1, 2, 4, 8, 12, 24, 50, 100)
HEAD = (
    "| network | steps | epochs | budget | variant | held out, % | test, % | kept, % | λ_s | rank correlation | seeds |\n"
    "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|"
)


def rows_in(path: Path) -> list[Row]:
    """Return the rows of a file, in order; half a line that a killed process left counts for nothing."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def identity(row: Row) -> str:
    """Return what makes a row this row and no other."""
    return json.dumps({key: row[key] for key in _IDENTITY}, sort_keys=True)


def groups(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[list[Row]]]:
    """Return for every setup its variants and budgets, each with its seeds. Trials are left out; of equal rows the last counts.

    The default changes in time: rows of the same variant with other changes are older ones.
    """
    last: dict[str, Row] = {}
    for row in rows:
        if not row["trial"]:
            last[identity({**row, "changes": None})] = row
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Row]]] = {}
    for row in last.values():
        setup = found.setdefault(tuple(row[key] for key in _SETUP), {})
        setup.setdefault((-(row["budget"] or 2.0), row["variant"]), []).append(row)
    return {setup: [variants[key] for key in sorted(variants, key=lambda key: key[0])] for setup, variants in found.items()}


def table(rows: Iterable[Row]) -> str:
    """Return mean ± standard deviation over seeds as a Markdown table, and under it what each setup is."""
    lines, notes = [], []
    for setup, variants in groups(rows).items():
        lines += [_line(seeds) for seeds in variants]
        notes.append(_note(dict(zip(_SETUP, setup, strict=True))))
    return "\n".join([HEAD, *lines, "", *notes]) if lines else "No row was measured."


def _line(seeds: Sequence[Row]) -> str:
    first = seeds[0]
    scores = [_score([row[key] for row in seeds]) for key in ("held_top1", "test_top1")]
    kept = spread([100 * row["kept"] for row in seeds])
    budget = "–" if first["budget"] is None else f"{100 * first['budget']:.1f} %"
    weights = {f"{row['sparsity']:g}" for row in seeds if row["sparsity"] is not None}
    cells = [_network(first), first["steps"], first["epochs"], budget, first["variant"], *scores, kept, ", ".join(sorted(weights)) or "–"]
    return f"| {' | '.join(map(str, [*cells, _moved(seeds), len(seeds)]))} |"


def _score(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return spread(there) if there else "–"


def _network(row: Row) -> str:
    name = row["backbone"].replace("resnet", "ResNet-")
    return name if row["width"] is None else f"{name}, width {row['width']}"


def _moved(seeds: Sequence[Row]) -> str:
    """The mean over groups, steps and seeds."""
    steps = [step["rank_correlation"] for row in seeds for step in row["per_step"]]
    values = [value for groups in steps if groups is not None for value in groups.values()]
    return f"{statistics.mean(values):.2f}" if values else "–"


def _note(setup: Row) -> str:
    images = "all images" if setup["per_class"] is None else f"{setup['per_class']} images of each class"
    held = f"all but {setup['held']} of each class" if setup["held"] and setup["per_class"] is None else images
    return (
        f"{_network(setup)}, {setup['steps']} step(s): {setup['data']}, trained on {held}, {setup['epochs']} epochs, {setup['precision']}."
    )


def plot(rows: Iterable[Row], path: Path) -> None:
    """Write the picture: a panel per setup, a line per variant, accuracy on test images if all rows have them."""
    found = groups(rows)
    style: Any = {"svg.hashsalt": "der_fast", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(1 + 4.5 * max(len(found), 1), 3.8), layout="constrained")
        panels = figure.subplots(1, max(len(found), 1), squeeze=False)[0]
        for axes, (setup, variants) in zip(panels, found.items(), strict=False):
            _panel(axes, _note(dict(zip(_SETUP, setup, strict=True))), variants)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, title: str, variants: Sequence[Sequence[Row]]) -> None:
    tested = all(row["test_top1"] is not None for seeds in variants for row in seeds)
    key = "test_top1" if tested else "held_top1"
    points: dict[str, list[tuple[float, float, float]]] = {}
    for seeds in variants:
        values = [row[key] for row in seeds]
        error = statistics.stdev(values) if len(values) > 1 else 0.0
        points.setdefault(seeds[0]["variant"], []).append(
            (100 * statistics.mean(row["kept"] for row in seeds), statistics.mean(values), error)
        )
    for name, line in points.items():
        kept, means, errors = zip(*sorted(line), strict=True)
        if name == "unpruned":
            axes.axhline(means[0], color="gray", linestyle="--", linewidth=1, label="unpruned")
        else:
            axes.errorbar(kept, means, errors, marker="o", markersize=4, linewidth=1.4, capsize=2, label=name)
    axes.set_xscale("log")
    axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    every = [kept for line in points.values() for kept, _, _ in line if kept < 100] or [100.0]
    axes.set_xlim(0.8 * min(every), 1.25 * max(every))
    axes.set_xlabel("kept parameters, %")
    axes.set_ylabel(f"accuracy on {'test' if tested else 'held-out training'} images, %")
    axes.set_title(title, loc="left", fontsize=7, wrap=True)
    axes.legend(fontsize=7, frameon=False)
