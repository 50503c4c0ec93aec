"""Where the images of a data set lie: class folders, with or without a train/test split.

    photos/cat/1.jpg …                      every class held out in part for testing
    photos/train/cat/1.jpg  photos/test/cat/9.jpg …    ("val", "valid" and "validation" also name the test part)
    shards/train/0000.tar …  shards/val/0000.tar …     WebDataset tars instead of class folders, with or without the split

Names that begin with a dot are ignored.
"""

from __future__ import annotations

from pathlib import Path

from der_fast.errors import DataError

_TEST_NAMES = ("test", "val", "valid", "validation")
_IGNORED = ("__MACOSX",)

TRAIN, TEST, WHOLE = "train", "test", "whole"


def find_parts(folder: Path) -> dict[str, Path]:
    """Return where the class folders are: those of `TRAIN` and `TEST`, or those of the `WHOLE` set where it has no split.

    Raises:
        OSError: a folder that cannot be listed.
    """
    train, test = folder / "train", _test_folder(folder)
    if not _holds_folders(train):
        return {WHOLE: folder}
    return {WHOLE: train} if test is None else {TRAIN: train, TEST: test}


def flat_test_folder(folder: Path) -> Path | None:
    """Return the test folder beside train/ that lies there without class folders, as ImageNet's val/ is when unpacked; None if none."""
    if not _holds_folders(folder / "train") or _test_folder(folder) is not None:
        return None
    return next((folder / name for name in _TEST_NAMES if (folder / name).is_dir()), None)


def lone_test_folder(folder: Path) -> Path | None:
    """Return the test folder, of class folders or tars, that is the only folder in `folder`; None where there is anything else.

    Raises:
        OSError: a folder that cannot be listed.
    """
    found = _folders(folder)
    if len(found) != 1 or found[0].name not in _TEST_NAMES:
        return None
    return found[0] if _holds_folders(found[0]) or _tars(found[0]) else None


def find_tars(place: Path) -> dict[str, list[Path]]:
    """Return the tars of `TRAIN` and `TEST`, or of the `WHOLE` set: those in train/ and test/, those of a folder, or the one tar.

    Empty where there are class folders, beside which tars are nothing but what these came out of.
    """
    if place.is_file():
        return {WHOLE: [place]} if place.suffix == ".tar" else {}
    train = _tars(place / "train")
    if not train:
        return {WHOLE: whole} if (whole := _tars(place)) else {}
    test = next((found for name in _TEST_NAMES if (found := _tars(place / name))), None)
    return {WHOLE: train} if test is None else {TRAIN: train, TEST: test}


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir() or _holds_folders(folder):
        return []
    return sorted(entry for entry in folder.glob("*.tar") if not entry.name.startswith(".") and entry.is_file())


def class_folders(folder: Path) -> list[Path]:
    """Return the class folders in `folder`, sorted by name.

    Raises:
        DataError: there are none.
    """
    found = _folders(folder)
    if not found:
        raise DataError(f"{folder} holds no class folders; put the images of every class into a folder of its own: {folder}/<class>/*.jpg")
    return found


def _folders(folder: Path) -> list[Path]:
    entries = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(entry for entry in entries if not entry.name.startswith(".") and entry.name not in _IGNORED)


def _holds_folders(folder: Path) -> bool:
    """Tell a split ("train/" with class folders in it) from a class that happens to be called so."""
    return folder.is_dir() and bool(_folders(folder))


def _test_folder(folder: Path) -> Path | None:
    return next((folder / name for name in _TEST_NAMES if _holds_folders(folder / name)), None)
