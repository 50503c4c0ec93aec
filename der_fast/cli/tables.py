"""The final table and summary of a run, from its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rich.table import Table

from der_fast.cli.console import output
from der_fast.training.timeleft import as_clock

MISSING = "–"


def _percent(value: float) -> str:
    return f"{value:.2f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}"


# Heading, key of metrics.json (one value per step), how it is written.
_COLUMNS: list[tuple[str, str, Callable[[float], str]]] = [
    ("top-1 %", "top1", _percent),
    ("top-5 %", "top5", _percent),
    ("parameters", "params", _count),
    ("unpruned", "params_unpruned", _count),
    ("added", "params_added", _count),
    ("latency ms", "latency_ms", _milliseconds),
    ("added ms", "latency_added_ms", _milliseconds),
    ("time", "seconds", as_clock),
]


def steps_table(metrics: Mapping[str, Any]) -> Table:
    """Return one row per step; columns without values are left out."""
    table = Table(title=None)
    table.add_column("step", justify="right")
    table.add_column("new classes", justify="right")
    columns = [column for column in _COLUMNS if any(value is not None for value in metrics.get(column[1]) or [])]
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for index, classes in enumerate(metrics.get("steps", [])):
        cells = [_cell(metrics[key], index, write) for _, key, write in columns]
        table.add_row(str(index + 1), str(len(classes)), *cells)
        for event in metrics.get("events") or []:
            if event["step"] == index + 1 and event["params"] is not None:
                values = [MISSING if event.get(key) is None else write(event[key]) for _, key, write in columns]
                table.add_row(f"{index + 1} {event['kind']}", "", *values)
    return table


def _cell(values: Sequence[float | None], index: int, write: Callable[[float], str]) -> str:
    value = values[index] if index < len(values) else None
    return MISSING if value is None else write(value)


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the run's figures in a few lines; missing figures are left out."""
    figures = [
        ("average incremental accuracy", "average_top1", "{:.2f} %"),
        ("last", "last_top1", "{:.2f} %"),
        ("average top-5", "average_top5", "{:.2f} %"),
        ("backward transfer", "bwt", "{:+.2f} points"),
        ("forward transfer", "fwt", "{:+.2f} points"),
    ]
    accuracy = [f"{name} {form.format(metrics[key])}" for name, key, form in figures if metrics.get(key) is not None]
    lines = [", ".join(accuracy)] if accuracy else []
    final, unpruned = metrics.get("final_params"), metrics.get("params_unpruned") or []
    if final is not None:
        share = f", {100 * final / unpruned[-1]:.1f} % of the {unpruned[-1]:,.0f} without pruning" if unpruned and unpruned[-1] else ""
        lines.append(f"{final:,.0f} parameters{share}")
    return lines


class TableOfTexts(Protocol):
    """A table whose cells are already text."""

    @property
    def columns(self) -> Sequence[str]:
        """Headings."""

    @property
    def rows(self) -> Sequence[Sequence[str]]:
        """One text per column."""


def print_texts(texts: TableOfTexts) -> None:
    """Print a table of numbers to standard output."""
    table = Table(title=None)
    for heading in texts.columns:
        table.add_column(heading, justify="right")
    for row in texts.rows:
        table.add_row(*row)
    output().print(table)


def print_summary(metrics: Mapping[str, Any]) -> None:
    """Print table and figures to standard output."""
    console = output()
    console.print(steps_table(metrics))
    for line in summary_lines(metrics):
        console.print(line, soft_wrap=True)
