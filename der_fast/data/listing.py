"""Which files a data set consists of, with a class each: from a folder's index, or from text files of "path class"."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from der_fast.config.schema import DataConfig
from der_fast.data.decode import IMAGE_SUFFIXES
from der_fast.data.files import FileTable, Int64s, absolute_root
from der_fast.data.index import FolderIndex, open_index
from der_fast.data.layout import TEST, TRAIN, WHOLE, flat_test_folder
from der_fast.data.split import held_out
from der_fast.errors import DataError

_MOST_LISTED = 20
_THREADS = 16


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
    """

    table: FileTable
    class_names: tuple[str, ...]
    train: Part
    test: Part
    note: str


def list_folder(folder: Path, config: DataConfig, cache: Path | None = None) -> Listing:
    """List a folder of class folders.

    Args:
        folder: the folder.
        config: `classes`, `train_per_class`, `test_per_class` and `test_share` are used.
        cache: the folder that keeps the index.

    Raises:
        DataError: no class folders, an unknown class, an empty class, a class that is in one part only, or one too small to be split.
    """
    try:
        index, note = open_index(folder, cache, config.timeout)
    except OSError as error:
        raise DataError(f"cannot list {error.filename}: {error.strerror}; check its permissions") from error
    classes = _classes(index, config.classes)
    names = sorted({name for found in classes.values() for name in found})
    if WHOLE in classes:
        train, test = _split(index.table, [classes[WHOLE][name] for name in names], names, config.test_share)
        note += f"; {sum(map(len, test)):,} of them are held out for testing"
        if (unused := flat_test_folder(index.root)) is not None:
            note += f", and {unused} is not used: it has no class folders"
    else:
        _refuse_one_sided(index, classes)
        train, test = ([classes[part][name] for name in names] for part in (TRAIN, TEST))
    return Listing(index.table, tuple(names), _part(train, config.train_per_class), _part(test, config.test_per_class), note)


def _classes(index: FolderIndex, wanted: Sequence[str] | None) -> dict[str, dict[str, Int64s]]:
    """Return part → class name → its files' rows, sorted by name."""
    borders = np.searchsorted(index.table.folder, np.arange(len(index.parts) + 1))
    classes: dict[str, dict[str, Int64s]] = {}
    for number, (part, name) in enumerate(zip(index.parts, index.classes, strict=True)):
        classes.setdefault(part, {})[name] = np.arange(borders[number], borders[number + 1])
    if wanted is not None:
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
        place = {(where, name): path for where, name, (_, path) in zip(index.parts, index.classes, index.table.folders, strict=True)}
        places = ", ".join(f"{index.root}/{place[part, name]}" for name in names[:_MOST_LISTED])
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"no images in class folder {places}; add images (directly inside, {suffixes}) or remove the folder")


def _refuse_one_sided(index: FolderIndex, classes: dict[str, dict[str, Int64s]]) -> None:
    place = {part: (index.root / path).parent for part, (_, path) in zip(index.parts, index.table.folders, strict=True)}
    for have, lack in ((TRAIN, TEST), (TEST, TRAIN)):
        missing = [name for name in classes[have] if name not in classes[lack]]
        if missing:
            raise DataError(
                f"no folder for class {', '.join(map(repr, missing[:_MOST_LISTED]))} in {place[lack]}; every class needs a folder in both "
                f"{place[TRAIN]} and {place[TEST]}"
            )


def _split(table: FileTable, classes: list[Int64s], names: Sequence[str], share: float) -> tuple[list[Int64s], list[Int64s]]:
    """Hold a part of every class out."""
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
    """List the files that text files name: every line is a path and, after white space, a class; paths are relative to the text file.

    Args:
        train: the list of the training images, or of all where there is no other.
        test: the list of the test images.
        config: `classes`, `train_per_class`, `test_per_class` and `test_share` are used.

    Raises:
        DataError: a list that cannot be read, or whose lines are not of that form; a class that is in one list only.
    """
    table, by_class = _read_text(train, config.classes)
    note, tested = f"list of {len(table):,} files: {train}", None
    if test is not None:
        second, found = _read_text(test, config.classes)
        tested, table = {name: rows + len(table) for name, rows in found.items()}, table.joined(second)
    return listing_of(table, by_class, tested, config, note, (str(train), str(test)))


def listing_of(
    table: FileTable,
    train: Mapping[str, Int64s],
    test: Mapping[str, Int64s] | None,
    config: DataConfig,
    note: str,
    places: tuple[str, str],
) -> Listing:
    """Return a listing of files whose classes are known.

    Args:
        table: all files.
        train: class name → rows of the training images, or of all where there are no others.
        test: class name → rows of the test images.
        config: `train_per_class`, `test_per_class` and `test_share` are used.
        note: where the list came from.
        places: where training and test images were listed, for messages.

    Raises:
        DataError: a class that is in one part only, or one too small to be split.
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
    return Listing(table, tuple(names), _part(parts[0], config.train_per_class), _part(parts[1], config.test_per_class), note)


def read_text(path: Path) -> tuple[FileTable, dict[str, Int64s]]:
    """Return all files of a list, and class name → rows; raises DataError."""
    return _read_text(path, None)


def _read_text(path: Path, wanted: Sequence[str] | None) -> tuple[FileTable, dict[str, Int64s]]:
    """Return the files of a list, and class name → rows."""
    try:
        # Some editors put a mark in front, which would be taken for a part of the first path.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list {path}: {error}; it takes a text file (UTF-8) with lines of 'path class'") from error
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        parts = line.rsplit(maxsplit=1)
        if not parts:
            continue
        if len(parts) < 2:
            raise DataError(f"{path}, line {number}: {line!r} is not 'path class'; write the class after the path")
        if wanted is None or parts[1] in wanted:
            pairs.append((parts[0], parts[1]))
    if not pairs:
        raise DataError(f"{path} lists no images{'' if wanted is None else ' of the classes that data.classes names'}")
    inside = not any(os.path.isabs(file) for file, _ in pairs)  # noqa: PTH117
    root = absolute_root(path.parent) if inside else ""
    files = [file if inside else str((path.parent / file).absolute())[1:] for file, _ in pairs]
    table = _table(root, files)
    rows: dict[str, list[int]] = {}
    for row, (_, name) in enumerate(pairs):
        rows.setdefault(name, []).append(row)
    missing = [name for name in wanted or () if name not in rows]
    if missing:
        raise DataError(f"data.classes names {', '.join(map(repr, missing[:_MOST_LISTED]))}, but {path} has no such class")
    return table, {name: np.array(found, dtype=np.int64) for name, found in rows.items()}


def _table(root: str, files: Sequence[str]) -> FileTable:
    split = [os.path.split(file) for file in files]
    number_of: dict[str, int] = {}
    folder = np.array([number_of.setdefault(place, len(number_of)) for place, _ in split], dtype=np.int64)
    names = [os.fsencode(name) for _, name in split]
    table = FileTable.of(root, list(number_of), folder, names, np.zeros(len(files), dtype=np.int64))
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = np.fromiter(pool.map(_size, (table.path(row) for row in range(len(table))), chunksize=256), np.int64, len(table))
    return replace(table, sizes=sizes)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        # That it is missing is reported when it is read.
        return 0
