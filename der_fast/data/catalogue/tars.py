"""WebDataset tars as a list of files: every sample's image, by its place in the tar, and its class from its .cls or .json.

A sample is a run of members with one name: `0007.jpg`, `0007.cls`. Images are read directly from the tars, in any order.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from der_fast.config.schema import DataConfig
from der_fast.data.catalogue.cache import CachedIndex, load_or_make
from der_fast.data.catalogue.file_table import FileTable, Int64s, absolute_root, last_change
from der_fast.data.catalogue.kinds import is_image_name, unread_kind
from der_fast.data.catalogue.layout import TEST, TRAIN, WHOLE
from der_fast.data.catalogue.leftover import left_out
from der_fast.data.catalogue.listing import Listing, listing_of
from der_fast.data.io.members import member_name
from der_fast.data.io.names import spelled
from der_fast.data.io.progress import progress_bar
from der_fast.data.io.threads import mapped
from der_fast.errors import DataError

FILE = "tars.npz"

_MOST_NAMED = 20
# The keys under which a sample's .json may name the class.
_KEYS = ("cls", "label", "class")
# Class, name in a table of files, bytes.
_Sample = tuple[str, str, int]
# Class name → kind → number of images that cannot be read.
_Left = dict[str, dict[str, int]]


@dataclass(frozen=True)
class TarIndex(CachedIndex):
    """The images of some tars, tar after tar.

    Args:
        table: a tar takes the place of a folder, and a name says where in the tar the image is (see `members`).
        classes: distinct class names.
        labels: (N,) int64: positions in `classes`.
        tars: every tar's size in bytes and change time in ns.
        left: class name → kind → number of images that cannot be read.
    """

    classes: tuple[str, ...]
    labels: Int64s
    tars: tuple[tuple[int, int], ...]
    left: _Left

    def __str__(self) -> str:
        """Return what it is, for a note."""
        return f"index of {len(self.table):,} images in {len(self.tars)} tar(s)"


def list_tars(place: Path, parts: dict[str, list[Path]], config: DataConfig, cache: Path | None = None) -> Listing:
    """List the images of tars.

    Args:
        place: the folder of the tars, or a tar.
        parts: the tars of every part, from `layout.find_tars`.
        config: `classes`, `train_per_class`, `test_per_class` and `test_share` are used.
        cache: the folder to save the list in; None saves nothing.

    Raises:
        DataError: a tar that cannot be read, is cut off, or holds an image without a class; an unknown class, a class that is in only
            one part, or one too small to split.
    """
    index, note = _indexed(place, parts, config, cache)
    if config.classes is not None:
        unknown = [name for name in config.classes if spelled(name) not in index.classes]
        if unknown:
            raise DataError(f"data.classes names {', '.join(map(repr, unknown[:_MOST_NAMED]))}, but {place} has no such class")
    wanted = set(index.classes if config.classes is None else map(spelled, config.classes))
    border = len(parts[TRAIN]) if TRAIN in parts else len(index.tars)
    train = _by_class(index, np.flatnonzero(index.table.folder < border), wanted)
    test = None if WHOLE in parts else _by_class(index, np.flatnonzero(index.table.folder >= border), wanted)
    places = [str(parts[part][0].parent) if part in parts else str(place) for part in (TRAIN, TEST)]
    left = left_out({name: found for name, found in index.left.items() if name in wanted or config.classes is None})
    return listing_of(index.table, train, test, config, note, (places[0], places[1]), () if left is None else (left,))


def index_tars(
    place: Path, parts: dict[str, list[Path]], config: DataConfig, cache: Path | None = None
) -> tuple[FileTable, dict[str, dict[str, Int64s]], str]:
    """Return all images of tars, part → class name → rows, and a line that says where the list came from; see `list_tars`."""
    index, note = _indexed(place, parts, config, cache)
    borders = {TRAIN: (0, len(parts.get(TRAIN, ()))), TEST: (len(parts.get(TRAIN, ())), len(index.tars)), WHOLE: (0, len(index.tars))}
    folder, classes = index.table.folder, set(index.classes)
    rows = {part: np.flatnonzero((folder >= borders[part][0]) & (folder < borders[part][1])) for part in parts}
    return index.table, {part: _by_class(index, found, classes) for part, found in rows.items()}, note


def _indexed(place: Path, parts: dict[str, list[Path]], config: DataConfig, cache: Path | None) -> tuple[TarIndex, str]:
    root = absolute_root(place if place.is_dir() else place.parent)
    tars = [tar for found in parts.values() for tar in found]
    index, note = _open(root, [tar.absolute().relative_to(root).as_posix() for tar in tars], cache, config.timeout)
    if not len(index.table):
        raise DataError(f"no images in the tars of {place}; a sample is an image and its class with the same name: 0007.jpg and 0007.cls")
    return index, note


def _by_class(index: TarIndex, rows: Int64s, wanted: set[str]) -> dict[str, Int64s]:
    rows = rows[index.labels[rows].argsort(kind="stable")]
    borders = np.searchsorted(index.labels[rows], np.arange(len(index.classes) + 1))
    found = {name: rows[borders[label] : borders[label + 1]] for label, name in enumerate(index.classes) if name in wanted}
    return {name: part for name, part in found.items() if len(part)}


def _open(root: str, tars: Sequence[str], cache: Path | None, timeout: float) -> tuple[TarIndex, str]:
    """Return the index of tars, from `cache` if it describes the same tars, and a line that says where it came from."""
    try:
        state = tuple((facts.st_size, last_change(facts)) for facts in mapped(os.stat, [f"{root}/{tar}" for tar in tars], timeout))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    def check(old: TarIndex) -> TarIndex | str:
        return old if (old.table.roots, old.tars, [tar for _, tar in old.table.folders]) == ((root,), state, list(tars)) else ""

    return load_or_make(None if cache is None else cache / FILE, TarIndex, check, lambda: _build(root, tars, state, timeout))


def _build(root: str, tars: Sequence[str], state: tuple[tuple[int, int], ...], timeout: float) -> TarIndex:
    with progress_bar("listing tars", len(tars)) as advance:
        read = mapped(read_tar, [Path(root, tar) for tar in tars], timeout, advance=advance)
    found, left = [samples for samples, _ in read], _Left()
    for name, kind in (row for _, unread in read for row in unread):
        left.setdefault(name, {}).setdefault(kind, 0)
        left[name][kind] += 1
    classes = sorted({sample[0] for samples in found for sample in samples})
    label_of = {name: label for label, name in enumerate(classes)}
    whole = [sample for samples in found for sample in samples]
    table = FileTable.of(
        root,
        tars,
        np.repeat(np.arange(len(tars), dtype=np.int64), [len(samples) for samples in found]),
        [os.fsencode(name) for _, name, _ in whole],
        np.array([size for _, _, size in whole], dtype=np.int64),
    )
    return TarIndex(table, tuple(classes), np.array([label_of[name] for name, _, _ in whole], dtype=np.int64), state, left)


def read_tar(path: Path) -> tuple[list[_Sample], list[tuple[str, str]]]:
    """Return (class, name in a table of files, size) of every readable image in a tar, in order, and (class, kind) of all others.

    Raises:
        DataError: it is not a tar, or is compressed, damaged or cut off, or a sample does not have exactly one image and one class.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples, unread = _samples(path, tar, file)
            # The library stops silently; a complete archive has its end mark there, a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it breaks off or is damaged after {len(samples)} image(s)")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"cannot read {path} as an uncompressed tar: {error}; download it again, or decompress it") from error
    return samples, unread


def _samples(path: Path, tar: tarfile.TarFile, file: io.BufferedReader) -> tuple[list[_Sample], list[tuple[str, str]]]:
    samples: list[_Sample] = []
    unread: list[tuple[str, str]] = []
    images: list[tarfile.TarInfo] = []
    kinds: list[str] = []
    name: str = ""
    label: str | None = None

    while (member := tar.next()) is not None:
        # The library keeps every member it has seen: a gigabyte for a million of them.
        tar.members = []  # type: ignore[attr-defined]
        if not member.isreg() or member.issparse():
            continue
        folder, base = os.path.split(member.name)
        stem, _, suffix = base.partition(".")
        if f"{folder}/{stem}" != name:
            samples += _finished(path, name, label, images)
            unread += [] if images else [(label or "", kind) for kind in kinds]
            name, label, images, kinds = f"{folder}/{stem}", None, [], []
        if is_image_name(f"image.{suffix}"):
            images.append(member)
        elif (kind := unread_kind(f"image.{suffix}")) is not None:
            kinds.append(kind)
        elif suffix in ("cls", "json"):
            file.seek(member.offset_data)
            label = _label(path, member.name, file.read(member.size), label)
    unread += [] if images else [(label or "", kind) for kind in kinds]
    return samples + _finished(path, name, label, images), unread


def _finished(path: Path, name: str, label: str | None, images: Sequence[tarfile.TarInfo]) -> list[_Sample]:
    """Return a sample as it is listed; nothing if it has no image."""
    if not images:
        return []
    if len(images) > 1:
        raise DataError(f"{path}: sample {name!r} has {len(images)} images; give every image its own name")
    if label is None:
        raise DataError(f"{path}: sample {name!r} has no class: it needs a .cls with a text or number, or a .json with 'label'")
    found = images[0]
    return [(label, member_name(found.name, found.offset_data, found.size), found.size)]


def _label(path: Path, name: str, data: bytes, known: str | None) -> str | None:
    """Return the class that a .cls or .json names; a .json without one leaves `known` as it was."""
    try:
        value: Any = data.decode().strip() if name.endswith(".cls") else json.loads(data)
    except ValueError as error:
        raise DataError(f"{path}: {name} is not text that could name a class: {error}") from error
    if isinstance(value, dict):
        value = next((value[key] for key in _KEYS if key in value), None)
    return known if value is None or not str(value) else spelled(str(value))
