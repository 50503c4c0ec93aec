from __future__ import annotations

from pathlib import Path

import pytest
import torch

from der_fast.config.schema import DataConfig
from der_fast.data import MemorySource, load_dataset
from der_fast.data.source import renamed
from der_fast.errors import DataError


def source() -> MemorySource:
    images = torch.arange(4 * 12, dtype=torch.uint8).reshape(4, 2, 2, 3)
    return MemorySource(images, torch.tensor([0, 1, 0, 2]), ["a", "b", "c"], files=["1", "2", "3", "4"])


def test_names_change_and_nothing_else() -> None:
    old = source()
    new = renamed(old, {"a": "b", "b": "a", "x": "y"})
    assert new.class_names == ("b", "a", "c")
    assert torch.equal(new.labels, old.labels) and torch.equal(new.pixels(torch.arange(4)), old.images)
    assert isinstance(new, MemorySource) and new.files == old.files
    assert renamed(old, {"x": "y"}) is old


def test_two_classes_of_one_name_are_refused() -> None:
    with pytest.raises(DataError, match="'c' appears more than once"):
        renamed(source(), {"a": "c"})


def test_files_are_renamed_too(photos: Path) -> None:
    train, _ = load_dataset(DataConfig(str(photos), image_size=32, random_resized_crop=True, reader="pillow", workers=0))
    first, *rest = train.class_names
    new = renamed(train, {first: "new"})
    assert new.class_names == ("new", *rest)
    with pytest.raises(DataError, match="appears more than once"):
        renamed(train, {first: rest[0]})
