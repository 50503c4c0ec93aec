"""Threads that read files and never keep a process from ending."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, TypeVar

from der_fast.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Seconds; the default of data.timeout.
TIMEOUT = 120.0

_Calls = queue.SimpleQueue["tuple[Future[Any], Callable[[], Any]] | None"]


class FileThreads:
    """A few threads that run calls in the order in which they were submitted.

    The standard library's pool waits for its threads when the interpreter ends: forever, if one of them reads from a drive that does
    not answer.

    Args:
        count: how many threads.
        name: what they are called.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._begin()

    def _begin(self) -> None:
        self._owner = os.getpid()
        self._calls: _Calls = queue.SimpleQueue()
        closed = threading.Event()
        for index in range(self._count):
            threading.Thread(target=_work, args=(self._calls, closed), name=f"{self._name}_{index}", daemon=True).start()
        # Threads refer to the queue, not to this object, so that they end with it even if nobody closes it.
        self._close = weakref.finalize(self, _end, self._calls, closed, self._count)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Return a future of ``function(*arguments)``; a forked process, which has lost the threads, starts new ones."""
        if self._owner != os.getpid():
            self._close.detach()
            self._begin()
        future: Future[Result] = Future()
        self._calls.put((future, lambda: function(*arguments)))
        return future

    def close(self) -> None:
        """Let every thread end after its current call; waiting calls are not started."""
        self._close()


@dataclass(frozen=True)
class Some:
    """Some files handled in one call; a message names the first of them.

    Args:
        start: how many come before them.
        paths: where they are; at least one.
    """

    start: int
    paths: Sequence[str]

    def __str__(self) -> str:
        """Name them."""
        return self.paths[0] + (f" (or one of the {len(self.paths) - 1} after it)" if len(self.paths) > 1 else "")


def some(paths: Sequence[str], size: int) -> list[Some]:
    """Return files in groups of `size`, in order."""
    return [Some(start, paths[start : start + size]) for start in range(0, len(paths), size)]


def mapped(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    timeout: float,
    *,
    count: int = 16,
    name: str = "der_fast-map",
    advance: Callable[[int], object] = lambda done: None,
) -> list[Result]:
    """Return the function's result for every item, in order, from a few threads.

    Args:
        function: reads something.
        items: what it is called with; named in the message.
        timeout: seconds to wait for one result once those before it are there.
        count: how many threads.
        name: what they are called.
        advance: called with 1 after every result.

    Raises:
        DataError: a result did not come in time. The thread that waits for it is abandoned and does not keep the process from ending.
    """
    threads = FileThreads(min(count, len(items)), name)
    try:
        calls = [threads.submit(function, item) for item in items]
        results = []
        for item, call in zip(items, calls, strict=True):
            try:
                results.append(call.result(timeout))
                advance(1)
            except FutureTimeout:
                raise DataError(
                    f"reading {item} took longer than data.timeout={timeout:g} seconds; check the drive that holds it"
                ) from None
        return results
    finally:
        threads.close()


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
            except BaseException as error:  # raised again where the result is read
                future.set_exception(error)
        # A waiting thread must not keep a batch in memory.
        del entry, future, call
