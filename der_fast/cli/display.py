"""The display of a command: a live bar on a terminal, lines of text elsewhere, only messages with --quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from der_fast.cli.console import errors, output, say_note
from der_fast.data.io.progress import bars_told_to, no_bars, takes_a_bar
from der_fast.training.display import LiveDisplay, LogLines
from der_fast.training.plain import write_line
from der_fast.training.progress import Observer


class OnlyMessages(Observer):
    """--quiet: only what a person should know."""

    def message(self, text: str) -> None:
        """Pass a message on to standard error."""
        say_note(text)


@contextmanager
def watching(quiet: bool) -> Iterator[Observer]:
    """Yield the observer that fits: messages only for --quiet, a live bar on a terminal, a line per minute and per step elsewhere."""
    console = output()
    if quiet:
        with no_bars():
            yield OnlyMessages()
    elif takes_a_bar(console):
        display = LiveDisplay(console, say_note)
        try:
            yield display
        finally:
            display.stop()
    else:
        lines = LogLines(lambda text: write_line(sys.stdout, text), say_note)
        # If standard error is a terminal, loading draws its own bar there.
        loading = nullcontext() if takes_a_bar(errors()) else bars_told_to(lines.loads)
        with loading, lines.ticking():
            yield lines
