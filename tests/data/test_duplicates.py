from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from der_fast.config.schema import DataConfig
from der_fast.data import ImageSource, MemorySource, load_dataset
from der_fast.data.duplicates import held_already


def test_images_in_memory_are_compared_by_their_pixels() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3).contiguous()
    source = MemorySource(images, torch.tensor([0, 0, 1, 1, 1]), ["a", "b"])
    memory = source.subset(torch.tensor([3, 0])).relabelled(["b", "x", "a"])
    assert held_already(source, memory).tolist() == [True, False, False, True, False]
    assert held_already(source, memory.subset(torch.tensor([], dtype=torch.int64))).tolist() == [False] * 5


def photos_in(folder: Path) -> ImageSource:
    train, _ = load_dataset(DataConfig(str(folder), image_size=32, random_resized_crop=True, reader="pillow", workers=0, test_share=0.2))
    return train


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders; two images of the second are copies of the first's, under other names; one has only their size."""
    for name, shades in (("one", (10, 20, 30, 40)), ("two", (30, 50, 10, 60))):
        for part in ("train", "test"):
            (tmp_path / name / part / "a").mkdir(parents=True)
            for number, shade in enumerate(shades):
                Image.new("RGB", (40, 40), (shade, 0, 0)).save(tmp_path / name / part / "a" / f"{name}{number}.bmp")
    return tmp_path / "one", tmp_path / "two"


def test_files_are_compared_by_their_contents(folders: tuple[Path, Path]) -> None:
    memory, source = map(photos_in, folders)
    assert held_already(source, memory).tolist() == [True, False, True, False]
    (folders[1] / "train" / "a" / "two0.bmp").unlink()
    assert held_already(source, memory).tolist() == [False, False, True, False]


def test_sources_of_two_kinds_have_nothing_in_common(folders: tuple[Path, Path]) -> None:
    photos = photos_in(folders[0])
    images = MemorySource(photos.pixels(torch.arange(len(photos))), photos.labels, photos.class_names)
    assert not held_already(photos, images).any() and not held_already(images, photos).any()
