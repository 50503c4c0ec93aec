"""What a JPEG's header says, without decoding it."""

from __future__ import annotations

# The most pixels that Pillow considers harmless.
_MOST_PIXELS = 89_478_485
_FRAMES = (0xC0, 0xC1, 0xC2)
_STANDALONE = (0x01, *range(0xD0, 0xD8))
_SCAN = 0xDA
_ADOBE, _APP1 = 0xEE, 0xE1
_ORIENTATION = 0x0112


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that any decoder reads alike; None for everything else.

    Plain means: baseline or progressive Huffman code, 8 bits, grey or YCbCr, upright, of a harmless size, and complete.

    Args:
        data: the whole file.
    """
    if data[:2] != b"\xff\xd8" or data.rstrip(b"\0\n\r")[-2:] != b"\xff\xd9":
        return None
    size, at = None, 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in _STANDALONE:
            at += 2
            continue
        if marker == _SCAN:
            return size
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) < length - 2 or not _is_plain(marker, body):
            return None
        if marker in _FRAMES:
            size = (int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"))
        at += 2 + length
    return None


def _is_plain(marker: int, body: bytes) -> bool:
    """Whether a segment says nothing out of the ordinary."""
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
        pixels = int.from_bytes(body[1:3], "big") * int.from_bytes(body[3:5], "big")
        return marker in _FRAMES and len(body) >= 6 and body[0] == 8 and body[5] in (1, 3) and 0 < pixels <= _MOST_PIXELS
    if marker == _ADOBE and body[:5] == b"Adobe":
        return len(body) >= 12 and body[11] == 1
    if marker != _APP1:
        return True
    # Without an orientation in EXIF, Pillow follows the one in XMP, so a file with one in XMP is left to Pillow.
    return _orientation(body[6:]) in (None, 1) if body[:6] == b"Exif\0\0" else b"tiff:Orientation" not in body


def _orientation(tiff: bytes) -> int | None:
    """Return the orientation in an EXIF block: None if it has none, 0 if it cannot be read."""
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 0

    def number(start: int, length: int) -> int:
        return int.from_bytes(tiff[start : start + length], "little" if order == "little" else "big")

    start = number(4, 4)
    if start + 2 > len(tiff):
        return 0
    for entry in range(start + 2, start + 2 + 12 * number(start, 2), 12):
        if entry + 12 > len(tiff):
            return 0
        if number(entry, 2) == _ORIENTATION:
            return number(entry + 8, 2)
    return None
