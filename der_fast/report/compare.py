"""Comparing several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from der_fast.errors import ConfigError
from der_fast.files import write_bytes
from der_fast.home import expand
from der_fast.report import style
from der_fast.report.accuracy import draw_runs
from der_fast.report.page import render
from der_fast.report.paper import PaperCurve, curve_beside
from der_fast.report.record import RunRecord, read_run
from der_fast.report.tables import Table


def compare_runs(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw the accuracies of several runs in one picture, with a table of their averages and sizes.

    The paper's curve is included if all runs share one of the paper's protocols and data sets.

    Args:
        runs: run folders, each with at least one finished step.
        out: ``.html`` for a self-contained page, ``.png`` for the picture alone.

    Returns:
        `out`.

    Raises:
        ConfigError: no runs, or another file ending.
        CheckpointError: a run that cannot be read.
        StorageError: `out` could not be written.
    """
    out = expand(out)
    if not runs:
        raise ConfigError("there are no runs to compare: give at least one run folder")
    if out.suffix.lower() not in (".html", ".png"):
        raise ConfigError(f"{out} should end in .html (page with table) or .png (picture alone)")
    records = [read_run(run) for run in runs]
    names = _names(records)
    picture = _draw(records, names)
    if out.suffix.lower() == ".png":
        return write_bytes(out, picture.png)
    return write_bytes(out, render("compare.html", picture=picture, table=_table(records, names)))


def _names(records: Sequence[RunRecord]) -> list[str]:
    """Name runs by their own names; if two share a name, add the folder."""
    names = [record.name for record in records]
    return [name if names.count(name) == 1 else f"{name} ({record.path.name})" for name, record in zip(names, records, strict=True)]


def _draw(records: Sequence[RunRecord], names: Sequence[str]) -> style.Picture:
    with style.look():
        figure = style.new_figure(9.2, 4.2 + 0.2 * len(records))
        axes = figure.add_subplot()
        draw_runs(axes, records, names, _common_paper(records))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=1 if len(records) < 4 else 2)
        caption = "Share of the test images of all classes seen so far that are classified correctly, after every step."
        return style.picture(figure, "compare", "Accuracy after every step", caption)


def _common_paper(records: Sequence[RunRecord]) -> PaperCurve | None:
    curves = [curve_beside(record) for record in records]
    return curves[0] if all(curve == curves[0] for curve in curves) else None


def _table(records: Sequence[RunRecord], names: Sequence[str]) -> Table:
    columns = ("run", "data set", "protocol", "steps", "average top-1 %", "last top-1 %", "BWT", "final parameters", "of unpruned", "time")
    rows = []
    for record, name in zip(records, names, strict=True):
        known = [value for value in record.seconds if value is not None]
        rows.append(
            (
                name, record.dataset, record.protocol, str(len(record.top1)), style.percent(record.average_top1, 2),
                style.percent(record.last_top1, 2), style.signed(record.bwt, 2), style.count(record.final_params),
                style.share(record.final_params, record.params_unpruned[-1]), style.duration(sum(known)) if known else "–",
            )
        )  # fmt: skip
    return Table(columns, tuple(rows), leading=3)
