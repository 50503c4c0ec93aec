"""What a file is: a readable image, an image of an unreadable kind, a note next to images, or clutter that systems leave.

A known suffix decides. For all other files, and for those without a suffix, the first bytes decide.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError, features

from der_fast.data.io.members import openable

_HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif", ".heics", ".heifs"))
try:
    import pillow_heif
except ImportError:
    HAS_HEIF = False
else:
    # Once, at import: decoding processes import this module too.
    pillow_heif.register_heif_opener()
    HAS_HEIF = True

HEIC, AVIF, JPEG_2000, JPEG_XL, RAW = "HEIC", "AVIF", "JPEG 2000", "JPEG XL", "raw"
NO_SUFFIX = "without a suffix and not an image"
LINK = "link(s) to another class"
IMAGE_KINDS = frozenset((HEIC, AVIF, JPEG_2000, JPEG_XL, RAW))

# What makes a kind readable.
REMEDIES = {
    HEIC: "pip install 'der_fast[heic]' to read them",
    AVIF: "Pillow 11.3 or newer reads them",
    JPEG_2000: "a Pillow built with OpenJPEG reads them",
}

_DEPENDING = {
    HEIC: (_HEIF_SUFFIXES, HAS_HEIF),
    AVIF: (frozenset((".avif", ".avifs")), bool(features.check("avif"))),
    JPEG_2000: (frozenset((".jp2", ".j2k", ".jpx", ".j2c", ".jpc", ".jpf")), bool(features.check("jpg_2000"))),
}
# Kinds that need an installed package; an index made with other packages is out of date.
READABLE_KINDS = tuple(kind for kind, (_, there) in _DEPENDING.items() if there)

IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in "jpg jpeg jpe jfif mpo png apng bmp dib webp gif tif tiff ppm pgm pbm pnm tga qoi".split()  # noqa: SIM905
).union(*(suffixes for suffixes, there in _DEPENDING.values() if there))

_RAW_SUFFIXES = "3fr ari arw bay cr2 cr3 crw dcr dng erf fff iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f"
_UNREAD_SUFFIXES = {
    ".jxl": JPEG_XL,
    **{f".{suffix}": RAW for suffix in _RAW_SUFFIXES.split()},
    **{suffix: kind for kind, (suffixes, there) in _DEPENDING.items() if not there for suffix in suffixes},
}

# Labels, notes and what cameras and programs write next to their images: nobody misses these.
_NOTE_SUFFIXES = (
    "txt json jsonl xml csv tsv md rst yaml yml toml ini cfg conf html htm css js log doc docx xls xlsx xmp aae thm url lnk "
    "py ipynb sh bat db sqlite cls md5 sha1 sha256 license bak tmp part crdownload"
)
_NOTES = frozenset(f".{suffix}" for suffix in _NOTE_SUFFIXES.split())
_NOTE_NAMES = frozenset(("readme", "license", "licence", "copying", "authors", "notice", "makefile", "citation", "changelog", "version"))
_RUBBISH = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
)

# TGA has no signature, and the rest are not pictures of things.
_SNIFFED = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "HEIF", "QOI", "PCX", "SGI", "PSD", "ICO")
_SUBFILE_TYPE, _DNG_VERSION = 254, 50706
_HEAD = 64
_MOST_SUFFIX = 9


def is_rubbish(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems create everywhere (`Thumbs.db`, `__MACOSX`)."""
    return name.startswith(".") or name.lower() in _RUBBISH


def suffix_of(name: str) -> str:
    """Return a name's suffix in lower case with its dot, or '' without one."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def is_image_name(name: str) -> bool:
    """Whether the suffix is that of a readable image."""
    return suffix_of(name) in IMAGE_SUFFIXES


def is_note(name: str) -> bool:
    """Whether it is a text, a label file or a program's data, which are found next to images everywhere."""
    return suffix_of(name) in _NOTES or name.lower() in _NOTE_NAMES


def unread_kind(name: str) -> str | None:
    """Return the kind of unreadable image that the suffix stands for; None for all other suffixes."""
    return _UNREAD_SUFFIXES.get(suffix_of(name))


def kind_by_name(name: str) -> str:
    """Return what a count calls a file that is not a readable image: its kind of image, else its suffix."""
    suffix = suffix_of(name)
    # A long one is not a suffix but the end of a sentence.
    return _UNREAD_SUFFIXES.get(suffix) or (suffix if 1 < len(suffix) <= _MOST_SUFFIX else NO_SUFFIX)


def sniffed_kind(path: Path) -> str | None:
    """Look into a file whose name does not say that it is an image.

    Returns:
        None for a readable image, else what a count calls it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(openable(path), formats=_formats()) as image:
                return RAW if _is_raw(image, path.name) else None
    except UnidentifiedImageError:
        return _kind_of_head(_head(path)) or kind_by_name(path.name)
    except Image.DecompressionBombError:
        # It is an image, and will be refused when it is read.
        return None
    except Exception:  # damaged headers make the decoders raise almost anything
        return kind_by_name(path.name)


@functools.cache
def _formats() -> list[str]:
    """The formats recognised by their first bytes, as far as Pillow supports them."""
    Image.init()
    return [name for name in _SNIFFED if name in Image.OPEN]


def open_image(file: Path | io.BytesIO, name: str = "") -> Image.Image:
    """Open an image with Pillow, including HEIC if pillow-heif is installed; its pixels are not read yet.

    Args:
        file: a regular file's path, or its contents.
        name: the file's name, if it is known.

    Raises:
        ValueError: a kind that cannot be read; the message names it and the remedy.
        Exception: whatever Pillow raises on a damaged or unknown file.
    """
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        kind = _kind_of_head(_head(file)) or _UNREAD_SUFFIXES.get(suffix_of(name))
        if kind is None:
            raise
        raise ValueError(f"{kind} cannot be read here{f'; {REMEDIES[kind]}' if kind in REMEDIES else ''}") from None
    if _is_raw(image, name):
        image.close()
        raise ValueError("a camera raw file, whose small preview is all that could be read; give the developed image")
    return image


def _is_raw(image: Image.Image, name: str) -> bool:
    """Whether a TIFF is a camera raw file; Pillow would read only its small preview."""
    if image.format != "TIFF":
        return False
    tags = getattr(image, "tag_v2", {})
    return unread_kind(name) == RAW or _DNG_VERSION in tags or bool(int(tags.get(_SUBFILE_TYPE, 0)) & 1)


def _head(file: Path | io.BytesIO) -> bytes:
    """Return the first bytes; b'' if they cannot be read."""
    with contextlib.suppress(OSError):
        if isinstance(file, io.BytesIO):
            return file.getvalue()[:_HEAD]
        with file.open("rb") as opened:
            return opened.read(_HEAD)
    return b""


def _kind_of_head(head: bytes) -> str | None:
    """Return the kind of image that a file's first bytes show, among those that Pillow may not know."""
    if head[4:8] == b"ftyp":
        for kind, marks in ((HEIC, (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")), (AVIF, (b"avif", b"avis")), (RAW, (b"crx ",))):
            if any(mark in head[8:] for mark in marks):
                return kind
    return JPEG_XL if head[:2] == b"\xff\x0a" or head[4:8] == b"JXL " else None
