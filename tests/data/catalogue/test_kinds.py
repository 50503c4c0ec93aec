"""What a file is: by its name where that is known, else by its first bytes."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from PIL import Image

from der_fast.data.catalogue import kinds
from der_fast.data.decode.encoded import read_encoded
from der_fast.data.decode.pixels import decode_files


def save(path, form="PNG", **keywords):
    Image.new("RGB", (20, 12), (200, 30, 30)).save(path, format=form, **keywords)
    return path


@pytest.mark.parametrize("name", ["photo", "IMG_1", "photo.JPG_large", "photo.jpg.1", "image.img", "a.b c"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_images_are_known_whatever_they_are_called(tmp_path, name, form):
    assert not kinds.is_image_name(name)
    assert kinds.sniffed_kind(save(tmp_path / name, form)) is None


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("plain", b"\1\2\3\4" * 20, kinds.NO_SUFFIX),
        ("Python notes", b"Python and P6 are no images", kinds.NO_SUFFIX),
        ("Dr. Smith, the second of his name", b"?", kinds.NO_SUFFIX),
        ("clip.MP4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", ".mp4"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", ".svg"),
        ("photo", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", kinds.HEIC),
        ("photo", b"\0\0\0\x0cJXL \r\n\x87\n", kinds.JPEG_XL),
        ("photo.bin", b"\xff\x0a" + bytes(30), kinds.JPEG_XL),
        ("photo", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", kinds.RAW),
        ("photo.NEF", b"MM\0*" + bytes(40), kinds.RAW),
        ("cut.png_", b"\x89PNG\r\n\x1a\n" + bytes(4), ".png_"),
    ],
)
def test_other_files_are_called_by_their_kind(tmp_path, name, data, kind):
    (tmp_path / name).write_bytes(data)
    assert kinds.sniffed_kind(tmp_path / name) == kind


def test_of_a_raw_file_the_small_preview_is_not_taken(tmp_path):
    assert kinds.sniffed_kind(save(tmp_path / "a.cr2", "TIFF")) == kinds.RAW
    assert kinds.sniffed_kind(save(tmp_path / "a", "TIFF", tiffinfo={254: 1})) == kinds.RAW
    assert kinds.sniffed_kind(save(tmp_path / "b", "TIFF", tiffinfo={50706: b"\1\4\0\0"})) == kinds.RAW
    assert kinds.sniffed_kind(save(tmp_path / "c", "TIFF", tiffinfo={254: 0})) is None
    # Cameras give their JPEGs the names of raw files now and then.
    assert kinds.sniffed_kind(save(tmp_path / "d.dng", "JPEG")) is None


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini", "__MACOSX", "@eaDir", "._photo.jpg"])
def test_rubbish(name):
    assert kinds.is_rubbish(name)


@pytest.mark.parametrize("name", ["labels.txt", "a.JSON", "a.xml", "boxes.csv", "README", "LICENSE"])
def test_notes_are_no_images_that_anybody_misses(name):
    assert kinds.is_note(name) and not kinds.is_rubbish(name)


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif", reason="needs the extra 'heic'")
    path = save(tmp_path / "a.heic", "HEIF")
    assert kinds.is_image_name(path.name) and kinds.HEIC in kinds.READABLE_KINDS
    assert kinds.sniffed_kind(path.rename(tmp_path / "a")) is None


def test_heic_is_a_kind_that_cannot_be_read_where_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.init()
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    spec = importlib.util.spec_from_file_location("kinds_without", kinds.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    assert not without.is_image_name("a.HEIC") and without.is_image_name("a.jpg")
    assert without.unread_kind("a.HEIC") == without.kind_by_name("a.heif") == kinds.HEIC and kinds.HEIC not in without.READABLE_KINDS
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))
    assert without.sniffed_kind(tmp_path / "a.heic") == kinds.HEIC
    # Phones call JPEGs so, too.
    assert without.sniffed_kind(save(tmp_path / "b.heic", "JPEG")) is None
    (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))
    with pytest.raises(ValueError, match=r"HEIC cannot be read here; pip install 'der_fast\[heic\]' to read them"):
        without.open_image(tmp_path / "c.heic", "c.heic")


def test_files_given_by_name_are_refused_as_what_they_are(tmp_path):
    """Nobody counts them, since a person or a list names them; of a raw file the preview would be taken for the image."""
    save(tmp_path / "a.nef", "TIFF")
    save(tmp_path / "plain", "TIFF", tiffinfo={254: 1})
    (tmp_path / "b.jxl").write_bytes(b"\xff\x0a" + bytes(30))
    (tmp_path / "c.jpg").write_bytes(b"\0\0\0\x0cJXL \r\n\x87\n")
    problems = decode_files(sorted(tmp_path.iterdir()), (8, 8)).problems
    assert [problem.split(": ")[1][:24] for problem in problems] == [
        "a camera raw file, whose",
        "JPEG XL cannot be read h",
        "JPEG XL cannot be read h",
        "a camera raw file, whose",
    ]
    for name in ("plain", "b.jxl"):
        with pytest.raises(ValueError, match="raw file|JPEG XL"):
            read_encoded(str(tmp_path / name))
