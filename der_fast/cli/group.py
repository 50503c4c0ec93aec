"""What every command shares: exit codes, messages for people, --debug."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from der_fast.cli.console import errors, say_error, say_note
from der_fast.cli.streams import OutputLost, guarded
from der_fast.errors import UserError
from der_fast.home import expand
from der_fast.stopping import Stopped

USER_ERROR = 2
INTERRUPTED = 130
OUTPUT_LOST = 1

_DEBUG = "der_fast.debug"
_RESUME = "der_fast.resume"


class Commands(TyperGroup):
    """Exits with 2 on errors that the user can fix, with 128 plus its number on a signal, with 1 if standard output is lost, and
    leaves bugs to Python (traceback, 1)."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; if standard output is lost, end with a sentence, or quietly if its reader has gone."""
        try:
            with guarded():
                return super().main(*args, **kwargs)
        except OutputLost as lost:
            if not lost.unread:
                say_error(f"cannot write to standard output: {lost.reason}")
            sys.exit(OUTPUT_LOST)

    def invoke(self, ctx: Any) -> Any:
        """Run the command of `ctx`."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            how: Callable[[], str] = ctx.meta.get(_RESUME, lambda: "What was saved is unharmed.")
            say_note(f"interrupted. {how()}")
            raise typer.Exit(128 + stop.signal if isinstance(stop, Stopped) else INTERRUPTED) from None
        except UserError as error:
            if ctx.meta.get(_DEBUG):
                errors().print("".join(traceback.format_exception(error)), end="")
            say_error(error.on_command_line())
            raise typer.Exit(USER_ERROR) from None


def at_home(path: Path | list[Path] | None) -> Path | list[Path] | None:
    """Expand ``~`` in a path option or argument; the shell does not if it is quoted or follows a ``=``."""
    if isinstance(path, (list, tuple)):
        return [expand(entry) for entry in path]
    return None if path is None else expand(path)


def remember_debug(ctx: typer.Context, value: bool) -> bool:
    """Keep --debug where `Commands` finds it after the command has failed."""
    ctx.meta[_DEBUG] = value
    return value


def remember_resume(ctx: typer.Context, how: Callable[[], str]) -> None:
    """Keep a function that says how to continue after Ctrl-C; it is called when that happens."""
    ctx.meta[_RESUME] = how
