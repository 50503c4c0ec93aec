"""Images of every kind come out right, or are reported by path."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from der_fast.data.decode.pixels import decode, decode_files

RED, GREEN = (255, 0, 0), (0, 255, 0)


def centre(path, size=(8, 8)):
    pixels = decode(path, size)
    assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8
    return tuple(int(value) for value in pixels[size[0] // 2, size[1] // 2])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("I;16", 0x4D11, (0x4D, 0x4D, 0x4D)),
    ],
)
def test_modes_in_png(tmp_path, mode, colour, expected):
    path = tmp_path / "image.png"
    Image.new(mode, (8, 8), colour).save(path)
    assert centre(path) == expected


def test_half_transparent_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert centre(tmp_path / "half.png") == (127, 127, 127)


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RED, *GREEN])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert centre(tmp_path / "opaque.png") == RED
    assert centre(tmp_path / "clear.png") == (255, 255, 255)


def test_cmyk_jpeg(tmp_path):
    path = tmp_path / "cmyk.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=95)
    red, green, blue = centre(path)
    assert red > 240 and green < 15 and blue < 15


def test_grey_jpeg(tmp_path):
    Image.new("L", (16, 16), 90).save(tmp_path / "grey.jpg", quality=95)
    assert centre(tmp_path / "grey.jpg") == (90, 90, 90)


def test_the_bytes_decide_not_the_suffix(tmp_path):
    path = tmp_path / "really_a_png.JPEG"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path, format="PNG")
    assert centre(path) == (1, 2, 3)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    assert centre(tmp_path / "dot.png", (5, 6)) == (9, 8, 7)


@pytest.mark.parametrize(("width", "height"), [(1, 3000), (3000, 1), (2, 7)])
def test_extreme_shapes(tmp_path, width, height):
    Image.new("RGB", (width, height), GREEN).save(tmp_path / "strip.png")
    assert centre(tmp_path / "strip.png") == GREEN


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = np.zeros((16, 16, 3), dtype=np.uint8)
    upright[:8, :8], upright[:8, 8:] = RED, GREEN
    # How a camera held in each orientation stores this scene; the inverse of what a viewer does.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"{orientation}.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert np.array_equal(decode(path, (16, 16)), upright)


def test_short_side_is_resized_and_the_rest_cut_off_evenly(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, :10], wide[:, 10:20], wide[:, 20:] = RED, GREEN, RED
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.array_equal(decode(tmp_path / "wide.png", (10, 10)), wide[:, 10:20])
    half = decode(tmp_path / "wide.png", (5, 5))
    assert (half[:, 1:4] == GREEN).all()


def test_large_jpegs_decoded_at_reduced_scale_look_the_same(tmp_path, photo):
    image = photo(8, 8, 3).resize((1000, 760), Image.Resampling.BICUBIC)
    image.save(tmp_path / "large.jpg", quality=95)
    image.save(tmp_path / "large.png")
    difference = decode(tmp_path / "large.jpg", (64, 64)).astype(int) - decode(tmp_path / "large.png", (64, 64))
    assert abs(difference).max() < 12 and abs(difference).mean() < 2


def bad_files(folder, photo):
    """Return file name → part of the reason that must be given."""
    photo(64, 64, 1).save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "header_only.jpg").write_bytes(data[:30])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image at all")
    (folder / "folder.jpg").mkdir()
    photo(64, 64, 1).save(folder / "broken.png")
    broken = bytearray((folder / "broken.png").read_bytes())
    broken[200:240] = bytes(40)
    (folder / "broken.png").write_bytes(broken)
    Image.new("F", (4, 4), 0.5).save(folder / "float.tif")
    os.mkfifo(folder / "pipe.jpg")
    return {
        "truncated.jpg": "truncated",
        "header_only.jpg": "",
        "zero.jpg": "not an image",
        "text.png": "not an image",
        "folder.jpg": "a folder, not an image",
        "broken.png": "",
        "float.tif": "no known range",
        "pipe.jpg": "not a regular file",
        "missing.jpg": "no such file",
    }


@pytest.mark.timeout(60)
def test_unreadable_files_are_reported_by_path_and_the_others_kept_in_order(tmp_path, photo):
    reasons = bad_files(tmp_path, photo)
    paths = []
    for index, name in enumerate(reasons):
        good = tmp_path / f"good{index}.png"
        Image.new("RGB", (8, 8), (index, 50, 50)).save(good)
        paths += [good, tmp_path / name]
    decoded = decode_files(paths, (8, 8))
    assert decoded.kept == list(range(0, len(paths), 2))
    assert decoded.lost == list(range(1, len(paths), 2))
    assert decoded.images[:, 4, 4, 0].tolist() == list(range(len(reasons)))
    for problem, (name, reason) in zip(decoded.problems, reasons.items(), strict=True):
        path, _, text = problem.partition(": ")
        assert path == str(tmp_path / name) and reason in text and text


def test_parts_of_a_list(tmp_path):
    paths = []
    for index in range(6):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (4, 4), (index, 0, 0)).save(paths[-1])
    paths[1].write_bytes(b"")
    paths[4].write_bytes(b"")
    part = decode_files(paths, (4, 4)).part(2, 6)
    assert part.kept == [0, 1, 3] and part.lost == [2]
    assert part.images[:, 0, 0, 0].tolist() == [2, 3, 5]
    assert part.problems[0].startswith(str(paths[4]))


def test_many_files_in_several_threads_keep_their_order(tmp_path):
    paths = []
    for index in range(200):
        paths.append(tmp_path / f"{index:03d}.png")
        Image.new("RGB", (2, 2), (index, 0, 0)).save(paths[-1])
    done = []
    decoded = decode_files(paths, (2, 2), progress=done.append)
    assert decoded.images[:, 0, 0, 0].tolist() == list(range(200))
    assert sum(done) == 200
