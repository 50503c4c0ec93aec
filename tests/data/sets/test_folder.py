"""Folders of class folders, good and bad."""

from __future__ import annotations

import logging

import pytest
import torch
from PIL import Image

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.errors import DataError


def load(folder, **keys):
    return load_dataset(DataConfig(name=str(folder), **keys))


def colours(source):
    """The red value of every image, which tells its class."""
    return source.images[:, source.image_size[0] // 2, source.image_size[1] // 2, 0].tolist()


@pytest.fixture
def flat(tmp_path, write_images):
    """Two classes of ten images without a split."""
    write_images(tmp_path / "photos" / "zebra", 10, value=200)
    write_images(tmp_path / "photos" / "ape", 10, value=50)
    return tmp_path / "photos"


@pytest.fixture
def split(tmp_path, write_images):
    """Two classes with three training images and two test images each."""
    for part, count in (("train", 3), ("test", 2)):
        write_images(tmp_path / "photos" / part / "zebra", count, value=200)
        write_images(tmp_path / "photos" / part / "ape", count, value=50)
    return tmp_path / "photos"


def test_classes_are_sorted_by_name_and_every_image_has_its_own_label(flat):
    train, test = load(flat)
    assert train.class_names == test.class_names == ("ape", "zebra")
    assert len(train) == 16 and len(test) == 4
    for source in (train, test):
        assert [(50, 200)[label] for label in source.labels.tolist()] == colours(source)
        assert list(source.files) == sorted(source.files)
        assert source.labels.dtype == torch.int64
    assert not set(train.files) & set(test.files)
    assert train.skipped == test.skipped == ()


def test_the_held_out_part_is_the_same_every_time_and_hardly_moves_when_images_are_added(flat, write_images):
    first, again = load(flat), load(flat)
    assert first[1].files == again[1].files
    assert first[0].fingerprint() == again[0].fingerprint()
    write_images(flat / "ape", 12, value=50)
    files = {name for name in load(flat)[1].files if name.startswith("ape")}
    assert len(files & {name for name in first[1].files if name.startswith("ape")}) >= 1


def test_a_small_share_still_holds_one_image_out(flat):
    train, test = load(flat, test_share=0.01)
    assert len(test) == 2 and len(train) == 18


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_a_split_is_used_as_it_is(split, name):
    (split / "test").rename(split / name)
    train, test = load(split)
    assert list(train.files) == [f"train/{animal}/c0{index}.png" for animal in ("ape", "zebra") for index in range(3)]
    assert list(test.files) == [f"{name}/{animal}/c0{index}.png" for animal in ("ape", "zebra") for index in range(2)]
    assert colours(train) == [50] * 3 + [200] * 3 and colours(test) == [50] * 2 + [200] * 2


def test_train_alone_is_split(split):
    for path in sorted((split / "test").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    train, test = load(split)
    assert (len(train), len(test)) == (4, 2)


def test_a_class_that_happens_to_be_called_train(flat, write_images):
    write_images(flat / "train", 5, value=120)
    assert load(flat)[0].class_names == ("ape", "train", "zebra")


def test_limits_take_the_first_by_name(split):
    train, test = load(split, train_per_class=2, test_per_class=1)
    assert list(train.files) == ["train/ape/c00.png", "train/ape/c01.png", "train/zebra/c00.png", "train/zebra/c01.png"]
    assert list(test.files) == ["test/ape/c00.png", "test/zebra/c00.png"]


def test_limits_beyond_what_there_is_take_everything(split):
    train, test = load(split, train_per_class=99, test_per_class=99)
    assert (len(train), len(test)) == (6, 4)


def test_hidden_and_foreign_files_are_ignored(flat):
    (flat / ".cache").mkdir()
    (flat / "__MACOSX").mkdir()
    (flat / "ape" / "._c00.png").write_bytes(b"resource fork")
    (flat / "ape" / "notes.txt").write_text("not an image")
    (flat / "README").write_text("not a class")
    train, test = load(flat)
    assert len(train) + len(test) == 20 and train.skipped == ()


def test_size_is_32_for_small_images_and_224_once_one_is_larger(flat, photo):
    assert load(flat)[0].image_size == (32, 32)
    photo(20, 33, 1).save(flat / "zebra" / "wide.png")
    assert load(flat)[0].image_size == (224, 224)
    assert load(flat, random_resized_crop=True)[0].image_size == (256, 256)
    assert load(flat, image_size=16)[1].image_size == (16, 16)


def test_mixed_sizes_and_modes_become_one_batch(flat, photo):
    photo(30, 50, 1).save(flat / "ape" / "large.jpg")
    photo(2, 90, 2).convert("L").save(flat / "ape" / "grey.png")
    photo(17, 5, 3).convert("CMYK").save(flat / "ape" / "cmyk.jpg")
    photo(9, 9, 4).convert("RGBA").save(flat / "ape" / "alpha.webp")
    Image.new("RGB", (1, 1)).save(flat / "ape" / "dot.JPEG", format="PNG")
    train, test = load(flat, image_size=12)
    assert len(train) + len(test) == 25 and train.images.shape[1:] == (12, 12, 3)


def test_few_broken_images_are_left_out_listed_and_logged(flat, caplog):
    (flat / "ape" / "c03.png").write_bytes(b"")
    (flat / "zebra" / "nowhere.jpg").symlink_to(flat / "gone")
    with caplog.at_level(logging.WARNING, logger="der_fast.data"):
        train, test = load(flat)
    skipped = train.skipped + test.skipped
    assert len(train) + len(test) == 19 and len(skipped) == 2
    assert any(str(flat / "ape" / "c03.png") in entry for entry in skipped)
    assert any(str(flat / "zebra" / "nowhere.jpg") in entry and "no such file" in entry for entry in skipped)
    assert "2 of 21 images" in caplog.text and "c03.png" in caplog.text
    for source in (train, test):
        assert [(50, 200)[label] for label in source.labels.tolist()] == colours(source)


def test_many_broken_images_are_refused_with_their_paths(flat):
    for index in range(4):
        (flat / "ape" / f"c0{index}.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"4 of 20 images in .*photos cannot be read") as caught:
        load(flat)
    assert all(str(flat / "ape" / f"c0{index}.png") in str(caught.value) for index in range(4))


def test_a_class_that_loses_all_its_images_is_refused(split):
    for index in range(2):
        (split / "test" / "ape" / f"c0{index}.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"no readable test image of class 'ape'(.|\n)*c00\.png"):
        load(split)


def test_an_empty_class_is_refused_with_its_path(flat):
    (flat / "yak").mkdir()
    (flat / "yak" / "notes.txt").write_text("nothing here")
    with pytest.raises(DataError, match=r"no images in class folder .*photos/yak; add images"):
        load(flat)


def test_a_class_of_one_image_cannot_be_split(flat, write_images):
    write_images(flat / "yak", 1)
    with pytest.raises(DataError, match=r"'yak' has only 1 image.*add images, remove the class"):
        load(flat)


def test_a_class_of_one_image_is_fine_where_a_split_is_given(split, write_images):
    for part in ("train", "test"):
        write_images(split / part / "yak", 1)
    train, test = load(split)
    assert train.class_names[1] == "yak" and (len(train), len(test)) == (7, 5)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_in_one_part_only_is_refused(split, write_images, part):
    write_images(split / part / "yak", 2)
    other = {"train": "test", "test": "train"}[part]
    with pytest.raises(DataError, match=rf"no folder for class 'yak' in .*photos/{other};"):
        load(split)


def test_a_folder_without_class_folders_is_refused(tmp_path, photo):
    photo(8, 8, 1).save(tmp_path / "lonely.png")
    with pytest.raises(DataError, match="holds no class folders"):
        load(tmp_path)


def test_more_than_the_memory_allows_is_refused_before_anything_is_decoded(flat):
    for path in flat.rglob("*.png"):
        path.write_bytes(b"junk")
    with pytest.raises(DataError, match=r"20 images of 512 × 512 pixels need 0\.0146 GiB.*data\.max_gib=0\.01"):
        load(flat, image_size=512, max_gib=0.01)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_is_none_is_refused(flat, share):
    with pytest.raises(DataError, match=r"data\.test_share"):
        load(flat, test_share=share)
