"""What a JPEG's header says."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from der_fast.data.decode.jpeg import plain_size


def encoded(image, **keywords):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", **keywords})
    return buffer.getvalue()


def rotated(turn):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = turn
    return exif.tobytes()


def with_xmp(data, xmp):
    """A JPEG with a block that not every version of Pillow writes."""
    body = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    return data[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]


@pytest.mark.parametrize("keywords", [{}, {"progressive": True}, {"comment": b"hello"}, {"exif": rotated(1)}, {"quality": 100}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_images(photo, mode, keywords):
    data = encoded(photo(37, 21, 1).convert(mode), **keywords)
    assert plain_size(data) == (37, 21)
    assert plain_size(data + b"\0\0\n") == (37, 21)


@pytest.mark.parametrize("turn", range(2, 9))
def test_turned_images_are_not_plain(photo, turn):
    assert plain_size(encoded(photo(37, 21, 1), exif=rotated(turn))) is None


def test_images_that_xmp_alone_turns_are_not_plain(photo):
    data = encoded(photo(37, 21, 1))
    assert plain_size(with_xmp(data, b'<rdf:Description tiff:Orientation="6"/>')) is None
    assert plain_size(with_xmp(data, b"<rdf:Description/>")) == (37, 21)


def test_whatever_else_is_not_plain(photo):
    image = photo(37, 21, 1)
    data = encoded(image)
    others = [b"", b"\xff", b"hello", encoded(image.convert("CMYK")), encoded(image, format="PNG"), data[:-2], data[: len(data) // 2]]
    assert [plain_size(other) for other in others] == [None] * len(others)
    assert plain_size(encoded(image, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")) is None


def test_absurd_sizes_are_not_plain(photo):
    data = bytearray(encoded(photo(37, 21, 1)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    assert plain_size(bytes(data)) is None
    data[at : at + 4] = bytes(4)
    assert plain_size(bytes(data)) is None


def test_no_header_makes_it_raise(photo):
    """Every beginning of a file, and every byte of the header changed."""
    data = encoded(photo(9, 9, 1), exif=rotated(1))
    for end in range(len(data)):
        assert plain_size(data[:end]) is None
    for index in range(200):
        for value in (0, 1, 0x7F, 0xFF):
            changed = bytearray(data)
            changed[index] = value
            size = plain_size(bytes(changed))
            assert size is None or min(size) > 0
