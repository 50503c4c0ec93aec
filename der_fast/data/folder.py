"""Folders of class folders, with or without a train/test split.

    photos/cat/1.jpg …                      every class held out in part for testing
    photos/train/cat/1.jpg  photos/test/cat/9.jpg …    ("val", "valid" and "validation" also name the test part)

Names that begin with a dot are ignored. Class names are folder names in sorted order, images are taken in sorted order of their names.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from der_fast.config.schema import DataConfig
from der_fast.data.decode import IMAGE_SUFFIXES, Decoded, decode_files
from der_fast.data.progress import progress_bar
from der_fast.data.sizes import SMALL_SIDE, default_side, refuse_too_much, stored_side
from der_fast.data.source import MemorySource
from der_fast.data.split import held_out
from der_fast.errors import DataError

_TEST_NAMES = ("test", "val", "valid", "validation")
_IGNORED = ("__MACOSX",)
_MOST_LISTED = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """Files of one part (training or test) with a label each."""

    paths: list[Path]
    labels: list[int]


def load_folder(folder: Path, config: DataConfig) -> tuple[MemorySource, MemorySource]:
    """Return (train, test) of a folder of class folders.

    Unreadable files are left out, logged and listed in `MemorySource.skipped`.

    Args:
        folder: the folder.
        config: `image_size`, `random_resized_crop`, `train_per_class`, `test_per_class`, `test_share` and `max_gib` are used.

    Raises:
        DataError: no class folders, an empty class, a class that is in one part only, a class too small to be split, more images than
            `max_gib` allows, or more unreadable files than three and than 1 % of all.
    """
    try:
        names, train, test = _parts(folder, config)
    except OSError as error:
        raise DataError(f"cannot list {error.filename}: {error.strerror}; check its permissions") from error
    paths = train.paths + test.paths
    side = stored_side(config.image_size or _guess_side(paths), config.random_resized_crop)
    refuse_too_much(len(paths), (side, side), config.max_gib, str(folder))
    with progress_bar(f"decoding {folder.name}", len(paths)) as advance:
        decoded = decode_files(paths, (side, side), progress=advance)
    _judge_problems(decoded.problems, len(paths), folder)
    border = len(train.paths)
    return (
        _source("training", folder, names, train, decoded.part(0, border)),
        _source("test", folder, names, test, decoded.part(border, len(paths))),
    )


def _source(what: str, folder: Path, names: list[str], part: _Part, decoded: Decoded) -> MemorySource:
    labels = torch.tensor(part.labels, dtype=torch.int64)[torch.tensor(decoded.kept, dtype=torch.int64)]
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    lost = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if lost:
        raise DataError(
            f"no readable {what} image of class {', '.join(map(repr, lost))} in {folder}; mend or replace these files:\n"
            + _listed(decoded.problems)
        )
    files = [part.paths[index].relative_to(folder).as_posix() for index in decoded.kept]
    return MemorySource(decoded.images, labels, names, files=files, skipped=decoded.problems)


def _guess_side(paths: Sequence[Path]) -> int:
    """Choose the side from the headers of the files."""
    largest = 1
    for path in paths:
        # Whatever is wrong with a file is reported when it is decoded.
        with contextlib.suppress(Exception):
            if path.is_file():
                with Image.open(path) as image:
                    largest = max(largest, *image.size)
        if largest > SMALL_SIDE:
            break
    return default_side(largest)


def _parts(folder: Path, config: DataConfig) -> tuple[list[str], _Part, _Part]:
    """Find classes and files; returns class names, training part, test part."""
    train_folder, test_folder = folder / "train", _test_folder(folder)
    train_is_split = _holds_folders(train_folder)
    train_classes = _classes(train_folder if train_is_split else folder)
    names = list(train_classes)
    train, test = _Part([], []), _Part([], [])
    if train_is_split and test_folder is not None:
        test_classes = _classes(test_folder)
        _refuse_one_sided(train_classes, test_classes, train_folder, test_folder)
        for label, name in enumerate(names):
            _add(train, train_classes[name], label, config.train_per_class)
            _add(test, test_classes[name], label, config.test_per_class)
        return names, train, test
    for label, name in enumerate(names):
        files = train_classes[name]
        held = held_out(name, [path.name for path in files], config.test_share)
        _add(train, [path for path, out in zip(files, held, strict=True) if not out], label, config.train_per_class)
        _add(test, [path for path, out in zip(files, held, strict=True) if out], label, config.test_per_class)
    return names, train, test


def _add(part: _Part, paths: list[Path], label: int, most: int | None) -> None:
    chosen = paths if most is None else paths[:most]
    part.paths.extend(chosen)
    part.labels.extend([label] * len(chosen))


def _folders(folder: Path) -> list[Path]:
    entries = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(entry for entry in entries if not entry.name.startswith(".") and entry.name not in _IGNORED)


def _holds_folders(folder: Path) -> bool:
    """Tell a split ("train/" with class folders in it) from a class that happens to be called so."""
    return folder.is_dir() and bool(_folders(folder))


def _test_folder(folder: Path) -> Path | None:
    return next((folder / name for name in _TEST_NAMES if _holds_folders(folder / name)), None)


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return class name → image files, both sorted by name."""
    folders = _folders(folder)
    if not folders:
        raise DataError(f"{folder} holds no class folders; put the images of every class into a folder of its own: {folder}/<class>/*.jpg")
    classes = {entry.name: _image_files(entry) for entry in folders}
    empty = [name for name, files in classes.items() if not files]
    if empty:
        places = ", ".join(str(folder / name) for name in empty[:_MOST_LISTED])
        raise DataError(f"no images in class folder {places}; add images (directly inside, {_suffixes()}) or remove the folder")
    return classes


def _image_files(folder: Path) -> list[Path]:
    found = (entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith("."))
    return sorted(found, key=lambda path: path.name)


def _suffixes() -> str:
    return " ".join(sorted(IMAGE_SUFFIXES))


def _refuse_one_sided(train: dict[str, list[Path]], test: dict[str, list[Path]], train_folder: Path, test_folder: Path) -> None:
    for have, lack, where in ((train, test, test_folder), (test, train, train_folder)):
        missing = [name for name in have if name not in lack]
        if missing:
            raise DataError(
                f"no folder for class {', '.join(map(repr, missing[:_MOST_LISTED]))} in {where}; every class needs a folder in both "
                f"{train_folder} and {test_folder}"
            )


def _judge_problems(problems: list[str], count: int, folder: Path) -> None:
    """Log unreadable files; refuse a folder in which they are too many to be an accident."""
    if not problems:
        return
    if len(problems) > max(3, count // 100):
        raise DataError(f"{len(problems)} of {count} images in {folder} cannot be read; mend or remove them:\n{_listed(problems)}")
    _log.warning("%d of %d images in %s could not be read and were left out:\n%s", len(problems), count, folder, _listed(problems))


def _listed(problems: list[str]) -> str:
    more = [f"  … and {len(problems) - _MOST_LISTED} more"] if len(problems) > _MOST_LISTED else []
    return "\n".join([f"  {problem}" for problem in problems[:_MOST_LISTED]] + more)
