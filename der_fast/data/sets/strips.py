"""CIFAR-100 as strips: one picture file per class, its images one below the other.

``cifar100/train/<class>.webp`` holds 500 images of 32 × 32 and ``cifar100/test/<class>.webp`` 100, in the order of their names;
unpacked, or in tars ``cifar100_strips_<number>.tar``, of which each holds a part of the classes. Without loss, this takes 60 % of the
official archive's space, and 200 files instead of 60,000.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from der_fast.data.decode.pixels import reason_of, to_rgb
from der_fast.data.io.members import member_name, read_bytes
from der_fast.data.io.names import spelled
from der_fast.data.memory_source import MemorySource
from der_fast.data.selection import few
from der_fast.errors import DataError, Spelling

NAME = "cifar100"
_TARS = "cifar100_strips_*.tar"
_MEMBER = re.compile(r"(?:\./)?cifar100/(train|test)/([^/]+)\.webp")
_THREADS = 8

Strips = dict[tuple[str, str], str]


@dataclass(frozen=True)
class Form:
    """What a whole set holds: classes, images of each in either part, and their side in pixels."""

    classes: int = 100
    train: int = 500
    test: int = 100
    side: int = 32


WHOLE = Form()


def places_of(root: Path) -> list[str]:
    """Return where `root` holds strips, as text: in tars, which are read if both are there, and unpacked."""
    unpacked = _unpacked(root)
    tars = [str(root / _TARS)] if any(root.glob(_TARS)) else []
    return tars + ([] if unpacked is None else [str(unpacked / "train" / "*.webp")])


def classes_in(root: Path) -> list[str]:
    """Return the classes whose strips are in `root`, for training and for testing, sorted; raises DataError where a tar cannot be read."""
    return sorted(_there(_found(root)))


def load_strips(root: Path, classes: Sequence[str] | None = None) -> tuple[MemorySource, MemorySource]:
    """Return (train, test): uint8, 32 × 32, class by class in alphabetical order, the images of a class from top to bottom.

    Args:
        root: the folder that holds the tars or the unpacked folder.
        classes: only these; None = all.

    Raises:
        DataError: a class is missing, a strip has another size than it must have, or a file cannot be read.
    """
    found = _found(root)
    names = _wanted(root, found, classes)
    train, test = (_source(found, part, names, count) for part, count in (("train", WHOLE.train), ("test", WHOLE.test)))
    return train, test


def _unpacked(root: Path) -> Path | None:
    """Return the folder with train/ and test/: `root` itself, or cifar100 in it."""
    return next((folder for folder in (root / NAME, root) if any((folder / "train").glob("*.webp"))), None)


def _found(root: Path) -> Strips:
    """Return where the strip of every (part, class) lies, as `read_bytes` takes it."""
    tars = sorted(root.glob(_TARS))
    if tars:
        return {key: place for tar in tars for key, place in _members(tar).items()}
    folder = _unpacked(root)
    assert folder is not None
    return {(part, spelled(path.stem)): str(path) for part in ("train", "test") for path in (folder / part).glob("*.webp")}


def _members(tar: Path) -> Strips:
    try:
        with tarfile.open(tar, "r:") as opened:
            listed = [(match, member) for member in opened if (match := _MEMBER.fullmatch(member.name)) and member.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar} cannot be read: {reason_of(error)}; copy it again") from error
    return {(match[1], spelled(match[2])): f"{tar}/{member_name(member.name, member.offset_data, member.size)}" for match, member in listed}


def _there(found: Mapping[tuple[str, str], str]) -> set[str]:
    return {name for part, name in found if part == "train"} & {name for part, name in found if part == "test"}


def _wanted(root: Path, found: Mapping[tuple[str, str], str], classes: Sequence[str] | None) -> list[str]:
    """Return the classes that are used, sorted; raises DataError where one of them is not there in both parts."""
    there = _there(found)
    half = {name for _, name in found} - there
    if classes is not None:
        missing = sorted(set(map(spelled, classes)) - there)
        if missing:
            raise DataError(f"data.classes names {few(missing)}, but the strips in {root} have no such class")
        return sorted(set(map(spelled, classes)))
    if half:
        raise DataError(f"the strips in {root} have {few(sorted(half))} in train or in test only; copy them again")
    if len(there) != WHOLE.classes:
        tars = [tar.name for tar in sorted(root.glob(_TARS))]
        held = f"only in {', '.join(tars)}; " if tars else ""
        raise DataError(
            f"the strips in {root} have {len(there)} of {WHOLE.classes} classes ({held}{few(sorted(there), 3)}): "
            f"{_missing(tars)}, or name the classes to use with ",
            Spelling("--classes", "data.classes"),
        )
    return sorted(there)


def _missing(tars: Sequence[str]) -> str:
    """Say which tar is missing, as far as the numbers of those that are there tell."""
    numbers = {int(found[1]) for tar in tars if (found := re.search(r"_(\d+)\.tar$", tar))}
    absent = [number for number in range(1, max([*numbers, 2]) + 1) if number not in numbers]
    return f"put {', '.join(f'cifar100_strips_{number}.tar' for number in absent)} beside it" if numbers and absent else "add the others"


def _source(found: Mapping[tuple[str, str], str], part: str, names: Sequence[str], count: int) -> MemorySource:
    with ThreadPoolExecutor(_THREADS) as threads:
        strips = list(threads.map(lambda name: _pixels(found[part, name], count), names))
    labels = torch.arange(len(names)).repeat_interleave(count)
    files = [f"{part}/{name}.webp[{number:03d}]" for name in names for number in range(count)]
    return MemorySource(torch.cat(strips), labels, names, files=files)


def _pixels(place: str, count: int) -> Tensor:
    """Return the images of a strip, uint8, count × side × side × 3."""
    side = WHOLE.side
    try:
        with Image.open(io.BytesIO(read_bytes(place))) as image:
            if image.size == (side, side * count):
                return torch.from_numpy(np.array(to_rgb(image))).reshape(count, side, side, 3)
            size = image.size
    except Exception as error:  # damaged bytes make the decoders raise almost anything
        raise DataError(f"{place} cannot be read: {reason_of(error)}; copy it again") from error
    raise DataError(f"{place} has {size[0]} × {size[1]} pixels, expected {side} × {side * count}: {count} images of {side} × {side}")
