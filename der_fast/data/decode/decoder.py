"""The program of a decoding process: crops arrive on its standard input, pixels leave on its standard output.

It is a program of its own, not a child of `multiprocessing`. Such children run the user's script again where processes are spawned (macOS,
Windows, Python 3.14), cannot be started by a daemonic process, and inherit locks that nobody releases where they are forked.
Pickled data comes only through pipes that the parent made for this process alone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from typing import BinaryIO

from der_fast.data.decode.crops import Crops, decode_crops

# What Python runs: it looks for modules where the parent finds them, and does not take the current folder's for the library's.
START = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; import pickle; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from der_fast.data.decode.decoder import main; main()"
)


@dataclass(frozen=True)
class Failed:
    """Sent instead of pixels when decoding failed for another reason than an unreadable file.

    Args:
        memory: whether memory ran out.
        traceback: where and why.
    """

    memory: bool
    traceback: str


def serve(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Answer every `Crops` with `Cropped` or `Failed`, until the input ends or nobody reads the answers."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            crops: Crops = pickle.load(incoming)
            try:
                answer: object = decode_crops(crops)
            except Exception as error:  # raised again where the pixels are awaited
                answer = Failed(isinstance(error, MemoryError), traceback.format_exc())
            pickle.dump(answer, outgoing, protocol=5)
            outgoing.flush()


def main() -> None:
    """Serve standard input and output, which nothing else may write to from now on."""
    # Ctrl-C, a closed terminal and a service manager's SIGTERM reach this process too; it ends when its input does.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    try:
        os.dup2(2, 1)
    except OSError:
        # Standard error is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        serve(incoming, outgoing)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Skip the interpreter's shutdown, which would flush an output that nobody reads, and complain.
    os._exit(0)
