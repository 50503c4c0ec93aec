"""Which display a command gets: a live bar on a terminal, one line per step elsewhere, only messages with --quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from der_fast.cli.console import output, say_note
from der_fast.training.display import LiveDisplay, StepLines
from der_fast.training.progress import Observer


class OnlyMessages(Observer):
    """--quiet: nothing but what a person should know."""

    def message(self, text: str) -> None:
        """Pass a message on to standard error."""
        say_note(text)


@contextmanager
def watching(quiet: bool) -> Iterator[Observer]:
    """Yield the observer that fits: nothing for --quiet, a live bar on a terminal, lines elsewhere."""
    console = output()
    if quiet:
        yield OnlyMessages()
    elif not console.is_terminal:
        yield StepLines(console, say_note)
    else:
        display = LiveDisplay(console, say_note)
        try:
            yield display
        finally:
            display.stop()
