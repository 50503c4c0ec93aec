"""By what an image is known: the bytes of its file, or its pixels, wherever it lies and whatever it is called."""

from __future__ import annotations

import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from der_fast.config.schema import DataConfig
from der_fast.data.identity import FILE, PIXELS, UNREADABLE, identities, kind_of, of_file, of_pixels
from der_fast.data.io.members import member_name
from der_fast.data.joined import in_memory
from der_fast.data.memory_source import MemorySource
from der_fast.data.whole import load_whole


@pytest.mark.parametrize("size", [1, 1000, 65536, 65537, 200_001])
def test_a_file_is_known_by_its_bytes(size, tmp_path):
    data = bytearray(np.random.default_rng(size).bytes(size))
    path = tmp_path / "one.jpg"
    path.write_bytes(data)
    shutil.copy(path, tmp_path / "another name.png")
    known = of_file(str(path))
    assert known != UNREADABLE and known == of_file(str(tmp_path / "another name.png"))
    for place in {0, size // 3, size - 1} if size <= 65536 else {0, 16383, size - 16384, size - 1}:
        changed = data.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        assert of_file(str(path)) != known
    path.write_bytes(data + b"\0")
    assert of_file(str(path)) != known


def test_an_image_in_a_tar_is_the_one_in_its_file(tmp_path):
    (tmp_path / "one.jpg").write_bytes(np.random.default_rng(1).bytes(100_000))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "one.jpg", "one.jpg")
    with tarfile.open(tmp_path / "all.tar") as tar:
        (member,) = tar.getmembers()
    path = f"{tmp_path}/all.tar/{member_name('one.jpg', member.offset_data, member.size)}"
    assert of_file(path) == of_file(str(tmp_path / "one.jpg"))


def test_what_cannot_be_read_is_known_by_nothing(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    names = ["empty.jpg", "folder.jpg", "missing.jpg"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")
        names.append("pipe.jpg")
    assert {of_file(str(tmp_path / name)) for name in names} == {UNREADABLE}


def test_pixels_are_told_apart_and_so_are_shapes():
    images = torch.randint(0, 256, (50, 4, 6, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = of_pixels(images)
    assert len(set(found.tolist())) == 50
    assert np.array_equal(of_pixels(images.flip(0))[::-1], found)
    assert not set(of_pixels(images.reshape(50, 6, 4, 3)).tolist()) & set(found.tolist())
    assert of_pixels(images[:0]).shape == (0,)


def test_files_can_be_compared_with_images_in_memory(tmp_path):
    (tmp_path / "a").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{index}.png")
    (tmp_path / "a" / "2.png").write_bytes(b"broken")
    whole = load_whole(DataConfig(name=str(tmp_path), image_size=40), in_files=True)
    files = whole.to_measure()
    held = in_memory(files)
    assert (kind_of(files), kind_of(held)) == (FILE, PIXELS)
    assert len(held) == 3 and len(held.skipped) == 1
    pixels = identities(files, PIXELS)
    assert sorted(pixels[pixels != UNREADABLE]) == sorted(identities(held, PIXELS))
    assert identities(held, FILE) is None
    assert np.array_equal(identities(files, FILE, torch.tensor([2, 0])), identities(files, FILE)[[2, 0]])


def test_a_source_of_another_kind_is_known_by_its_pixels():
    images = torch.randint(0, 256, (200, 3, 3, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    source = MemorySource(images, torch.zeros(200, dtype=torch.int64), ["a"])
    assert np.array_equal(identities(source, PIXELS), of_pixels(images))
