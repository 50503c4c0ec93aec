"""From the data configuration to a training and a test source."""

from __future__ import annotations

from pathlib import Path

import torch

from der_fast.config.schema import DataConfig
from der_fast.data.digits import load_digits
from der_fast.data.folder import load_folder
from der_fast.data.source import MemorySource
from der_fast.errors import DataError

KNOWN_NAMES = ("digits", "cifar10", "cifar100")


def load_dataset(config: DataConfig) -> tuple[MemorySource, MemorySource]:
    """Load (train, test) into memory.

    Args:
        config: `name` is a known name (it wins over a folder of the same name; write ./digits for the folder) or a folder.

    Returns:
        Two sources with the same class names and image size. The size is `image_size`, or 256/224 of it with `random_resized_crop`.

    Raises:
        DataError: an unknown name, or anything wrong with the data; see `load_folder`.
    """
    if config.name == "digits":
        train, test = load_digits(config.test_share)
        return limit_per_class(train, config.train_per_class), limit_per_class(test, config.test_per_class)
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        return load_folder(folder, config)
    raise DataError(
        f"unknown data set {config.name!r}: known names are {', '.join(KNOWN_NAMES)}, and there is no folder {folder.absolute()}; "
        "give one of these names or the path of a folder of class folders"
    )


def limit_per_class(source: MemorySource, most: int | None) -> MemorySource:
    """Keep at most the first `most` images of every class, in their order; None keeps all."""
    if most is None:
        return source
    chosen = torch.zeros(len(source), dtype=torch.bool)
    for label in range(len(source.class_names)):
        chosen[(source.labels == label).nonzero().flatten()[:most]] = True
    return source.subset(chosen.nonzero().flatten())
