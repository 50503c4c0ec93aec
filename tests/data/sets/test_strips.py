"""CIFAR-100 as strips: what is in them comes out, and what is missing or of a wrong size is named. The strips of these tests are tiny."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.data.sets import cifar, strips
from der_fast.errors import DataError

FORM = strips.Form(classes=4, train=3, test=2, side=5)
# In the order of the names; the second tar begins with the third.
NAMES = ["apple", "bed", "mouse", "worm"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(strips, "WHOLE", FORM)


@pytest.fixture
def pixels():
    """Images of every (part, class): uint8, count × 5 × 5 × 3."""
    draw = np.random.default_rng(0)
    counts = {"train": FORM.train, "test": FORM.test}
    return {(part, name): draw.integers(256, size=(counts[part], 5, 5, 3), dtype=np.uint8) for part in counts for name in NAMES}


@pytest.fixture
def unpacked(tmp_path, pixels):
    for (part, name), images in pixels.items():
        path = tmp_path / "plain" / "cifar100" / part / f"{name}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.reshape(-1, 5, 3)).save(path, lossless=True, exact=True)
    return tmp_path / "plain"


@pytest.fixture
def tars(tmp_path, unpacked):
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, names in ((1, NAMES[:2]), (2, NAMES[2:])):
        with tarfile.open(folder / f"cifar100_strips_{number}.tar", "w") as tar:
            for name in names:
                for part in ("train", "test"):
                    tar.add(unpacked / "cifar100" / part / f"{name}.webp", f"cifar100/{part}/{name}.webp")
    return folder


def loaded(root, **keys):
    return load_dataset(DataConfig(name="cifar100", root=str(root), **keys))


def same(source, part, pixels, names):
    assert source.class_names == tuple(names)
    assert torch.equal(source.images, torch.from_numpy(np.concatenate([pixels[part, name] for name in names])))
    assert source.labels.tolist() == [label for label, name in enumerate(names) for _ in pixels[part, name]]


@pytest.mark.parametrize("place", ["unpacked", "unpacked/cifar100", "tars"])
def test_what_is_in_them_comes_out(place, request, pixels):
    kind, _, inside = place.partition("/")
    train, test = loaded(request.getfixturevalue(kind) / inside)
    same(train, "train", pixels, NAMES)
    same(test, "test", pixels, NAMES)
    assert train.files[4] == "train/bed.webp[001]"


def test_the_official_archive_comes_first(tars, monkeypatch):
    (tars / cifar.ARCHIVES["cifar100"].file).write_bytes(b"no archive")
    with pytest.raises(DataError, match="is damaged or not the official file"):
        loaded(tars)


def test_a_missing_tar_is_named_unless_nothing_of_it_is_wanted(tars, pixels):
    (tars / "cifar100_strips_2.tar").unlink()
    with pytest.raises(
        DataError, match=r"2 of 4 classes \(only in cifar100_strips_1.tar; apple, bed\): put cifar100_strips_2.tar beside it"
    ):
        loaded(tars)
    assert strips.classes_in(tars) == NAMES[:2]
    same(loaded(tars, classes=("bed", "apple"))[0], "train", pixels, NAMES[:2])
    with pytest.raises(DataError, match="data.classes names mouse, but the strips in"):
        loaded(tars, classes=("bed", "mouse"))


def test_limits_and_sizes_apply(tars):
    train, test = loaded(tars, train_per_class=1, image_size=4)
    assert len(train) == 4 and len(test) == 8 and train.image_size == (4, 4)


def test_a_class_must_be_in_both_parts(unpacked):
    (unpacked / "cifar100" / "test" / "mouse.webp").unlink()
    with pytest.raises(DataError, match="have mouse in train or in test only"):
        loaded(unpacked)


def test_another_number_of_images_is_refused(unpacked):
    path = unpacked / "cifar100" / "train" / "bed.webp"
    Image.new("RGB", (5, 10)).save(path, lossless=True)
    with pytest.raises(DataError, match=r"bed.webp has 5 × 10 pixels, expected 5 × 15: 3 images of 5 × 5"):
        loaded(unpacked)


def test_damage_is_named(unpacked, tars):
    path = unpacked / "cifar100" / "train" / "bed.webp"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="bed.webp cannot be read: .*; copy it again"):
        loaded(unpacked)
    (tars / "cifar100_strips_1.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match="cifar100_strips_1.tar cannot be read"):
        loaded(tars)


def test_a_tar_that_ends_early_is_named(tars):
    path = tars / "cifar100_strips_2.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + last.size // 2])
    with pytest.raises(DataError, match="cannot be read"):
        loaded(tars)
