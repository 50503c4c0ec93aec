"""From the data configuration to a training and a test source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from der_fast.config.datasets import KNOWN_NAMES
from der_fast.config.schema import DataConfig
from der_fast.data.decode.convert import fit_batch
from der_fast.data.io.threads import mapped
from der_fast.data.memory_source import MemorySource
from der_fast.data.sets.cifar import ARCHIVES
from der_fast.data.sets.digits import load_digits
from der_fast.data.sets.folder import load_folder
from der_fast.data.sets.named import load_named, of_classes
from der_fast.data.sizes import refuse_too_much, stored_side
from der_fast.data.source import ImageSource
from der_fast.errors import DataError, Spelling
from der_fast.home import cache_folder, expand, older_cache_folder


def load_dataset(
    config: DataConfig, *, cache: Path | None = None, say: Callable[[str], None] | None = None
) -> tuple[ImageSource, ImageSource]:
    """Load (train, test) into memory, or as files to decode when needed (see `data.reader`).

    Args:
        config: `name` is a known name (it wins over a folder of the same name; write ./digits for the folder), a folder, or a text file
            of "path class", or a WebDataset tar.
        cache: the folder to save the index of a folder of images in; None saves nothing.
        say: called with where a data set with a name was found, what is left out and, if images stay in their files, how they are read.

    Returns:
        Two sources with the same class names and image size. The size is `image_size`, or 256/224 of it with `random_resized_crop`.

    Raises:
        DataError: an unknown name, or anything wrong with the data; see `load_folder`.
    """
    if config.name == "digits":
        train, test = load_digits(config.test_share)
        return _limited((of_classes(train, config), of_classes(test, config)), config)
    if config.name in ARCHIVES:
        folder, older = _archive_folder(config), older_cache_folder() if config.root is None else None
        return _limited(load_named(config, folder, None if older == folder else older, say), config)
    return load_folder(found_place(config), config, cache=cache, say=say)


def found_place(config: DataConfig) -> Path:
    """Return the folder, list or tar that `config.name` stands for; raises DataError if there is none."""
    folder = expand(config.name)
    # A drive that does not answer is detected here, before anything waits for it forever.
    mapped(Path.exists, [folder], config.timeout)
    if folder.is_dir() or (folder.is_file() and folder.suffix in (".txt", ".tar")):
        return folder
    if folder.exists():
        raise DataError(
            f"{folder.absolute()} is a file; give the path of a folder of class folders (unpack an archive "
            "first), a text file (.txt) of 'path class', or a WebDataset tar (.tar)"
        )
    if folder.is_absolute():
        raise DataError(f"there is no folder {folder}; give the path of a folder of class folders, or the new place of one that was moved")
    raise DataError(
        f"unknown data set {config.name!r}: known names are {', '.join(KNOWN_NAMES)}, and there is no folder {folder.absolute()}; "
        "give one of these names or the path of a folder of class folders"
    )


def archive_folder(root: str | None, file: str) -> Path | None:
    """Return the folder where the official archive `file` is expected: `root`, or the user's cache folder, or version 0.1's if the archive
    is there; None without `root` for a user without a home folder.
    """
    if root is not None:
        return expand(root)
    older, folder = older_cache_folder(), cache_folder()
    if older is not None and (older / file).is_file() and not (folder is not None and (folder / file).is_file()):
        return older
    return folder


def _archive_folder(config: DataConfig) -> Path:
    archive = ARCHIVES[config.name]
    folder = archive_folder(config.root, archive.file)
    if folder is None:
        raise DataError(
            f"{config.name} needs the official archive {archive.file}, and this user has no home folder to keep it in: name the "
            "folder that holds it with ",
            Spelling("--data-root", "data.root"),
            f", or one to download {archive.url} to",
        )
    return folder


def _limited(sources: tuple[MemorySource, MemorySource], config: DataConfig) -> tuple[MemorySource, MemorySource]:
    """Apply the limits per class and the image size to a data set that was loaded whole."""
    train, test = limit_per_class(sources[0], config.train_per_class), limit_per_class(sources[1], config.test_per_class)
    side = stored_side(config.image_size or train.image_size[0], config.random_resized_crop)
    refuse_too_much(len(train) + len(test), (side, side), config.max_gib, config.name)
    return resized(train, (side, side)), resized(test, (side, side))


def resized(source: MemorySource, size: tuple[int, int]) -> MemorySource:
    """Return the source with images resized to cover `size` (height, width), the rest cut off evenly."""
    if source.image_size == size:
        return source
    return MemorySource(
        fit_batch(source.images, size),
        source.labels,
        source.class_names,
        files=source.files,
        skipped=source.skipped,
        notes=source.notes,
    )


def limit_per_class(source: MemorySource, most: int | None) -> MemorySource:
    """Keep at most the first `most` images of every class, in their order; None keeps all."""
    if most is None:
        return source
    chosen = torch.zeros(len(source), dtype=torch.bool)
    for label in range(len(source.class_names)):
        chosen[(source.labels == label).nonzero().flatten()[:most]] = True
    return source.subset(chosen.nonzero().flatten())
