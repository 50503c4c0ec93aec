"""Where the installed command `der-fast` starts. Nothing slow is imported here, so that Ctrl-C works from the start."""

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
        # Started in a shell's background, or by a program with its own handler.
        _run()
        return
    # Half-imported libraries do odd things with exceptions, and there is nothing to clean up yet.
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
    _say("interrupted. Nothing was started yet: run the same command again.")
    os._exit(INTERRUPTED)


def _leave_quietly(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


def _say(text: str) -> None:
    # The stream may be in the middle of something else; the descriptor is not.
    with contextlib.suppress(OSError):
        os.write(2, f"note: {text}\n".encode())


if __name__ == "__main__":
    main()
