"""A `MemorySource` from any map-style data set of (image, label) pairs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from der_fast.config.schema import DataConfig
from der_fast.config.tree import plain
from der_fast.data.decode.convert import to_pil
from der_fast.data.decode.pixels import Pixels, fit
from der_fast.data.io.names import spelled
from der_fast.data.io.progress import progress_bar
from der_fast.data.memory_source import MemorySource
from der_fast.data.selection import few
from der_fast.data.sizes import default_side, refuse_too_much, stored_side
from der_fast.data.source import ImageSource
from der_fast.errors import DataError

_MEMBERS = sorted(name for name in vars(ImageSource) if not name.startswith("_"))


def from_dataset(
    dataset: Any, *, class_names: Sequence[str] | None = None, image_size: int | tuple[int, int] | None = None, max_gib: float = 8.0
) -> MemorySource:
    """Read a data set into memory, once; it must not augment or normalise.

    Args:
        dataset: has ``len(dataset)`` and ``dataset[i] → (image, label)``, e.g. one of torchvision's. Images as `to_pil` takes them
            (Pillow image, array or tensor of 2 or 3 axes); labels are integers, or class names if names are known.
        class_names: the class of label i is ``class_names[i]``; default: ``dataset.classes``, also from inside a wrapper (`random_split`,
            `Subset`, `ConcatDataset`: see `names_within`), else the distinct labels themselves, sorted.
        image_size: (height, width) in pixels, or the side of a square; default: the images' own size if it is the same for all, else 32 if
            no side is longer than that, else 224. Other images are resized to cover it and cut off evenly.
        max_gib: refuse to hold more than this many GiB.

    Raises:
        DataError: not a map-style data set, an image or label of a wrong kind, a label out of range, or too many images; the message gives
            the index.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(f"{type(dataset).__name__} is not a map-style data set: it needs len(dataset) and dataset[i] → (image, label)")
    count = len(dataset)
    if count == 0:
        raise DataError(f"the data set ({type(dataset).__name__}) is empty")
    size = None if image_size is None else _size(image_size)
    what = f"the data set ({type(dataset).__name__})"
    if size is not None:
        refuse_too_much(count, size, max_gib, what)
    images: list[Pixels] = []
    labels: list[Any] = []
    held = 0
    with progress_bar("reading the data set", count) as advance:
        for index in range(count):
            image, label = _item(dataset, index)
            rgb = to_pil(image, f"image {index}")
            images.append(np.asarray(rgb) if size is None else fit(rgb, size))
            labels.append(label)
            held += images[-1].nbytes
            if held > max_gib * 2**30:
                raise DataError(
                    f"{what}: the first {index + 1} of {count} images, at their own size, already need more than max_gib={max_gib:g} GiB; "
                    "give image_size, or raise max_gib"
                )
            advance(1)
    pixels = torch.from_numpy(_stacked(images))
    names = class_names if class_names is not None else names_within(dataset)
    numbers, known = _numbered(labels, None if names is None else [str(name) for name in names])
    return MemorySource(pixels, numbers, known)


def as_source(data: Any, config: DataConfig, stored_size: tuple[int, int] | None = None) -> ImageSource:
    """Return an image source unchanged; read a map-style data set of (image, label) into memory.

    Args:
        data: an image source or a map-style data set.
        config: `image_size`, `random_resized_crop` and `max_gib` are used.
        stored_size: (height, width) in pixels of images that these must match; default: what `config` needs.

    Raises:
        DataError: a source that lacks a part of `ImageSource`; see also `from_dataset`.
    """
    if hasattr(data, "batches") and hasattr(data, "class_names"):
        missing = [name for name in _MEMBERS if not hasattr(data, name)]
        if missing:
            raise DataError(
                f"{type(data).__name__} is not a complete image source (der_fast.data.ImageSource): it lacks {', '.join(missing)}"
            )
        source: ImageSource = data
        return source
    if stored_size is None and config.image_size is not None:
        side = stored_side(config.image_size, config.random_resized_crop)
        stored_size = (side, side)
    return from_dataset(data, image_size=stored_size, max_gib=config.max_gib)


def names_within(dataset: Any) -> list[str] | None:
    """Return the class names of a data set, or of one inside it, however deep (``.dataset``, ``.datasets``); None if it has none.

    Raises:
        DataError: joined data sets have different names, so that a label would mean several classes.
    """
    seen: list[Any] = []
    while dataset is not None and not any(dataset is other for other in seen):
        seen.append(dataset)
        own = getattr(dataset, "classes", None)
        if isinstance(own, Iterable) and not isinstance(own, str):
            return [str(name) for name in own]
        parts = getattr(dataset, "datasets", None)
        if isinstance(parts, Iterable) and not isinstance(parts, str):
            return _agreed([names_within(part) for part in parts])
        dataset = getattr(dataset, "dataset", None)
    return None


def _agreed(found: list[list[str] | None]) -> list[str] | None:
    if any(names != found[0] for names in found):
        one, other = [("no names" if names is None else few(names)) for names in (found[0], next(n for n in found if n != found[0]))]
        raise DataError(
            f"the joined data sets name their classes differently ({one}; {other}), so a label is ambiguous; "
            "give class_names, or join data sets with the same classes"
        )
    return found[0] if found else None


def _size(given: Any) -> tuple[int, int]:
    """Return (height, width) of a size as callers give it: a pair, or the side of a square, of any integer type."""
    try:
        return (operator.index(plain(given)),) * 2
    except TypeError:
        height, width = given
        return operator.index(plain(height)), operator.index(plain(width))


def _item(dataset: Any, index: int) -> tuple[Any, Any]:
    try:
        item = dataset[index]
    except Exception as error:  # the data set is the caller's: whatever it raises, the index helps
        raise DataError(f"dataset[{index}] failed: {type(error).__name__}: {error}") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise DataError(f"dataset[{index}] must be a pair (image, label), not {type(item).__name__}")
    return item[0], item[1]


def _stacked(images: list[Pixels]) -> Pixels:
    """Stack images of one size; fit mixed sizes to a square first."""
    if len({image.shape for image in images}) > 1:
        side = default_side(max(max(image.shape[:2]) for image in images))
        images = [fit(Image.fromarray(image), (side, side)) for image in images]
    return np.stack(images)


def _numbered(labels: list[Any], names: list[str] | None) -> tuple[Tensor, list[str]]:
    """Return labels as int64 positions in the class names, and those names."""
    names = None if names is None else list(map(spelled, names))
    if all(isinstance(label, str) for label in labels):
        labels = list(map(spelled, labels))
        known = sorted(set(labels)) if names is None else names
        for index, label in enumerate(labels):
            if label not in known:
                raise DataError(f"label {label!r} of image {index} is not among the class names ({', '.join(known[:10])} …)")
        number_of = {name: number for number, name in enumerate(known)}
        return torch.tensor([number_of[label] for label in labels], dtype=torch.int64), known
    numbers = [_integer(label, index) for index, label in enumerate(labels)]
    if names is not None:
        return torch.tensor(numbers, dtype=torch.int64), names
    for index, number in enumerate(numbers):
        if number < 0:
            raise DataError(f"label {number} of image {index} is negative; leave unlabelled images out")
    distinct = sorted(set(numbers))
    position = {number: label for label, number in enumerate(distinct)}
    return torch.tensor([position[number] for number in numbers], dtype=torch.int64), [str(number) for number in distinct]


def _integer(label: Any, index: int) -> int:
    try:
        return operator.index(plain(label))
    except TypeError as error:
        raise DataError(
            f"label {label!r} of image {index} is a {type(label).__name__}; labels must be integers (or all of them strings)"
        ) from error
