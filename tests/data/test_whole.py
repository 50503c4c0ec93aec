"""All images of a data set, in the parts in which a run would have learned and held them out."""

from __future__ import annotations

import io
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from der_fast.config.schema import DataConfig
from der_fast.data.load import load_dataset
from der_fast.data.whole import load_whole
from der_fast.errors import DataError


def write(folder, classes):
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng([len(name), index]).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def config_of(place, **keys):
    return DataConfig(name=str(place), image_size=8, **keys)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("in_files", [False, True])
def test_the_parts_are_those_of_training(split, in_files, tmp_path):
    if split:
        write(tmp_path / "train", {"a": 5, "bb": 6})
        write(tmp_path / "test", {"a": 2, "bb": 1})
    else:
        write(tmp_path, {"a": 5, "bb": 6})
    config = config_of(tmp_path, reader="pillow" if in_files else "memory", workers=0)
    train, test = load_dataset(config)
    whole = load_whole(config, in_files=in_files)
    assert (whole.load_rest().files, whole.load_test().files) == (train.files, test.files)
    assert whole.load_test().fingerprint() == test.fingerprint()
    assert whole.split is split and whole.empty == ()
    assert len(whole.to_measure()) == (len(test) if split else len(test) + len(train))


def test_classes_in_one_part_only_and_without_images(tmp_path):
    write(tmp_path / "train", {"a": 2, "c": 0})
    write(tmp_path / "test", {"b": 2, "c": 0})
    whole = load_whole(config_of(tmp_path))
    assert (whole.class_names, whole.empty) == (("a", "b"), ("c",))
    assert whole.load_test().labels.tolist() == [1, 1] and whole.load_rest().labels.tolist() == [0, 0]


@pytest.mark.parametrize("part", ["test", "val", "validation"])
def test_a_test_folder_alone(part, tmp_path):
    write(tmp_path / part, {"a": 1, "b": 3})
    assert len(load_whole(config_of(tmp_path)).to_measure()) == 4


def test_a_class_that_is_called_test(tmp_path):
    write(tmp_path, {"test": 3})
    assert load_whole(config_of(tmp_path)).class_names == ("test",)
    write(tmp_path, {"a": 3})
    assert load_whole(config_of(tmp_path)).class_names == ("a", "test")


def test_all_classes_are_listed_where_one_that_is_wanted_is_not_there(tmp_path):
    write(tmp_path, {"a": 2, "b": 2, "c": 2})
    config = config_of(tmp_path, classes=("a", "b"))
    assert load_whole(config).class_names == ("a", "b")
    assert load_whole(replace(config, classes=("a", "gone"))).class_names == ("a", "b", "c")


def test_lists(tmp_path):
    write(tmp_path, {"a": 3, "b": 1})
    (tmp_path / "one.txt").write_text("a/0.png a\na/1.png a\nb/0.png b\n")
    (tmp_path / "two.txt").write_text("a/2.png a\n")
    assert len(load_whole(config_of(tmp_path / "one.txt")).to_measure()) == 3
    both = load_whole(config_of(tmp_path / "one.txt", test_list=str(tmp_path / "two.txt")))
    assert both.to_measure().files == ("a/2.png",)


@pytest.mark.parametrize("part", ["", "test", "train"])
def test_tars(part, tmp_path):
    (tmp_path / part).mkdir(exist_ok=True)
    files = write(tmp_path / "images", {"a": 4, "b": 1})
    with tarfile.open(tmp_path / part / "0.tar", "w") as tar:
        for number, path in enumerate(sorted(files.rglob("*.png"))):
            for suffix, data in (("png", path.read_bytes()), ("cls", path.parent.name.encode())):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    shutil.rmtree(files)
    whole = load_whole(config_of(tmp_path))
    assert (whole.class_names, len(whole.to_measure())) == (("a", "b"), 5)
    assert len(load_whole(config_of(tmp_path / part / "0.tar"), in_files=True).to_measure()) == 5


def test_a_known_data_set(tmp_path):
    config = DataConfig(name="digits", image_size=8)
    train, test = load_dataset(config)
    whole = load_whole(config)
    assert (len(whole.load_test()), len(whole.load_rest()), whole.split) == (len(test), len(train), True)


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        load_whole(config_of(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no class folders"):
        load_whole(config_of(tmp_path))
    write(tmp_path, {"a": 0})
    with pytest.raises(DataError, match="no images to measure"):
        load_whole(config_of(tmp_path)).to_measure()


def test_what_is_left_out_of_it_is_said(tmp_path):
    write(tmp_path, {"a": 2, "bb": 3})
    (tmp_path / "a" / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    (note,) = load_whole(config_of(tmp_path)).notes
    assert "a" in note and "left out" in note, note
    assert not load_whole(config_of(tmp_path, classes=("bb",))).notes
