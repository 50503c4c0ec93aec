"""A progress bar for long loads, on a terminal only; other displays of progress are called instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]
# Called with what is going on, and how far it is, as text.
Tell = Callable[[str, str], None]

_tell: ContextVar[Tell | None] = ContextVar("der_fast_bars", default=None)


@contextmanager
def bars_told_to(tell: Tell) -> Iterator[None]:
    """Show no bars meanwhile, but call `tell` with what they would show; it is called often and must be cheap."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)


def no_bars() -> AbstractContextManager[None]:
    """Show no bars while the returned context lasts: the caller asked for silence."""
    return bars_told_to(lambda what, how_far: None)


@contextmanager
def progress_bar(title: str, total: int | None, *, in_bytes: bool = False) -> Iterator[Advance]:
    """Show a bar on stderr while the body runs, if stderr is a terminal; the body calls the yielded function with the amount done.

    Args:
        title: what is going on.
        total: how much there is to do, or None if unknown.
        in_bytes: the numbers are bytes.
    """
    tell = _tell.get()
    if tell is not None:
        yield _teller(tell, title, total, " bytes" if in_bytes else "")
        return
    console = Console(stderr=True)
    amount: ProgressColumn = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not takes_a_bar(console)) as progress:
        task = progress.add_task(title, total=total)

        def advance(amount: int) -> None:
            progress.advance(task, amount)

        yield advance


def _teller(tell: Tell, title: str, total: int | None, unit: str) -> Advance:
    done, of = 0, "" if total is None else f" of {total:,}"

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        tell(title, f"{done:,}{of}{unit}")

    advance(0)
    return advance


def takes_a_bar(console: Console) -> bool:
    """Whether a live bar can be drawn: on a terminal that moves its cursor, whatever FORCE_COLOR and its like say."""
    return console.is_interactive and is_terminal(console.file)


def is_terminal(stream: Any) -> bool:
    """Whether `stream` is a terminal; False for a closed one, or none at all (pythonw)."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False
