"""Many images, part by part, so that a list of ten thousand photos is never in memory as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from der_fast.data.decode.convert import fit_batch, rgb_batch, to_pil
from der_fast.data.decode.forms import as_array, channels_last, check_shape, check_values, holds_numbers, shape_of
from der_fast.data.decode.pixels import Decoded, Pixels, decode_files, fit, reason_of
from der_fast.data.io.members import openable, split_member
from der_fast.errors import DataError
from der_fast.home import expand

# Bytes of pixels in one part.
PART_BYTES = 64 * 2**20
# A part is a whole number of prediction batches, so that cutting into parts does not make batches smaller.
_WHOLE = 256


def part_length(size: tuple[int, int]) -> int:
    """Return how many images of `size` (height, width) make one part."""
    most = max(1, PART_BYTES // (3 * size[0] * size[1]))
    return most - most % _WHOLE if most > _WHOLE else most


def file_parts(files: Sequence[Path], size: tuple[int, int]) -> Iterator[tuple[Sequence[Path], Decoded]]:
    """Decode files part by part, each part in several threads.

    Args:
        files: image files.
        size: (height, width) of the result in pixels.

    Yields:
        A part of the files and its result; only one part is in memory at a time.
    """
    most = part_length(size)
    for start in range(0, len(files), most):
        part = files[start : start + most]
        yield part, decode_files(part, size)


def image_parts(images: Any, size: tuple[int, int]) -> Iterator[Tensor]:
    """Turn images of any form into pixels, part by part.

    Args:
        images: one image or many:

            - a path, or a Pillow image of any mode; it is turned upright as its EXIF data says, and transparency is laid over white;
            - an array or tensor of 2 or 3 axes is one image (H × W, H × W × C or C × H × W), of 4 axes many (N × H × W × C or
              N × C × H × W), with 1 channel (grey), 2 (grey, alpha), 3 (RGB, not OpenCV's BGR) or 4 (RGB, alpha), as long as only one of
              the two axes can hold channels; see `der_fast.data.decode.forms`. uint8; bool; uint16, of which the upper 8 bits count;
              or floating in [0, 1]; any strides;
            - a list, tuple, one-dimensional array or generator of any of these, one image each.
        size: (height, width) in pixels; images of other sizes are resized to cover it and cut off evenly.

    Yields:
        uint8, n × size[0] × size[1] × 3, on the CPU; n at least 1 and at most `part_length(size)`. Files are decoded in several threads, a
        generator is read one part at a time, and only one part is in memory.

    Raises:
        DataError: any other form, or a file that cannot be read. Everything but the contents of files and a generator's items is checked
            before the first part.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    if holds_numbers(images):
        array = as_array(images, "the array or tensor of images")
        # An array of paths or of Pillow images is a list.
        if array.ndim == 1 and array.dtype.kind in "OUT":
            images = array.tolist()
        else:
            yield from _of_array(array, size)
            return
    if (
        not isinstance(images, Iterable)
        or isinstance(images, (bytes, bytearray, memoryview, set, frozenset, Mapping))
        or hasattr(images, "read")
    ):
        raise DataError(f"images is a {type(images).__name__}; give a path, a Pillow image, an array or tensor, or a list of them")
    if isinstance(images, (list, tuple)):
        for index, image in enumerate(images):
            _check_form(image, f"image {index}")
    yield from _of_items(images, size)


def as_image_batch(images: Any, size: tuple[int, int]) -> Tensor:
    """Return images of any form as one batch of pixels: all parts of `image_parts` together, which must fit into memory.

    Args:
        images, size: as for `image_parts`.

    Returns:
        uint8, N × size[0] × size[1] × 3, on the CPU.

    Raises:
        DataError: as `image_parts`.
    """
    parts = list(image_parts(images, size))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.zeros(0, *size, 3, dtype=torch.uint8)


def _of_array(array: np.ndarray[Any, Any], size: tuple[int, int]) -> Iterator[Tensor]:
    what = "the array or tensor of images"
    images = channels_last(array, what, many=True)
    check_values(array, what)
    most = part_length(size)
    for start in range(0, len(images), most):
        yield fit_batch(rgb_batch(images[start : start + most]), size)


def _of_items(images: Iterable[Any], size: tuple[int, int]) -> Iterator[Tensor]:
    numbered = enumerate(images)
    while True:
        # Images in memory are resized as they come; files are collected, to be decoded together.
        done: list[Pixels | None] = []
        files: list[Path] = []
        for index, image in islice(numbered, part_length(size)):
            if isinstance(image, (str, os.PathLike)):
                files.append(expand(image))
                done.append(None)
            else:
                done.append(fit(to_pil(image, f"image {index}"), size))
        if not done:
            return
        decoded = decode_files(files, size)
        if decoded.lost:
            path = files[decoded.lost[0]]
            raise DataError(f"{path} cannot be read: {decoded.problems[0].removeprefix(f'{path}: ')}")
        if len(files) == len(done):
            yield decoded.images
            continue
        rows = iter(decoded.images.numpy())
        yield torch.from_numpy(np.stack([next(rows) if pixels is None else pixels for pixels in done]))


def _check_form(image: Any, what: str) -> None:
    """Refuse what is seen to be wrong without decoding; raises DataError."""
    if isinstance(image, (str, os.PathLike)):
        path = expand(image)
        if split_member(str(path)) is not None:
            return
        try:
            openable(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {reason_of(error)}") from error
    elif not isinstance(image, Image.Image):
        check_shape(shape_of(image, what), what, many=False)
