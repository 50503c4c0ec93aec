"""`der-fast demo`: a complete run on data that ships with scikit-learn, in minutes on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from der_fast.cli import options as opt
from der_fast.cli.console import output, say_note
from der_fast.cli.folders import how_to_go_on, new_folder, usable_out
from der_fast.cli.group import remember_resume
from der_fast.cli.running import run_and_show
from der_fast.cli.settings import changes_from
from der_fast.config.resolve import resolve_config


def demo(
    ctx: typer.Context,
    epochs: opt.Epochs = None,
    out: opt.Out = None,
    seed: opt.Seed = None,
    device: opt.Device = None,
    backend: opt.Backend = None,
    settings: opt.Settings = None,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Learn ten handwritten digits in five steps of two, prune after every step, and draw a report."""
    config = resolve_config("digits", preset="digits")
    config = resolve_config(base=config, changes=changes_from(ctx.params, config))
    out = new_folder(ctx, Path("runs"), "demo") if out is None else usable_out(out, resume=False)
    say_note(f"writing to {out}")
    remember_resume(ctx, lambda: how_to_go_on(out))
    if not quiet:
        output().print("1797 handwritten digits arrive two classes at a time; every step is tested on all digits seen so far.")

    def work(observer: Any) -> None:
        from der_fast.runs import train_run

        train_run(config, out, resume=False, observer=observer)

    run_and_show(work, out, quiet=quiet)
