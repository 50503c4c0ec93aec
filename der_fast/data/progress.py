"""A progress bar for long loads, on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]

_silent: ContextVar[bool] = ContextVar("der_fast no bars", default=False)


@contextmanager
def no_bars() -> Iterator[None]:
    """Show no bars meanwhile: the caller asked for silence."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


@contextmanager
def progress_bar(title: str, total: int | None, *, in_bytes: bool = False) -> Iterator[Advance]:
    """Show a bar on stderr while the body runs, if stderr is a terminal; the body calls the yielded function with what was done.

    Args:
        title: what is going on.
        total: how much there is to do, or None if unknown.
        in_bytes: the numbers are bytes.
    """
    console = Console(stderr=True)
    shown = console.is_terminal and not _silent.get()
    amount: ProgressColumn = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(title, total=total)

        def advance(amount: int) -> None:
            progress.advance(task, amount)

        yield advance
