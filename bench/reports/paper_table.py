"""The paper's benchmark as Markdown: every step that was learned beside the paper's figures for it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from der_fast.report.paper import PaperCurve, paper_curve

HEAD = (
    "| step | classes | epochs | top-1 | the paper's | difference | parameters | of the unpruned | seconds | of one epoch |\n"
    "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)
PAPER_EPOCHS = 170

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Return the last run among `rows` (a run begins with step 1), and what it says of the whole."""
    begins = max((number for number, row in enumerate(rows) if row["step"] == 1), default=0)
    run = rows[begins:]
    if not run:
        return "No step was learned."
    curve = curve_of(run)
    lines = [title(run), "", HEAD, *(line_of(row, curve) for row in run)]
    return "\n".join([*lines, "", *summary(run, curve)])


def curve_of(run: Sequence[Row]) -> PaperCurve | None:
    """Return the paper's curve, where the run has its classes, its images and its network."""
    if not all(row["whole"] and row["width"] is None and row["per_class"] is None for row in run):
        return None
    steps = int(run[0]["steps"])
    curve = paper_curve("cifar100", f"B0-{steps}", ())
    even = all(row["classes"] * steps == 100 * row["step"] for row in run)
    return curve if even else None


def title(run: Sequence[Row]) -> str:
    """Say what was run, and where."""
    first = run[0]
    count = first["classes"] // first["step"] * first["steps"]
    classes = "CIFAR-100" if first["whole"] else f"{count} classes, a part of CIFAR-100's"
    epochs = sorted({row["epochs"] for row in run})
    spread = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
    small = f", width {first['width']}" if first["width"] else ""
    small += f", {first['per_class']} images per class" if first["per_class"] else ""
    return (
        f"B0-{first['steps']} on {classes}{small}: ResNet-18, pruned to {100 * first['target_params']:.0f} %, {spread} of the paper's "
        f"{PAPER_EPOCHS} epochs per step, {first['precision']}, backend {first['backend']}, seed {first['seed']}; "
        f"{first['facts']['device']}, commit {first['facts']['commit']}."
    )


def line_of(row: Row, curve: PaperCurve | None) -> str:
    """Return a step's line of the table."""
    published = curve.pruned[row["step"] - 1] if curve else None
    beside = ("–", "–") if published is None else (f"{published:.2f}", f"{row['top1'] - published:+.2f}")
    cells = [row["step"], row["classes"], row["epochs"], f"{row['top1']:.2f}", *beside, f"{row['params'] / 1e6:.2f} M"]
    cells += [f"{100 * row['params'] / row['params_unpruned']:.1f} %", f"{row['seconds']:.1f}", f"{row['epoch_seconds']:.3f}"]
    return f"| {' | '.join(map(str, cells))} |"


def summary(run: Sequence[Row], curve: PaperCurve | None) -> list[str]:
    """Return the averages, and what may and may not be compared."""
    steps, last = len(run), run[0]["steps"]
    mean = statistics.mean(row["top1"] for row in run)
    millions = [statistics.mean(row[key] for row in run) / 1e6 for key in ("params", "params_unpruned")]
    said = f"Average over {steps} of {last} steps: {mean:.2f} %, {millions[0]:.2f} M parameters ({millions[1]:.1f} M unpruned), "
    lines = [f"{said}{sum(row['seconds'] for row in run):.0f} s."]
    if curve is None:
        return [*lines, "Not the paper's benchmark: other classes, images or widths, so nothing of the paper stands beside it."]
    pruned, unpruned = (statistics.mean(values[:steps]) for values in (curve.pruned, curve.unpruned))
    lines.append(
        f"The paper's over the same steps: {pruned:.2f} % pruned, {unpruned:.2f} % unpruned, means over three class orders; here one."
    )
    if curve.average_params_pruned and curve.average_params_unpruned:
        sizes = f"{curve.average_params_pruned / 1e6:.2f} M pruned, {curve.average_params_unpruned / 1e6:.1f} M unpruned"
        lines.append(f"The paper's parameters, on average over all {last} steps: {sizes}.")
    if min(row["epochs"] for row in run) < PAPER_EPOCHS:
        lines.append("The schedule is shorter than the paper's: lower accuracies are expected, and no others follow from these.")
    return lines
