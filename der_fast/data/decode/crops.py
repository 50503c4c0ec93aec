"""Windows of image files, decoded with Pillow and resized. Nothing here needs PyTorch, so processes that only decode start fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from der_fast.data.augment.draws import Floats, Ints, windows_of
from der_fast.data.decode.encoded import open_upright
from der_fast.data.decode.pixels import Pixels, reason_of, to_rgb
from der_fast.data.io.members import read_bytes


@dataclass(frozen=True)
class Crops:
    """The files to decode together, and how.

    Args:
        paths: the n files.
        numbers: (n, 24) random numbers of the images; None in evaluation.
        resized: (height, width) to which windows are resized.
        size: (height, width) of the result, cut out of the middle.
    """

    paths: Sequence[str]
    numbers: Floats | None
    resized: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Cropped:
    """The result of decoding `Crops`.

    Args:
        pixels: uint8, k × H × W × 3: the images that could be read.
        kept: (k,) int64: which of the files they are.
        problems: (path, reason) of all others.
    """

    pixels: Pixels
    kept: Ints
    problems: list[tuple[str, str]]


def decode_crops(crops: Crops) -> Cropped:
    """Decode; a file that cannot be read is left out and listed in `problems`."""
    pixels = np.empty((len(crops.paths), *crops.size, 3), dtype=np.uint8)
    kept: list[int] = []
    problems: list[tuple[str, str]] = []
    for index, path in enumerate(crops.paths):
        try:
            image = open_upright(read_bytes(path))
            width, height = image.size
            own = None if crops.numbers is None else crops.numbers[index : index + 1]
            window = windows_of(own, np.array([height]), np.array([width]))[0]
            pixels[len(kept)] = _cut(image, window.tolist(), crops)
        except MemoryError:
            raise
        except Exception as error:  # damaged bytes make the decoders raise almost anything
            problems.append((path, reason_of(error)))
        else:
            kept.append(index)
    return Cropped(pixels[: len(kept)], np.array(kept, dtype=np.int64), problems)


def _cut(image: Image.Image, window: list[int], crops: Crops) -> Pixels:
    """Resize a window of an image and cut off what an evaluation's centre crop leaves out."""
    top, left, height, width = window
    rows, columns = crops.resized
    full = image.size
    # A JPEG can be decoded at half its size or less; the image to resize stays at least twice as large as wanted.
    image.draft(None, (-(-2 * columns * full[0] // width), -(-2 * rows * full[1] // height)))
    x, y = image.size[0] / full[0], image.size[1] / full[1]
    box = (left * x, top * y, min((left + width) * x, image.size[0]), min((top + height) * y, image.size[1]))
    pixels = np.asarray(to_rgb(image).resize((columns, rows), Image.Resampling.BILINEAR, box=box))
    height, width = crops.size
    top, left = (rows - height) // 2, (columns - width) // 2
    return pixels[top : top + height, left : left + width]
