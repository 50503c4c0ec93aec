"""Several processes that share the rows of one results file: each row is measured by one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from bench.harness.records import Record
from bench.harness.runner import append


class Claims:
    """Locks beside a results file, which the system releases when a process ends, however it ends.

    Args:
        path: the results file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.with_name(f"{path.name}.claims")

    @contextmanager
    def claim(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether the row of this name is this process's meanwhile, which then looks whether it is done; `wait`: until no other has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / hashlib.sha256(name.encode()).hexdigest()[:24]
        lock = FileLock(place)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def append(self, row: Record) -> None:
        """Append a row on a line of its own, also after half a line that a killed process left."""
        with FileLock(self.folder / "append"):
            if self.path.is_file() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
                with self.path.open("a") as file:
                    file.write("\n")
            append(self.path, row)

    def clear(self) -> None:
        """Remove the locks if no process holds one."""
        with suppress(OSError):
            for place in self.folder.iterdir():
                with FileLock(place, timeout=0):
                    place.unlink()
            self.folder.rmdir()
