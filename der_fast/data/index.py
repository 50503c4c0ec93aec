"""The index of a folder of class folders: every file's path and size, made once, kept in a file, and made anew when it is out of date.

A folder's own time of change tells whether files were added, removed or renamed in it, so a million files need no second listing.
Whether a file was overwritten is asked of every file in small data sets, and of some thousand spread over large ones.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from der_fast.data.decode import IMAGE_SUFFIXES
from der_fast.data.files import FileTable, Int64s, absolute_root, last_change
from der_fast.data.layout import class_folders, find_parts
from der_fast.data.progress import progress_bar
from der_fast.data.threads import mapped
from der_fast.errors import StorageError
from der_fast.files import write_bytes

FILE = "index.npz"
FORMAT = 2

# Seconds; the default of data.timeout.
TIMEOUT = 120.0
_FILES_ASKED = 4096
# Within this time a change may leave a folder's time stamp as it was: file systems count in steps.
_STEP_NS = 2_000_000_000


@dataclass(frozen=True)
class FolderIndex:
    """What lies in a folder of class folders.

    Args:
        table: the files, class by class, sorted by name within a class.
        parts: for every folder of the table which part it belongs to: 'train', 'test', or 'whole'.
        classes: for every folder its class name.
        changed: (N,) int64: when every file was last changed, in ns.
        folders_changed: when every class folder was last changed, in ns.
        listed: when the listing began, in ns.
        checksum: SHA-256 over the files' relative paths and sizes.
    """

    table: FileTable
    parts: tuple[str, ...]
    classes: tuple[str, ...]
    changed: Int64s
    folders_changed: tuple[int, ...]
    listed: int
    checksum: str

    @property
    def root(self) -> Path:
        """The folder."""
        return Path(self.table.roots[0])


def build_index(folder: Path, timeout: float = TIMEOUT) -> FolderIndex:
    """List a folder, its class folders in parallel.

    Args:
        folder: the data set.
        timeout: seconds to wait for one class folder.

    Raises:
        DataError: there are no class folders, or one could not be listed in time.
        OSError: a folder that cannot be listed.
    """
    listed, root = time.time_ns(), Path(absolute_root(folder))
    (places,) = mapped(_places, [root], timeout)
    with progress_bar(f"listing {root.name}", len(places)) as advance:
        rows = mapped(_list_folder, [place for _, place in places], timeout, advance=advance)
    counts = [len(names) for names, _, _, _ in rows]
    table = FileTable.of(
        str(root),
        [place.relative_to(root).as_posix() for _, place in places],
        np.repeat(np.arange(len(places), dtype=np.int64), counts),
        [name for names, _, _, _ in rows for name in names],
        np.concatenate([np.zeros(0, np.int64), *(sizes for _, sizes, _, _ in rows)]),
    )
    return FolderIndex(
        table,
        tuple(part for part, _ in places),
        tuple(place.name for _, place in places),
        np.concatenate([np.zeros(0, np.int64), *(changed for _, _, changed, _ in rows)]),
        tuple(changed for _, _, _, changed in rows),
        listed,
        table.checksum(np.arange(len(table))),
    )


def _places(root: Path) -> list[tuple[str, Path]]:
    return [(part, entry) for part, folder in find_parts(root).items() for entry in class_folders(folder)]


def _list_folder(folder: Path) -> tuple[list[bytes], Int64s, Int64s, int]:
    """Return names, sizes and times of the image files directly in a folder, sorted by name, and the folder's own time."""
    own = last_change(folder.stat())
    found: list[tuple[str, int, int]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
                found.append((entry.name, *_size_and_time(entry)))
    found.sort()
    numbers = np.array([row[1:] for row in found], dtype=np.int64).reshape(-1, 2)
    return [os.fsencode(name) for name, _, _ in found], numbers[:, 0], numbers[:, 1], own


def _size_and_time(entry: os.DirEntry[str] | Path) -> tuple[int, int]:
    """Return a file's size and time; zeros where it cannot be asked, which is reported when it is read."""
    try:
        facts = entry.stat()
    except OSError:
        return 0, 0
    return facts.st_size, last_change(facts)


def save_index(path: Path, index: FolderIndex) -> None:
    """Write an index; raises StorageError."""
    table = index.table
    facts = {
        "format": FORMAT,
        "root": table.roots[0],
        "folders": [entry for _, entry in table.folders],
        "parts": index.parts,
        "classes": index.classes,
        "folders_changed": index.folders_changed,
        "listed": index.listed,
        "checksum": index.checksum,
    }
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    folder = table.folder.astype(np.int32)
    np.savez(buffer, facts=text, changed=index.changed, folder=folder, names=table.names, ends=table.ends, sizes=table.sizes)
    write_bytes(path, buffer.getvalue())


def load_index(path: Path) -> FolderIndex | None:
    """Read an index; None where there is none, or none that verifies."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            if facts["format"] != FORMAT:
                return None
            table = FileTable(
                (facts["root"],),
                tuple((0, entry) for entry in facts["folders"]),
                arrays["folder"].astype(np.int64),
                arrays["names"],
                arrays["ends"],
                arrays["sizes"],
            )
            index = FolderIndex(
                table,
                tuple(facts["parts"]),
                tuple(facts["classes"]),
                arrays["changed"],
                tuple(facts["folders_changed"]),
                facts["listed"],
                facts["checksum"],
            )
        return index if table.checksum(np.arange(len(table))) == index.checksum else None
    except Exception:  # a damaged archive raises almost anything; the folder can be listed anew
        return None


def difference(index: FolderIndex) -> str | None:
    """Say what of the folder is no longer as the index has it; None if nothing is seen to have changed."""
    try:
        places = _places(index.root)
        found = [(part, place.relative_to(index.root).as_posix()) for part, place in places]
        if found != [(part, entry) for part, (_, entry) in zip(index.parts, index.table.folders, strict=True)]:
            return "class folders were added or removed"
        for (_, place), changed in zip(places, index.folders_changed, strict=True):
            facts = place.stat()
            if last_change(facts) != changed:
                return f"files were added to or removed from {place}"
            if facts.st_mtime_ns > index.listed - _STEP_NS:
                return f"{place} had just been changed when it was listed"
    except OSError as error:
        return str(error)
    count = len(index.table)
    asked = np.unique(np.linspace(0, count - 1, min(count, _FILES_ASKED)).astype(np.int64)) if count else np.zeros(0, np.int64)
    return _changed_file(index, asked.tolist())


def _changed_file(index: FolderIndex, rows: Sequence[int]) -> str | None:
    for row in rows:
        path = index.table.path(row)
        if _size_and_time(Path(path)) != (int(index.table.sizes[row]), int(index.changed[row])):
            return f"{path} was changed"
    return None


def open_index(folder: Path, cache: Path | None, timeout: float = TIMEOUT) -> tuple[FolderIndex, str]:
    """Return a folder's index, from `cache` if it is there and not out of date, and a line that says where it came from.

    Args:
        folder: the data set.
        cache: the folder that keeps the index, or None to keep none. Where it cannot be written to, none is kept.
        timeout: seconds to wait for one class folder, and for the question whether the index is out of date.

    Raises:
        DataError, OSError: see `build_index`.
    """
    path = None if cache is None else cache / FILE
    old = None if path is None or not path.is_file() else load_index(path)
    reason = None
    if old is not None and old.root == Path(absolute_root(folder)):
        (reason,) = mapped(lambda _: difference(old), [old.root], timeout)
        if reason is None:
            return old, f"index of {len(old.table):,} files: {path}"
    index = build_index(folder, timeout)
    line = f"index of {len(index.table):,} files made{f' anew: {reason}' if reason else ''}"
    return index, line + not_kept(path, lambda place: save_index(place, index))


def not_kept(path: Path | None, save: Callable[[Path], None]) -> str:
    """Save an index where there is a place for it; returns '', or why it could not be, which is no reason to stop."""
    if path is None:
        return ""
    try:
        save(path)
    except StorageError as error:
        return f"; not kept: {error}"
    return ""
