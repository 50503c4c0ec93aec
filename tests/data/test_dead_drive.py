"""A drive that does not answer ends the work after `data.timeout`, whatever is asked of it."""

from __future__ import annotations

import pytest

from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.data.catalogue import found, index, listing, scan, tars
from der_fast.data.catalogue.found import find_images
from der_fast.data.catalogue.index import build_index
from der_fast.data.decode import pixels as decode
from der_fast.data.decode.pixels import decode_files
from der_fast.data.sets import folder
from der_fast.errors import DataError

NO_ANSWER = r"took longer than data\.timeout=0\.2 seconds"


@pytest.fixture
def data(tmp_path, write_images):
    """A folder of class folders, a list of its files, and a folder with a tar."""
    for name in ("ape", "bee"):
        write_images(tmp_path / "photos" / name, 4)
    files = sorted((tmp_path / "photos").rglob("*.png"))
    (tmp_path / "list.txt").write_text("".join(f"{path}\t{path.parent.name}\n" for path in files))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(bytes(1024))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("list.txt", listing, "_text_of"),
        ("list.txt", listing, "_sizes"),
        ("list.txt", listing, "_size"),
        ("list.txt", folder, "_largest_side"),
        ("list.txt", decode, "decode"),
        ("photos", folder, "find_tars"),
        ("photos", index, "find_layout"),
        ("photos", index, "identity_of"),
        ("photos", scan, "list_folder"),
        ("photos", folder, "openable"),
        ("shards", tars.os, "stat"),
        ("shards", tars, "read_tar"),
    ],
)
def test_loading_ends(data, dead, monkeypatch, name, module, function):
    if module is tars.os:
        # Everything asks for a file's facts, so only the question of `tars` is left without an answer.
        module = type("Os", (), {"stat": None, "path": tars.os.path, "fsencode": tars.os.fsencode})
        monkeypatch.setattr(tars, "os", module)
    dead(module, function)
    with pytest.raises(DataError, match=NO_ANSWER):
        load_dataset(DataConfig(name=str(data / name), timeout=0.2))


@pytest.mark.parametrize(("module", "function"), [(found, "_kind_of"), (scan, "_list_given")])
def test_looking_for_images_to_predict_ends(data, dead, module, function):
    dead(module, function)
    with pytest.raises(DataError, match=NO_ANSWER):
        find_images([data / "photos"], 0.2)


def test_decoding_ends(data, dead):
    dead(decode, "decode")
    with pytest.raises(DataError, match=NO_ANSWER):
        decode_files([data / "photos" / "ape" / "c00.png"], (8, 8), timeout=0.2)


def test_other_answers_come_through(data):
    assert len(build_index(data / "photos", 5.0).table) == 8
    assert len(load_dataset(DataConfig(name=str(data / "list.txt"), timeout=5.0))[0]) == 6
