"""The index of a folder: made, kept, and made again when it is out of date."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.data.catalogue import cache, scan
from der_fast.data.catalogue import index as indexing
from der_fast.data.catalogue.file_table import FileTable
from der_fast.errors import DataError


@pytest.fixture
def folder(tmp_path, write_images):
    """Three classes with a split, a day old."""
    for part, count in (("train", 4), ("val", 2)):
        for name in ("ape", "bee", "cow"):
            write_images(tmp_path / "photos" / part / name, count)
    age(tmp_path / "photos")
    return tmp_path / "photos"


def age(folder):
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (1e9, 1e9))


def paths(index):
    return [index.table.relative(row) for row in range(len(index.table))]


def checksum(index):
    return index.table.checksum(np.arange(len(index.table)))


def test_files_come_class_by_class_in_order(folder):
    found = indexing.build_index(folder)
    assert paths(found) == sorted(paths(found)) and len(found.table) == 18
    assert found.parts == ("train",) * 3 + ("test",) * 3 and found.classes == ("ape", "bee", "cow") * 2
    assert found.table.path(0) == str(folder / "train" / "ape" / "c00.png")
    assert found.table.sizes[0] == (folder / "train" / "ape" / "c00.png").stat().st_size


def test_it_is_kept_and_used_again(folder, tmp_path):
    first, made = indexing.open_index(folder, tmp_path / "run")
    again, used = indexing.open_index(folder, tmp_path / "run")
    assert "made" in made and "made" not in used
    assert paths(again) == paths(first) and checksum(again) == checksum(first) and again.table.folders == first.table.folders
    assert np.array_equal(again.table.sizes, first.table.sizes)


def add(folder):
    (folder / "train" / "bee" / "new.png").write_bytes(b"x")


def remove(folder):
    (folder / "val" / "cow" / "c01.png").unlink()


def rename(folder):
    (folder / "val" / "cow" / "c01.png").rename(folder / "val" / "cow" / "d01.png")


def overwrite(folder):
    (folder / "train" / "ape" / "c02.png").write_bytes(b"other")


def touch(folder):
    """Other contents of the same size."""
    path = folder / "train" / "ape" / "c02.png"
    path.write_bytes(bytes(path.stat().st_size))


def add_unseen(folder):
    """As a copy does that gives the folder the time that it has elsewhere."""
    add(folder)
    os.utime(folder / "train" / "bee", (1e9, 1e9))


def replace_unseen(folder):
    """Other contents of the same size and time."""
    touch(folder)
    os.utime(folder / "train" / "ape" / "c02.png", (1e9, 1e9))


def add_class(folder):
    for part in ("train", "val"):
        (folder / part / "yak").mkdir()
        (folder / part / "yak" / "a.png").write_bytes(b"x")


def add_below(folder):
    (folder / "train" / "ape" / "inner" / "deep" / "new.png").write_bytes(b"x")


def remove_below(folder):
    (folder / "train" / "ape" / "inner" / "deep" / "c00.png").unlink()


def add_folder_below(folder):
    (folder / "train" / "bee" / "one" / "two").mkdir(parents=True)
    (folder / "train" / "bee" / "one" / "two" / "new.png").write_bytes(b"x")


def remove_class(folder):
    for part in ("train", "val"):
        for path in (folder / part / "cow").iterdir():
            path.unlink()
        (folder / part / "cow").rmdir()


@pytest.mark.parametrize(
    "change",
    [add, remove, rename, overwrite, touch, add_unseen, replace_unseen, add_class, remove_class, add_below, remove_below, add_folder_below],
)
def test_a_change_is_noticed(folder, tmp_path, write_images, change):
    write_images(folder / "train" / "ape" / "inner" / "deep", 2)
    age(folder)
    before, _ = indexing.open_index(folder, tmp_path / "run")
    change(folder)
    after, note = indexing.open_index(folder, tmp_path / "run")
    assert "made again" in note
    assert sorted(paths(after)) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    if change not in (touch, replace_unseen):
        assert checksum(after) != checksum(before)
    assert all(after.table.sizes[row] == Path(after.table.path(row)).stat().st_size for row in range(len(after.table)))


def test_another_folder_and_a_damaged_file_are_not_used(folder, tmp_path):
    indexing.open_index(folder, tmp_path / "run")
    moved = folder.rename(tmp_path / "elsewhere")
    assert indexing.open_index(moved, tmp_path / "run")[0].table.roots == (str(moved),)
    path = tmp_path / "run" / indexing.FILE
    for data in (b"", b"PK", path.read_bytes()[:-30], path.read_bytes().replace(b"c00.png", b"c99.png")):
        path.write_bytes(data)
        assert cache.load_index(path, indexing.FolderIndex) is None
    assert paths(indexing.open_index(moved, tmp_path / "run")[0])[0] == "train/ape/c00.png"


def test_a_folder_changed_while_it_was_listed_is_listed_again(folder, tmp_path):
    add(folder)
    indexing.open_index(folder, tmp_path / "run")
    assert "changed just before it was listed" in indexing.open_index(folder, tmp_path / "run")[1]


def test_folders_below_are_not_listed_again_where_nothing_changed(folder, tmp_path, write_images, monkeypatch):
    write_images(folder / "train" / "ape" / "inner" / "deep", 2)
    (folder / "train" / "ape" / "inner" / "a.jxl").write_bytes(b"\xff\x0a")
    age(folder)
    first, _ = indexing.open_index(folder, tmp_path / "run")
    listed = []
    really = scan.list_folder
    monkeypatch.setattr(scan, "list_folder", lambda path, **keys: listed.append(path) or really(path, **keys))
    again, note = indexing.open_index(folder, tmp_path / "run")
    assert listed == [] and " made" not in note
    assert (again.left, again.tops, again.classes) == (first.left, first.tops, first.classes)
    assert dict(zip(again.table.folders, again.left, strict=True))[(0, "train/ape/inner")] == {"JPEG XL": 1}


def test_an_index_made_without_a_decoder_is_made_again_with_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "READABLE_KINDS", ())
    indexing.open_index(folder, tmp_path / "run")
    assert " made" not in indexing.open_index(folder, tmp_path / "run")[1]
    monkeypatch.setattr(cache, "READABLE_KINDS", ("HEIC",))
    assert " made" in indexing.open_index(folder, tmp_path / "run")[1]


def table_of(count, root="/data"):
    names = [f"n{index}ö.JPEG".encode() for index in range(count)]
    return FileTable.of(root, ["a", "b/c", ""], np.arange(count) % 3, names, np.arange(count) * 10)


def test_tables_are_cut_and_put_together():
    table = table_of(10)
    rows = np.array([7, 0, 7, 2])
    part = table.taken(rows)
    assert [part.path(row) for row in range(4)] == [table.path(row) for row in rows]
    assert part.path(0) == "/data/b/c/n7ö.JPEG" and part.path(3) == "/data/n2ö.JPEG" and part.sizes.tolist() == [70, 0, 70, 20]
    both = table.joined(table_of(3, "/other"))
    assert len(both) == 13 and both.path(12) == "/other/n2ö.JPEG" and both.path(9) == table.path(9)
    assert both.moved("/other", "/new").path(10) == "/new/a/n0ö.JPEG"


def test_a_checksum_is_of_relative_paths_and_sizes_in_order():
    table, rows = table_of(10), np.array([3, 1, 4])
    assert table.checksum(rows) == table.taken(rows).checksum(np.arange(3)) == table_of(10, "/moved").checksum(rows)
    assert table.checksum(np.arange(10)) == table.joined(table_of(1)).checksum(np.arange(10))
    assert len({table.checksum(np.array(other, dtype=np.int64)) for other in ([3, 1, 4], [1, 3, 4], [3, 1], [3, 1, 4, 4], [])}) == 5


@pytest.mark.parametrize(("module", "function"), [(scan, "list_folder"), (indexing, "find_layout"), (scan, "sniffed_kind")])
def test_a_drive_that_does_not_answer_ends_the_listing(folder, dead, module, function):
    (folder / "train" / "ape" / "odd").write_bytes(b"what is it?")
    dead(module, function)
    with pytest.raises(DataError, match=rf"reading {re.escape(str(folder))}.* took longer than data\.timeout=0\.2 seconds"):
        indexing.build_index(folder, 0.2)


def test_a_drive_that_does_not_answer_ends_the_comparison_with_the_index(folder, tmp_path, dead):
    indexing.open_index(folder, tmp_path / "run")
    dead(indexing, "difference")
    with pytest.raises(DataError, match=r"took longer than data\.timeout=0\.2 seconds"):
        indexing.open_index(folder, tmp_path / "run", 0.2)


def test_a_drive_that_does_not_answer_is_found_out_before_anything_else(folder, dead):
    config = DataConfig(name=str(folder), timeout=0.2)
    dead(Path, "exists")
    with pytest.raises(DataError, match=rf"reading {re.escape(str(folder))} took longer than data\.timeout=0\.2 seconds"):
        load_dataset(config)
