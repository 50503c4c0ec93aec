"""Names of data sets, the digits, and limits that hold for all of them."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset, transforms_for
from der_fast.data.catalogue.split import held_out
from der_fast.errors import DataError
from der_fast.seeds import generator


def test_digits_are_scikit_learns_pixels_in_uint8():
    train, test = load_dataset(DataConfig())
    assert train.class_names == tuple("0123456789")
    assert len(train) + len(test) == 1797 and train.image_size == (8, 8)
    bunch = load_digits()
    for source in (train, test):
        numbers = [int(name[7:11]) for name in source.files]
        assert source.labels.tolist() == bunch.target[numbers].tolist()
        grey = source.images.numpy()[..., 0]
        assert np.abs(grey / 255 * 16 - bunch.images[numbers]).max() < 0.04
        assert (source.images == source.images[..., :1]).all()
    assert max(int(train.images.max()), int(test.images.max())) == 255


def test_digits_are_split_the_same_way_every_time_and_alike_in_every_class():
    train, test = load_dataset(DataConfig())
    again = load_dataset(DataConfig())
    assert (train.fingerprint(), test.fingerprint()) == (again[0].fingerprint(), again[1].fingerprint())
    assert not set(train.files) & set(test.files)
    share = torch.bincount(test.labels) / (torch.bincount(test.labels) + torch.bincount(train.labels))
    assert (share - 0.2).abs().max() < 0.003
    assert len(load_dataset(DataConfig(test_share=0.5))[1]) == pytest.approx(1797 / 2, abs=10)


def test_digits_at_another_size_and_number():
    train, test = load_dataset(DataConfig(image_size=12, train_per_class=7, test_per_class=3))
    assert train.image_size == test.image_size == (12, 12)
    assert torch.bincount(train.labels).tolist() == [7] * 10 and torch.bincount(test.labels).tolist() == [3] * 10
    whole, _ = load_dataset(DataConfig())
    for label in range(10):
        names = [name for name, number in zip(whole.files, whole.labels.tolist(), strict=True) if number == label]
        assert [name for name, number in zip(train.files, train.labels.tolist(), strict=True) if number == label] == names[:7]


def test_random_resized_crop_stores_every_data_set_larger():
    assert load_dataset(DataConfig(random_resized_crop=True, image_size=28))[0].image_size == (32, 32)


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"unknown data set 'cifar11': known names are digits, cifar10, cifar100, and there is no folder /.*cifar11"
    ):
        load_dataset(DataConfig(name="cifar11"))


def test_a_file_is_no_data_set(tmp_path):
    path = tmp_path / "data.zip"
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="is a file"):
        load_dataset(DataConfig(name=str(path)))


def test_memory_limit_holds_for_the_digits_too():
    config = DataConfig(max_gib=0.0001)
    with pytest.raises(DataError, match=r"digits: 1797 images of 8 × 8 pixels need .*data\.max_gib"):
        load_dataset(config)
    load_dataset(dataclasses.replace(config, train_per_class=2, test_per_class=1))


def test_held_out_depends_on_names_only():
    names = [f"{index}.jpg" for index in range(50)]
    held = dict(zip(names, held_out("cat", names, 0.2), strict=True))
    backwards = dict(zip(names[::-1], held_out("cat", names[::-1], 0.2), strict=True))
    assert held == backwards and sum(held.values()) == 10
    assert held != dict(zip(names, held_out("dog", names, 0.2), strict=True))
    more = [*names, "50.jpg"]
    moved = [name for name, out in zip(more, held_out("cat", more, 0.2), strict=True) if name in held and out != held[name]]
    assert len(moved) <= 1


def test_held_out_takes_names_that_are_no_utf8():
    names = [os.fsdecode(b"\xff%d.jpg" % index) for index in range(10)]
    assert sum(held_out("cat", names, 0.2)) == 2
    assert held_out("cat", names, 0.2) == held_out("cat", names[::-1], 0.2)[::-1]


def test_held_out_leaves_something_on_both_sides():
    for count in range(2, 6):
        for share in (0.01, 0.5, 0.99):
            assert 1 <= sum(held_out("cat", [str(index) for index in range(count)], share)) <= count - 1


def test_cifar_jpegs_of_the_shared_folder(shared_data, tmp_path):
    """The first images by name of the real JPEGs: few are unpacked, because all would take long."""
    import tarfile

    with tarfile.open(shared_data / "cifar10_jpeg.tar.xz") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(("0000.jpg", "0001.jpg")):
                target = tmp_path / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    train, test = load_dataset(DataConfig(name=str(tmp_path / "cifar10"), train_per_class=1))
    assert train.class_names[:3] == ("airplane", "automobile", "bird") and train.image_size == (32, 32)
    assert len(train) == 10 and len(test) == 20
    assert train.files[0] == "train/airplane/0000.jpg"


def test_photos_of_the_shared_folder(shared_data, tmp_path):
    import tarfile

    with tarfile.open(shared_data / "caltech20.tar") as archive:
        wanted = [member for member in archive if member.isfile() and "/accordion/" in member.name]
        for member in wanted:
            target = tmp_path / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.extractfile(member).read())
    config = DataConfig(name=str(tmp_path / "caltech20"), random_resized_crop=True)
    files, _ = load_dataset(config)
    transform, _ = transforms_for(config, files.image_size)
    read = list(files.batches(None, 16, transform=transform, generator=generator(1), shuffle=True))
    assert sum(len(batch.indices) for batch in read) >= len(files) - 1 and files.skipped == ()
    assert all(batch.images.shape[1:] == (3, 224, 224) for batch in read)
    train, test = load_dataset(dataclasses.replace(config, reader="memory"))
    assert train.files == files.files
    assert train.image_size == (256, 256) and len(train) + len(test) == len(wanted)
    assert train.skipped == test.skipped == ()
    assert 40 < train.images.float().mean() < 220 and train.images.float().std() > 30
