"""Pictures of accuracy: per step, per class set over time, and the confusion matrix."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from der_fast.report import style
from der_fast.report.fields import Values
from der_fast.report.paper import PaperCurve
from der_fast.report.record import RunRecord

_ANNOTATED = 12
_CHANGES = LinearSegmentedColormap.from_list("changes", ["#b8433f", "#f0c4bf", "#fbfbfb", "#bfe0d2", "#2f8f6b"])


def accuracy_per_step(run: RunRecord, paper: PaperCurve | None) -> style.Picture | None:
    """Draw top-1 and top-5 over the number of classes seen, with the paper's curves if there are any; None without test images."""
    if all(value is None for value in run.top1):
        return None
    figure = style.new_figure(9.2, 4.0)
    axes = figure.add_subplot()
    style.grid_lines(axes)
    counts = run.class_counts
    if paper is not None:
        dot = "." if len(paper.class_counts) <= 20 else None
        name = f"paper, {'top-1' if paper.metric == 'top1' else 'top-5'}"
        axes.plot(paper.class_counts, paper.unpruned, color=style.OTHER, linestyle=":", marker=dot, label=f"{name}, not pruned")
        axes.plot(paper.class_counts, paper.pruned, color=style.WARM, linestyle="--", marker=dot, label=f"{name}, pruned")
    if len(run.class_names) > 5 and any(value is not None for value in run.top5):
        _line(axes, counts, run.top5, color=style.RUN_LIGHT, linewidth=1.4, markersize=3.5, label="this run, top-5")
    _line(axes, counts, run.top1, color=style.RUN, linewidth=2.4, markersize=5, label="this run, top-1")
    if paper is None and len(counts) <= _ANNOTATED:
        for count, value in zip(counts[:-1], run.top1[:-1], strict=True):
            _write_value(axes, count, value, (0, -7), "center", "top")
    _write_value(axes, counts[-1], run.top1[-1], (8, 0), "left", "center")
    axes.set_ylabel("accuracy on all classes seen, %")
    _class_axis(axes, paper.class_counts if paper is not None else counts)
    if len(counts) == 1 and paper is None:
        axes.set_ylim(0, 101.5)
    else:
        axes.margins(y=0.12)
        axes.set_ylim(max(0.0, axes.get_ylim()[0]), min(101.5, axes.get_ylim()[1]))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    style.legend_above(axes)
    return style.picture(figure, "accuracy_per_step", "Accuracy after every step", _accuracy_caption(run, paper))


def _class_axis(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xlabel("classes seen")
    if len(counts) <= 20:
        axes.set_xticks(counts)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.margins(x=0.04 if len(counts) > 1 else 0.5)


def _line(axes: Axes, counts: Sequence[int], values: Values, **look: Any) -> None:
    heights = [np.nan if value is None else value for value in values]
    axes.plot(counts, heights, marker="o" if len(counts) <= 20 else None, **look)


def _write_value(axes: Axes, at: int, value: float | None, offset: tuple[int, int], ha: str, va: str) -> None:
    if value is not None:
        text = axes.annotate(f"{value:.1f}", (at, value), xytext=offset, textcoords="offset points", ha=ha, va=va, color=style.RUN)
        text.set(fontsize=8.5, path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=4)


def _accuracy_caption(run: RunRecord, paper: PaperCurve | None) -> str:
    finished = len(run.top1)
    own = f"After the only step so far, top-1 is {style.percent(run.last_top1)} %"
    if finished > 1:
        own = f"Averaged over {finished} steps, top-1 is {style.percent(run.average_top1)} %"
    if paper is None:
        return f"{own}; every point is the share of test images of all classes seen so far that are classified correctly."
    mine, metric = (run.average_top1, "top-1") if paper.metric == "top1" else (run.average_top5, "top-5")
    if mine is not None:
        theirs = sum(paper.pruned[:finished]) / finished
        own = f"{own}, {style.signed(mine - theirs)} points from the paper's pruned {theirs:.1f} % in {metric} over the same steps"
    return f"{own}; the paper's curves are its authors' published values, with ResNet-18, {_orders(run, paper)}."


def _orders(run: RunRecord, paper: PaperCurve) -> str:
    """Compare the class orders of the paper's curves with the run's."""
    protocol = run.config.get("protocol")
    same = isinstance(protocol, Mapping) and protocol.get("class_order") in paper.orders
    if len(paper.orders) > 1:
        return f"averaged over {len(paper.orders)} class orders, {'including' if same else 'but not over'} this run's"
    return f"with {'the same' if same else 'another'} class order"


def class_sets_over_time(run: RunRecord) -> style.Picture | None:
    """Draw the accuracy of every class set after every later step: row = class set, column = step. None if it is unknown."""
    steps = len(run.class_set_top1)
    if steps < 2 or all(value is None for row in run.class_set_top1 for value in row):
        return None
    grid = np.full((steps, steps), np.nan)
    for step, row in enumerate(run.class_set_top1):
        grid[: len(row), step] = [np.nan if value is None else value for value in row]
    cell = 0.42 if steps <= _ANNOTATED else 0.3 if steps <= 25 else 0.15
    figure = style.new_figure(9.2, min(8.2, 1.5 + cell * steps))
    axes, beside = figure.subplots(1, 2, width_ratios=[max(6, steps), max(1.6, steps * 0.14)])
    image = axes.imshow(grid, cmap=style.SHARES, vmin=0, vmax=100, aspect="auto")
    axes.set_xlabel("after step")
    axes.set_ylabel("class set, by the step that added it")
    ticks = style.step_ticks(steps)
    axes.set_xticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks])
    starts = (0, *run.class_counts)
    names = [style.class_set_label(tick, run.steps[tick - 1], starts[tick - 1]) for tick in ticks]
    axes.set_yticks([tick - 1 for tick in ticks], names)
    _cell_borders(axes, steps, steps)
    change = np.array([[grid[index, -1] - grid[index, index]] for index in range(steps)])
    change[-1] = np.nan
    limit = max([10.0, *np.abs(change[np.isfinite(change)]).tolist()])
    _draw_change(beside, change, limit)
    if steps <= _ANNOTATED:
        _write_cells(axes, grid, "{:.0f}", dark_above=60)
        _write_cells(beside, change, "{:+.0f}", dark_above=0.75 * limit)
    figure.colorbar(image, ax=axes, location="right", shrink=0.9, pad=0.015, aspect=30).set_label("top-1, %")
    return style.picture(figure, "class_sets_over_time", "Which classes are forgotten?", _forgotten_caption(change[:-1, 0]))


def _draw_change(axes: Axes, change: NDArray[np.float64], limit: float) -> None:
    axes.imshow(change, cmap=_CHANGES, vmin=-limit, vmax=limit, aspect="auto")
    axes.set_yticks([])
    axes.set_xticks([0], ["change since\nlearned"])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    _cell_borders(axes, len(change), 1)


def _cell_borders(axes: Axes, rows: int, columns: int) -> None:
    if rows <= 25:
        axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_cells(axes: Axes, grid: NDArray[np.float64], template: str, dark_above: float) -> None:
    for row, column in itertools.product(range(grid.shape[0]), range(grid.shape[1])):
        value = grid[row, column]
        if np.isfinite(value):
            color = "white" if abs(value) > dark_above else style.INK
            text = template.format(value).replace("-", "−")
            text = "0" if text in ("+0", "−0") else text
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)


def _forgotten_caption(change: NDArray[np.float64]) -> str:
    reading = "Read a row from left to right to see what later steps did to the classes of that step"
    if not np.isfinite(change).any():
        return f"{reading}."
    worst = int(np.nanargmin(change))
    if change[worst] >= 0:
        return f"{reading}; no class set has lost accuracy since it was learned."
    return f"{reading}; class set {worst + 1} has lost the most, {-change[worst]:.1f} points since it was learned."


def confusion_matrix(run: RunRecord) -> style.Picture | None:
    """Draw the confusion matrix after the last step, every row in percent of its class's test images. None if it is unknown."""
    if not run.confusion:
        return None
    counts = np.array(run.confusion, dtype=np.float64)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(counts)
    side = 4.2 if classes <= 5 else 5.6 if classes <= 12 else 7.6
    figure = style.new_figure(side + 1.2, side)
    axes = figure.add_subplot()
    # A square-root scale shows rare mistakes that would be white on a linear one.
    image = axes.imshow(shares, cmap=style.SHARES, norm=PowerNorm(0.5 if classes > _ANNOTATED else 1.0, 0, 100), interpolation="nearest")
    _name_classes(axes, run)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if classes <= _ANNOTATED:
        shown = np.where(shares >= 0.5, shares, np.nan)
        _write_cells(axes, shown, "{:.0f}", dark_above=60)
    figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02, aspect=32).set_label("% of the true class's images")
    right = 100 * np.trace(counts) / max(counts.sum(), 1)
    caption = (
        f"Rows are true classes, columns predictions, both in learning order; "
        f"{right:.1f} % of {int(counts.sum())} test images lie on the diagonal."
    )
    return style.picture(figure, "confusion_matrix", "Which classes are confused", caption)


def _name_classes(axes: Axes, run: RunRecord) -> None:
    """Label single classes if there is room, else the steps that added them; lines separate the steps."""
    names, edges = run.class_names, (0, *run.class_counts)
    if len(names) <= 40:
        size = 8.5 if len(names) <= 20 else 6.5
        labels = [style.label(name, index) for index, name in enumerate(names)]
        axes.set_xticks(range(len(names)), labels, rotation=90 if max(map(len, labels)) > 2 else 0, fontsize=size)
        axes.set_yticks(range(len(names)), labels, fontsize=size)
        what = "class"
    else:
        ticks = style.step_ticks(len(run.steps))
        middles = [(edges[tick - 1] + edges[tick] - 1) / 2 for tick in ticks]
        axes.set_xticks(middles, [str(tick) for tick in ticks])
        axes.set_yticks(middles, [str(tick) for tick in ticks])
        what = "classes of step"
    axes.set_xlabel(f"predicted {what}")
    axes.set_ylabel(f"true {what}")
    axes.tick_params(length=0)
    if len(run.steps) <= 25:
        for edge in edges[1:-1]:
            axes.axhline(edge - 0.5, color=style.FAINT, linewidth=0.7)
            axes.axvline(edge - 0.5, color=style.FAINT, linewidth=0.7)


def draw_runs(axes: Axes, runs: Sequence[RunRecord], names: Sequence[str], paper: PaperCurve | None) -> None:
    """Draw several runs' top-1 over the classes seen, with the paper's pruned curve if it is given."""
    style.grid_lines(axes)
    if paper is not None and paper.metric == "top1":
        axes.plot(paper.class_counts, paper.pruned, color=style.OTHER, linestyle="--", marker=".", label="paper, pruned")
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        color = style.CYCLE[index % len(style.CYCLE)]
        line = ("-", "--", "-.", ":")[index // len(style.CYCLE) % 4]
        name = style.drawable(name, f"run {index + 1}", 28)
        text = f"{name}  ({style.percent(run.average_top1)} % on average)"
        _line(axes, run.class_counts, run.top1, color=color, linestyle=line, markersize=4.5, label=text)
    counts = max((run.class_counts for run in runs), key=len)
    _class_axis(axes, counts)
    if any(count not in counts for run in runs for count in run.class_counts):
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.set_ylabel("top-1 on all classes seen, %")
