"""Threads that read files and never keep a process from ending."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")

_Calls = queue.SimpleQueue["tuple[Future[Any], Callable[[], Any]] | None"]


class FileThreads:
    """A few threads that carry out calls in the order in which they were handed over.

    The standard library's pool waits for its threads when the interpreter ends: for ever, if one of them reads from a drive that does
    not answer.

    Args:
        count: how many threads.
        name: what they are called.
    """

    def __init__(self, count: int, name: str) -> None:
        self._calls: _Calls = queue.SimpleQueue()
        closed = threading.Event()
        for index in range(count):
            threading.Thread(target=_work, args=(self._calls, closed), name=f"{name}_{index}", daemon=True).start()
        # Threads know the queue and not this object, so that they end with it where nobody closes it.
        self._close = weakref.finalize(self, _end, self._calls, closed, count)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Return what will hold the result of ``function(*arguments)``."""
        future: Future[Result] = Future()
        self._calls.put((future, lambda: function(*arguments)))
        return future

    def close(self) -> None:
        """Let every thread end after the call that it is in; what waits is not begun."""
        self._close()


def _end(calls: _Calls, closed: threading.Event, count: int) -> None:
    closed.set()
    for _ in range(count):
        calls.put(None)


def _work(calls: _Calls, closed: threading.Event) -> None:
    while (entry := calls.get()) is not None:
        future, call = entry
        if closed.is_set():
            future.cancel()
        elif future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # it is raised where the result is asked for
                future.set_exception(error)
        # A thread that waits shall hold no batch.
        del entry, future, call
