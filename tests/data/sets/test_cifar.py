"""The official archives: checksum first, then an unpickler that builds arrays and nothing else.

The archives of these tests are small, but pickled in the form of the real ones (protocol 2 as Python 2 wrote it, byte strings throughout).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest

from der_fast.config.schema import DataConfig
from der_fast.data import load, load_dataset
from der_fast.data.load import archive_folder
from der_fast.data.sets import cifar
from der_fast.errors import DataError


def text(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value


def whole(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def array(value: np.ndarray) -> bytes:
    """The opcodes with which NumPy under Python 2 pickled a uint8 matrix."""
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + whole(0)
        + whole(1)
        + b"\x87R("
        + whole(3)
        + text(b"|")
        + b"NNN"
        + whole(-1) * 2
        + whole(0)
        + b"tb"
    )
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + whole(0) + b"\x85" + text(b"b") + b"\x87R"
    shape = whole(value.shape[0]) + whole(value.shape[1]) + b"\x86"
    return empty + b"(" + whole(1) + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"


def listed(values: list) -> bytes:
    return b"](" + b"".join(text(value) if isinstance(value, bytes) else whole(value) for value in values) + b"e"


def dictionary(entries: dict) -> bytes:
    body = b"".join(text(key) + (array(value) if isinstance(value, np.ndarray) else listed(value)) for key, value in entries.items())
    return b"\x80\x02}(" + body + b"u."


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def pack(path, members: dict[str, bytes]) -> str:
    """Write a .tar.gz and return its MD5."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def cifar10_members() -> dict[str, bytes]:
    names = [f"class{index}".encode() for index in range(10)]
    members = {"cifar-10-batches-py/batches.meta": dictionary({b"label_names": names})}
    for number in range(1, 6):
        entries = {
            b"data": rows(4, number),
            b"labels": [number, 0, 9, number],
            b"filenames": [f"{number}_{index}.png".encode() for index in range(4)],
        }
        members[f"cifar-10-batches-py/data_batch_{number}"] = dictionary(entries)
    members["cifar-10-batches-py/test_batch"] = dictionary({b"data": rows(3, 9), b"labels": [1, 2, 3]})
    return members


def cifar100_members() -> dict[str, bytes]:
    return {
        "cifar-100-python/meta": dictionary(
            {b"fine_label_names": [f"fine{i}".encode() for i in range(100)], b"coarse_label_names": [b"coarse"]}
        ),
        "cifar-100-python/train": dictionary({b"data": rows(5, 1), b"fine_labels": [99, 0, 1, 2, 3], b"coarse_labels": [0, 0, 0, 0, 0]}),
        "cifar-100-python/test": dictionary({b"data": rows(2, 2), b"fine_labels": [5, 6], b"coarse_labels": [0, 0]}),
    }


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that puts an archive in place and makes its checksum the published one."""

    def put(name, members):
        archive = cifar.ARCHIVES[name]
        md5 = pack(tmp_path / archive.file, members)
        monkeypatch.setattr(cifar, "ARCHIVES", {**cifar.ARCHIVES, name: dataclasses.replace(archive, md5=md5)})
        return tmp_path / archive.file

    return put


def config(tmp_path, name="cifar10", **keys):
    return DataConfig(name=name, root=str(tmp_path), **keys)


def test_cifar10(tmp_path, install):
    install("cifar10", cifar10_members())
    train, test = load_dataset(config(tmp_path))
    assert train.class_names == test.class_names == tuple(f"class{index}" for index in range(10))
    assert (len(train), len(test)) == (20, 3) and train.image_size == (32, 32)
    assert train.labels.tolist() == [label for number in range(1, 6) for label in (number, 0, 9, number)]
    planes = rows(4, 2)[1].reshape(3, 32, 32)
    assert np.array_equal(train.images[5].numpy(), planes.transpose(1, 2, 0))
    assert train.files[5] == "data_batch_2/2_1.png" and test.files is None


def test_cifar100_has_its_fine_labels(tmp_path, install):
    install("cifar100", cifar100_members())
    train, test = load_dataset(config(tmp_path, "cifar100"))
    assert len(train.class_names) == 100 and train.class_names[99] == "fine99"
    assert train.labels.tolist() == [99, 0, 1, 2, 3] and test.labels.tolist() == [5, 6]


def test_classes_select_in_the_archives_order(tmp_path, install):
    path = install("cifar10", cifar10_members())
    said = []
    train, test = load_dataset(config(tmp_path, classes=("class3", "class2")), say=said.append)
    assert train.class_names == test.class_names == ("class2", "class3")
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [0, 1]
    assert train.files == ("data_batch_2/2_0.png", "data_batch_2/2_3.png", "data_batch_3/3_0.png", "data_batch_3/3_3.png")
    assert said == [f"cifar10 is read from the official archive {path}"] == list(train.notes)
    with pytest.raises(DataError, match="data.classes names klass, but cifar10 has no such class"):
        load_dataset(config(tmp_path, classes=("class2", "klass")))


def test_limit_per_class_takes_the_first(tmp_path, install):
    install("cifar10", cifar10_members())
    train, _ = load_dataset(config(tmp_path, train_per_class=1, image_size=16))
    assert sorted(train.labels.tolist()) == [0, 1, 2, 3, 4, 5, 9] and train.image_size == (16, 16)
    assert train.files[0] == "data_batch_1/1_0.png"


def test_what_newer_numpy_pickles_is_read_too(tmp_path, install):
    members = cifar10_members()
    members["cifar-10-batches-py/test_batch"] = pickle.dumps({b"data": rows(3, 9), b"labels": [1, 2, 3]}, protocol=3)
    install("cifar10", members)
    assert np.array_equal(load_dataset(config(tmp_path))[1].images.permute(0, 3, 1, 2).reshape(3, -1).numpy(), rows(3, 9))


class Trap:
    """Leaves a file behind when a careless unpickler loads it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_wrong_checksum_is_refused_before_anything_is_unpickled(tmp_path, monkeypatch):
    members = cifar10_members()
    members["cifar-10-batches-py/batches.meta"] = pickle.dumps(Trap(tmp_path / "sprung"), protocol=2)
    pack(tmp_path / "cifar-10-python.tar.gz", members)
    monkeypatch.setattr(cifar.ArrayUnpickler, "load", lambda self: pytest.fail("unpickled before the checksum was verified"))
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz is damaged.*expected c58f30108f718f92721af3d95e74349a"):
        load_dataset(config(tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_a_truncated_archive_is_refused(tmp_path, install):
    path = install("cifar10", cifar10_members())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="is damaged or not the official file"):
        load_dataset(config(tmp_path))


def test_code_in_a_pickle_is_refused_even_with_the_right_checksum(tmp_path, install):
    members = cifar10_members()
    members["cifar-10-batches-py/test_batch"] = pickle.dumps(Trap(tmp_path / "sprung"), protocol=2)
    install("cifar10", members)
    with pytest.raises(DataError, match=r"asks for (io|__builtin__|_io)\.open"):
        load_dataset(config(tmp_path))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy", "core.multiarray._reconstruct"),
    ],
)
def test_only_arrays_can_be_named(module, name):
    data = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."
    with pytest.raises(pickle.UnpicklingError, match=f"{module}.{name}"):
        cifar.ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cifar-10-batches-py/test_batch": None}, "cannot be read"),
        ({"cifar-10-batches-py/test_batch": dictionary({b"data": rows(3, 9), b"labels": [1, 2]})}, "test_batch holds uint8"),
        (
            {"cifar-10-batches-py/test_batch": dictionary({b"data": rows(3, 9)[:, :3000].copy(), b"labels": [1, 2, 3]})},
            "expected uint8 N × 3072",
        ),
        ({"cifar-10-batches-py/test_batch": dictionary({b"data": rows(1, 9), b"labels": [10]})}, "label 10 of image 0"),
        ({"cifar-10-batches-py/test_batch": dictionary({b"labels": [1]})}, "cannot be read"),
        ({"cifar-10-batches-py/test_batch": b"\x80\x02}("}, "cannot be read"),
    ],
)
def test_unexpected_content_is_refused(tmp_path, install, change, message):
    members = {name: data for name, data in {**cifar10_members(), **change}.items() if data is not None}
    install("cifar10", members)
    with pytest.raises(DataError, match=message):
        load_dataset(config(tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_missing_archive_says_where_it_was_looked_for_and_where_to_get_it(tmp_path, name):
    archive = cifar.ARCHIVES[name]
    with pytest.raises(DataError) as caught:
        load_dataset(config(tmp_path, name))
    message = str(caught.value)
    assert archive.file in message and str(tmp_path) in message and archive.url in message and "data.download" in message
    assert "--download" in caught.value.on_command_line()


def test_an_unpacked_folder_is_not_trusted(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="unpacked folder .* is not used"):
        load_dataset(config(tmp_path))


def test_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"not in {tmp_path}/cache/der_fast"):
        load_dataset(DataConfig(name="cifar10"))


def test_an_archive_that_version_0_1_downloaded_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = cifar.ARCHIVES["cifar10"].file
    older, newer = tmp_path / ".cache" / "der_fast", tmp_path / "cache" / "der_fast"
    older.mkdir(parents=True)
    assert archive_folder(None, file) == newer
    (older / file).write_bytes(b"")
    assert archive_folder(None, file) == older and archive_folder(None, cifar.ARCHIVES["cifar100"].file) == newer
    newer.mkdir(parents=True)
    (newer / file).write_bytes(b"")
    assert archive_folder(None, file) == newer
    assert archive_folder("~/elsewhere", file) == tmp_path / "elsewhere"


def test_without_a_home_an_archive_needs_a_folder(monkeypatch):
    monkeypatch.setattr(load, "cache_folder", lambda: None)
    monkeypatch.setattr(load, "older_cache_folder", lambda: None)
    with pytest.raises(DataError, match=r"no home folder to keep it in: name the folder that holds it with data\.root"):
        load_dataset(DataConfig(name="cifar10", download=True))
