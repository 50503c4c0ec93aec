"""Standard output that may be lost: a full disk, a reader that has seen enough (`| head`), a closed terminal.

A command whose only result is its output ends then. Training continues without it: what it learns is in the run's folder.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# The reader has gone: nobody would see a message.
_GONE = (errno.EPIPE, errno.ESHUTDOWN, errno.ECONNRESET)


class OutputLost(Exception):
    """Standard output can no longer be written to.

    Args:
        cause: the system's error.
    """

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause

    @property
    def unread(self) -> bool:
        """Whether the reader has gone, as with `| head`; otherwise something is wrong with the file or the terminal."""
        return self.cause.errno in _GONE or isinstance(self.cause, BrokenPipeError)

    @property
    def reason(self) -> str:
        """The system's error as a text."""
        return os.strerror(self.cause.errno) if self.cause.errno else str(self.cause)


class Stream(io.TextIOBase):
    """A text stream that fails at most once, and from then on silently drops everything.

    Args:
        stream: the stream to write to; None, if there is no standard output at all, drops everything.
        failed: called when it fails; may raise.
    """

    def __init__(self, stream: TextIO | None, failed: Callable[[OutputLost], None]) -> None:
        self._stream = stream
        self._failed = failed
        self.lost: OutputLost | None = None

    def __getattr__(self, name: str) -> Any:
        # Every other attribute comes from the stream below.
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream below."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """How the stream below handles characters that it cannot encode."""
        return getattr(self._stream, "errors", None)

    def writable(self) -> bool:
        """Always true: what cannot be written is dropped."""
        return True

    def isatty(self) -> bool:
        """Whether the stream below is a terminal."""
        return self._stream is not None and self.lost is None and self._stream.isatty()

    def fileno(self) -> int:
        """The file descriptor of the stream below; raises OSError if it has none."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write a text; see the class for what happens if that fails."""
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is waiting; see the class for what happens if that fails."""
        self._try(lambda stream: stream.flush())

    def _try(self, call: Callable[[TextIO], object]) -> None:
        if self._stream is None or self.lost is not None:
            return
        try:
            call(self._stream)
        except OSError as error:
            self.lost = OutputLost(error)
            _silence(self._stream)
            self._failed(self.lost)


def _silence(stream: TextIO) -> None:
    """Keep the interpreter from complaining at exit about what is left in the buffer."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


class Streams:
    """Standard output and standard error while a command runs.

    Attributes:
        output, errors: the streams to write to.
    """

    def __init__(self) -> None:
        self.output = Stream(sys.stdout, self._output_failed)
        # Notes that nobody can read must not end the command.
        self.errors = Stream(sys.stderr, lambda lost: None)
        self._noted: Callable[[OutputLost], None] | None = None

    def _output_failed(self, lost: OutputLost) -> None:
        if self._noted is None:
            raise lost
        self._noted(lost)

    @contextlib.contextmanager
    def dispensable(self, noted: Callable[[OutputLost], None]) -> Iterator[None]:
        """Keep the body running if output is lost; afterwards raise OutputLost."""
        self._noted = noted
        try:
            yield
            if self.output.lost is not None:
                raise self.output.lost
        finally:
            self._noted = None


_current: Streams | None = None


@contextlib.contextmanager
def guarded() -> Iterator[Streams]:
    """Replace standard output and standard error by `Stream`s while the body runs; buffered output is written at its end.

    Raises:
        OutputLost: standard output could not be written to.
    """
    global _current
    before, sys_before = _current, (sys.stdout, sys.stderr)
    streams = Streams()
    _current = streams
    sys.stdout, sys.stderr = streams.output, streams.errors
    ended: SystemExit | None = None
    try:
        try:
            yield streams
        except SystemExit as error:
            ended = error
        streams.errors.flush()
        streams.output.flush()
        if ended is not None and ended.code:
            raise ended
        # Some libraries try whether a stream can be written to, and hide the error if it cannot.
        if streams.output.lost is not None:
            raise streams.output.lost
        if ended is not None:
            raise ended
    finally:
        _current = before
        sys.stdout, sys.stderr = sys_before


@contextlib.contextmanager
def outlived(noted: Callable[[OutputLost], None]) -> Iterator[None]:
    """Continue without standard output if it is lost while the body runs, and raise OutputLost afterwards.

    Args:
        noted: called when it is lost.
    """
    with contextlib.nullcontext() if _current is None else _current.dispensable(noted):
        yield
