"""WebDataset tars: the same images as a folder's, read where they lie in the tars."""

from __future__ import annotations

import io
import json
import os
import tarfile

import pytest
import torch

from der_fast.config.resolve import preset_for
from der_fast.data.memory_source import MemorySource
from der_fast.data.storage import from_record, located, record_of
from der_fast.errors import DataError
from der_fast.seeds import generator


def write_tar(path, members, **keywords):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **keywords) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def members_of(folder, files, first=0):
    """Every file as a sample: an image, something that nobody asks for, and the class in one of the ways there are."""
    for number, file in enumerate(files, first):
        yield f"./a.b/{number:05d}.jpg", (folder / file).read_bytes()
        yield f"./a.b/{number:05d}.txt", b"a caption"
        name = (folder / file).parent.name
        if number % 2:
            yield f"./a.b/{number:05d}.json", json.dumps({"width": 3, "label": name}).encode()
        else:
            yield f"./a.b/{number:05d}.cls", f"{name}\n".encode()


@pytest.fixture
def shards(photos, tmp_path):
    """The photos in three tars for training and one for testing, classes mixed."""
    for part in ("train", "val"):
        files = sorted(path.relative_to(photos) for path in (photos / part).rglob("*.jpg"))
        files = sorted(files, key=lambda path: path.name)
        size = 8 if part == "train" else 9
        for number, start in enumerate(range(0, len(files), size)):
            write_tar(tmp_path / "shards" / part / f"{number:04d}.tar", members_of(photos, files[start : start + size], start))
    return tmp_path / "shards"


def epoch(source, transform, **keywords):
    return list(source.batches(None, 4, transform=transform, generator=generator(1), shuffle=True, **keywords))


def by_bytes(source, batches):
    """Digest of an image's bytes → (image, class); in a tar and in a folder the same."""
    source.library.digests.clear()
    digests = record_of(source)[0]["sha256"]
    return {
        bytes(digests[index].tolist()): (image, source.class_names[label])
        for batch in batches
        for index, image, label in zip(batch.indices.tolist(), batch.images, batch.labels.tolist(), strict=True)
    }


def test_it_holds_what_the_folder_holds(photos, shards, open_photos, reader):
    train, test, transform, test_transform = open_photos(shards, reader)
    folder, folder_test, *_ = open_photos(photos, reader)
    assert train.class_names == folder.class_names and torch.equal(train.labels, folder.labels) and len(test) == 9
    for one, other in ((train, folder), (test, folder_test)):
        found, wanted = (by_bytes(source, source.batches(None, 4, transform=test_transform)) for source in (one, other))
        assert found.keys() == wanted.keys() and len(found) == len(one)
        assert all(torch.equal(found[key][0], wanted[key][0]) and found[key][1] == wanted[key][1] for key in found)
    first, again = epoch(train, transform), epoch(train, transform)
    assert all(torch.equal(one.images, other.images) for one, other in zip(first, again, strict=True))
    assert train.files[0].startswith("train/0000.tar/") and "00000.jpg@" in train.files[0]


def test_in_memory_and_in_the_resident_cache(shards, open_photos):
    plain, _, transform, _ = open_photos(shards, "pillow")
    cached, *_ = open_photos(shards, "pillow", cache_gib=1.0)
    held, *_ = open_photos_in_memory(shards)
    assert isinstance(held, MemorySource) and held.files == plain.files
    assert torch.equal(plain.pixels(torch.tensor([3, 20])), held.images[[3, 20]])
    for one, other in zip(epoch(cached, transform), epoch(plain, transform), strict=True):
        assert torch.equal(one.indices, other.indices) and (one.images - other.images).abs().mean() < 0.15


def open_photos_in_memory(place):
    from der_fast.config.schema import DataConfig
    from der_fast.data import load_dataset, transforms_for

    config = DataConfig(name=str(place), reader="memory", image_size=48, random_resized_crop=True)
    train, test = load_dataset(config)
    return train, test, *transforms_for(config, train.image_size)


def test_one_tar_or_a_folder_of_tars_without_a_split(photos, shards, open_photos):
    for place in (shards / "train" / "0000.tar", shards / "train"):
        train, test, *_ = open_photos(place, "pillow")
        assert train.class_names == ("ape", "bee", "cow") and len(train) + len(test) == (8 if place.suffix else 21)
        assert not set(train.files) & set(test.files)
        assert preset_for(str(place), None) == "photos"
    # Tars beside class folders are what these came out of.
    write_tar(photos / "train.tar", [])
    assert open_photos(photos, "pillow")[0].files[0] == "train/ape/0.jpg"


def test_only_some_classes(shards, open_photos):
    train, test, *_ = open_photos(shards, "pillow", classes=("cow", "ape"), train_per_class=4)
    assert train.class_names == test.class_names == ("ape", "cow") and (len(train), len(test)) == (8, 6)
    with pytest.raises(DataError, match=r"data\.classes names 'yak'"):
        open_photos(shards, "pillow", classes=("cow", "yak"))
    (shards / "val" / "0000.tar").unlink()
    write_tar(shards / "val" / "0.tar", [("1.cls", b"ape"), ("1.png", b"x")])
    with pytest.raises(DataError, match=r"'bee', 'cow' is in only one of .*train and .*val"):
        open_photos(shards, "pillow")


def test_the_list_is_kept_and_made_again_for_other_tars(shards, tmp_path):
    from der_fast.config.schema import DataConfig
    from der_fast.data import load_dataset

    config = DataConfig(name=str(shards), reader="pillow", workers=0, image_size=48, random_resized_crop=True)

    def opened():
        train, _ = load_dataset(config, cache=tmp_path / "run")
        return train.notes[0].endswith("made"), train.fingerprint()

    first = opened()
    assert first[0] and opened() == (False, first[1])
    path = tmp_path / "run" / "tars.npz"
    path.write_bytes(path.read_bytes()[:-40])
    assert opened() == first and not opened()[0]
    os.utime(shards / "val" / "0000.tar", (1, 1))
    assert opened() == first and not opened()[0]
    (shards / "train" / "0002.tar").unlink()
    assert opened()[0] and opened()[1] != first[1]


def test_a_rehearsal_memory_is_found_where_the_tars_were_moved(shards, open_photos, tmp_path):
    train, *_ = open_photos(shards, "pillow")
    chosen = train.subset(torch.tensor([20, 0, 3]))
    back = from_record(*record_of(chosen), train.library.settings)
    moved = shards.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="3 of 3 images of the rehearsal memory are not where they were"):
        located(back, [])
    found = located(back, [str(moved)])
    assert found.table.roots == (str(moved),) and found.files == chosen.files
    (moved / "train" / "0000.tar").write_bytes(bytes((moved / "train" / "0000.tar").stat().st_size))
    assert len(located(from_record(*record_of(found), train.library.settings), [])) == 3


@pytest.mark.parametrize("what", ["in an image", "in a header", "between two", "its end", "a header", "nothing is left"])
def test_a_tar_that_is_cut_off_or_damaged_is_refused(shards, open_photos, what):
    path = shards / "train" / "0001.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[6]
    if what == "a header":
        data[member.offset + 5] ^= 0xFF
    else:
        cuts = {"in an image": member.offset_data + 9, "in a header": member.offset + 100, "between two": member.offset, "its end": None}
        end = max(index for index, byte in enumerate(data) if byte) // 512 * 512 + 512
        del data[0 if what == "nothing is left" else cuts[what] or end :]
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot read .*0001\.tar as an uncompressed tar: .*; download it again"):
        open_photos(shards, "pillow")


def test_a_tar_that_is_cut_off_or_goes_away_later_is_left_out_and_counted(shards, open_photos, reader):
    _, test, _, transform = open_photos(shards, reader)
    path = shards / "val" / "0000.tar"
    with tarfile.open(path) as tar:
        last = [member for member in tar.getmembers() if member.name.endswith(".jpg")][-1]
    os.truncate(path, last.offset_data + last.size - 1)
    assert sum(len(batch.indices) for batch in test.batches(None, 4, transform=transform)) == len(test) - 1
    assert len(test.skipped) == 1 and test.skipped[0].endswith("the tar ends before the image does") and "/00008.jpg@" in test.skipped[0]
    path.unlink()
    with pytest.raises(DataError, match="No such file or directory"):
        list(test.batches(None, 4, transform=transform))


def test_a_broken_image_in_a_tar_is_left_out_and_counted(photos, tmp_path, open_photos, reader):
    files = sorted(path.relative_to(photos) for path in (photos / "train").rglob("*.jpg"))
    members = [(name, data[:200] if name.endswith("00004.jpg") else data) for name, data in members_of(photos, files)]
    write_tar(tmp_path / "all.tar", members)
    train, test, _, transform = open_photos(tmp_path / "all.tar", reader)
    read = sum(len(batch.indices) for source in (train, test) for batch in source.batches(None, 4, transform=transform))
    assert read == 20 and len(train.skipped) == 1 and "/all.tar/./a.b/00004.jpg@" in train.skipped[0]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("1.jpg", b"x")], "sample '/1' has no class"),
        ([("1.jpg", b"x"), ("1.json", b'{"other": 1}')], "sample '/1' has no class"),
        ([("a/1.jpg", b"x"), ("a/1.png", b"x"), ("a/1.cls", b"0")], "sample 'a/1' has 2 images"),
        ([("1.jpg", b"x"), ("1.cls", b"\xff\xfe")], r"1\.cls is not text"),
        ([("1.jpg", b"x"), ("1.json", b"{")], r"1\.json is not text"),
        ([("1.cls", b"0"), ("README", b"hello")], "no images in the tars"),
    ],
)
def test_tars_that_are_no_data_set(tmp_path, open_photos, members, words):
    with pytest.raises(DataError, match=words):
        open_photos(write_tar(tmp_path / "a.tar", members), "pillow")


def test_a_compressed_tar_is_refused(photos, tmp_path, open_photos):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(photos)
    with pytest.raises(DataError, match="or decompress it"):
        open_photos(tmp_path / "a.tar", "pillow")


def test_images_of_kinds_that_cannot_be_read_are_counted_by_class(photos, tmp_path, open_photos):
    files = sorted(path.relative_to(photos) for path in (photos / "train").rglob("*.jpg"))
    others = [("x/1.jxl", b"\xff\x0a"), ("x/1.cls", b"ape"), ("x/2.cr2", b"II*\0"), ("x/2.json", b'{"label": "bee"}'), ("x/3.nef", b"MM")]
    # Beside an image that is read, a raw file is the same picture.
    both = [("y/1.cr2", b"II*\0"), ("y/1.jpg", (photos / files[0]).read_bytes()), ("y/1.cls", b"ape")]
    tar = write_tar(tmp_path / "all.tar", [*members_of(photos, files), *others, *both])
    train, test, *_ = open_photos(tar, "pillow")
    assert len(train) + len(test) == len(files) + 1
    line = "left out: 3 files that cannot be read as images: 2 raw (without a class 1, bee 1); 1 JPEG XL (ape 1)"
    assert line in train.notes
    assert not [note for note in open_photos(tar, "pillow", classes=("cow", "bee"))[0].notes if "JPEG XL" in note]


def test_a_class_is_one_whatever_bytes_stand_for_it(photos, tmp_path, open_photos):
    data = (photos / "train" / "ape" / "0.jpg").read_bytes()
    names = ["caf\u00e9", "cafe\u0301"] * 3 + ["tea"] * 3
    members = [entry for number, name in enumerate(names) for entry in ((f"{number}.jpg", data), (f"{number}.cls", name.encode()))]
    train, test, *_ = open_photos(write_tar(tmp_path / "all.tar", members), "pillow")
    assert train.class_names == ("caf\u00e9", "tea") and len(train) + len(test) == 9
    assert open_photos(tmp_path / "all.tar", "pillow", classes=("cafe\u0301", "tea"))[0].class_names == train.class_names
