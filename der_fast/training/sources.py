"""Image sources, counted and checked before work starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from der_fast.data.source import ImageSource
from der_fast.errors import DataError


def counts_by_class(source: ImageSource) -> dict[str, int]:
    """Return the number of images of every class, by name."""
    counts = torch.bincount(source.labels, minlength=len(source.class_names)).tolist()
    return dict(zip(source.class_names, counts, strict=True))


def without_empty_classes(source: ImageSource) -> ImageSource:
    """Leave out class names without images: data sets often name all their classes even if only a part is given."""
    counts = counts_by_class(source)
    names = [name for name, count in counts.items() if count]
    return source if len(names) == len(counts) else source.of_classes(names)


def check_train(train: ImageSource, known: Sequence[str], size: tuple[int, int] | None, *, joint: bool) -> None:
    """Refuse training images that a step, or a refresh of known classes, cannot learn.

    Args:
        train: the images.
        known: names of the classes learned before.
        size: (height, width) in pixels of the images learned before, or None.
        joint: the method trains on the images of all seen classes.

    Raises:
        DataError: a shard, too few images, a class without images, no new class for the upper bound, or images of another size.
    """
    if train.world > 1:
        raise DataError("one process trains a step on all of its images; give the source itself instead of a shard of it (sharded)")
    repeated = [name for name in train.class_names if name in known]
    if len(train) < 2 and not (train.class_names and len(repeated) == len(train.class_names)):
        raise DataError(f"{len(train)} training image(s): batch-norm needs at least two; add images")
    empty = [name for name, count in counts_by_class(train).items() if not count]
    if empty:
        raise DataError(f"no training images of class {', '.join(map(repr, empty[:5]))}; add images or leave the name out of class_names")
    missing = [name for name in known if name not in train.class_names]
    if joint and missing:
        raise DataError(
            f"this method (the upper bound) trains on the images of all seen classes: {', '.join(map(repr, missing[:5]))} missing; "
            "give the images of the known classes too"
        )
    if joint and len(repeated) == len(train.class_names):
        raise DataError("there is no new class to learn; give images of at least one class that is not known yet")
    if size is not None and train.image_size != size:
        raise DataError(f"{_sizes(train, size)}; set data.image_size, or resize them")


def check_test(test: ImageSource, names: Sequence[str], size: tuple[int, int]) -> None:
    """Refuse test images that cannot measure a model.

    Args:
        test: the images.
        names: the classes that the model knows, or will know after the step.
        size: (height, width) in pixels of the training images.

    Raises:
        DataError: no images, a class that the model does not know, or images of another size.
    """
    if not len(test):
        raise DataError("the test set has no images; give some, or leave the test set out")
    unknown = [name for name in test.class_names if name not in names]
    if unknown:
        raise DataError(
            f"the test set has classes that were never learned: {', '.join(map(repr, unknown[:5]))}; learn them or leave them out"
        )
    if test.image_size != size:
        raise DataError(f"{_sizes(test, size)}; set data.image_size, or resize them")


def _sizes(source: ImageSource, size: tuple[int, int]) -> str:
    return f"images of {source.image_size[0]} × {source.image_size[1]} pixels, but the model was trained on {size[0]} × {size[1]}"
