"""Images that a caller already holds, in whatever form, as uint8 N × H × W × 3."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from der_fast.data.decode import Pixels, decode, decode_files, fit, reason_of, to_rgb
from der_fast.data.found import find_images
from der_fast.errors import DataError


def to_pil(image: Any, what: str) -> Image.Image:
    """Turn one image into an RGB Pillow image.

    Args:
        image: a Pillow image; an array H × W, H × W × 1, H × W × 3 or H × W × 4; or a tensor H × W, 1 × H × W or 3 × H × W. Arrays and
            tensors are uint8, or floating in [0, 1].
        what: how to call it in messages.

    Raises:
        DataError: another type, shape or dtype, or values outside the range.
    """
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except Exception as error:
            raise DataError(f"{what} cannot be converted to RGB: {reason_of(error)}") from error
    if isinstance(image, Tensor):
        array = image.detach().cpu().numpy()
        if array.ndim == 3:
            array = array.transpose(1, 2, 0)
        form = "a tensor must be H × W, 1 × H × W or 3 × H × W"
    elif isinstance(image, np.ndarray):
        array, form = image, "an array must be H × W, H × W × 1, H × W × 3 or H × W × 4"
    else:
        raise DataError(f"{what} is a {type(image).__name__}; give a Pillow image, a NumPy array or a tensor")
    channels = (1, 3) if isinstance(image, Tensor) else (1, 3, 4)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in channels) or 0 in array.shape:
        raise DataError(f"{what} has shape {tuple(image.shape)}; {form}")
    pixels = _to_uint8(array, what)
    return to_rgb(Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else np.ascontiguousarray(pixels)))


def _to_uint8(array: NDArray[Any], what: str) -> Pixels:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{what} has dtype {array.dtype}; pixels must be uint8 in 0 … 255 or floating in [0, 1]")
    # Written so that NaN fails too.
    if not (array.min() >= 0 and array.max() <= 1):
        raise DataError(
            f"{what} has floating values from {array.min():g} to {array.max():g}, outside [0, 1]; give pixels before any normalisation "
            "(der_fast normalises by itself)"
        )
    pixels: Pixels = np.rint(array * 255).astype(np.uint8)
    return pixels


def as_image_batch(images: Any, size: tuple[int, int]) -> Tensor:
    """Turn images of any form into one batch of pixels.

    Args:
        images: a uint8 tensor or array N × H × W × 3 or N × H × W (grey); or a list of Pillow images, paths, and arrays or tensors as
            `to_pil` takes them; or a single Pillow image, path, or H × W × 3 array.
        size: (height, width) in pixels; other sizes are resized to cover it and cut off evenly.

    Returns:
        uint8, N × size[0] × size[1] × 3, on the CPU.

    Raises:
        DataError: a form that is none of these, or a file that cannot be read.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    if isinstance(images, (Tensor, np.ndarray)):
        batch = _checked_batch(images)
        if tuple(batch.shape[1:3]) == tuple(size):
            return batch
        images = list(batch.numpy())
    if not isinstance(images, Iterable):
        raise DataError(f"images is a {type(images).__name__}; give a uint8 tensor N × H × W × 3 or a list of images or paths")
    pixels = [_one(image, size, f"image {index}") for index, image in enumerate(images)]
    return torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, *size, 3, dtype=torch.uint8)


def _checked_batch(images: Tensor | NDArray[Any]) -> Tensor:
    batch = torch.from_numpy(images) if isinstance(images, np.ndarray) and images.dtype == np.uint8 else images
    if not isinstance(batch, Tensor) or batch.dtype != torch.uint8:
        raise DataError(
            f"a batch of images must be uint8 in 0 … 255, not {images.dtype}; for floating x in [0, 1] give (x * 255).round() as uint8"
        )
    batch = batch.detach().cpu()
    if batch.dim() == 3:
        # H × W × 3 is one colour image; anything else of three dimensions is a batch of grey ones.
        batch = batch[None] if batch.shape[2] == 3 else batch[..., None].expand(-1, -1, -1, 3)
    if batch.dim() != 4 or batch.shape[3] != 3 or 0 in batch.shape[1:]:
        raise DataError(
            f"a batch of images must be N × H × W × 3 or N × H × W, not {tuple(images.shape)}; use permute(0, 2, 3, 1) on N × 3 × H × W"
        )
    return batch.contiguous()


def _one(image: Any, size: tuple[int, int], what: str) -> Pixels:
    if isinstance(image, (str, os.PathLike)):
        path = Path(image).expanduser()
        try:
            return decode(path, size)
        except Exception as error:  # damaged bytes make the decoders raise almost anything
            raise DataError(f"{path} cannot be read: {reason_of(error)}") from error
    return fit(to_pil(image, what), size)


def load_folder_images(paths: Path | str | Sequence[Path | str], image_size: tuple[int, int]) -> tuple[Tensor, list[Path], list[str]]:
    """Decode files, and all image files in folders and their subfolders, for prediction.

    Args:
        paths: one path or several; a folder stands for the image files below it in sorted order, as `find_images` finds them.
        image_size: (height, width) in pixels.

    Returns:
        The pixels (uint8, N × H × W × 3), the path of every one of them, one "path: reason" per file that could not be read, and one line
        for every folder that holds files of other kinds.

    Raises:
        DataError: a path that does not exist, a folder without image files, or a drive that does not answer.
    """
    found = find_images([paths] if isinstance(paths, (str, os.PathLike)) else list(paths))
    decoded = decode_files(found.files, image_size)
    return decoded.images, [found.files[index] for index in decoded.kept], [*decoded.problems, *found.notes]
