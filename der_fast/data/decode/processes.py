"""Processes that decode, seen from where the pixels are wanted: one that dies is noticed at once, and said why."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from multiprocessing.spawn import get_executable
from typing import Any

from der_fast.data.decode.crops import Cropped, Crops
from der_fast.data.decode.decoder import START, Failed
from der_fast.data.io.threads import FileThreads
from der_fast.errors import DataError

# Seconds for a process to be gone after its pipe has ended, or after it was killed.
_PATIENCE = 5.0

Process = subprocess.Popen[bytes]


def usable() -> bool:
    """Whether processes can be started: not by a program that was frozen into one file, or that has Python inside of it."""
    return bool(get_executable()) and not getattr(sys, "frozen", False)


class DecodingProcesses:
    """A few processes that decode, each started when it is first needed; they end with this object, and with this process.

    Args:
        count: the most that run at a time.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._threads = FileThreads(count, "der_fast-decode")
        self._started: list[Process] = []
        self._idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._end = weakref.finalize(self, _end, self._started, os.getpid())

    @property
    def ids(self) -> list[int]:
        """The process ids of those that were started."""
        return [process.pid for process in self._started]

    def submit(self, crops: Crops) -> Future[Cropped]:
        """Return what will hold the pixels, or a DataError that says what became of the process."""
        return self._threads.submit(self._decode, crops)

    def close(self) -> None:
        """End every process, whatever it does."""
        self._threads.close()
        with self._guard:
            self._end()

    def _decode(self, crops: Crops) -> Cropped:
        process = self._take()
        try:
            return _answer(process, crops)
        finally:
            self._idle.put(process)

    def _take(self) -> Process:
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._guard:
            if not self._end.alive:
                raise DataError("reading images was stopped")
            if len(self._started) < self._count:
                self._started.append(_start())
                return self._started[-1]
        return self._idle.get()


def _start() -> Process:
    keywords: dict[str, Any] = {}
    if sys.platform == "win32":
        keywords["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
    else:
        # Ctrl-C is for the process that trains; those that decode end with it.
        keywords["start_new_session"] = True
    try:
        process = subprocess.Popen([get_executable(), "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **keywords)
    except OSError as error:
        raise DataError(
            f"a process that decodes images cannot be started: {error}; set data.workers lower, or data.workers=0, which decodes without "
            "further processes"
        ) from error
    with contextlib.suppress(OSError):
        # What becomes of one that cannot read it shows when it is first needed.
        pickle.dump(sys.path, _pipe(process.stdin))
    return process


def _pipe(end: Any) -> Any:
    assert end is not None
    return end


def _answer(process: Process, crops: Crops) -> Cropped:
    try:
        pickle.dump(crops, _pipe(process.stdin))
        process.stdin.flush()  # type: ignore[union-attr]
        answer = pickle.load(_pipe(process.stdout))
    except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise DataError(_obituary(process, crops)) from error
    if isinstance(answer, Failed):
        if answer.memory:
            raise DataError(f"memory ran out in a process that decoded {_named(crops)}; set data.workers or the batch size lower")
        raise RuntimeError(f"decoding {_named(crops)} failed in another process:\n{answer.traceback}")
    assert isinstance(answer, Cropped)
    return answer


def _obituary(process: Process, crops: Crops) -> str:
    """Say how a process ended, and what to do."""
    try:
        code: int | None = process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        code = None
    begin = f"a process that decodes images (pid {process.pid}) "
    if code is not None and code < 0:
        name = _signal_name(-code)
        if name == "SIGKILL":
            return (
                f"{begin}was killed (SIGKILL), as systems do where memory runs out; free some memory, or set data.workers or the batch "
                "size lower, and resume the run: what was saved is unharmed"
            )
        return f"{begin}was ended by {name} while it read {_named(crops)}; if it happens again, look at these files"
    how = f"ended with exit code {code}" if code is not None else "does not answer any more"
    return f"{begin}{how}; what it said stands above. data.workers=0 decodes without further processes"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _named(crops: Crops) -> str:
    more = len(crops.paths) - 1
    return crops.paths[0] + (f" and {more} more" if more else "")


def _end(started: list[Process], owner: int) -> None:
    if owner != os.getpid():
        # This is the copy in a forked process: these are the children of another.
        return
    for process in started:
        process.kill()
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
            # Not of one that waits for a dead drive and cannot be killed: the thread that reads its pipe holds it for as long.
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    _pipe(pipe).close()
