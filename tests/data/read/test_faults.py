"""Files that are damaged, odd, or not there: decoded right, or left out and counted; never a wrong label, never a wait without end."""

from __future__ import annotations

import io
import logging
import os

import pytest
import torch
from PIL import Image

from der_fast.data.decode.pixels import decode
from der_fast.data.read.place import Place
from der_fast.errors import DataError
from der_fast.seeds import generator

GOOD, BAD = "decoded", "left out"


def jpeg(image, **keywords):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", "quality": 95, **keywords})
    return buffer.getvalue()


def turned(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif.tobytes()


def turned_by_xmp(data):
    body = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="6"/>'
    return data[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]


def picture():
    """Red above blue, wider than high."""
    image = Image.new("RGB", (90, 60), (200, 30, 30))
    image.paste((30, 30, 200), (0, 30, 90, 60))
    return image


ODD = {
    "cmyk.jpg": lambda path: path.write_bytes(jpeg(picture().convert("CMYK"))),
    "grey.jpg": lambda path: path.write_bytes(jpeg(picture().convert("L"))),
    "png_inside.JPEG": lambda path: picture().save(path, format="PNG"),
    "turned.jpg": lambda path: path.write_bytes(jpeg(picture().transpose(Image.Transpose.ROTATE_90), exif=turned(6))),
    "turned_by_xmp.jpg": lambda path: path.write_bytes(turned_by_xmp(jpeg(picture()))),
    "mirrored.jpg": lambda path: path.write_bytes(jpeg(picture(), exif=turned(4))),
    "one_pixel.jpg": lambda path: path.write_bytes(jpeg(Image.new("RGB", (1, 1), (9, 200, 90)))),
    "strip.png": lambda path: Image.new("RGB", (3000, 1), (9, 200, 90)).save(path),
    "palette.gif": lambda path: picture().convert("P").save(path),
    "alpha.png": lambda path: picture().convert("RGBA").save(path),
    "deep.png": lambda path: Image.fromarray((torch.arange(3600).reshape(60, 60) * 18).numpy().astype("uint16")).save(path),
    "progressive.jpg": lambda path: path.write_bytes(jpeg(picture(), progressive=True)),
    "garbage_behind.jpg": lambda path: path.write_bytes(jpeg(picture()) + b"\0" * 100),
    "without_suffix": lambda path: path.write_bytes(jpeg(picture())),
    "phone.HEIC": lambda path: picture().save(path, format="HEIF"),
}
BROKEN = {
    "truncated.jpg": lambda path: path.write_bytes(jpeg(picture())[:700]),
    "end_missing.jpg": lambda path: path.write_bytes(jpeg(Image.effect_noise((90, 60), 90).convert("RGB"))[:-900]),
    "empty.jpg": lambda path: path.write_bytes(b""),
    "one_byte.jpg": lambda path: path.write_bytes(b"\xff"),
    "text.jpg": lambda path: path.write_text("not an image"),
    "pipe.jpg": lambda path: os.mkfifo(path),
    "nowhere.jpg": lambda path: path.symlink_to(path.parent / "gone"),
    "bomb.png": lambda path: Image.new("L", (12000, 9000)).save(path),
}


@pytest.fixture
def many(photos):
    """The three classes, with enough sound images that a few broken ones are bearable."""
    source = photos / "train" / "ape" / "0.jpg"
    for index in range(400):
        (photos / "val" / "cow" / f"copy{index:03d}.jpg").hardlink_to(source)
    return photos


def batches_of(source, transform):
    return list(source.batches(None, 16, transform=transform, generator=generator(1, 2)))


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_decoded_right(photos, open_photos, reader, name):
    if name == "phone.HEIC":
        pytest.importorskip("pillow_heif", reason="needs the extra 'heic'")
    path = photos / "val" / "bee" / name
    ODD[name](path)
    _, test, _, transform = open_photos(photos, reader)
    place = test.files.index(f"val/bee/{name}")
    images = {
        int(i): image for batch in test.batches(None, 4, transform=transform) for i, image in zip(batch.indices, batch.images, strict=True)
    }
    assert len(images) == 10 and test.skipped == ()
    wanted = transform(torch.from_numpy(decode(path, (55, 55)).copy())[None])[0]
    assert (images[place] - wanted).abs().mean() < 0.1


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_left_out_and_counted(photos, open_photos, reader, name, caplog):
    if name == "bomb.png" and reader == "pillow":
        pytest.skip("the same code for both readers, and slow")
    BROKEN[name](photos / "val" / "bee" / name)
    _, test, _, transform = open_photos(photos, reader)
    place = test.files.index(f"val/bee/{name}")
    with caplog.at_level(logging.WARNING, logger="der_fast.data"):
        batches = batches_of(test, transform)
    read = torch.cat([batch.indices for batch in batches])
    assert sorted(read.tolist()) == [index for index in range(len(test)) if index != place]
    assert torch.equal(torch.cat([batch.labels for batch in batches]), test.labels[read])
    assert (
        len(test.skipped) == 1 and test.skipped[0].startswith(f"{photos}/val/bee/{name}: ") and len(test.skipped[0]) > len(str(photos)) + 20
    )
    assert str(photos / "val" / "bee" / name) in caplog.text
    # Seen before, it is not counted twice, and the other images are as they were.
    again = batches_of(test, transform)
    assert len(test.skipped) == 1
    assert all(torch.equal(one.images, other.images) for one, other in zip(batches, again, strict=True))


def test_what_was_unreadable_before_an_interruption_counts(many, open_photos, reader):
    for name in ("ape/0", "ape/1", "bee/1", "cow/copy398", "cow/copy399"):
        (many / "val" / f"{name}.jpg").unlink()
        (many / "val" / f"{name}.jpg").write_bytes(b"no image")
    _, test, _, transform = open_photos(many, reader)
    with pytest.raises(DataError, match=r"5 of the first images read, of 409 in all"):
        batches_of(test, transform)
    _, test, _, transform = open_photos(many, reader)
    place = next(iter(test.batches(None, 16, transform=transform))).place
    assert place == Place(1, 3)
    assert test.recall({}) == test.library.broken and len(test.library.broken) == 3
    elsewhere = str(many.parent / "elsewhere" / "0.jpg")
    _, resumed, _, transform = open_photos(many, reader)
    assert resumed.recall({**test.library.broken, elsewhere: "gone"}) == test.library.broken
    with pytest.raises(DataError, match=r"(?s)5 of the first images read, of 409 in all.*ape/0.jpg.*copy399.jpg"):
        list(resumed.batches(None, 16, transform=transform, start=place))
    assert sum(len(batch.indices) for batch in resumed.batches(None, 16, transform=transform, start=Place(1, 2))) == 409 - 16 - 2


def test_a_file_deleted_after_it_was_listed(photos, open_photos, reader):
    _, test, _, transform = open_photos(photos, reader)
    (photos / "val" / "bee" / "1.jpg").unlink()
    assert sum(len(batch.indices) for batch in batches_of(test, transform)) == len(test) - 1
    assert test.skipped == (f"{photos}/val/bee/1.jpg: No such file or directory",)


def test_a_file_that_may_not_be_read(photos, open_photos, reader, monkeypatch):
    """Tests often run as a user who may read everything, so the system's answer is put in its mouth."""
    really = os.open

    def refuse(path, *arguments, **keywords):
        if str(path).endswith("bee/1.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return really(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    _, test, _, transform = open_photos(photos, reader)
    assert sum(len(batch.indices) for batch in batches_of(test, transform)) == len(test) - 1
    assert test.skipped == (f"{photos}/val/bee/1.jpg: Permission denied",)


def test_what_the_decoder_alone_refuses_is_found_out(photos, open_photos, reader):
    """Headers that look sound, with nothing sound behind: one of them in each of several batches."""
    whole = jpeg(Image.effect_noise((90, 60), 90).convert("RGB"))
    for name in ("0.jpg", "1.jpg"):
        (photos / "val" / "bee" / name).write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    _, test, _, transform = open_photos(photos, reader)
    lost = [test.files.index(f"val/bee/{name}") for name in ("0.jpg", "1.jpg")]
    read = [index for batch in batches_of(test, transform) for index in batch.indices.tolist()]
    kept = [index for index in range(len(test)) if index not in lost]
    assert [index for index in read if index not in lost] == kept and len(test.skipped) == len(test) - len(read)


def test_more_than_one_in_a_hundred_stops_with_the_list(many, open_photos, reader):
    for index in range(5):
        (many / "val" / "cow" / f"copy{index:03d}.jpg").unlink()
        (many / "val" / "cow" / f"copy{index:03d}.jpg").write_bytes(b"")
    _, test, _, transform = open_photos(many, reader)
    with pytest.raises(DataError, match=r"5 of the first images read, of 409 in all, cannot be read(.|\n)*copy004\.jpg: the file is empty"):
        batches_of(test, transform)


def test_batches_of_which_nothing_is_left(photos, open_photos, reader):
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        (photos / "val" / "ape" / name).write_bytes(b"")
    _, test, train_transform, transform = open_photos(photos, reader)
    read = list(test.batches(None, 1, transform=transform))
    assert [batch.indices.tolist() for batch in read] == [[index] for index in range(3, 9)]
    assert list(test.subset(torch.arange(3)).batches(None, 2, transform=transform)) == []
    # Training leaves out a batch of which one image is left: batch-norm needs two.
    some = test.subset(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]))
    counts = [len(batch.indices) for batch in some.batches(None, 2, transform=train_transform, generator=generator(1, 3), shuffle=True)]
    assert 1 not in counts and sum(counts) <= 5
