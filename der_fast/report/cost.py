"""Pictures of the model's cost: parameters and latency per step, compared with the unpruned model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from der_fast.report import style
from der_fast.report.fields import Values
from der_fast.report.paper import PaperCurve
from der_fast.report.record import RunRecord

Write = Callable[[float], str]


def parameters_per_step(run: RunRecord, paper: PaperCurve | None) -> style.Picture | None:
    """Draw the parameters after every step (left) and those each step added (right), next to the unpruned model's. None if unknown."""
    if not _known(run.params):
        return None
    figure = style.new_figure(9.2, 3.6)
    total, added = figure.subplots(1, 2, width_ratios=[1.15, 1])
    full = run.params_unpruned if run.pruned else (None,) * len(run.params)
    total.set_title("parameters used at inference", pad=24)
    _lines(total, run.params, full, style.count_tick)
    if paper is not None and paper.average_params_pruned is not None:
        text = f"paper, pruned, average: {style.count(paper.average_params_pruned)}"
        total.axhline(paper.average_params_pruned, color=style.WARM, linestyle="--", linewidth=1.2, label=text)
    style.legend_above(total, columns=3)
    added.set_title("parameters added by each step, classifier included", pad=24)
    _bars(added, _differences(run.params), _differences(full), style.count_tick)
    title = "Parameters compared with the unpruned model" if run.pruned else "Parameters"
    return style.picture(figure, "parameters_per_step", title, _parameter_caption(run))


def _parameter_caption(run: RunRecord) -> str:
    full = run.params_unpruned[-1]
    if run.final_params is None:
        return "Parameters used at inference after every step."
    if full is None:
        return f"The final model has {style.count(run.final_params)} parameters; that of the unpruned model is unknown."
    if not run.pruned:
        return f"The run was not pruned: the final model has all {style.count(run.final_params)} parameters."
    share = style.share(run.final_params, full)
    errors = [error for error in run.compaction_error if error is not None]
    same = f"; its outputs differ from the masked network's by at most {max(errors):.1g} (relative)" if errors else ""
    return f"The final model has {style.count(run.final_params)} parameters, {share} of the {style.count(full)} without pruning{same}."


def latency_per_step(run: RunRecord) -> style.Picture | None:
    """Draw the latency of one image after every step (left) and that of every step's extractor (right). None if not measured."""
    if not _known(run.latency_ms):
        return None
    figure = style.new_figure(9.2, 3.4)
    total, added = figure.subplots(1, 2, width_ratios=[1.15, 1])
    total.set_title("milliseconds for one image", pad=24)
    # Without pruning the two models are the same, and any difference is measurement noise.
    full = run.latency_unpruned_ms if run.pruned else (None,) * len(run.latency_ms)
    _lines(total, run.latency_ms, full, style.milliseconds)
    style.legend_above(total, columns=3)
    added.set_title("milliseconds of each step's extractor", pad=24)
    _bars(added, run.latency_added_ms, (None,) * len(run.latency_ms), style.milliseconds)
    last = style.milliseconds(run.latency_ms[-1])
    caption = (
        f"Median time of the whole model for a single image on {run.device} ({run.backend_name} backend); the final model takes {last} ms."
    )
    title = "Latency compared with the unpruned model" if run.pruned else "Latency"
    return style.picture(figure, "latency_per_step", title, caption)


def _array(values: Values) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _differences(values: Values) -> Values:
    previous: Values = (0.0, *values[:-1])
    pairs = zip(values, previous, strict=True)
    return tuple(None if value is None or before is None else value - before for value, before in pairs)


def _known(values: Values) -> bool:
    return any(value is not None for value in values)


def _step_axis(axes: Axes, steps: int) -> None:
    style.grid_lines(axes)
    axes.set_xlabel("step")
    axes.set_xticks(style.step_ticks(steps, most=12))
    axes.set_xlim(0.4, steps + 0.6)


def _lines(axes: Axes, own: Values, full: Values, write: Write) -> None:
    steps = np.arange(1, len(own) + 1)
    _step_axis(axes, len(own))
    dot = 4.5 if len(own) <= 20 else 0.0
    if _known(full):
        axes.plot(steps, _array(full), color=style.OTHER, marker="o", markersize=0.75 * dot, label="unpruned")
    axes.plot(steps, _array(own), color=style.RUN, marker="o", markersize=dot, linewidth=2.2, label="this run")
    axes.fill_between(steps, 0, _array(own), color=style.RUN, alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def _bars(axes: Axes, own: Values, full: Values, write: Write) -> None:
    """Draw the unpruned step's bar behind the run's own; above it write the remaining share."""
    steps = np.arange(1, len(own) + 1)
    _step_axis(axes, len(own))
    compared = _known(full)
    if compared:
        axes.bar(steps, _array(full), color=style.FAINT, width=0.72, label="unpruned")
    axes.bar(steps, _array(own), color=style.RUN, width=0.72, label="this run")
    if len(own) <= 11:
        for step, (value, whole) in enumerate(zip(own, full, strict=True), start=1):
            if value is not None:
                text = f"{100 * value / whole:.0f} %" if compared and whole else write(value)
                axes.annotate(text, (step, max(value, 0)), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    style.legend_above(axes, columns=2)
