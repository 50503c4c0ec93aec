"""Where the images of a data set are: class folders, with or without a train/test split.

    photos/cat/1.jpg …                      part of every class is held out for testing
    photos/train/cat/1.jpg  photos/test/cat/9.jpg …    (or "Training", "val", "Validation", "testing" …)
    shards/train/0000.tar …  shards/val/0000.tar …     WebDataset tars instead of class folders, with or without the split

Names that begin with a dot are ignored, and so are folders that systems create everywhere.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from der_fast.config.run_folder import PARTS, is_run
from der_fast.data.catalogue.kinds import is_image_name, is_note, is_rubbish
from der_fast.data.catalogue.scan import is_folder
from der_fast.data.io.names import spelled
from der_fast.errors import DataError

# What a part is called, ignoring case and a word that may follow ("train_set", "val-images"); the first name is preferred.
_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "testing", "val", "valid", "validation", "validate", "eval", "evaluation", "dev", "holdout", "heldout")
_WORD_BEHIND = re.compile(r"[ _.-]?(set|images|imgs|data|split|part)$")
# A year after the name ("train2017") or a word before it ("my_val") makes it likely, not certain.
_LAST_WORD = re.compile(r"([a-z]+)[^a-z]*$")

TRAIN, TEST, WHOLE = "train", "test", "whole"


@dataclass(frozen=True)
class Layout:
    """Where the class folders of a data set are.

    Args:
        classes: (part, folder) of every class folder, sorted by name within a part; runs may still be among them.
        notes: what is there but not used, or may have been meant differently.
        loose: images that are next to the class folders instead of in them.
    """

    classes: tuple[tuple[str, Path], ...]
    notes: tuple[str, ...]
    loose: int


def part_named(name: str) -> str | None:
    """Return the part (`TRAIN` or `TEST`) that a folder's name stands for, None for any other name."""
    plain = _WORD_BEHIND.sub("", spelled(name).lower())
    return TRAIN if plain in _TRAIN_NAMES else TEST if plain in _TEST_NAMES else None


def find_layout(folder: Path) -> Layout:
    """Return where the class folders of a data set are, and what is next to them.

    Raises:
        DataError: there are no class folders, or two folders are the training part.
        OSError: a folder that cannot be listed.
    """
    parts = find_parts(folder)
    classes = [(part, entry) for part, place in parts.items() for entry in class_folders(place)]
    notes, used = [], set(parts.values())
    if folder not in used:
        notes = [f"{entry} is not used: {_why_unused(entry, parts)}" for entry in _folders(folder) if entry not in used and _holds(entry)]
    else:
        _refuse_flat_split(folder, [entry for _, entry in classes])
        notes = [
            f"{entry} is taken for a class, though its name is that of a {found} part; a split has class folders in train/ and in test/"
            for _, entry in classes
            if (found := part_named(entry.name)) is not None
        ]
    loose = sum(is_image_name(entry.name) for place in {folder, *used} for entry in place.iterdir() if not is_rubbish(entry.name))
    return Layout(tuple(classes), tuple(notes), loose)


def find_parts(folder: Path) -> dict[str, Path]:
    """Return the folders that hold the class folders: of `TRAIN` and `TEST`, or of the `WHOLE` set if it has no split.

    Raises:
        DataError: two folders are the training part.
        OSError: a folder that cannot be listed.
    """
    train, test = _part_folder(folder, TRAIN), _part_folder(folder, TEST)
    if train is None:
        return {WHOLE: folder}
    return {WHOLE: train} if test is None else {TRAIN: train, TEST: test}


def _why_unused(entry: Path, parts: dict[str, Path]) -> str:
    if part_named(entry.name) == TEST:
        return f"the test part is {parts[TEST].name}" if TEST in parts else "it has no class folders"
    places = " and ".join(place.name for place in parts.values())
    return f"the classes are those of {places}"


def _holds(folder: Path) -> bool:
    """Whether a folder holds anything but notes, and is not a run and contains none."""
    entries = [entry for entry in folder.iterdir() if not is_rubbish(entry.name) and not is_note(entry.name)]
    return bool(entries) and not is_run(folder) and not any(is_run(entry) for entry in entries if entry.is_dir())


def _refuse_flat_split(folder: Path, classes: list[Path]) -> None:
    """Refuse folders that all look like parts of a split, when none can be used as one."""
    certain = [entry for entry in classes if part_named(entry.name)]
    likely = {entry: _likely_part(entry.name) for entry in classes if _likely_part(entry.name)}
    looks = certain if len(certain) > 1 else list(likely) if len(set(likely.values())) > 1 else []
    if looks and not any(_holds(entry) for entry in classes if entry not in looks):
        raise DataError(
            f"{folder} holds {', '.join(entry.name for entry in looks[:5])}, which look like the parts of a split, not like classes; "
            f"put the images of each class into a separate folder inside, and call the parts train and test: {folder}/train/<class>/*.jpg"
        )


def _likely_part(name: str) -> str | None:
    found = _LAST_WORD.search(spelled(name).lower())
    return part_named(found[1]) if found else None


def lone_test_folder(folder: Path) -> Path | None:
    """Return the test folder, of class folders or tars, if it is the only folder in `folder`; else None.

    Raises:
        OSError: a folder that cannot be listed.
    """
    found = _folders(folder)
    if len(found) != 1 or part_named(found[0].name) != TEST:
        return None
    return found[0] if _holds_folders(found[0]) or _tars(found[0]) else None


def find_tars(place: Path) -> dict[str, list[Path]]:
    """Return the tars of `TRAIN` and `TEST`, or of the `WHOLE` set: those in train/ and test/, those of a folder, or the one tar.

    Empty if there are class folders: tars next to them are just the archives that they were unpacked from.
    """
    if place.is_file():
        return {WHOLE: [place]} if place.suffix == ".tar" else {}
    if not place.is_dir():
        return {}
    found = {part: next((tars for entry in _named(place, part) if (tars := _tars(entry))), None) for part in (TRAIN, TEST)}
    train, test = found[TRAIN], found[TEST]
    if not train:
        return {WHOLE: whole} if (whole := _tars(place)) else {}
    return {WHOLE: train} if test is None else {TRAIN: train, TEST: test}


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir() or any(_holds(entry) for entry in _folders(folder)):
        return []
    return sorted(entry for entry in folder.glob("*.tar") if not entry.name.startswith(".") and entry.is_file())


def class_folders(folder: Path) -> list[Path]:
    """Return the class folders in `folder`, sorted by name, without the folders that a run in the same place wrote.

    Raises:
        DataError: there are none.
    """
    found = _folders(folder)
    if any(entry.name in PARTS for entry in found) and is_run(folder):
        found = [entry for entry in found if entry.name not in PARTS]
    if not found:
        raise DataError(f"{folder} holds no class folders; put the images of each class into a separate folder: {folder}/<class>/*.jpg")
    return found


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        # A link that leads nowhere, or in a circle, is not a folder.
        names = [entry.name for entry in entries if not is_rubbish(entry.name) and is_folder(entry)]
    return sorted(folder / name for name in names)


def _holds_folders(folder: Path) -> bool:
    """Tell a split ("train/" with class folders in it) from a class that happens to have that name."""
    return folder.is_dir() and bool(_folders(folder))


def _named(folder: Path, part: str) -> list[Path]:
    """Return the folders that have a part's name, the usual name first."""
    order = _TRAIN_NAMES if part == TRAIN else _TEST_NAMES
    found = [entry for entry in _folders(folder) if part_named(entry.name) == part]
    return sorted(
        found, key=lambda entry: (order.index(_WORD_BEHIND.sub("", spelled(entry.name).lower())), entry.name != entry.name.lower())
    )


def _part_folder(folder: Path, part: str) -> Path | None:
    """Return the folder with the class folders of a part."""
    found = [entry for entry in _named(folder, part) if _holds_folders(entry)]
    if part == TRAIN and len(found) > 1:
        raise DataError(
            f"{folder} holds {' and '.join(entry.name for entry in found)}, which both look like the training part; keep only one"
        )
    return found[0] if found else None
