"""The picture of training itself: loss, training accuracy and kept share over all epochs of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from der_fast.report import style
from der_fast.report.record import EpochRow, RunRecord

_COLORS = {"representation": style.RUN, "classifier": style.WARM, "reference": style.OTHER}


def epochs_of_the_run(run: RunRecord) -> style.Picture | None:
    """Draw loss, training accuracy, kept share and, if it changes, λ_s over all epochs; None if there is no history."""
    rows = run.history
    if not rows:
        return None
    panels: list[tuple[str, Callable[[EpochRow], float | None]]] = [
        ("loss", lambda row: row.loss),
        ("training accuracy, %", lambda row: row.accuracy),
    ]
    if any(row.kept_share is not None for row in rows):
        panels.append(("parameters kept, %", lambda row: None if row.kept_share is None else 100 * row.kept_share))
    if len({row.sparsity_weight for row in rows if row.sparsity_weight is not None}) > 1:
        panels.append(("λ_s", lambda row: row.sparsity_weight))
    figure = style.new_figure(9.2, 1.0 + 1.6 * len(panels))
    all_axes = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    for axes, (name, value) in zip(all_axes, panels, strict=True):
        _draw(axes, rows, value)
        axes.set_ylabel(name)
        if "%" in name:
            axes.set_ylim(0, 104)
    _mark_steps(all_axes, rows)
    all_axes[-1].set_xlabel("epoch of the whole run")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    handles = [all_axes[0].plot([], [], color=_color(stage), marker="o", markersize=3.5, label=stage)[0] for stage in _stages(rows)]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    return style.picture(figure, "epochs", "Training, epoch by epoch", _caption(rows))


def _stages(rows: Sequence[EpochRow]) -> list[str]:
    return list(dict.fromkeys(row.stage for row in rows))


def _color(stage: str) -> str:
    return _COLORS.get(stage, style.CYCLE[3])


def _draw(axes: Axes, rows: Sequence[EpochRow], value: Callable[[EpochRow], float | None]) -> None:
    """Draw one line per step and stage, so that no line joins points that do not belong together."""
    style.grid_lines(axes)
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (rows[end].step, rows[end].stage) != (rows[start].step, rows[start].stage):
            heights = [np.nan if (height := value(row)) is None else height for row in rows[start:end]]
            size = 3.0 if len(rows) <= 150 or end - start == 1 else 0.0
            axes.plot(range(start + 1, end + 1), heights, color=_color(rows[start].stage), linewidth=1.5, marker="o", markersize=size)
            start = end


def _mark_steps(all_axes: Sequence[Axes], rows: Sequence[EpochRow]) -> None:
    """Shade every second step and nothing else, and write the steps' numbers above the first panel."""
    edges = [index for index, row in enumerate(rows) if index == 0 or row.step != rows[index - 1].step] + [len(rows)]
    labelled = set(style.step_ticks(len(edges) - 1, most=25))
    for axes in all_axes:
        axes.set_xlim(0.5, len(rows) + 0.5)
        for position in range(1, len(edges) - 1, 2):
            axes.axvspan(edges[position] + 0.5, edges[position + 1] + 0.5, color=style.FAINT, alpha=0.4, linewidth=0)
    for position in range(len(edges) - 1):
        if position + 1 in labelled:
            middle = (edges[position] + edges[position + 1] + 1) / 2
            text = f"step {rows[edges[position]].step}" if len(edges) <= 13 else str(rows[edges[position]].step)
            all_axes[0].text(middle, 1.02, text, transform=all_axes[0].get_xaxis_transform(), ha="center", fontsize=8, color=style.MUTED)


def _caption(rows: Sequence[EpochRow]) -> str:
    settled = sum(row.settled and row.stage == "representation" for row in rows)
    stages = [sum(row.stage == stage for row in rows) for stage in ("representation", "classifier")]
    held = f", {settled} of them with binary masks" if settled else ""
    alone = f"; {style.plural(stages[1], 'epoch')} trained only the classifier" if stages[1] else ""
    return f"{style.plural(stages[0], 'epoch')} trained the representation{held}{alone}; each band is one step."
