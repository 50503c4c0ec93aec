"""The index of a folder of class folders: every file's path and size, made once, saved, and made again when it is out of date.

A folder's change time shows whether files were added, removed or renamed in it, so a million files need not be listed twice. This covers
every folder of images, including those below the class folders.
Overwritten files are looked for among all files of a small data set, and among a few thousand spread over a large one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from der_fast.data.catalogue.cache import CachedIndex, load_or_make
from der_fast.data.catalogue.file_table import FileTable, Int64s, absolute_root, last_change
from der_fast.data.catalogue.layout import Layout, find_layout
from der_fast.data.catalogue.scan import Identity, Tree, identity_of, list_trees, size_and_time
from der_fast.data.io.names import spelled
from der_fast.data.io.progress import progress_bar
from der_fast.data.io.threads import TIMEOUT, mapped
from der_fast.errors import DataError

FILE = "index.npz"

_FILES_ASKED = 4096
# A second change within this time may leave a folder's time stamp as it was: file systems count in steps.
_STEP_NS = 2_000_000_000


@dataclass(frozen=True)
class FolderIndex(CachedIndex):
    """The contents of a folder of class folders.

    Args:
        table: the files, class by class; within a class folder by folder, sorted by name in each.
        parts: the part that every folder of the table belongs to: 'train', 'test', or 'whole'.
        classes: every folder's class name; several folders may share one.
        changed: (N,) int64: when every file was last changed, in ns.
        folders_changed: when every folder was last changed, in ns.
        listed: when the listing began, in ns.
        tops: for every folder, whether it is a class folder rather than a folder inside one.
        left: for every folder, how many of its files are left out, by kind.
        runs: folders next to the class folders that are runs or contain runs.
        notes: what else is there; looked up whenever the index is opened.
        loose: images next to the class folders; likewise.
    """

    parts: tuple[str, ...]
    classes: tuple[str, ...]
    changed: Int64s
    folders_changed: tuple[int, ...]
    listed: int
    tops: tuple[bool, ...]
    left: tuple[Mapping[str, int], ...]
    runs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    loose: int = 0

    @property
    def root(self) -> Path:
        """The folder."""
        return Path(self.table.roots[0])

    def __str__(self) -> str:
        """Return what it is, for a note."""
        return f"index of {len(self.table):,} files"


def build_index(folder: Path, timeout: float = TIMEOUT) -> FolderIndex:
    """List a folder, its class folders in parallel.

    Args:
        folder: the data set.
        timeout: seconds to wait for one folder.

    Raises:
        DataError: there are no class folders, or one could not be listed in time.
        OSError: a folder that cannot be listed.
    """
    listed, root = time.time_ns(), Path(absolute_root(folder))
    (layout,) = mapped(find_layout, [root], timeout)
    trees, runs = _class_trees(root, layout, timeout)
    if not trees:
        raise DataError(f"{root} holds runs but no class folders; put the images of each class into a separate folder")
    folders = [found for _, tree in trees for found in tree.folders]
    table = FileTable.of(
        str(root),
        [found.path.relative_to(root).as_posix() for found in folders],
        np.repeat(np.arange(len(folders), dtype=np.int64), [len(found.images) for found in folders]),
        [os.fsencode(name) for found in folders for name, _, _ in found.images],
        _column(size for found in folders for _, size, _ in found.images),
    )
    return FolderIndex(
        table,
        tuple(part for part, tree in trees for _ in tree.folders),
        tuple(spelled(tree.path.name) for _, tree in trees for _ in tree.folders),
        _column(changed for found in folders for _, _, changed in found.images),
        tuple(found.changed for found in folders),
        listed,
        tuple(number == 0 for _, tree in trees for number in range(len(tree.folders))),
        tuple(found.left for found in folders),
        runs,
        layout.notes,
        layout.loose,
    )


def _column(values: Iterable[int]) -> Int64s:
    return np.fromiter(values, np.int64)


def _class_trees(root: Path, layout: Layout, timeout: float) -> tuple[list[tuple[str, Tree]], tuple[str, ...]]:
    """List the class folders; return them, and the folders that turned out to be runs."""
    places = [place for _, place in layout.classes]
    above = mapped(_identity, sorted({*root.parents, root, *(place.parent for place in places)}) if places else [], timeout)
    with progress_bar(f"listing {root.name}", len(places)) as advance:
        trees = list_trees(places, timeout, above=above, advance=advance)
    classes = [(part, tree) for (part, _), tree in zip(layout.classes, trees, strict=True) if not tree.is_run]
    return classes, tuple(str(tree.path) for tree in trees if tree.is_run)


def _identity(folder: Path) -> Identity:
    return identity_of(folder, folder.stat())


def difference(index: FolderIndex, timeout: float = TIMEOUT) -> str | FolderIndex:
    """Say what changed in the folder since the index was made, or return the index if no change is found.

    Args:
        index: the index as it was read.
        timeout: seconds to wait for a folder next to the class folders.

    Returns:
        A line, or the index with an up-to-date view of what is next to the class folders.
    """
    try:
        layout = find_layout(index.root)
        known = [row for row, top in enumerate(index.tops) if top]
        had = {(index.parts[row], index.table.folders[row][1]) for row in known}
        others = [entry for entry in layout.classes if (entry[0], entry[1].relative_to(index.root).as_posix()) not in had]
        classes, runs = _class_trees(index.root, replace(layout, classes=tuple(others)), timeout)
        if classes or len(layout.classes) - len(others) != len(had):
            return "class folders were added or removed"
        for (_, entry), changed in zip(index.table.folders, index.folders_changed, strict=True):
            place = index.root / entry
            facts = place.stat()
            if last_change(facts) != changed:
                return f"files were added to or removed from {place}"
            if facts.st_mtime_ns > index.listed - _STEP_NS:
                return f"{place} changed just before it was listed"
    except (OSError, DataError) as error:
        return str(error)
    count = len(index.table)
    asked = np.unique(np.linspace(0, count - 1, min(count, _FILES_ASKED)).astype(np.int64)) if count else np.zeros(0, np.int64)
    return _changed_file(index, asked.tolist()) or replace(index, runs=runs, notes=layout.notes, loose=layout.loose)


def _changed_file(index: FolderIndex, rows: Sequence[int]) -> str | None:
    for row in rows:
        path = index.table.path(row)
        if size_and_time(Path(path))[:2] != (int(index.table.sizes[row]), int(index.changed[row])):
            return f"{path} was changed"
    return None


def open_index(folder: Path, cache: Path | None, timeout: float = TIMEOUT) -> tuple[FolderIndex, str]:
    """Return a folder's index, from `cache` if it is there and up to date, and a line that says where it came from.

    Args:
        folder: the data set.
        cache: the folder to save the index in; None saves nothing. A folder that cannot be written to is not an error.
        timeout: seconds to wait for one class folder, and for the check whether the index is out of date.

    Raises:
        DataError, OSError: see `build_index`.
    """
    root = Path(absolute_root(folder))

    def check(old: FolderIndex) -> FolderIndex | str:
        return mapped(lambda _: difference(old, timeout), [root], timeout)[0] if old.root == root else ""

    return load_or_make(None if cache is None else cache / FILE, FolderIndex, check, lambda: build_index(folder, timeout))
