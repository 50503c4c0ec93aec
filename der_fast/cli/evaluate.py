"""`der-fast eval`: the accuracy of a saved run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from der_fast.cli import options as opt
from der_fast.cli.console import output, print_json
from der_fast.cli.tables import MISSING

Data = Annotated[
    str | None, typer.Argument(metavar="DATA", help="test images: a data set or a folder; default: the images that the run held out")
]


def evaluate(run: opt.Run, data: Data = None, as_json: opt.Json = False, device: opt.Device = None, debug: opt.Debug = False) -> None:
    """Test the model of RUN on the images that it held out, or on those of DATA that it was not trained on."""
    from der_fast.api import evaluate_run
    from der_fast.cli.display import OnlyMessages
    from der_fast.training.standing import shortened

    result = asdict(evaluate_run(run, data, device=device, observer=OnlyMessages()))
    if as_json:
        print_json(result)
        return
    console = output()
    console.print(classes_table(result))
    if result["without_images"]:
        names = result["without_images"]
        console.print(
            f"no test images of {len(names)} of {len(result['class_names'])} known classes: {shortened(names, 10)}", soft_wrap=True
        )
    console.print(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % of {result['images']:,} test images", soft_wrap=True)


def classes_table(result: Mapping[str, Any]) -> Table:
    """Return one row per class with test images: how many, how many were classified correctly, and the most frequent mistake.

    Args:
        result: `class_names` and `confusion` (rows true, columns predicted).
    """
    names, confusion = result["class_names"], result["confusion"]
    table = Table()
    table.add_column("class")
    for heading in ("images", "top-1 %"):
        table.add_column(heading, justify="right")
    table.add_column("mistaken for")
    for label, (name, row) in enumerate(zip(names, confusion, strict=True)):
        if total := sum(row):
            wrong = [(count, other) for other, count in enumerate(row) if count and other != label]
            worst = max(wrong, key=lambda entry: entry[0], default=None)
            mistaken = f"{names[worst[1]]} ({worst[0]})" if worst else MISSING
            table.add_row(name, f"{total:,}", f"{100 * row[label] / total:.2f}", mistaken)
    return table
