"""The files of a data set and their classes: from a folder's index, or from text files of "path class"."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from der_fast.config.run_folder import PARTS
from der_fast.config.schema import DataConfig
from der_fast.data.catalogue.file_table import FileTable, Int64s, absolute_root
from der_fast.data.catalogue.index import FolderIndex, open_index
from der_fast.data.catalogue.layout import TEST, TRAIN, WHOLE
from der_fast.data.catalogue.leftover import added, below_notes, counted, left_out, what_is_left
from der_fast.data.catalogue.lines import Line, parse_lines
from der_fast.data.catalogue.split import held_out
from der_fast.data.io.names import spelled
from der_fast.data.io.threads import TIMEOUT, Some, mapped, some
from der_fast.errors import OUT, DataError

_MOST_LISTED = 20
_SIZES_AT_ONCE = 256


@dataclass(frozen=True)
class Part:
    """Files of one part (training or test), class by class.

    Args:
        rows: (N,) int64: rows of the table.
        labels: (N,) int64.
    """

    rows: Int64s
    labels: Int64s


@dataclass(frozen=True)
class Listing:
    """A data set's files.

    Args:
        table: all of them.
        class_names: sorted.
        train, test: the two parts.
        note: where the list came from.
        notes: what is left out, and what may have been meant differently.
    """

    table: FileTable
    class_names: tuple[str, ...]
    train: Part
    test: Part
    note: str
    notes: tuple[str, ...] = ()


def list_folder(folder: Path, config: DataConfig, cache: Path | None = None) -> Listing:
    """List a folder of class folders.

    Args:
        folder: the folder.
        config: `classes`, `train_per_class`, `test_per_class` and `test_share` are used.
        cache: the folder to save the index in.

    Raises:
        DataError: no class folders, an unknown class, an empty class, a class that is in only one part, or one too small to split.
    """
    try:
        index, note = open_index(folder, cache, config.timeout)
    except OSError as error:
        raise DataError(f"cannot list {error.filename}: {error.strerror}; check its permissions") from error
    _refuse_run_in_class(index, cache)
    classes = _classes(index, config.classes)
    names = sorted({name for found in classes.values() for name in found})
    if WHOLE in classes:
        train, test = _split(index.table, [classes[WHOLE][name] for name in names], names, config.test_share)
        note += f"; {sum(map(len, test)):,} of them are held out for testing"
    else:
        _refuse_one_sided(index, classes)
        train, test = ([classes[part][name] for name in names] for part in (TRAIN, TEST))
    parts = _part(train, config.train_per_class), _part(test, config.test_per_class)
    return Listing(index.table, tuple(names), *parts, note, tuple(folder_notes(index, names)))


def folder_notes(index: FolderIndex, names: Sequence[str]) -> list[str]:
    """Return what a person should know about a folder: what is left out, what is elsewhere, what may have been meant differently.

    Args:
        index: the folder's index.
        names: the classes in use.
    """
    per_folder = np.bincount(index.table.folder, minlength=len(index.classes)).tolist()
    left: dict[str, Mapping[str, int]] = {}
    below, totals = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    spellings: dict[tuple[str, str], list[str]] = {}
    for number, name in enumerate(index.classes):
        if name in totals:
            left[name] = added(left.get(name, {}), index.left[number])
            totals[name] += per_folder[number]
            below[name] += 0 if index.tops[number] else per_folder[number]
            if index.tops[number]:
                spellings.setdefault((index.parts[number], name), []).append(index.table.folders[number][1])
    notes = [*index.notes, *(f"{place} is not a class: it is a run or contains runs" for place in index.runs)]
    if (line := left_out(left)) is not None:
        notes.append(line)
    if index.loose:
        notes.append(
            f"left out: {counted(index.loose, 'image')} next to the class folders, in {index.root} or its parts, and so without a class"
        )
    notes += below_notes(names, below, totals)
    return notes + [
        f"{len(places)} folders are called {name!r}, spelled with different bytes, and count as one class"
        for (_, name), places in spellings.items()
        if len(places) > 1
    ]


def _refuse_run_in_class(index: FolderIndex, run: Path | None) -> None:
    """Refuse to write a run into a class folder, which would then be a run and no longer a class."""
    place = None if run is None else Path(absolute_root(run))
    tops = [index.root / path for top, (_, path) in zip(index.tops, index.table.folders, strict=True) if top]
    own = [top for top in tops if top.parent == place and top.name in PARTS]
    if own:
        raise DataError(f"a run writes its own {own[0].name}/, but {own[0]} is a class folder; choose another folder with ", OUT)
    if place in tops:
        raise DataError(f"the run's folder {run} is a class folder of {index.root}; choose another folder with ", OUT)


def _classes(index: FolderIndex, wanted: Sequence[str] | None) -> dict[str, dict[str, Int64s]]:
    """Return part → class name → its files' rows, folder by folder, sorted by name in each."""
    borders = np.searchsorted(index.table.folder, np.arange(len(index.parts) + 1))
    classes: dict[str, dict[str, Int64s]] = {}
    for number, (part, name) in enumerate(zip(index.parts, index.classes, strict=True)):
        rows = np.arange(borders[number], borders[number + 1])
        known_rows = classes.setdefault(part, {}).get(name)
        classes[part][name] = rows if known_rows is None else np.concatenate([known_rows, rows])
    if wanted is not None:
        wanted = [spelled(name) for name in wanted]
        known = {name for found in classes.values() for name in found}
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise DataError(
                f"data.classes names {', '.join(map(repr, unknown[:_MOST_LISTED]))}, but {index.root} has no such class folder; "
                "check the names, or leave them out"
            )
        classes = {part: {name: rows for name, rows in found.items() if name in set(wanted)} for part, found in classes.items()}
    for part, found in classes.items():
        _refuse_empty([name for name, rows in found.items() if not len(rows)], index, part)
    return classes


def _refuse_empty(names: Sequence[str], index: FolderIndex, part: str) -> None:
    if names:
        folders = [(name, row) for row, name in enumerate(index.classes) if index.parts[row] == part and name in names]
        left = {name: added(*(index.left[row] for other, row in folders if other == name)) for name in names}
        tops = [(name, row) for name, row in folders if index.tops[row]][:_MOST_LISTED]
        places = ", ".join(f"{index.root}/{index.table.folders[row][1]}{what_is_left(left[name])}" for name, row in tops)
        raise DataError(f"no images in class folder {places}; add images or remove the folder")


def _refuse_one_sided(index: FolderIndex, classes: dict[str, dict[str, Int64s]]) -> None:
    folders = zip(index.parts, index.table.folders, index.tops, strict=True)
    place = {part: (index.root / path).parent for part, (_, path), top in folders if top}
    for have, lack in ((TRAIN, TEST), (TEST, TRAIN)):
        missing = [name for name in classes[have] if name not in classes[lack]]
        if missing:
            raise DataError(
                f"no folder for class {', '.join(map(repr, missing[:_MOST_LISTED]))} in {place[lack]}; every class needs a folder in both "
                f"{place[TRAIN]} and {place[TEST]}"
            )


def _split(table: FileTable, classes: list[Int64s], names: Sequence[str], share: float) -> tuple[list[Int64s], list[Int64s]]:
    """Hold out a part of every class."""
    train, test = [], []
    for name, rows in zip(names, classes, strict=True):
        out = np.array(held_out(name, [table.name(row) for row in rows.tolist()], share), dtype=bool)
        train.append(rows[~out])
        test.append(rows[out])
    return train, test


def _part(classes: list[Int64s], most: int | None) -> Part:
    chosen = [rows if most is None else rows[:most] for rows in classes]
    labels = np.repeat(np.arange(len(chosen), dtype=np.int64), [len(rows) for rows in chosen])
    return Part(np.concatenate([np.zeros(0, np.int64), *chosen]), labels)


def list_texts(train: Path, test: Path | None, config: DataConfig) -> Listing:
    """List the files named in text files: every line is a path and a class (see `lines`); paths are relative to the text file.

    Args:
        train: the list of the training images, or of all images if there is no test list.
        test: the list of the test images.
        config: `classes`, `train_per_class`, `test_per_class` and `test_share` are used.

    Raises:
        DataError: a list that cannot be read or has lines of another form; a class that is in only one list.
    """
    table, by_class = _read_text(train, config.classes, config.timeout)
    note, tested = f"list of {len(table):,} files: {train}", None
    if test is not None:
        second, found = _read_text(test, config.classes, config.timeout)
        tested, table = {name: rows + len(table) for name, rows in found.items()}, table.joined(second)
    return listing_of(table, by_class, tested, config, note, (str(train), str(test)))


def listing_of(
    table: FileTable,
    train: Mapping[str, Int64s],
    test: Mapping[str, Int64s] | None,
    config: DataConfig,
    note: str,
    places: tuple[str, str],
    notes: Sequence[str] = (),
) -> Listing:
    """Return a listing of files whose classes are known.

    Args:
        table: all files.
        train: class name → rows of the training images, or of all images if there is no test part.
        test: class name → rows of the test images.
        config: `train_per_class`, `test_per_class` and `test_share` are used.
        note: where the list came from.
        places: where training and test images were listed, for messages.
        notes: what is left out.

    Raises:
        DataError: a class that is in only one part, or one too small to split.
    """
    names = sorted(train)
    if test is None:
        parts = _split(table, [train[name] for name in names], names, config.test_share)
    elif odd := sorted(test.keys() ^ train.keys())[:_MOST_LISTED]:
        raise DataError(
            f"class {', '.join(map(repr, odd))} is in only one of {places[0]} and {places[1]}; every class needs images in both"
        )
    else:
        parts = [train[name] for name in names], [test[name] for name in names]
    train_part, test_part = _part(parts[0], config.train_per_class), _part(parts[1], config.test_per_class)
    return Listing(table, tuple(names), train_part, test_part, note, tuple(notes))


def read_text(path: Path) -> tuple[FileTable, dict[str, Int64s]]:
    """Return all files of a list, and class name → rows; raises DataError."""
    return _read_text(path, None)


def _read_text(path: Path, wanted: Sequence[str] | None, timeout: float = TIMEOUT) -> tuple[FileTable, dict[str, Int64s]]:
    """Return the files of a list, and class name → rows."""
    (text,) = mapped(_text_of, [path], timeout)
    names = None if wanted is None else {spelled(name) for name in wanted}
    rows = [row for row in parse_lines(path, text.splitlines(), timeout) if names is None or row.class_name in names]
    if not rows:
        raise DataError(f"{path} lists no images{'' if names is None else ' of the classes that data.classes names'}")
    table = _table(path, rows, timeout)
    by_class: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_class.setdefault(row.class_name, []).append(number)
    missing = [name for name in names or () if name not in by_class]
    if missing:
        raise DataError(f"data.classes names {', '.join(map(repr, sorted(missing)[:_MOST_LISTED]))}, but {path} has no such class")
    return table, {name: np.array(found, dtype=np.int64) for name, found in by_class.items()}


def _text_of(path: Path) -> str:
    try:
        # Some editors write a byte-order mark first, which would become part of the first path.
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list {path}: {error}; it takes a text file (UTF-8) with lines of 'path class'") from error


def _table(place: Path, rows: Sequence[Line], timeout: float) -> FileTable:
    inside = not any(os.path.isabs(row.path) for row in rows)  # noqa: PTH117
    root = absolute_root(place.parent) if inside else ""
    split = [os.path.split(row.path if inside else str((place.parent / row.path).absolute())[1:]) for row in rows]
    number_of: dict[str, int] = {}
    folder = np.array([number_of.setdefault(where, len(number_of)) for where, _ in split], dtype=np.int64)
    names = [os.fsencode(name) for _, name in split]
    table = FileTable.of(root, list(number_of), folder, names, np.zeros(len(rows), dtype=np.int64))
    # Never wait forever for a drive that does not answer.
    found = mapped(_sizes, some([table.path(row) for row in range(len(table))], _SIZES_AT_ONCE), timeout)
    return replace(table, sizes=np.array([size for sizes in found for size in sizes], dtype=np.int64))


def _sizes(files: Some) -> list[int]:
    return [_size(path) for path in files.paths]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        # A missing file is reported when it is read.
        return 0
