"""The report's tables as plain text, ready for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from der_fast.config.tree import declared, flatten
from der_fast.report import style
from der_fast.report.fields import Values
from der_fast.report.paper import PaperCurve
from der_fast.report.record import EventRow, RunRecord


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        columns: headings.
        rows: one text per column; the first `leading` columns are words (left aligned), the others numbers.
        emphasised: indices of rows to highlight.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    leading: int = 1
    emphasised: frozenset[int] = frozenset()


def tiles(run: RunRecord) -> tuple[tuple[str, str, str], ...]:
    """Return the key numbers as (name, value, remark), without those that the run lacks."""
    classes, steps = len(run.class_names), len(run.top1)
    full = run.params_unpruned[-1]
    remark = f"{style.share(run.final_params, full)} of {style.count(full)} unpruned" if run.pruned else "not pruned"
    known_seconds = [value for value in run.seconds if value is not None]
    waited = run.data_share
    candidates = (
        ("average top-1", run.average_top1 if steps > 1 else None, f"{style.percent(run.average_top1)} %", f"mean over {steps} steps"),
        ("last top-1", run.last_top1, f"{style.percent(run.last_top1)} %", f"on all {classes} classes"),
        ("final parameters", run.final_params, style.count(run.final_params), remark if full else "used at inference"),
        ("backward transfer", run.bwt, style.signed(run.bwt, 2), "points; below zero = forgetting"),
        ("forward transfer", run.fwt, style.signed(run.fwt, 2), "points, compared with a new model"),
        ("latency", run.latency_ms[-1], f"{style.milliseconds(run.latency_ms[-1])} ms", f"one image on {run.device}"),
        ("wall time", known_seconds or None, style.duration(sum(known_seconds)), f"{style.plural(steps, 'step')} in total"),
        ("waiting for images", waited, f"{style.percent(waited)} %", "of the time spent in training epochs"),
    )
    return tuple((name, text, remark) for name, value, text, remark in candidates if value is not None)


def summary(run: RunRecord) -> str:
    """Return the run in one sentence."""
    finished, full = len(run.top1), run.params_unpruned[-1]
    steps = f"{finished} of {run.planned_steps} steps" if run.planned_steps > finished else style.plural(finished, "step")
    text = f"After {steps} the model knows {style.plural(len(run.class_names), 'class', 'es')}"
    if run.last_top1 is not None:
        text += f" and classifies {style.percent(run.last_top1)} % of their test images correctly"
        if finished > 1 and run.average_top1 is not None:
            text += f" ({style.percent(run.average_top1)} % averaged over steps)"
    if run.final_params is not None:
        text += f", with {style.count(run.final_params)} parameters"
        if full and run.pruned:
            text += f": {style.share(run.final_params, full)} of the unpruned model's {style.count(full)}"
    return f"{text}."


def step_table(run: RunRecord) -> Table:
    """Return one row per step, and a last row with averages over the steps."""
    columns = (
        *("step", "classes", "top-1 %", "top-5 %", "parameters", "unpruned", "share", "added"),
        *("latency ms", "added ms", "exemplars", "time"),
    )
    rows: list[tuple[str, ...]] = []
    for step, count in enumerate(run.class_counts):
        rows.append(
            (
                str(step + 1),
                str(count),
                style.percent(run.top1[step], 2),
                style.percent(run.top5[step], 2),
                style.count(run.params[step]),
                style.count(run.params_unpruned[step]),
                style.share(run.params[step], run.params_unpruned[step]),
                style.count(run.params_added[step]),
                style.timed(run.latency_ms[step], run.latency_spread_ms[step]),
                style.timed(run.latency_added_ms[step], run.latency_added_spread_ms[step]),
                "–" if (quota := run.memory_per_class[step]) is None else f"{quota:.0f}",
                style.duration(run.seconds[step]),
            )
        )
        rows += [_event_row(event) for event in run.events if event.step == step + 1 and event.params is not None]
    known = [value for value in run.seconds if value is not None]
    full = [value for value in run.params_unpruned if value is not None]
    average_full = sum(full) / len(full) if full else None
    mean_time = style.duration(sum(known) / len(known)) if known else "–"
    rows.append(
        (
            *("average", "", style.percent(run.average_top1, 2), style.percent(run.average_top5, 2), style.count(run.average_params)),
            *(style.count(average_full), style.share(run.average_params, average_full), "", "", "", "", mean_time),
        )
    )
    return Table(columns, tuple(rows), emphasised=frozenset({len(rows) - 1}))


def _event_row(event: EventRow) -> tuple[str, ...]:
    """A row between the steps: no extractor was added, so nothing is compared with the unpruned model."""
    return (
        f"{event.step} {event.kind}",
        "",
        style.percent(event.top1, 2),
        style.percent(event.top5, 2),
        style.count(event.params),
        "",
        "",
        style.count(event.params_added),
        style.milliseconds(event.latency_ms),
        "",
        "–" if event.memory_per_class is None else f"{event.memory_per_class:.0f}",
        style.duration(event.seconds),
    )


def event_table(run: RunRecord) -> Table | None:
    """Return what happened to classes between the steps, in order; None if nothing did."""
    if not run.events:
        return None
    rows = []
    for event in run.events:
        names = " → ".join(event.class_names) if event.kind == "renamed" else ", ".join(event.class_names) or "–"
        rows.append(
            (str(event.step), event.kind, names, "" if event.images is None else f"{event.images:,.0f}", style.percent(event.top1, 2))
        )
    return Table(("after step", "what", "classes", "new images", "top-1 % afterwards"), tuple(rows), leading=3)


def growth_table(run: RunRecord) -> Table:
    """Return what every step adds to the model and the resulting cost, next to the unpruned model."""
    steps = len(run.top1)
    columns = (
        *("step", "parameters added", "unpruned", "latency added ms", "unpruned"),
        *("parameters", "unpruned", "latency ms", "unpruned", "file size", "unpruned", "training time saved"),
    )
    added = [_added(run.params_unpruned, step) for step in range(steps)]
    rows = tuple(
        (
            str(step + 1),
            style.count(run.params_added[step]),
            style.count(added[step]),
            style.timed(run.latency_added_ms[step], run.latency_added_spread_ms[step]),
            style.timed(*_added_unpruned(run, step)),
            style.count(run.params[step]),
            style.count(run.params_unpruned[step]),
            style.milliseconds(run.latency_ms[step]),
            style.milliseconds(run.latency_unpruned_ms[step]),
            style.size(run.bytes[step]),
            style.size(run.bytes_unpruned[step]),
            _saved(run.saved_seconds[step]),
        )
        for step in range(steps)
    )
    return Table(columns, rows, emphasised=frozenset({len(rows) - 1}))


def _saved(seconds: float | None) -> str:
    # Older versions measured wall time, and on a busy machine the saving could seem negative.
    return "–" if seconds is None or seconds < 0 else style.duration(seconds)


def _added_unpruned(run: RunRecord, step: int) -> tuple[float | None, float | None]:
    """What an unpruned extractor adds, and its spread; for older runs the difference between two steps, which were timed separately."""
    measured = run.latency_added_unpruned_ms[step]
    return (_added(run.latency_unpruned_ms, step), None) if measured is None else (measured, run.latency_added_unpruned_spread_ms[step])


def _added(values: Values, step: int) -> float | None:
    now, before = values[step], values[step - 1] if step else 0.0
    return None if now is None or before is None else now - before


def class_table(run: RunRecord) -> Table | None:
    """Return one row per class after the last step, in learning order; None without a confusion matrix."""
    if not run.confusion:
        return None
    names = run.class_names
    step_of = [step for step, group in enumerate(run.steps, start=1) for _ in group]
    rows = []
    for index, counts in enumerate(run.confusion):
        images = sum(counts)
        wrong = max((other for other in range(len(counts)) if other != index), key=lambda other: counts[other], default=None)
        mistaken = f"{names[wrong]} ({counts[wrong]})" if wrong is not None and counts[wrong] else "–"
        right = style.percent(100 * counts[index] / images) if images else "–"
        rows.append((str(index + 1), names[index], mistaken, str(step_of[index]), str(images), right))
    return Table(("no.", "class", "most often mistaken for", "step", "test images", "top-1 %"), tuple(rows), leading=3)


def step_class_table(run: RunRecord) -> Table:
    """Return the class names that every step added."""
    return Table(("step", "classes"), tuple((str(step), ", ".join(names)) for step, names in enumerate(run.steps, start=1)), leading=2)


def paper_table(run: RunRecord, paper: PaperCurve) -> Table:
    """Return this run next to the paper, over the steps that this run has finished."""
    finished, metric = len(run.top1), "top-1" if paper.metric == "top1" else "top-5"
    own = run.top1 if paper.metric == "top1" else run.top5
    mine = run.average_top1 if paper.metric == "top1" else run.average_top5
    rows = [("this run", style.percent(mine, 2), style.percent(own[-1], 2), style.count(run.average_params))]
    for name, curve, params in (
        ("paper, pruned", paper.pruned, paper.average_params_pruned),
        ("paper, not pruned", paper.unpruned, paper.average_params_unpruned),
    ):
        # The paper's parameter average is over all steps: an unfinished run cannot be compared with it.
        whole = finished == len(curve)
        rows.append(
            (
                name,
                style.percent(sum(curve[:finished]) / finished, 2),
                style.percent(curve[finished - 1], 2),
                style.count(params if whole else None),
            )
        )
    columns = ("", f"average {metric} %", f"{metric} after step {finished} %", "average parameters")
    return Table(columns, tuple(rows), emphasised=frozenset({0}))


def config_table(config: Mapping[str, Any]) -> Table:
    """Return every key with its value and meaning; rows with values other than the default are emphasised."""
    known = declared()
    rows: list[tuple[str, str, str]] = []
    changed: set[int] = set()
    for key, value in flatten(config).items():
        default, meaning = (known[key].default, known[key].doc) if key in known else (value, "")
        if value != (list(default) if isinstance(default, tuple) else default):
            changed.add(len(rows))
        rows.append((key, _plain(value), meaning))
    return Table(("key", "value", "meaning"), tuple(rows), leading=3, emphasised=frozenset(changed))


def version_table(run: RunRecord) -> Table:
    """Return the versions and the device of the run."""
    rows = [("backend", run.backend), ("device", run.device), *run.versions.items()]
    return Table(("what", "version"), tuple(rows), leading=2)


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return ("; " if any(isinstance(entry, (list, tuple)) for entry in value) else ", ").join(map(_plain, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
