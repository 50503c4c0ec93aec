"""The index file beside a run: what lies in it, so that those written before are found valid."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.data.catalogue.cache import load_index
from der_fast.data.catalogue.file_table import last_change
from der_fast.data.catalogue.index import FolderIndex, open_index
from der_fast.data.catalogue.kinds import READABLE_KINDS
from der_fast.data.catalogue.tars import TarIndex
from der_fast.files import write_bytes

LISTED = 2_000_000_000_000_000_000


def write_index(path, facts, **arrays):
    """Write an index file as version 0.1.0 did."""
    buffer = io.BytesIO()
    np.savez(buffer, facts=np.frombuffer(json.dumps({"format": 3, "readable": READABLE_KINDS, **facts}).encode(), np.uint8), **arrays)
    write_bytes(path, buffer.getvalue())


def columns(names, sizes, folder, kind):
    ends = np.cumsum([len(name) for name in names])
    return {"folder": np.array(folder, kind), "names": np.frombuffer(b"".join(names), np.uint8), "ends": ends, "sizes": np.array(sizes)}


@pytest.fixture
def folder(tmp_path, write_images):
    """Two classes of two images; one class also has a film."""
    for name in ("ape", "bee"):
        write_images(tmp_path / "photos" / name, 2)
    (tmp_path / "photos" / "ape" / "film.mp4").write_bytes(b"x")
    return tmp_path / "photos"


def test_an_older_index_of_a_folder_is_used(folder, tmp_path):
    new, note = open_index(folder, tmp_path / "new")
    assert note == "index of 4 files made"
    files = sorted(folder.rglob("*.png"))
    facts = {
        "root": str(folder),
        "folders": ["ape", "bee"],
        "parts": ["whole", "whole"],
        "classes": ["ape", "bee"],
        "folders_changed": [last_change((folder / name).stat()) for name in ("ape", "bee")],
        "listed": LISTED,
        "checksum": new.table.checksum(np.arange(4)),
        "tops": [True, True],
        "left": [{".mp4": 1}, {}],
    }
    sizes, changed = [file.stat().st_size for file in files], [last_change(file.stat()) for file in files]
    names = [file.name.encode() for file in files]
    write_index(tmp_path / "old" / "index.npz", facts, changed=np.array(changed), **columns(names, sizes, [0, 0, 1, 1], np.int32))
    old, note = open_index(folder, tmp_path / "old")
    assert note == f"index of 4 files: {tmp_path / 'old' / 'index.npz'}"
    assert [old.table.path(row) for row in range(4)] == [str(file) for file in files] and old.table.folder.dtype == np.int64
    for name in ("parts", "classes", "folders_changed", "tops", "left"):
        assert getattr(old, name) == getattr(new, name), name
    assert old.changed.tolist() == new.changed.tolist()


def test_an_older_index_of_tars_is_used(folder, tmp_path):
    path = tmp_path / "shards" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(sorted(folder.rglob("*.png"))):
            tar.add(file, f"{number}.png")
            entry = tarfile.TarInfo(f"{number}.cls")
            entry.size = 3
            tar.addfile(entry, io.BytesIO(file.parent.name.encode()))
    config = DataConfig(name=str(path.parent), reader="pillow", workers=0, image_size=8, random_resized_crop=True, test_share=0.5)
    first, _ = load_dataset(config, cache=tmp_path / "new")
    new = load_index(tmp_path / "new" / "tars.npz", TarIndex)
    facts = {
        "root": str(path.parent),
        "folders": ["0.tar"],
        "classes": ["ape", "bee"],
        "tars": [[path.stat().st_size, last_change(path.stat())]],
        "left": {"ape": {".mp4": 1}},
        "checksum": new.table.checksum(np.arange(4)),
    }
    names = [os.fsencode(new.table.name(row)) for row in range(4)]
    write_index(tmp_path / "old" / "tars.npz", facts, labels=new.labels, **columns(names, new.table.sizes, [0] * 4, np.int64))
    train, _ = load_dataset(config, cache=tmp_path / "old")
    assert train.notes[0].startswith(f"index of 4 images in 1 tar(s): {tmp_path / 'old' / 'tars.npz'}") and train.files == first.files
    assert any(".mp4" in note for note in train.notes)


@pytest.mark.parametrize("what", ["format", "readable", "checksum", "parts", "rows"])
def test_a_file_that_does_not_fit_is_not_used(folder, tmp_path, what):
    open_index(folder, tmp_path)
    path = tmp_path / "index.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    facts = json.loads(arrays.pop("facts").tobytes())
    if what == "rows":
        arrays["changed"] = arrays["changed"][:-1]
    elif what == "parts":
        del facts["parts"]
    else:
        facts[what] = {"format": 2, "readable": ["HEIC", "of another machine"], "checksum": "0" * 64}[what]
    assert load_index(path, FolderIndex) is not None
    write_index(path, facts, **arrays)
    assert load_index(path, FolderIndex) is None
