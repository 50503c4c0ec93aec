"""All images of a data set, none held out: to measure on, or to search for those that a run knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from der_fast.config.datasets import KNOWN_NAMES
from der_fast.config.schema import DataConfig
from der_fast.data.catalogue.file_table import FileTable, Int64s
from der_fast.data.catalogue.index import open_index
from der_fast.data.catalogue.layout import TEST, TRAIN, WHOLE, find_tars, lone_test_folder
from der_fast.data.catalogue.listing import folder_notes, read_text
from der_fast.data.catalogue.split import held_out
from der_fast.data.catalogue.tars import index_tars
from der_fast.data.decode.pixels import decode_files
from der_fast.data.io.progress import progress_bar
from der_fast.data.load import found_place, load_dataset
from der_fast.data.memory_source import MemorySource
from der_fast.data.photos import PhotoSource
from der_fast.data.read.library import Library, read_settings
from der_fast.data.sets.folder import judge_problems
from der_fast.data.sizes import SMALL_SIDE, refuse_too_much, stored_side
from der_fast.data.source import ImageSource
from der_fast.errors import DataError
from der_fast.home import expand

_Classes = dict[str, Int64s]


@dataclass(frozen=True)
class WholeSet:
    """A data set's images in two parts, each read on request.

    Args:
        place: where it is, or its name.
        class_names: the classes with images in either part, sorted.
        empty: class folders without images.
        split: whether the data set has a test part of its own. If it has none, a run that learned it with the same `test_share`
            would have held out the images of `load_test`.
        load_test: reads the test part.
        load_rest: reads all other images.
        notes: what a person should know about it: files left out, runs among the classes, one class in two spellings.
    """

    place: str
    class_names: tuple[str, ...]
    empty: tuple[str, ...]
    split: bool
    load_test: Callable[[], ImageSource]
    load_rest: Callable[[], ImageSource]
    notes: tuple[str, ...] = ()

    def to_measure(self) -> ImageSource:
        """Return the test part if the data set has one of its own, else all images; raises DataError if there are none."""
        test = self.load_test()
        source = test if self.split else test.concatenated(self.load_rest())
        if not len(source):
            raise DataError(f"there are no images to measure in {self.place}; give class folders with images, or a list of them")
        return source


def load_whole(config: DataConfig, *, cache: Path | None = None, in_files: bool | None = None) -> WholeSet:
    """List a data set; a class may have one image or none, or be in only one part, and there may be only test/.

    Args:
        config: `image_size` must be given. Only those of `classes` are taken, unless one of them is missing: it may have been renamed, so
            all classes are taken.
        cache: the folder to save the index of a folder of images in; None saves nothing.
        in_files: whether images stay in their files; default: as training would hold them.

    Raises:
        DataError: an unknown name, or anything wrong with the data set as a whole.
    """
    if config.name in KNOWN_NAMES:
        train, test = load_dataset(config)
        return WholeSet(config.name, test.class_names, (), True, lambda: test, lambda: train)
    assert config.image_size is not None
    place = found_place(config)
    table, parts, empty, note, notes = _listed(place, config, cache)
    names = sorted({name for classes in parts.values() for name, rows in classes.items() if len(rows)})
    if WHOLE in parts:
        test_rows, rest_rows = _split(table, parts[WHOLE], config.test_share)
    else:
        test_rows, rest_rows = parts.get(TEST, {}), parts.get(TRAIN, {})
    side = stored_side(config.image_size, config.random_resized_crop)
    if in_files is None:
        in_files = config.reader != "memory" if config.reader != "auto" else config.random_resized_crop and config.image_size > SMALL_SIDE
    if in_files:
        library = Library(read_settings(config))
        library.say(note)

        def read(classes: Mapping[str, Int64s]) -> ImageSource:
            rows, labels = _rows(classes, names)
            return PhotoSource.of(table, rows, torch.from_numpy(labels), names, (side, side), library)
    else:

        def read(classes: Mapping[str, Int64s]) -> ImageSource:
            return _in_memory(place, table, *_rows(classes, names), names, (side, side), config.max_gib)

    return WholeSet(config.name, tuple(names), empty, WHOLE not in parts, lambda: read(test_rows), lambda: read(rest_rows), notes)


def _listed(
    place: Path, config: DataConfig, cache: Path | None
) -> tuple[FileTable, dict[str, _Classes], tuple[str, ...], str, tuple[str, ...]]:
    """Return the files, part → class → rows, the classes without images, where the list came from, and what it leaves out."""
    parts: dict[str, _Classes] = {}
    notes: tuple[str, ...] = ()
    # If there is only test/, the name of that folder would be taken for a class.
    lone = lone_test_folder(place) if place.is_dir() else None
    tars = find_tars(place if lone is None else lone)
    if tars:
        table, parts, note = index_tars(place, tars, config, cache)
    elif place.is_dir():
        try:
            index, note = open_index(place if lone is None else lone, cache if lone is None else None, config.timeout)
        except OSError as error:
            raise DataError(f"cannot list {error.filename}: {error.strerror}; check its permissions") from error
        table = index.table
        borders = np.searchsorted(table.folder, np.arange(len(index.parts) + 1))
        for number, (part, name) in enumerate(zip(index.parts, index.classes, strict=True)):
            classes = parts.setdefault(part, {})
            classes[name] = np.concatenate([classes.get(name, np.zeros(0, np.int64)), np.arange(borders[number], borders[number + 1])])
        used = _wanted(parts, config.classes).values()
        notes = tuple(folder_notes(index, sorted({name for classes in used for name in classes})))
    else:
        table, parts[WHOLE] = read_text(place)
        note = f"list of {len(table):,} files: {place}"
        if config.test_list is not None:
            second, found = read_text(expand(config.test_list))
            parts = {TRAIN: parts[WHOLE], TEST: {name: rows + len(table) for name, rows in found.items()}}
            table = table.joined(second)
    parts = _wanted(parts, config.classes)
    known = {name for classes in parts.values() for name in classes}
    empty = sorted(name for name in known if not any(len(classes.get(name, ())) for classes in parts.values()))
    return table, parts, tuple(empty), note, notes


def _wanted(parts: dict[str, _Classes], names: Sequence[str] | None) -> dict[str, _Classes]:
    found = {name for classes in parts.values() for name in classes}
    if names is None or not found.issuperset(names):
        return parts
    return {part: {name: rows for name, rows in classes.items() if name in set(names)} for part, classes in parts.items()}


def _split(table: FileTable, classes: _Classes, share: float) -> tuple[_Classes, _Classes]:
    """Hold out what training would; a class of one image is all test."""
    test, rest = {}, {}
    for name, rows in classes.items():
        out = np.ones(len(rows), dtype=bool)
        if len(rows) > 1:
            out = np.array(held_out(name, [table.name(row) for row in rows.tolist()], share), dtype=bool)
        test[name], rest[name] = rows[out], rows[~out]
    return test, rest


def _rows(classes: Mapping[str, Int64s], names: Sequence[str]) -> tuple[Int64s, Int64s]:
    found = [classes.get(name, np.zeros(0, np.int64)) for name in names]
    labels = np.repeat(np.arange(len(names), dtype=np.int64), [len(rows) for rows in found])
    return np.concatenate([np.zeros(0, np.int64), *found]), labels


def _in_memory(
    place: Path, table: FileTable, rows: Int64s, labels: Int64s, names: Sequence[str], size: tuple[int, int], max_gib: float
) -> MemorySource:
    paths = [Path(table.path(row)) for row in rows.tolist()]
    refuse_too_much(len(paths), size, max_gib, str(place))
    with progress_bar(f"decoding {place.name}", len(paths)) as advance:
        decoded = decode_files(paths, size, progress=advance)
    judge_problems(decoded.problems, len(paths), place)
    kept = torch.tensor(decoded.kept, dtype=torch.int64)
    files = [table.relative(int(rows[index])) for index in decoded.kept]
    return MemorySource(decoded.images, torch.from_numpy(labels)[kept], names, files=files, skipped=decoded.problems)
