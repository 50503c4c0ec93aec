"""The final table, with whatever a run knows."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from der_fast.cli.evaluate import classes_table
from der_fast.cli.predict import predictions_table
from der_fast.cli.tables import steps_table, summary_lines

METRICS: dict[str, Any] = {
    "steps": [["cat", "dog"], ["eel"]],
    "top1": [90.0, 80.5],
    "top5": [None, None],
    "params": [1000, 1800],
    "params_unpruned": [5000, 10000],
    "seconds": [61.0, None],
    "average_top1": 85.25,
    "last_top1": 80.5,
    "bwt": -1.5,
    "fwt": 0.25,
    "final_params": 1800,
}


def rows_of(table: Table) -> list[list[str]]:
    stream = io.StringIO()
    Console(file=stream, width=200, markup=False).print(table)
    lines = [line for line in stream.getvalue().splitlines() if "│" in line or "┃" in line]
    return [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in lines]


def test_steps_table() -> None:
    assert rows_of(steps_table(METRICS)) == [
        ["step", "new classes", "top-1 %", "parameters", "unpruned", "time"],
        ["1", "2", "90.00", "1,000", "5,000", "1:01"],
        ["2", "1", "80.50", "1,800", "10,000", "–"],
    ]


def test_steps_table_without_any_figures() -> None:
    assert rows_of(steps_table({"steps": [["a"]]})) == [["step", "new classes"], ["1", "1"]]


def test_summary_lines() -> None:
    assert summary_lines(METRICS) == [
        "average incremental accuracy 85.25 %, last 80.50 %, backward transfer -1.50 points, forward transfer +0.25 points",
        "1,800 parameters, 18.0 % of the 10,000 without pruning",
    ]
    assert summary_lines({"final_params": 5}) == ["5 parameters"]
    assert summary_lines({}) == []


def test_classes_table() -> None:
    result = {"class_names": ["cat", "dog", "eel"], "confusion": [[3, 1, 0], [0, 0, 0], [2, 1, 5]]}
    assert rows_of(classes_table(result)) == [
        ["class", "images", "top-1 %", "mistaken for"],
        ["cat", "4", "75.00", "dog (1)"],
        ["eel", "8", "62.50", "cat (2)"],
    ]


def test_predictions_table() -> None:
    top = [{"class_name": "cat", "probability": 0.75}, {"class_name": "dog", "probability": 0.25}]
    row = {"path": "a [b].png", "class_name": "cat", "probability": 0.75, "top": top}
    assert rows_of(predictions_table([row]))[1] == ["a [b].png", "cat", "75.0 %", "dog 25.0 %"]


def test_rows_of_what_happened_between_the_steps() -> None:
    events = [
        {"kind": "renamed", "step": 1, "class_names": ["kit", "cat"], "params": None},
        {"kind": "refreshed", "step": 1, "class_names": ["cat"], "top1": 92.0, "params": 1000, "seconds": 2.0},
    ]
    rows = rows_of(steps_table({**METRICS, "events": events}))
    assert [row[0] for row in rows] == ["step", "1", "1 refreshed", "2"]
    assert rows[2][1:] == ["", "92.00", "1,000", "–", "0:02"]
