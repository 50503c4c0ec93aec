"""Ctrl-C, SIGTERM and a closed terminal during training: the current batch is finished and saved, then the run ends.

A second signal ends it at once.

A signal may come between any two instructions, even in the middle of an optimizer's step, when there is no consistent state to save. So
inside `heeding`, a first signal is only noted while the work is `deferred`, and raised as `Stopped` where the work allows it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """A signal ended the work in an orderly way.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class _Watch:
    """What the main thread of this process knows about signals."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.process = os.getpid()
        self.deferrals = 0
        self.requested: int | None = None
        self.replaced: dict[int, Any] = {}

    def take(self, number: int, frame: FrameType | None) -> None:
        """Note or raise a signal; the handler itself."""
        if os.getpid() != self.process:
            _take_in_a_fork(number)
            return
        again, self.requested = self.requested is not None, number
        if again or not self.deferrals:
            raise Stopped(number)
        self._let_workers_die()
        # The signal may have come while the same stream was being written to.
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            self.say("stopping once the current batch is saved; a second signal stops at once")

    def _let_workers_die(self) -> None:
        """Keep PyTorch from raising in the middle of a batch because the same signal ended one of its workers."""
        for number in _CHILD:
            handler = signal.getsignal(number)
            if callable(handler):
                self.replaced[number] = handler
                signal.signal(number, lambda number, frame: None)


def _take_in_a_fork(number: int) -> None:
    """A worker inherits the handler. Ctrl-C reaches it too, but the main process decides when it ends; other signals are meant for it."""
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


# The signal that tells a parent that a worker died.
_CHILD = (signal.SIGCHLD,) if hasattr(signal, "SIGCHLD") else ()
# Windows has no SIGHUP.
_ENDING = (signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else (signal.SIGTERM,)
_watch: _Watch | None = None


@contextlib.contextmanager
def heeding(say: Callable[[str], None], *, terminate: bool = False) -> Iterator[None]:
    """Handle Ctrl-C as this file describes until the context ends; then the previous handler is restored.

    Only the main thread can: in any other thread nothing changes. The caller's own handler stays. Inside another `heeding` nothing
    changes either.

    Args:
        say: called when a signal has come that does not take effect at once.
        terminate: handle SIGTERM the same way, and SIGHUP, which comes when a terminal is closed or its connection is lost.

    Raises:
        Stopped: a KeyboardInterrupt, from wherever the work is when a signal comes, or from the next place where it can stop.
    """
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(say)
    # Default handlers may be replaced; a handler that somebody set, or a signal ignored on purpose (nohup), stays.
    wanted: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if terminate:
        wanted |= dict.fromkeys(_ENDING, signal.SIG_DFL)
    before = {number: usual for number, usual in wanted.items() if signal.getsignal(number) == usual}
    try:
        _watch = watch
        for number in before:
            signal.signal(number, watch.take)
        yield
    finally:
        _watch = None
        for number, handler in {**before, **watch.replaced}.items():
            signal.signal(number, handler)


def _mine() -> _Watch | None:
    return _watch if threading.current_thread() is threading.main_thread() else None


def requested() -> bool:
    """Return whether a signal has asked this thread to stop."""
    watch = _mine()
    return watch is not None and watch.requested is not None


def stop_if_requested() -> None:
    """Raise Stopped if a signal has asked this thread to stop."""
    watch = _mine()
    if watch is not None and watch.requested is not None:
        raise Stopped(watch.requested)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a first signal wait until `stop_if_requested`, or until this is left, whichever comes first.

    An error after a signal that ended a process which the work needs counts as stopped.
    """
    watch = _mine()
    if watch is None:
        yield
        return
    watch.deferrals += 1
    try:
        yield
    except Exception as error:
        if watch.requested is not None:
            raise Stopped(watch.requested) from error
        raise
    finally:
        watch.deferrals -= 1
    if not watch.deferrals:
        stop_if_requested()
