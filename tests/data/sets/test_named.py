"""Data sets with a name: every form is found, the line says which, and what is missing is named. The sets of these tests are tiny."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.data.sets import named, strips
from der_fast.data.sets.cifar import ARCHIVES
from der_fast.errors import DataError

NAMES = ["apple", "bed", "worm"]
COUNTS = {"train": 3, "test": 2}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(named, "CLASSES", {"cifar10": 3, "cifar100": 3})
    monkeypatch.setattr(strips, "WHOLE", strips.Form(classes=3, train=3, test=2, side=32))


@pytest.fixture
def pixels():
    """Images of every (part, class): uint8, count × 32 × 32 × 3."""
    draw = np.random.default_rng(0)
    return {(part, name): draw.integers(256, size=(count, 32, 32, 3), dtype=np.uint8) for part, count in COUNTS.items() for name in NAMES}


@pytest.fixture
def images(tmp_path, pixels):
    root = tmp_path / "images"
    for (part, name), found in pixels.items():
        folder = root / "cifar100" / part / name
        folder.mkdir(parents=True)
        for number, image in enumerate(found):
            Image.fromarray(image).save(folder / f"{number:04d}.png")
    return root


def add_strips(root, pixels):
    for (part, name), found in pixels.items():
        path = root / "cifar100" / part / f"{name}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(found.reshape(-1, 32, 3)).save(path, lossless=True, exact=True)


def loaded(root, said=None, name="cifar100", **keys):
    return load_dataset(DataConfig(name=name, root=str(root), **keys), say=None if said is None else said.append)


def refused(root, **keys):
    with pytest.raises(DataError) as caught:
        loaded(root, **keys)
    return str(caught.value)


@pytest.mark.parametrize("inside", ["", "cifar100"])
@pytest.mark.parametrize("reader", ["auto", "pillow"])
def test_images_are_read_and_said(images, pixels, inside, reader):
    said: list[str] = []
    train, test = loaded(images / inside, said, reader=reader)
    for part, source in (("train", train), ("test", test)):
        assert source.class_names == tuple(NAMES) and not source.in_files
        assert torch.equal(source.images, torch.from_numpy(np.concatenate([pixels[part, name] for name in NAMES])))
        assert source.labels.tolist() == [label for label in range(3) for _ in range(COUNTS[part])]
        assert source.notes == (f"cifar100 is read from the images {images / 'cifar100'}",)
    assert said == list(train.notes)


def test_cifar10_may_be_images_too(images):
    (images / "cifar100").rename(images / "cifar10")
    said: list[str] = []
    assert len(loaded(images, said, name="cifar10")[0]) == 9
    assert said == [f"cifar10 is read from the images {images / 'cifar10'}"]


def test_all_forms_give_the_same_images(images, tmp_path, pixels):
    add_strips(tmp_path, pixels)
    for one, other in zip(loaded(images), loaded(tmp_path), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels) and one.class_names == other.class_names


def test_of_two_forms_the_line_says_which_is_read(images, pixels):
    add_strips(images, pixels)
    said: list[str] = []
    loaded(images, said)
    place = images / "cifar100"
    assert said == [f"cifar100 is read from the strips {place / 'train' / '*.webp'}; not used: images {place}"]
    (images / ARCHIVES["cifar100"].file).write_bytes(b"no archive")
    said.clear()
    with pytest.raises(DataError, match="is damaged or not the official file"):
        loaded(images, said)
    assert said[0].startswith(f"cifar100 is read from the official archive {images / ARCHIVES['cifar100'].file}; not used: strips ")


def test_where_nothing_is_all_places_and_forms_are_named(tmp_path):
    for root, there in ((tmp_path, True), (tmp_path / "gone", False)):
        message = refused(root)
        for place in (
            ARCHIVES["cifar100"].file,
            "cifar100_strips_*.tar",
            "cifar100/train/*.webp",
            "train/*.webp",
            "cifar100/train/<class>/*.png",
        ):
            assert str(root / place) in message
        assert str(root / "train/<class>/*.png") in message and ARCHIVES["cifar100"].url in message and "data.root" in message
        assert (f"There is no folder {root}" in message) is not there
    assert "strips" not in refused(tmp_path, name="cifar10")


def test_without_a_root_both_cache_folders_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        load_dataset(DataConfig(name="cifar100"))
    for folder in (tmp_path / "cache" / "der_fast", tmp_path / ".cache" / "der_fast"):
        assert str(folder / ARCHIVES["cifar100"].file) in str(caught.value)


def test_limits_and_sizes_apply_to_images(images):
    train, test = loaded(images, train_per_class=1, test_per_class=1, image_size=16)
    assert (len(train), len(test), train.image_size) == (3, 3, (16, 16))
    assert train.files == tuple(f"train/{name}/0000.png" for name in NAMES)


def test_a_class_that_is_missing_is_named_unless_only_others_are_wanted(images):
    shutil.rmtree(images / "cifar100" / "train" / "worm")
    shutil.rmtree(images / "cifar100" / "test" / "worm")
    message = refused(images)
    assert "holds 2 class folders (apple, bed), but cifar100 has 3 classes: add the others" in message and "data.classes" in message
    assert loaded(images, classes=("bed",))[0].class_names == ("bed",)
    assert "data.classes names 'worm'" in refused(images, classes=("bed", "worm"))


def test_superclasses_are_not_taken_for_classes(images):
    for part in COUNTS:
        folder = images / "cifar100" / part
        (folder / "plants").mkdir()
        for name in NAMES:
            (folder / name).rename(folder / "plants" / name)
    assert f"{Path('train') / 'plants'} holds folders itself; put every class directly into train/ and test/" in refused(images)


def test_test_images_must_be_there(images):
    shutil.rmtree(images / "cifar100" / "test")
    assert f"put the test images there: {images / 'cifar100'}/test/<class>/*.png" in refused(images)


def test_classes_of_the_digits():
    train, test = load_dataset(DataConfig(name="digits", classes=("7", "2")))
    whole = load_dataset(DataConfig(name="digits"))
    for source, full in zip((train, test), whole, strict=True):
        assert source.class_names == ("2", "7")
        assert torch.equal(source.images, full.of_classes(("2", "7")).images)
    with pytest.raises(DataError, match="data.classes names ten, but digits has no such class"):
        load_dataset(DataConfig(name="digits", classes=("ten",)))
