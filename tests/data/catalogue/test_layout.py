"""Which folders are parts of a split, which are classes, and what is said of those that could be either."""

from __future__ import annotations

import logging
import re

import pytest

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.data.catalogue.layout import TEST, TRAIN, find_layout, find_tars, part_named
from der_fast.errors import DataError


def fill(write_images, folder, *classes, count=3):
    for number, name in enumerate(classes):
        write_images(folder / name, count, value=40 * number)
    return folder


def load(folder, **keys):
    return load_dataset(DataConfig(name=str(folder), **keys))


@pytest.mark.parametrize(
    "name", ["train", "Train", "TRAIN", "training", "Training", "train_set", "trainset", "training-images", "Train Data"]
)
def test_what_a_training_part_is_called(name):
    assert part_named(name) == TRAIN


@pytest.mark.parametrize("name", ["test", "Test", "testing", "val", "VAL", "valid", "Validation", "val_set", "Test Images", "eval", "dev"])
def test_what_a_test_part_is_called(name):
    assert part_named(name) == TEST


@pytest.mark.parametrize("name", ["cat", "trainer", "train station", "test tube", "data", "set", "latest", "devil", "valley", "contest"])
def test_what_is_no_part(name):
    assert part_named(name) is None


@pytest.mark.parametrize(("one", "other"), [("Train", "valid"), ("TRAIN", "TEST"), ("training", "Validation"), ("train_set", "testing")])
def test_a_split_is_used_however_it_is_called(tmp_path, write_images, one, other):
    fill(write_images, tmp_path / one, "ape", "zebra")
    fill(write_images, tmp_path / other, "ape", "zebra", count=2)
    train, test = load(tmp_path)
    assert train.class_names == ("ape", "zebra") and (len(train), len(test)) == (6, 4)
    assert train.notes == ()


def test_the_other_part_and_what_lies_beside_a_split_are_named(tmp_path, write_images, caplog):
    for part in ("train", "Test", "val"):
        fill(write_images, tmp_path / part, "ape", "zebra")
    write_images(tmp_path / "extra", 2)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "boxes.xml").write_text("<a/>")
    said = []
    with caplog.at_level(logging.INFO, logger="der_fast.data"):
        train, test = load_dataset(DataConfig(name=str(tmp_path)), say=said.append)
    assert test.files[0].startswith("Test/")
    assert list(train.notes) == [
        f"{tmp_path}/extra is not used: the classes are those of train and Test",
        f"{tmp_path}/val is not used: the test part is Test",
    ]
    assert said == list(train.notes) and all(note in caplog.text for note in said)


def test_a_flat_test_part_is_named(tmp_path, write_images):
    fill(write_images, tmp_path / "Train", "ape", "zebra")
    write_images(tmp_path / "Val", 2)
    assert load(tmp_path)[0].notes == (f"{tmp_path}/Val is not used: it has no class folders",)


@pytest.mark.parametrize(
    "names", [("train", "test"), ("Train", "Validation"), ("train2017", "val2017"), ("my_train", "my_test"), ("test", "val")]
)
def test_parts_without_class_folders_are_refused_as_what_they_look_like(tmp_path, write_images, names):
    fill(write_images, tmp_path, *names)
    with pytest.raises(DataError, match=rf"holds {', '.join(sorted(names))}, which look like the parts of a split, not like classes"):
        load(tmp_path)


def test_two_training_parts_are_refused(tmp_path, write_images):
    for part in ("train", "Training"):
        fill(write_images, tmp_path / part, "ape", "zebra")
    with pytest.raises(DataError, match="holds train and Training, which both look like the training part"):
        load(tmp_path)


def test_classes_that_are_called_as_parts_are_classes_and_it_is_said(tmp_path, write_images):
    fill(write_images, tmp_path, "ape", "test", "freight train", "toy train")
    train, _ = load(tmp_path)
    assert train.class_names == ("ape", "freight train", "test", "toy train")
    assert len(train.notes) == 1 and "test is taken for a class, though its name is that of a test part" in train.notes[0]


def test_images_beside_the_class_folders_are_counted(tmp_path, write_images):
    fill(write_images, tmp_path / "train", "ape", "zebra")
    fill(write_images, tmp_path / "test", "ape", "zebra")
    write_images(tmp_path, 2)
    write_images(tmp_path / "train", 1)
    assert [note for note in load(tmp_path)[0].notes if re.match("left out: 3 images next to the class folders", note)]


def test_a_class_that_is_all_there_is_and_lies_in_folders_is_explained(tmp_path, write_images):
    fill(write_images, tmp_path / "photos", "ape", "zebra")
    train, _ = load(tmp_path)
    assert train.class_names == ("photos",)
    assert "all images are in folders below 'photos', which is taken for one class; if these folders are the classes" in train.notes[0]


def test_folders_that_differ_in_their_bytes_only_are_one_class(tmp_path, write_images):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_images(tmp_path / "train" / composed, 2)
    if (tmp_path / "train" / decomposed).exists():
        pytest.skip("this file system does not tell the two spellings apart")
    (write_images(tmp_path / "train" / decomposed, 3) / "c00.png").rename(tmp_path / "train" / decomposed / "other.png")
    fill(write_images, tmp_path / "train", "tea")
    # The other system wrote the test part.
    fill(write_images, tmp_path / "test", decomposed, "tea")
    train, test = load(tmp_path)
    assert train.class_names == test.class_names == (composed, "tea")
    assert train.labels.tolist() == [0] * 5 + [1] * 3 and test.labels.tolist() == [0] * 3 + [1] * 3
    assert any("2 folders are called 'café'" in note for note in train.notes)
    assert len(load(tmp_path, classes=(decomposed,))[0]) == len(load(tmp_path, classes=(composed,))[0]) == 5


def test_the_held_out_images_do_not_depend_on_how_a_system_spells(tmp_path, write_images):
    held = []
    for place, name in (("mac", "cafe\u0301"), ("linux", "caf\u00e9")):
        folder = write_images(tmp_path / place / name, 10)
        for path in sorted(folder.iterdir()):
            path.rename(folder / f"{name} {path.name}")
        write_images(tmp_path / place / "tea", 10)
        held.append([file[-7:] for file in load(tmp_path / place)[1].files])
    assert held[0] == held[1]


@pytest.mark.parametrize(("train", "test"), [("Train", "Validation"), ("training", "testing"), ("train", "val")])
def test_tars_of_a_split_are_found_however_it_is_called(tmp_path, train, test):
    for part in (train, test):
        (tmp_path / part).mkdir()
        (tmp_path / part / "0.tar").write_bytes(b"")
    assert find_tars(tmp_path) == {TRAIN: [tmp_path / train / "0.tar"], TEST: [tmp_path / test / "0.tar"]}


def test_a_run_beside_tars_does_not_hide_them(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.json").write_text('{"config": {}, "train": "", "test": ""}')
    assert find_tars(tmp_path) == {"whole": [tmp_path / "0.tar"]}


def test_a_run_in_the_folder_of_the_images_leaves_no_classes(tmp_path, write_images):
    fill(write_images, tmp_path, "ape", "zebra", "figures")
    (tmp_path / "steps").mkdir()
    assert len(find_layout(tmp_path).classes) == 4
    (tmp_path / "metrics.json").write_text('{"protocol": "B0-2", "steps": [], "top1": []}')
    assert [entry.name for _, entry in find_layout(tmp_path).classes] == ["ape", "zebra"]
