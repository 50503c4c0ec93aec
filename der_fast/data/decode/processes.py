"""Decoding processes, as their parent sees them: one that dies is noticed at once and reported with the reason."""

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

# Seconds for a process to end after its pipe has closed, or after it was killed.
_PATIENCE = 5.0

Process = subprocess.Popen[bytes]


def usable() -> bool:
    """Whether processes can be started: not by a program that was frozen into one file, or that embeds Python."""
    return bool(get_executable()) and not getattr(sys, "frozen", False)


class DecodingProcesses:
    """A few decoding processes, each started when it is first needed; they end with this object or with this process.

    Args:
        count: how many may run at a time.
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
        """Return a future with the pixels, or with a DataError that says what happened to the process."""
        return self._threads.submit(self._decode, crops)

    def close(self) -> None:
        """End every process, whatever it is doing."""
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
        # Ctrl-C is for the training process; the decoding processes end with it.
        keywords["start_new_session"] = True
    try:
        process = subprocess.Popen([get_executable(), "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **keywords)
    except OSError as error:
        raise DataError(
            f"cannot start a decoding process: {error}; lower data.workers, or set data.workers=0, which decodes without other processes"
        ) from error
    with contextlib.suppress(OSError):
        # A process that cannot read it is noticed when it is first needed.
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
            raise DataError(f"a decoding process ran out of memory on {_named(crops)}; lower data.workers or the batch size")
        raise RuntimeError(f"decoding {_named(crops)} failed in another process:\n{answer.traceback}")
    assert isinstance(answer, Cropped)
    return answer


def _obituary(process: Process, crops: Crops) -> str:
    """Say how a process ended, and what to do."""
    try:
        code: int | None = process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        code = None
    begin = f"a decoding process (pid {process.pid}) "
    if code is not None and code < 0:
        name = _signal_name(-code)
        if name == "SIGKILL":
            return (
                f"{begin}was killed (SIGKILL), as happens when memory runs out; free some memory, or lower data.workers or the batch "
                "size, and resume the run: what was saved is unharmed"
            )
        return f"{begin}was ended by {name} while reading {_named(crops)}; if it happens again, check these files"
    how = f"ended with exit code {code}" if code is not None else "no longer answers"
    return f"{begin}{how}; its output is above. data.workers=0 decodes without other processes"


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
        # This is a copy in a forked process: the children belong to its parent.
        return
    for process in started:
        process.kill()
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
            # Not if it waits for a dead drive and cannot be killed: a thread still reads its pipe.
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    _pipe(pipe).close()
