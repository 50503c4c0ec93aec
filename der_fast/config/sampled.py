"""The size of a data set's images, estimated from a few of them: it decides which recipe they get.

Only a bounded number of entries is read, however many images there are: the first images of a folder's first classes, the first
members of tars, and lines spread over a list of files.
"""

from __future__ import annotations

import os
import queue
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO

from der_fast.config.run_folder import has_traces, is_run
from der_fast.errors import DataError

_CLASSES = 20
_FILES_PER_CLASS = 5
_FOLDERS_PER_CLASS = 20
_MEMBERS = 60
_IMAGES_PER_TAR = 10
_LINES = 40
# A path has at most 4096 bytes on Linux; a line may also hold a class.
_LINE_BYTES = 8192
# How many spaces may belong to the class rather than the path.
_SPACES = 8
# Folders between the data set and its classes.
_SPLITS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation"))


def largest_side(place: Path, timeout: float) -> int:
    """Return the longer side in pixels of the largest of a few images; 0 if none can be read.

    Args:
        place: a folder of class folders or of tars, a tar, or a text file of "path class".
        timeout: seconds to wait for the drive.

    Raises:
        DataError: the drive did not answer in time. The thread that waits for it is abandoned and does not keep the process from ending.
    """
    found: queue.SimpleQueue[int | OSError] = queue.SimpleQueue()

    def look() -> None:
        try:
            found.put(max(_sides(place), default=0))
        except OSError as error:
            found.put(error)

    threading.Thread(target=look, name="der_fast-sizes", daemon=True).start()
    try:
        side = found.get(timeout=timeout)
    except queue.Empty:
        raise DataError(
            f"reading the sizes of a few images of {place} took longer than data.timeout={timeout:g} seconds; check the drive that holds it"
        ) from None
    # What cannot be listed is reported by the full listing.
    return 0 if isinstance(side, OSError) else side


def _sides(place: Path) -> Iterator[int]:
    if place.is_dir():
        yield from _in_folder(place)
    elif place.suffix == ".txt":
        yield from map(_listed_side, _lines(place), [place.parent] * _LINES)
    else:
        yield from _in_tar(place)


def _in_folder(folder: Path) -> Iterator[int]:
    tars = _tars(folder / "train") or _tars(folder)
    for tar in tars[:_CLASSES]:
        yield from _in_tar(tar)
    for class_folder in [] if tars else _class_folders(folder)[:_CLASSES]:
        yield next((side for side in map(_side, _files(class_folder)) if side), 0)


def _tars(folder: Path) -> list[Path]:
    """Return the tars of a folder; none if there are class folders, which were then unpacked from them."""
    return sorted(folder.glob("*.tar")) if folder.is_dir() and not _folders(folder) else []


def _class_folders(folder: Path) -> list[Path]:
    """Return the class folders of a folder, or of its training part if it has one."""
    folders = _folders(folder)
    parts = [part for part in folders if part.name.casefold() in _SPLITS and _folders(part)]
    train = [part for part in parts if part.name.casefold().startswith("train")]
    return _folders((train or parts)[0]) if parts else folders


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _files(class_folder: Path) -> Iterator[Path]:
    """Return the first files of a class, including those in folders below it but not the pictures of a run."""
    return islice(_walked(class_folder), _FILES_PER_CLASS)


def _walked(class_folder: Path) -> Iterator[Path]:
    for where, folders, names in islice(os.walk(class_folder), _FOLDERS_PER_CLASS):
        if has_traces(names) and is_run(Path(where)):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where) / name for name in sorted(names) if not name.startswith("."))


def _in_tar(path: Path) -> Iterator[int]:
    with suppress(OSError, tarfile.TarError), tarfile.open(path, "r:") as tar:
        sides = (_side(file) for member in islice(tar, _MEMBERS) if (file := tar.extractfile(member)) is not None)
        yield from islice((side for side in sides if side), _IMAGES_PER_TAR)


def _lines(path: Path) -> list[str]:
    """Return lines from places spread over a text file: lists are mostly sorted by class."""
    found = []
    with path.open("rb") as file:
        size = path.stat().st_size
        for number in range(_LINES):
            start = size * number // _LINES
            # The byte before shows whether a line begins exactly here.
            file.seek(max(start - 1, 0))
            data = file.read(2 * _LINE_BYTES)
            whole = data if start == 0 else data.partition(b"\n")[2]
            found.append(whole.partition(b"\n")[0])
    return [line.decode("utf-8-sig", "surrogateescape").strip() for line in dict.fromkeys(found)]


def _listed_side(line: str, folder: Path) -> int:
    """Return the side of the image that a line names: the part before a tab, comma or space that is a file."""
    places = [index for index, letter in enumerate(line) if letter.isspace() or letter in ",;"][-_SPACES:]
    names = [line[:end].strip().strip("\"'") for end in reversed(places)]
    for path in (folder / name for name in names if name):
        with suppress(OSError, ValueError):
            if path.is_file():
                return _side(path)
    return 0


def _side(path: Path | IO[bytes]) -> int:
    from PIL import Image

    try:
        # Opening a pipe or a device would wait forever.
        if isinstance(path, Path) and not path.is_file():
            return 0
        with Image.open(path) as image:
            return max(image.size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0
