"""Crop, flip, jitter and normalise a whole batch of resident uint8 images.

Public function: `augment`. `reference.py` defines what it computes; faster backends are tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from der_fast.kernels.augment.reference import augment_reference

__all__ = ["augment", "augment_reference"]


def augment(
    images: Tensor,
    *,
    row: Tensor,
    col: Tensor,
    flip: Tensor,
    brightness: Tensor,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """Crop, flip, jitter and normalise a batch; the formula is in `reference.py`.

    Args:
        images: uint8, N × H × W × 3, contiguous or not, on any device.
        row: int64, N: top edge of every crop in the zero-padded image, in [0, 2·padding].
        col: int64, N: left edge, in [0, 2·padding].
        flip: bool, N: mirror left and right after the crop.
        brightness: floating, N: factor ≥ 0 applied to the pixels before clipping to [0, 1].
        padding: black pixels around every side before the crop.
        mean: three channel means in [0, 1].
        std: three channel standard deviations, > 0, in [0, 1].
        dtype: of the result; float64 is computed in float64, everything else in float32.
        channels_last: memory layout of the result; True costs no copy.

    Returns:
        N × 3 × H × W on the device of `images`.

    Raises:
        ValueError: a wrong shape, dtype or device, or (checked on the CPU only) an offset outside [0, 2·padding].
    """
    _check(images, row, col, flip, brightness, padding, mean, std)
    return augment_reference(
        images,
        row=row,
        col=col,
        flip=flip,
        brightness=brightness,
        padding=padding,
        mean=mean,
        std=std,
        dtype=dtype,
        channels_last=channels_last,
    )


def _check(
    images: Tensor, row: Tensor, col: Tensor, flip: Tensor, brightness: Tensor, padding: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8, N × H × W × 3, not {images.dtype}, {tuple(images.shape)}")
    if padding < 0:
        raise ValueError(f"padding must be ≥ 0, not {padding}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must hold three numbers, std > 0; got mean {tuple(mean)}, std {tuple(std)}")
    count = images.shape[0]
    for name, values, right in (
        ("row", row, row.dtype == torch.int64),
        ("col", col, col.dtype == torch.int64),
        ("flip", flip, flip.dtype == torch.bool),
        ("brightness", brightness, brightness.is_floating_point()),
    ):
        if values.shape != (count,) or not right or values.device != images.device:
            raise ValueError(
                f"{name} must hold one value per image ({count}) on {images.device}: row and col int64, flip bool, brightness floating; "
                f"got {values.dtype}, {tuple(values.shape)} on {values.device}"
            )
    # Reading values back from a GPU would stall it, so only the CPU checks them.
    if count and images.device.type == "cpu":
        for name, offsets in (("row", row), ("col", col)):
            low, high = int(offsets.min()), int(offsets.max())
            if low < 0 or high > 2 * padding:
                raise ValueError(f"{name} must lie in [0, {2 * padding}] with padding {padding}; got {low} to {high}")
