"""Folders and everything below them: what is read, what is counted, what is passed over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset, load_folder_images
from der_fast.data.catalogue.found import find_images
from der_fast.data.catalogue.index import open_index
from der_fast.data.catalogue.scan import list_trees
from der_fast.errors import DataError


def images(tree):
    return [(folder.path / name).relative_to(tree.path).as_posix() for folder in tree.folders for name, _, _ in folder.images]


@pytest.fixture
def cat(tmp_path, write_images, photo):
    """A class with images of every kind of place and name."""
    folder = tmp_path / "photos" / "cat"
    write_images(folder, 2)
    write_images(folder / "2019" / "may", 2)
    write_images(folder / "x.jpg", 1)
    photo(9, 9, 1).save(folder / "2019" / "plain", format="JPEG")
    photo(9, 9, 2).save(folder / "odd.JPG_large", format="JPEG")
    photo(9, 9, 3).save(folder / "phone.heic", format="JPEG")
    (folder / "a.jxl").write_bytes(b"\xff\x0a" + bytes(30))
    (folder / "2019" / "b.jxl").write_bytes(b"\xff\x0a" + bytes(30))
    photo(9, 9, 4).save(folder / "raw.cr2", format="TIFF")
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "labels.json", "boxes.xml", "notes.txt"):
        (folder / name).write_bytes(b"some bytes")
    (folder / "__MACOSX").mkdir()
    write_images(folder / "__MACOSX", 1)
    return folder


READ = ["c00.png", "c01.png", "odd.JPG_large", "phone.heic", "2019/plain", "2019/may/c00.png", "2019/may/c01.png", "x.jpg/c00.png"]


def test_images_are_found_at_any_depth_and_under_any_name_and_the_rest_is_counted(cat):
    (tree,) = list_trees([cat])
    assert images(tree) == READ
    assert tree.left == {"JPEG XL": 2, "raw": 1, ".mp4": 1}
    assert not tree.is_run


def test_links_that_lead_in_a_circle_or_to_another_class_are_not_followed(cat, write_images):
    dog = write_images(cat.parent / "dog", 2)
    elsewhere = write_images(cat.parent.parent / "elsewhere", 1)
    (cat / "self").symlink_to(cat)
    (cat / "2019" / "up").symlink_to(cat.parent)
    (cat / "other").symlink_to(dog)
    (cat / "far").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(cat / "2019")
    (cat / "knot").symlink_to(cat / "knot")
    train, test = load_dataset(DataConfig(name=str(cat.parent)))
    assert len(train) + len(test) == len(READ) + 2 + 1
    (line,) = [note for note in train.notes if note.startswith("left out:")]
    assert "1 link(s) to another class (cat 1)" in line and "circle" not in line


def make_run(folder, write_images):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {}, "train": "a", "test": "b"}))
    write_images(folder / "figures", 3)
    (folder / "steps" / "01").mkdir(parents=True)
    return folder


def test_a_run_is_never_a_class_nor_are_its_figures_images(cat, write_images):
    make_run(cat / "inner", write_images)
    runs = cat.parent / "runs"
    make_run(runs / "one", write_images)
    make_run(runs / "deep" / "two", write_images)
    (runs / "begun").mkdir()
    (runs / "begun" / "index.npz").write_bytes(b"PK")
    (runs / "model.onnx").write_bytes(b"exported")
    tree, holder = list_trees([cat, runs])
    (run,) = list_trees([runs / "one"])
    assert images(tree) == READ and not tree.is_run
    assert holder.is_run and run.is_run and images(run) == []


def test_a_class_that_has_what_runs_have_is_a_class(tmp_path, write_images):
    stairs = write_images(tmp_path / "stairs" / "steps", 2).parent
    (stairs / "config.json").write_text('{"camera": "front"}')
    (stairs / "metrics.json").write_text("no JSON")
    (tree,) = list_trees([stairs])
    assert images(tree) == ["steps/c00.png", "steps/c01.png"] and not tree.is_run
    # Neither is one whose images cannot be read: it is refused by name.
    (stairs / "steps" / "c00.png").rename(stairs / "c.jxl").write_bytes(b"\xff\x0a")
    (stairs / "steps" / "c01.png").unlink()
    (tree,) = list_trees([stairs])
    assert tree.left == {"JPEG XL": 1} and not tree.is_run


def two_classes(folder, write_images):
    for name, value in (("cat", 10), ("dog", 200)):
        write_images(folder / name, 5, value=value)
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (1e9, 1e9))
    return folder


@pytest.mark.parametrize("place", ["runs/one", "dog/run", "mine", "."])
def test_a_run_inside_the_data_changes_nothing(tmp_path, write_images, place):
    photos = two_classes(tmp_path / "photos", write_images)
    config, run = DataConfig(name=str(photos)), photos / place
    before = [source.fingerprint() for source in load_dataset(config, cache=run)]
    assert (run / "index.npz").is_file()
    # As the first of the run's files, the index makes no class either.
    assert [source.fingerprint() for source in load_dataset(config, cache=run)] == before
    for name in ("checkpoints", "steps", "figures"):
        (run / name).mkdir()
    (run / "config.json").write_text(json.dumps({"config": {}, "train": "a", "test": "b"}))
    write_images(run / "figures", 2)
    for _ in range(2):
        train, test = load_dataset(config, cache=run)
        assert [source.fingerprint() for source in (train, test)] == before and train.class_names == ("cat", "dog")


def test_an_index_is_not_made_again_because_of_a_run(tmp_path, write_images):
    photos = two_classes(tmp_path / "photos", write_images)
    make_run(photos / "runs" / "one", write_images)
    open_index(photos, tmp_path / "kept")
    make_run(photos / "runs" / "two", write_images)
    make_run(photos / "other", write_images)
    index, note = open_index(photos, tmp_path / "kept")
    assert " made" not in note and sorted(Path(place).name for place in index.runs) == ["other", "runs"]
    write_images(photos / "runs", 1)
    assert "class folders were added" in open_index(photos, tmp_path / "kept")[1]


def test_a_run_cannot_be_written_into_a_class_folder(tmp_path, write_images):
    photos = two_classes(tmp_path / "photos", write_images)
    with pytest.raises(DataError, match=r"the run's folder .*photos/cat is a class folder"):
        load_dataset(DataConfig(name=str(photos)), cache=photos / "cat")
    write_images(photos / "figures", 2)
    with pytest.raises(DataError, match=r"a run writes its own figures/, but .*photos/figures is a class folder"):
        load_dataset(DataConfig(name=str(photos)), cache=photos)


def test_for_prediction_the_same_files_are_found_and_the_same_are_counted(cat, write_images):
    make_run(cat / "run", write_images)
    found = find_images([cat.parent, cat / "c00.png"])
    assert [path.relative_to(cat).as_posix() for path in found.files[:-1]] == sorted(READ, key=lambda name: Path(name).parts)
    assert len(found.notes) == 1 and "left out: 4 files" in found.notes[0] and "2 JPEG XL (cat 1, cat/2019 1)" in found.notes[0]
    pixels, paths, problems = load_folder_images(cat, (4, 4))
    assert len(pixels) == len(paths) == len(READ) and len(problems) == 1 and "1 raw (. 1)" in problems[0]


def test_a_folder_of_a_run_can_be_given_by_name(tmp_path, write_images):
    run = make_run(tmp_path / "run", write_images)
    write_images(run, 2)
    assert [path.name for path in find_images([run]).files] == ["c00.png", "c01.png"]
    assert len(find_images([run / "figures"]).files) == 3


def test_nothing_but_other_kinds_is_refused_with_what_there_is(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.jxl").write_bytes(b"\xff\x0a" + bytes(30))
    with pytest.raises(DataError, match=r"no image files in .*new or below it; left out: 1 file.* 1 JPEG XL"):
        find_images([tmp_path / "new"])
