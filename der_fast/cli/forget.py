"""`der-fast forget`: remove classes from a saved run."""

from __future__ import annotations

from typing import Annotated

import typer

from der_fast.cli import options as opt
from der_fast.cli.console import output, say_where

Classes = Annotated[list[str], typer.Argument(metavar="CLASS...", help="names of known classes, not all of them")]


def forget(run: opt.Run, classes: Classes, debug: opt.Debug = False) -> None:
    """Remove every CLASS from RUN: its row of the classifier and its exemplars, in every state and checkpoint in the folder.

    The other classes' logits stay as they are. What the extractors learned from its images stays in them.
    """
    from der_fast.api import forget_class
    from der_fast.cli.display import OnlyMessages
    from der_fast.training.forget import REMAINS

    result = forget_class(run, *classes, observer=OnlyMessages())
    console = output()
    console.print(f"forgotten: {', '.join(map(repr, classes))}; {len(result.learner.class_names)} class(es) are left", soft_wrap=True)
    console.print(REMAINS, soft_wrap=True)
    say_where("report", run / "report.html")
