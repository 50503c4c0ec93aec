"""Reports: one self-contained HTML page and PNG pictures per run, and comparisons of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from der_fast.report.tables import Table

__all__ = ["compare_runs", "growth_table", "unfinished_step", "write_report"]


def write_report(run: str | Path) -> Path:
    """Write RUN/report.html and RUN/figures/*.png; see `der_fast.report.page.write_report`."""
    # Drawing needs matplotlib, which takes a second to import: only drawing pays for it.
    from der_fast.report.page import write_report as write

    return write(run)


def compare_runs(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw several runs in one picture; see `der_fast.report.compare.compare_runs`."""
    from der_fast.report.compare import compare_runs as compare

    return compare(runs, out)


def growth_table(run: str | Path) -> Table:
    """Return what every step of a run adds; see `der_fast.report.tables.growth_table`."""
    from der_fast.report.record import read_run
    from der_fast.report.tables import growth_table as table

    return table(read_run(run))


def unfinished_step(run: str | Path) -> str | None:
    """Return one sentence about how far the unfinished step got; None if there is none. Raises CheckpointError."""
    from der_fast.report.record import read_run

    return read_run(run).unfinished
