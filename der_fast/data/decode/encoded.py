"""Image files as they go into a decoder: read, checked, and converted to a form that every decoder reads alike."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps

from der_fast.data.catalogue.kinds import open_image
from der_fast.data.decode.jpeg import plain_size
from der_fast.data.decode.pixels import to_rgb
from der_fast.data.io.members import read_bytes


@dataclass(frozen=True)
class Encoded:
    """One image file.

    Args:
        data: a plain JPEG (see `plain_size`), or a PPM that Pillow made from anything else.
        height, width: in pixels, upright.
    """

    data: bytes
    height: int
    width: int


def read_encoded(path: str, *, plainly: bool = True) -> Encoded:
    """Read a file for a decoder.

    Args:
        path: the file.
        plainly: pass a plain JPEG on unchanged; False decodes it here, for files that the other decoder refused.

    Raises:
        Exception: whatever the system or Pillow raises on a missing or damaged file.
    """
    data = read_bytes(path)
    size = plain_size(data) if plainly else None
    if size is not None:
        return Encoded(data, *size)
    with open_upright(data) as image:
        pixels = to_rgb(image)
        return Encoded(b"P6\n%d %d\n255\n" % pixels.size + pixels.tobytes(), pixels.size[1], pixels.size[0])


def open_upright(data: bytes) -> Image.Image:
    """Open an image and turn it upright as its EXIF data says; it is not decoded unless it has to be."""
    with warnings.catch_warnings():
        # Pillow warns about odd EXIF blocks and palettes that it copes with. An absurdly large picture must not fill the memory.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = open_image(io.BytesIO(data))
        ImageOps.exif_transpose(image, in_place=True)
    return image
