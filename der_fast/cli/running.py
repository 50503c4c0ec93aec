"""Training and showing the result: shared by `train`, `demo` and `learn`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from der_fast.cli.console import say_note, say_where
from der_fast.cli.folders import read_json
from der_fast.cli.streams import OutputLost, outlived
from der_fast.cli.tables import print_summary
from der_fast.stopping import heeding

if TYPE_CHECKING:
    from der_fast.training.progress import Observer


def run_and_show(work: Callable[[Observer], Any], run: Path, *, quiet: bool) -> None:
    """Call `work` with a fitting observer, then print the run's table and where its report is.

    Args:
        work: trains; writes the run folder and its report.
        run: that folder.
        quiet: no progress, only the final table.

    Raises:
        Stopped: by Ctrl-C or SIGTERM; what was learned is saved.
        OutputLost: standard output could not be written to; the run is complete anyway.
    """
    # Before PyTorch, whose C code imports it too and swallows any exception meanwhile, including Ctrl-C.
    import numpy  # noqa: F401

    from der_fast.cli.display import watching

    def note(lost: OutputLost) -> None:
        say_note(f"can no longer write to standard output ({lost.reason}); training continues, and its results are in {run}")

    with heeding(say_note, terminate=True), outlived(note):
        with watching(quiet) as observer:
            work(observer)
        print_summary(read_json(run, "metrics.json"))
        say_where("run", run)
        say_where("report", run / "report.html")
