"""Where the installed command `der-fast` begins. Nothing is imported here that takes time, so that Ctrl-C is answered from the start."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Run the command line; see `der_fast.cli.main`. Ctrl-C while it is imported, and while Python ends, shows no traceback."""
    if signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        # Started in the background of a shell, or by somebody with a handler of their own.
        _run()
        return
    # Libraries that are half imported do odd things with exceptions, and nothing is there yet that would have to be cleared up.
    signal.signal(signal.SIGINT, _leave)
    from der_fast.cli.main import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:
        _say("interrupted.")
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, _leave_quietly)


def _run() -> None:
    from der_fast.cli.main import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    _say("interrupted. Nothing was begun yet: give the same command again.")
    os._exit(INTERRUPTED)


def _leave_quietly(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


def _say(text: str) -> None:
    # The stream may be in the middle of something else; the descriptor is not.
    with contextlib.suppress(OSError):
        os.write(2, f"note: {text}\n".encode())


if __name__ == "__main__":
    main()
