"""The program of a process that decodes: crops come in by its standard input, pixels go out by its standard output.

It is a program of its own, and no child of `multiprocessing`, because those run the user's script once more where processes are spawned
(macOS, Windows, Python 3.14), cannot be started by a daemonic process, and where they are forked inherit locks that nobody opens again.
What is pickled comes by pipes that the parent made for this process alone.
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

# What Python runs: modules are looked for where the parent finds them, and the current folder's are not taken for the library's.
START = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; import pickle; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from der_fast.data.decode.decoder import main; main()"
)


@dataclass(frozen=True)
class Failed:
    """What is sent instead of pixels where decoding failed, other than for a file that cannot be read.

    Args:
        memory: whether memory ran out.
        traceback: where and why.
    """

    memory: bool
    traceback: str


def serve(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Answer every `Crops` with `Cropped` or `Failed`, until nothing more comes or nobody reads the answers."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            crops: Crops = pickle.load(incoming)
            try:
                answer: object = decode_crops(crops)
            except Exception as error:  # it is raised where somebody waits for the pixels
                answer = Failed(isinstance(error, MemoryError), traceback.format_exc())
            pickle.dump(answer, outgoing, protocol=5)
            outgoing.flush()


def main() -> None:
    """Serve standard input and output, which nothing else may write to from now on."""
    # Ctrl-C and the end of a terminal, and a service manager's SIGTERM, reach this process too; it ends when its input does.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    try:
        os.dup2(2, 1)
    except OSError:
        # Nobody listens to standard error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        serve(incoming, outgoing)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Without the interpreter's end, which flushes an output that nobody reads and complains.
    os._exit(0)
