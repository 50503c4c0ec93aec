"""The image files that paths stand for, without classes: for prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from der_fast.data.catalogue.leftover import left_out
from der_fast.data.catalogue.scan import list_trees
from der_fast.data.io.threads import TIMEOUT, mapped
from der_fast.errors import DataError
from der_fast.home import expand


@dataclass(frozen=True)
class Found:
    """What paths stand for.

    Args:
        files: in order.
        notes: one line for every folder with files left out.
    """

    files: list[Path]
    notes: list[str]


def find_images(paths: Sequence[Path | str], timeout: float = TIMEOUT) -> Found:
    """Return the files themselves, and for folders the images below them in sorted order; runs and hidden files left out.

    Args:
        paths: files and folders.
        timeout: seconds to wait for a drive.

    Raises:
        DataError: a path that does not exist, a folder that cannot be listed or has no images, or a drive that does not answer.
    """
    files: list[Path] = []
    notes: list[str] = []
    places = [expand(path) for path in paths]
    for place, (there, is_folder) in zip(places, mapped(_kind_of, places, timeout), strict=True):
        if not there:
            raise DataError(f"there is no file or folder {place}")
        if not is_folder:
            files.append(place)
            continue
        found, note = _below(place, timeout)
        if not found:
            raise DataError(f"no image files in {place} or below it{f'; {note}' if note else ''}")
        files.extend(found)
        notes += [] if note is None else [f"{place}: {note}"]
    return Found(files, notes)


def _kind_of(place: Path) -> tuple[bool, bool]:
    return place.exists(), place.is_dir()


def _below(folder: Path, timeout: float) -> tuple[list[Path], str | None]:
    try:
        (tree,) = list_trees([folder], timeout, given=True)
    except OSError as error:
        raise DataError(f"cannot list {error.filename}: {error.strerror}; check its permissions") from error
    counts = {found.path.relative_to(folder).as_posix(): found.left for found in tree.folders if found.left}
    return sorted(found.path / name for found in tree.folders for name, _, _ in found.images), left_out(counts)
