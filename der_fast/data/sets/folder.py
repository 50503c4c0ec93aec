"""Folders of class folders, lists of files, and tars, as image sources: decoded into memory, or left in their files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image

from der_fast.config.schema import DataConfig
from der_fast.data.catalogue.file_table import FileTable
from der_fast.data.catalogue.layout import find_tars, lone_test_folder
from der_fast.data.catalogue.listing import Listing, Part, list_folder, list_texts
from der_fast.data.catalogue.tars import list_tars
from der_fast.data.decode.pixels import Decoded, decode_files
from der_fast.data.io.members import openable
from der_fast.data.io.progress import progress_bar
from der_fast.data.io.threads import Some, mapped, some
from der_fast.data.memory_source import MemorySource
from der_fast.data.photos import PhotoSource
from der_fast.data.read.library import Library, read_settings
from der_fast.data.sizes import LARGE_SIDE, SMALL_SIDE, default_side, refuse_too_much, stored_side
from der_fast.data.source import ImageSource
from der_fast.errors import DataError
from der_fast.home import expand

_MOST_LISTED = 20
_HEADERS_AT_ONCE = 64

_log = logging.getLogger(__name__)


def load_folder(
    folder: Path, config: DataConfig, *, cache: Path | None = None, say: Callable[[str], None] | None = None
) -> tuple[ImageSource, ImageSource]:
    """Return (train, test) of a folder of class folders, of a text file of "path class", or of WebDataset tars.

    Unreadable files are left out, logged and listed in the source's `skipped`: in memory now, else when they are read.

    Args:
        folder: the folder, the text file, or a tar.
        config: everything but `name`, `root` and `download` is used.
        cache: the folder to save the index in; None saves nothing.
        say: called with what is left out and, if images stay in their files, how they are read.

    Raises:
        DataError: no class folders, an empty class, a class that is in only one part, a class too small to split, a damaged tar, more
            images than `max_gib` allows, or more than three and more than 1 % unreadable files.
    """
    # Another drive may be mounted below a folder, so even a look at its contents has a time limit.
    (tars,) = mapped(find_tars, [folder], config.timeout)
    if tars:
        listing = list_tars(folder, tars, config, cache)
    elif folder.is_dir():
        if (lone := lone_test_folder(folder)) is not None:
            raise DataError(f"{folder} holds nothing but {lone.name}/, and test images are not for training; add train/, or give {lone}")
        listing = list_folder(folder, config, cache)
    else:
        listing = list_texts(folder, None if config.test_list is None else expand(config.test_list), config)
    if _stays_in_files(listing, config):
        return _in_files(listing, config, say)
    for note in listing.notes:
        _log.info("%s", note)
        if say is not None:
            say(note)
    return _in_memory(folder, listing, config)


def _stays_in_files(listing: Listing, config: DataConfig) -> bool:
    if config.reader != "auto":
        return config.reader != "memory"
    return (
        config.random_resized_crop and (config.image_size or _guess_side(_paths(listing.table, listing.train), config.timeout)) > SMALL_SIDE
    )


def _in_files(listing: Listing, config: DataConfig, say: Callable[[str], None] | None) -> tuple[PhotoSource, PhotoSource]:
    side = stored_side(config.image_size or LARGE_SIDE, config.random_resized_crop)
    library = Library(read_settings(config), say)
    for note in (listing.note, *listing.notes):
        library.say(note)

    def source(part: Part) -> PhotoSource:
        return PhotoSource.of(listing.table, part.rows, torch.from_numpy(part.labels), listing.class_names, (side, side), library)

    return source(listing.train), source(listing.test)


def _in_memory(folder: Path, listing: Listing, config: DataConfig) -> tuple[MemorySource, MemorySource]:
    train, test = listing.train, listing.test
    paths = [*_paths(listing.table, train), *_paths(listing.table, test)]
    side = stored_side(config.image_size or _guess_side(paths, config.timeout), config.random_resized_crop)
    refuse_too_much(len(paths), (side, side), config.max_gib, str(folder))
    with progress_bar(f"decoding {folder.name}", len(paths)) as advance:
        decoded = decode_files(paths, (side, side), progress=advance, timeout=config.timeout)
    judge_problems(decoded.problems, len(paths), folder)
    border = len(train.rows)
    return (
        _source("training", folder, listing, train, decoded.part(0, border)),
        _source("test", folder, listing, test, decoded.part(border, len(paths))),
    )


def _paths(table: FileTable, part: Part) -> Iterable[Path]:
    return (Path(table.path(row)) for row in part.rows.tolist())


def _source(what: str, folder: Path, listing: Listing, part: Part, decoded: Decoded) -> MemorySource:
    names = listing.class_names
    labels = torch.from_numpy(part.labels)[torch.tensor(decoded.kept, dtype=torch.int64)]
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    lost = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if lost:
        raise DataError(
            f"no readable {what} image of class {', '.join(map(repr, lost))} in {folder}; fix or replace these files:\n"
            + _listed(decoded.problems)
        )
    files = [listing.table.relative(int(part.rows[index])) for index in decoded.kept]
    return MemorySource(decoded.images, labels, names, files=files, skipped=decoded.problems, notes=listing.notes)


def _guess_side(paths: Iterable[Path], timeout: float) -> int:
    """Choose the side from the headers of the files."""
    largest = 1
    for group in some([str(path) for path in paths], _HEADERS_AT_ONCE):
        largest = max(largest, *mapped(_largest_side, [group], timeout))
        if largest > SMALL_SIDE:
            break
    return default_side(largest)


def _largest_side(group: Some) -> int:
    largest = 1
    for path in group.paths:
        # Decoding a file reports what is wrong with it.
        with contextlib.suppress(Exception), Image.open(openable(Path(path))) as image:
            largest = max(largest, *image.size)
        if largest > SMALL_SIDE:
            break
    return largest


def judge_problems(problems: list[str], count: int, folder: Path) -> None:
    """Log unreadable files; refuse a folder with too many of them to be an accident."""
    if not problems:
        return
    if len(problems) > max(3, count // 100):
        raise DataError(f"{len(problems)} of {count} images in {folder} cannot be read; fix or remove them:\n{_listed(problems)}")
    _log.warning("%d of %d images in %s could not be read and were left out:\n%s", len(problems), count, folder, _listed(problems))


def _listed(problems: list[str]) -> str:
    more = [f"  … and {len(problems) - _MOST_LISTED} more"] if len(problems) > _MOST_LISTED else []
    return "\n".join([f"  {problem}" for problem in problems[:_MOST_LISTED]] + more)
