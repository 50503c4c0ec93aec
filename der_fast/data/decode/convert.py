"""An image in any form that a caller holds, converted to RGB; and files for prediction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from der_fast.data.catalogue.found import find_images
from der_fast.data.decode.forms import as_array, as_bytes, channels_last, check_values, shape_of
from der_fast.data.decode.pixels import Pixels, decode_files, fit, reason_of, to_rgb
from der_fast.errors import DataError

_ORIENTATION = ExifTags.Base.Orientation


def to_pil(image: Any, what: str) -> Image.Image:
    """Turn one image into an RGB Pillow image.

    Args:
        image: a Pillow image of any mode, turned upright as its EXIF data says; or an array or tensor H × W, H × W × C or C × H × W, where
            C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha), of any strides: see `der_fast.data.decode.forms`. uint8; bool;
            uint16, of which the upper 8 bits count; or floating in [0, 1]. Transparency is laid over white.
        what: what to call it in messages.

    Raises:
        DataError: another type, shape or dtype, or values outside the range.
    """
    if isinstance(image, Image.Image):
        try:
            return to_rgb(_upright(image))
        except Exception as error:  # a damaged file that is only decoded now
            size = f"{image.size[0]} × {image.size[1]} pixels"
            raise DataError(f"{what} ({size}, mode {image.mode}) cannot be converted to RGB: {reason_of(error)}") from error
    shape_of(image, what)
    array = as_array(image, what)
    pixels = channels_last(array, what, many=False)
    check_values(array, what)
    return _rgb_image(as_bytes(pixels[0]))


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image upright, as files are; raises ValueError if it has no pixels."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    # Load it first: Pillow then turns some formats by itself and removes the orientation.
    image.load()
    return image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def _rgb_image(pixels: Pixels) -> Image.Image:
    """The Pillow image of uint8 H × W × C, C from 1 to 4."""
    return to_rgb(Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)))


def rgb_batch(images: NDArray[Any]) -> Tensor:
    """Return N × H × W × C, with C from 1 to 4 and values that `check_values` accepts, as a uint8 tensor N × H × W × 3."""
    pixels = as_bytes(images)
    channels = pixels.shape[3]
    if channels in (2, 4):
        layers = [np.asarray(_rgb_image(image)) for image in pixels]
        return torch.from_numpy(np.stack(layers)) if layers else torch.zeros(0, *pixels.shape[1:3], 3, dtype=torch.uint8)
    # PyTorch does not accept negative strides, and warns about read-only memory.
    plain = np.require(pixels, requirements=["C", "W"])
    return torch.from_numpy(plain).expand(-1, -1, -1, 3).contiguous()


def fit_batch(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 images N × H × W × 3 to cover `size` (height, width), and cut off the rest evenly."""
    if tuple(images.shape[1:3]) == tuple(size):
        return images
    fitted = [fit(Image.fromarray(image), size) for image in images.numpy()]
    return torch.from_numpy(np.stack(fitted)) if fitted else torch.zeros(0, *size, 3, dtype=torch.uint8)


def load_folder_images(paths: Path | str | Sequence[Path | str], image_size: tuple[int, int]) -> tuple[Tensor, list[Path], list[str]]:
    """Decode files, and all image files in folders and their subfolders, for prediction.

    Args:
        paths: one path or several; a folder stands for the image files below it in sorted order, see `find_images`.
        image_size: (height, width) in pixels.

    Returns:
        The pixels (uint8, N × H × W × 3), the path of each image, one "path: reason" per file that could not be read, and one line
        for every folder that holds files of other kinds.

    Raises:
        DataError: a path that does not exist, a folder without image files, or a drive that does not answer.
    """
    found = find_images([paths] if isinstance(paths, (str, os.PathLike)) else list(paths))
    decoded = decode_files(found.files, image_size)
    return decoded.images, [found.files[index] for index in decoded.kept], [*decoded.problems, *found.notes]
