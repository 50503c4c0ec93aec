"""Many images a part at a time: bounded, in several threads, and as a whole would be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from der_fast.data import as_image_batch, file_parts, image_parts
from der_fast.data.decode import parts
from der_fast.data.decode import pixels as decode
from der_fast.errors import DataError

SIZE = (5, 6)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Eleven photos whose first pixel tells which it is."""
    made = [tmp_path / f"{index:02}.png" for index in range(11)]
    for index, path in enumerate(made):
        Image.new("RGB", (6, 5), (index, 9, 9)).save(path)
    return made


@pytest.fixture
def three_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 3 * 5 * 6 * 3)


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_a_part_is_whole_batches_of_little_memory() -> None:
    assert parts.part_length((256, 256)) == 256
    assert parts.part_length((2048, 2048)) == 5
    assert parts.part_length((32, 32)) % 256 == 0
    for size in ((8, 8), (32, 32), (100, 300), (224, 224), (512, 512), (4000, 4000)):
        assert parts.part_length(size) * 3 * size[0] * size[1] <= parts.PART_BYTES
    assert parts.part_length((9999, 9999)) == 1


@pytest.mark.usefixtures("three_at_once")
def test_files_part_by_part(paths: list[Path]) -> None:
    paths[4].write_bytes(b"")
    found = list(file_parts(paths, SIZE))
    assert [list(files) for files, _ in found] == [paths[0:3], paths[3:6], paths[6:9], paths[9:]]
    assert [numbers(decoded.images) for _, decoded in found] == [[0, 1, 2], [3, 5], [6, 7, 8], [9, 10]]
    assert found[1][1].lost == [1] and str(paths[4]) in found[1][1].problems[0]


@pytest.mark.usefixtures("three_at_once")
def test_no_file_is_decoded_before_its_part_is_asked_for(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = decode.decode
    monkeypatch.setattr(decode, "decode", lambda path, size: (opened.append(path), real(path, size))[1])
    for given in (paths, iter(paths)):
        opened.clear()
        walk = image_parts(given, SIZE)
        for number, part in enumerate(walk, 1):
            assert len(part) <= 3 and len(opened) == min(3 * number, 11)
        assert sorted(opened) == paths


@pytest.mark.usefixtures("three_at_once")
def test_a_generator_is_asked_for_no_more_than_a_part() -> None:
    given: list[int] = []

    def photos() -> Iterator[Image.Image]:
        for index in range(10):
            given.append(index)
            yield Image.new("RGB", (60, 40), (index, 0, 0))

    walk = image_parts(photos(), SIZE)
    assert numbers(next(walk)) == [0, 1, 2] and given == [0, 1, 2]
    assert [numbers(part) for part in walk] == [[3, 4, 5], [6, 7, 8], [9]]


def test_a_few_files_are_decoded_at_the_same_time(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.os, "cpu_count", lambda: 2)
    together = threading.Barrier(2)
    real = decode.decode

    def waits_for_another(path: Path, size: tuple[int, int]) -> Any:
        together.wait(timeout=60)
        return real(path, size)

    monkeypatch.setattr(decode, "decode", waits_for_another)
    # One thread alone would wait for the other until the barrier breaks, and every file be refused.
    assert numbers(as_image_batch(paths[:2], SIZE)) == [0, 1]
    assert numbers(as_image_batch(paths[:8], SIZE)) == list(range(8))


@pytest.mark.usefixtures("three_at_once")
def test_files_between_other_images_keep_their_place(paths: list[Path]) -> None:
    grey = torch.full((5, 6), 100, dtype=torch.uint8)
    mixed = [paths[0], Image.new("L", (6, 5), 50), str(paths[1]), grey, np.full((5, 6, 3), 0.8), paths[2], grey.numpy()]
    assert [numbers(part) for part in image_parts(mixed, SIZE)] == [[0, 50, 1], [100, 204, 2], [100]]


@pytest.mark.usefixtures("three_at_once")
@pytest.mark.parametrize("size", [SIZE, (7, 7)])
def test_an_array_in_parts_is_what_it_is_as_a_whole(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    many = np.random.default_rng(0).integers(0, 256, (10, 3, 9, 6), dtype=np.uint8)
    for form in (many, torch.from_numpy(many) / 255, many.transpose(0, 2, 3, 1)):
        found = list(image_parts(form, size))
        assert max(map(len, found)) <= 3 and sum(map(len, found)) == 10
        with monkeypatch.context() as patch:
            patch.setattr(parts, "PART_BYTES", 2**30)
            assert torch.equal(torch.cat(found), as_image_batch(form, size))


@pytest.mark.usefixtures("three_at_once")
@pytest.mark.parametrize(
    ("last", "words"),
    [
        (lambda path: path / "nowhere.png", "nowhere.png cannot be read: no such file"),
        (lambda path: path, "cannot be read: a folder, not an image"),
        (lambda path: None, "image 11 is a NoneType"),
        (lambda path: np.zeros((9, 9, 9), np.uint8), r"image 11 has shape \(9, 9, 9\)"),
    ],
)
def test_bad_input_is_refused_before_the_first_part(last: Any, words: str, paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        next(image_parts([*paths, last(tmp_path)], SIZE))


def test_bad_values_in_an_array_are_refused_before_the_first_part(three_at_once: None) -> None:
    array = np.zeros((10, 5, 6, 3), np.float32)
    array[9, 0, 0, 0] = 2
    with pytest.raises(DataError, match=r"outside \[0, 1\]"):
        next(image_parts(array, SIZE))


@pytest.mark.usefixtures("three_at_once")
def test_a_damaged_file_is_refused_by_its_path(paths: list[Path]) -> None:
    paths[7].write_bytes(b"damaged")
    walk = image_parts(paths, SIZE)
    assert [numbers(next(walk)), numbers(next(walk))] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(DataError, match=r"07\.png cannot be read: not an image of a known format"):
        next(walk)
