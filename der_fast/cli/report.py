"""`der-fast report`: pictures and tables of saved runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from der_fast.cli import options as opt
from der_fast.cli.console import say_note, say_where
from der_fast.cli.group import at_home
from der_fast.cli.tables import print_texts

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", callback=at_home, help="the folders of saved runs")]
Compare = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="draw all runs in one picture: .html with a table, .png alone", show_default=False, callback=at_home),
]


def report(runs: Runs, compare: Compare = None, debug: opt.Debug = False) -> None:
    """Write report.html and figures/*.png into every RUN, and print what its steps add; with --compare, draw one picture of all instead."""
    from der_fast.report import compare_runs, growth_table, unfinished_step, write_report

    if compare is not None:
        say_where("comparison", compare_runs(runs, compare))
        return
    for run in runs:
        where = write_report(run)
        print_texts(growth_table(run))
        if (so_far := unfinished_step(run)) is not None:
            say_note(so_far)
        say_where("report", where)
