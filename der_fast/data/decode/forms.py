"""One image or many that a caller holds as numbers: which axis is which, and what the numbers mean.

The number of axes says whether it is one image or many, never the lengths of the axes: a last batch of three grey images must not turn
into one colour image.

    2 axes      one grey image, H × W
    3 axes      one image, H × W × C (NumPy, OpenCV, Pillow) or C × H × W (PyTorch, torchvision)
    4 axes      many images, N × H × W × C or N × C × H × W

C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha): whichever of the two axes has such a length holds the channels, in
arrays and tensors alike. If both do (3 × 200 × 4: a picture of four columns, or one of three rows?) or neither does, the shape is refused
rather than guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from der_fast.data.decode.pixels import Pixels, reason_of
from der_fast.errors import DataError

_CHANNELS = (1, 2, 3, 4)
_ONE = "one image is H × W, H × W × C or C × H × W with C from 1 to 4 channels"
_MANY = "many are N × H × W × C or N × C × H × W"
_PLAIN = (torch.float16, torch.float32, torch.float64)


def holds_numbers(image: Any) -> bool:
    """Whether something is a tensor, an array, or something that NumPy can turn into an array without inspecting it."""
    return isinstance(image, (Tensor, np.ndarray)) or hasattr(image, "__array__")


def shape_of(image: Any, what: str) -> tuple[int, ...]:
    """Return the shape of a tensor or array; raises DataError for anything else."""
    if not holds_numbers(image):
        raise DataError(f"{what} is a {type(image).__name__}; give a Pillow image, a NumPy array or a tensor")
    return tuple(image.shape if isinstance(image, Tensor) else np.asarray(image).shape)


def as_array(image: Any, what: str) -> NDArray[Any]:
    """Return the numbers of a tensor or array, on the CPU and in this machine's byte order; copied only if necessary.

    Args:
        image: something that `holds_numbers` accepts.
        what: what to call it in messages.

    Raises:
        DataError: a tensor without pixels that can be read (sparse, on the device 'meta'), or an array with masked values.
    """
    if isinstance(image, Tensor):
        try:
            dense = image.detach().cpu().resolve_conj().resolve_neg().as_subclass(Tensor)
            # NumPy has neither bfloat16 nor eight-bit floating numbers.
            widened = dense.float() if dense.is_floating_point() and dense.dtype not in _PLAIN else dense
            array: NDArray[Any] = widened.numpy()
        except (TypeError, RuntimeError) as error:  # sparse, quantised, nested and meta tensors differ in what they raise
            raise DataError(
                f"{what} is a tensor whose pixels cannot be read ({image.layout}, {image.device}): {reason_of(error)}"
            ) from error
        return array
    if isinstance(image, np.ma.MaskedArray) and np.ma.is_masked(image):
        raise DataError(f"{what} has shape {image.shape} and masked values, which are not pixels; fill them: image.filled(0)")
    array = np.asarray(image)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def channels_last(array: NDArray[Any], what: str, *, many: bool) -> NDArray[Any]:
    """Return one image or several as a view N × H × W × C; N is 1 for two or three axes. Arguments and errors as `check_shape`."""
    axis = check_shape(array.shape, what, many=many)
    images = array[..., None] if axis is None else array
    images = images[None] if images.ndim == 3 else images
    return images if axis in (None, -1) else np.moveaxis(images, 1, 3)


def check_shape(shape: Sequence[int], what: str, *, many: bool) -> int | None:
    """Return which axis of one image or several holds the channels, by the rule above.

    Args:
        shape: of an array or tensor.
        what: what to call it in messages.
        many: four axes are allowed.

    Returns:
        -1 or -3, the axis counted from the end; None for two axes, which hold no channels.

    Raises:
        DataError: another number of axes, no axis or two that can hold the channels, or a side of zero pixels.
    """
    shape = tuple(shape)
    named, forms = f"{what} has shape {shape}", f"{_ONE}; {_MANY}" if many else _ONE
    if len(shape) == 4 and not many:
        raise DataError(f"{named}, but {_ONE}; give many images as one array or tensor, or one at a time")
    if len(shape) not in (2, 3, 4):
        raise DataError(f"{named}, but {forms}")
    if 0 in shape[-3:]:
        raise DataError(f"{named}: it has no pixels")
    if len(shape) == 2:
        return None
    one, two, three = shape[-3:]
    if one in _CHANNELS and three in _CHANNELS:
        raise DataError(
            f"{named}, which can be read in two ways: {one} × {two} pixels of {three} channel(s), or {two} × {three} pixels of {one}; give "
            "Pillow images (Image.fromarray), which leave no doubt"
        )
    if one not in _CHANNELS and three not in _CHANNELS:
        grey = "; many grey images are N × H × W × 1: give x[..., None]" if len(shape) == 3 and many else ""
        raise DataError(f"{named}, but {forms}{grey}")
    return -1 if three in _CHANNELS else -3


def check_values(array: NDArray[Any], what: str) -> None:
    """Refuse numbers whose brightness is unclear.

    Args:
        array: uint8, bool, uint16 and floating values pass, within their range.
        what: what to call it in messages.

    Raises:
        DataError: another dtype, floating values outside [0, 1], or uint16 without any value above 255, which are really bytes.
    """
    kind, named = array.dtype, f"{what} has shape {tuple(array.shape)}"
    if kind == np.uint8 or kind == np.bool_ or not array.size:
        return
    if kind == np.uint16:
        if 0 < array.max() <= 255:
            raise DataError(
                f"{named} and dtype uint16, where white is 65535, but no value above {array.max()}: all would be black; give pixels in "
                "0 … 255 as uint8"
            )
        return
    if not np.issubdtype(kind, np.floating):
        raise DataError(
            f"{named} and dtype {kind}; pixels must be uint8 in 0 … 255, uint16 in 0 … 65535, bool, or floating in [0, 1]; convert "
            "integers in 0 … 255 to uint8"
        )
    # Written so that NaN fails too.
    if not (array.min() >= 0 and array.max() <= 1):
        raise DataError(
            f"{named} and floating values from {array.min():g} to {array.max():g}, outside [0, 1]; give pixels before any normalisation "
            "(der_fast normalises by itself), and values in 0 … 255 as uint8"
        )


def as_bytes(array: NDArray[Any]) -> Pixels:
    """Return checked pixels as uint8: floating x becomes 255 x, rounded; uint16 keeps its upper 8 bits; True becomes 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    wide = array.astype(np.float32) if array.dtype == np.float16 else array
    pixels: Pixels = np.rint(wide * 255).astype(np.uint8)
    return pixels
