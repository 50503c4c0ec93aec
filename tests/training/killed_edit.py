"""Renames and forgets classes in copies of a run and kills itself at every point: `python killed_edit.py RUN FOLDER`.

A point is just before a file is written, moved or deleted. Every point has a fork of this process and a copy of the run in
FOLDER/<what>-<point>. Prints one JSON table: what → how many points there were.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from der_fast import files
from der_fast.training import latency
from der_fast.training.edit import forget_in_run, rename_in_run

EDITS: dict[str, Callable[[Path], object]] = {
    "rename": lambda run: rename_in_run(run, "b", "bee"),
    "forget": lambda run: forget_in_run(run, ["b"]),
}


class Points:
    """Counts points, and kills the process at one of them."""

    def __init__(self, last: int | None) -> None:
        self.last, self.count = last, 0

    def reached(self) -> None:
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def before(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def replaced(*arguments: Any, **rest: Any) -> Any:
            self.reached()
            return original(*arguments, **rest)

        setattr(owner, name, replaced)


def edit(what: str, run: Path, last: int | None) -> int:
    points = Points(last)
    for owner, name in ((files, "_store"), (Path, "replace"), (Path, "unlink")):
        points.before(owner, name)
    EDITS[what](run)
    return points.count


def main(run: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    latency.REPEATS = 1
    counts: dict[str, int] = {}
    for what in EDITS:
        point = 0
        while True:
            copy = shutil.copytree(run, folder / f"{what}-{point}")
            child = os.fork()
            if child == 0:
                edit(what, copy, point)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                assert status == 0, f"{what}-{point} ended with {status}"
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            point += 1
        counts[what] = point
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
