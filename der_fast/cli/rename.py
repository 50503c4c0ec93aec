"""`der-fast rename`: rename a class of a saved run."""

from __future__ import annotations

from typing import Annotated

import typer

from der_fast.cli import options as opt
from der_fast.cli.console import output, say_where

Old = Annotated[str, typer.Argument(metavar="OLD", help="the class's name")]
New = Annotated[str, typer.Argument(metavar="NEW", help="its new name")]


def rename(run: opt.Run, old: Old, new: New, debug: opt.Debug = False) -> None:
    """Rename the class OLD of RUN to NEW, in model, memory, metrics and report; no weight changes."""
    from der_fast.api import rename_class
    from der_fast.cli.display import OnlyMessages

    rename_class(run, old, new, observer=OnlyMessages())
    output().print(f"class {old!r} is now {new!r}; files that were exported before keep the old name", soft_wrap=True)
    say_where("report", run / "report.html")
