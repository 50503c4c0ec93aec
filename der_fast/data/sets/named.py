"""Where the data sets with a name are found: CIFAR-10 and CIFAR-100 as official archive, strips or images, whichever is there.

The first of these that `FOLDER` (`data.root`, else the user's cache folder) holds is read; CIFAR-10 has no strips:

    FOLDER/cifar-100-python.tar.gz                                    the official archive
    FOLDER/cifar100_strips_<number>.tar                               strips in tars
    FOLDER/cifar100/train/<class>.webp  and  test/                    strips; `cifar100/` may be left out
    FOLDER/cifar100/train/<class>/*.png  and  test/<class>/           images; `cifar100/` may be left out
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from der_fast.config.schema import DataConfig
from der_fast.data.catalogue.layout import TEST, class_folders, find_parts
from der_fast.data.io.names import spelled
from der_fast.data.io.threads import mapped
from der_fast.data.memory_source import MemorySource
from der_fast.data.selection import few
from der_fast.data.sets.cifar import ARCHIVES, DOWNLOAD, load_cifar
from der_fast.data.sets.folder import load_folder
from der_fast.data.sets.strips import NAME as WITH_STRIPS
from der_fast.data.sets.strips import load_strips, places_of
from der_fast.errors import DataError, Spelling

CLASSES = {"cifar10": 10, "cifar100": 100}
_SIDE = 32
Pair = tuple[MemorySource, MemorySource]


@dataclass(frozen=True)
class Form:
    """A form in which a data set is there.

    Args:
        what: what it is called.
        place: the path that a message names.
        load: reads it, with the configuration.
    """

    what: str
    place: str
    load: Callable[[DataConfig], Pair]

    def __str__(self) -> str:
        return f"{self.what} {self.place}"


def forms_in(name: str, folder: Path) -> list[Form]:
    """Return the forms in which `folder` holds the data set `name`, the one that is read first."""
    archive = folder / ARCHIVES[name].file
    forms = [Form("official archive", str(archive), partial(_archive, folder))] if archive.is_file() else []
    if name == WITH_STRIPS:
        forms += [Form("strips", place, partial(_strips, folder)) for place in places_of(folder)]
    return forms + [
        Form("images", str(place), partial(_images, place)) for place in (folder / name, folder) if _has_classes(place / "train")
    ]


def load_named(config: DataConfig, folder: Path, older: Path | None, say: Callable[[str], None] | None) -> Pair:
    """Return (train, test) of `config.name` from the first form that `folder` holds it in; held in memory.

    Args:
        config: `name`, `classes`, `download` and, for images, `train_per_class`, `test_per_class` and `image_size` are used.
        folder: where it is looked for.
        older: where the archive was looked for before; only named in a message.
        say: called with a line that names what was found and where, and what else is there; the sources' notes have it too.

    Raises:
        DataError: it is there in no form, and not to be downloaded; a class of `config.classes` is missing; see also `load_cifar`,
            `load_strips` and `load_folder`.
    """
    # A drive that does not answer ends this instead of keeping it waiting forever.
    (forms,) = mapped(partial(forms_in, config.name), [folder], config.timeout)
    if not forms:
        if not config.download:
            raise DataError(*_missing(config.name, folder, older))
        archive = folder / ARCHIVES[config.name].file
        forms = [Form("official archive", str(archive), partial(_archive, folder))]
    first, *others = forms
    unused = f"; not used: {', '.join(map(str, others))}" if others else ""
    note = f"{config.name} is read from the {first}{unused}"
    if say is not None:
        say(note)
    train, test = first.load(config)
    return _noted(train, note), _noted(test, note)


def _archive(folder: Path, config: DataConfig) -> Pair:
    train, test = load_cifar(config.name, folder)
    return of_classes(train, config), of_classes(test, config)


def _strips(folder: Path, config: DataConfig) -> Pair:
    return load_strips(folder, config.classes)


def _images(place: Path, config: DataConfig) -> Pair:
    """Read a folder of class folders, as converters of the archive write it."""
    parts, expected = find_parts(place), CLASSES[config.name]
    if TEST not in parts:
        raise DataError(
            f"{place / 'train'} holds class folders of {config.name}, but {place / 'test'} does not; put the test images there: "
            f"{place}/test/<class>/*.png"
        )
    folders = class_folders(place / "train")
    if config.classes is None and len(folders) != expected:
        inner = next((folder for folder in folders if _has_classes(folder)), None)
        raise DataError(
            f"{place / 'train'} holds {len(folders)} class folders ({few([folder.name for folder in folders], 3)}), but {config.name} has "
            f"{expected} classes: "
            + (f"{inner} holds folders itself; put every class directly into train/ and test/" if inner else "add the others")
            + ", or name the classes to use with ",
            Spelling("--classes", "data.classes"),
        )
    # All forms are held in memory and have the same size, so that a recipe means the same with each.
    train, test = load_folder(place, replace(config, reader="memory", image_size=config.image_size or _SIDE))
    assert isinstance(train, MemorySource) and isinstance(test, MemorySource)
    return train, test


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())


def of_classes(source: MemorySource, config: DataConfig) -> MemorySource:
    """Return the images of `config.classes` only, in the data set's own order of classes; None keeps all.

    Raises:
        DataError: it has no such class.
    """
    if config.classes is None:
        return source
    wanted = set(map(spelled, config.classes))
    missing = sorted(wanted - set(source.class_names))
    if missing:
        raise DataError(f"data.classes names {few(missing)}, but {config.name} has no such class; it has {few(source.class_names)}")
    return source.of_classes([name for name in source.class_names if name in wanted])


def _noted(source: MemorySource, note: str) -> MemorySource:
    return MemorySource(
        source.images, source.labels, source.class_names, files=source.files, skipped=source.skipped, notes=[note, *source.notes]
    )


def _missing(name: str, folder: Path, older: Path | None) -> tuple[str | Spelling, ...]:
    archive = ARCHIVES[name]
    strips = (
        [f"strips ({folder}/cifar100_strips_*.tar, {folder}/{name}/train/*.webp or {folder}/train/*.webp)"] if name == WITH_STRIPS else []
    )
    looked = [
        f"the official archive ({' or '.join(str(place / archive.file) for place in (folder, older) if place)})",
        *strips,
        f"images ({folder}/{name}/train/<class>/*.png or {folder}/train/<class>/*.png, with test/ beside train/)",
    ]
    unpacked = folder / archive.folder
    note = f" The unpacked folder {unpacked} is not used: it has no checksum." if unpacked.is_dir() else ""
    there = "" if folder.is_dir() else f" There is no folder {folder}."
    return (
        f"{name} is not in {folder}, where {', '.join(looked[:-1])} and {looked[-1]} were looked for.{there}{note} "
        f"Download {archive.url} into that folder, name another folder with ",
        Spelling("--data-root", "data.root"),
        ", or use ",
        DOWNLOAD,
    )
