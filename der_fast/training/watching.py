"""Who watches when Python code trains: the given observer, or a display if a person is watching."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from rich.console import Console

from der_fast.data.io.progress import bars_told_to, no_bars, takes_a_bar
from der_fast.training.display import LiveDisplay, LogLines, NotebookDisplay
from der_fast.training.plain import write_line
from der_fast.training.progress import Observer, Observers


@contextmanager
def watched(observer: Observer | None, progress: bool | None) -> Iterator[Observer]:
    """Yield the observer of a training.

    Args:
        observer: given by the caller, or None.
        progress: None shows progress if no observer was given and standard error is a terminal, or in a notebook; True always
            shows it, elsewhere as a line per minute on standard error, also with an observer; False never shows any, not even of loading.
    """
    if progress is False:
        with no_bars():
            yield observer or Observer()
        return
    if progress is None and observer is not None:
        yield observer
        return
    with _display(always=progress is True) as display:
        if display is None:
            yield observer or Observer()
        else:
            yield display if observer is None else Observers([observer, display])


@contextmanager
def _display(always: bool) -> Iterator[Observer | None]:
    console = Console(stderr=True, highlight=False, markup=False)
    rewrite = in_notebook()
    if rewrite is not None:
        notebook = NotebookDisplay(rewrite)
        try:
            with bars_told_to(notebook.loads):
                yield notebook
        finally:
            notebook.stop()
    elif takes_a_bar(console):
        live = LiveDisplay(console, lambda text: console.print(f"note: {text}", style="dim", soft_wrap=True))
        try:
            yield live
        finally:
            live.stop()
    elif always and sys.stderr is not None:
        lines = LogLines(_tell, lambda text: _tell(f"note: {text}"))
        with bars_told_to(lines.loads), lines.ticking():
            yield lines
    else:
        yield None


def _tell(text: str) -> None:
    # Nobody can watch any more (a closed terminal, a full disk): no reason to give up a night's training.
    with suppress(OSError, ValueError):
        write_line(sys.stderr, text)


def in_notebook() -> Callable[[str], None] | None:
    """Return a function that shows a text below the running cell, in place of the previous text; None outside notebooks."""
    # In a notebook it is already imported.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    # IPython in a terminal has no kernel; its standard error is a terminal like any other.
    if getattr(shell, "kernel", None) is None:
        return None
    # Imported only here: no other part needs it.
    display: Any = import_module("IPython.display").display
    handles: list[Any] = []

    def rewrite(text: str) -> None:
        content = {"text/plain": text}
        if handles:
            handles[0].update(content, raw=True)
        else:
            handles.append(display(content, raw=True, display_id=True))

    return rewrite
