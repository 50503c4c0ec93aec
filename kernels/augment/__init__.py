"""Crop, flip, jitter and normalise a whole batch of resident uint8 images.

`augment` takes the crop, flip and brightness of every image as arguments; `augment_drawn` draws them from a counter. `reference.py` and
`draw.py` define what both compute; the fused backend is one launch and is tested against them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from der_fast.kernels import checks, triton_runtime
from der_fast.kernels.augment.draw import Draw, draw_augmentation
from der_fast.kernels.augment.reference import augment_reference, scale_and_shift
from der_fast.kernels.checks import BACKENDS, check_backend
from der_fast.kernels.dtypes import FUSED_DTYPES

__all__ = ["BACKENDS", "Draw", "augment", "augment_drawn", "augment_reference", "draw_augmentation"]


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
    index: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    backend: str = "reference",
) -> Tensor:
    """Crop, flip, jitter and normalise a batch; the formula is in `reference.py`.

    Args:
        images: uint8, D × H × W × 3, on any device; contiguous or not with the reference.
        row: int64, N: top edge of every crop in the zero-padded image, in [0, 2·padding].
        col: int64, N: left edge, in [0, 2·padding].
        flip: bool, N: mirror left and right after the crop.
        brightness: floating, N: factor ≥ 0 applied to the pixels before clipping to [0, 1].
        padding: black pixels around every side before the crop.
        mean: three channel means in [0, 1].
        std: three channel standard deviations, > 0, in [0, 1].
        index: int64, N: which images of a resident data set to take; None: all, in order (then N = D).
        dtype: of the result; float64 is computed in float64, everything else in float32.
        channels_last: memory layout of the result; True costs no copy.
        backend: 'reference' (plain PyTorch) or 'fused' (Triton, one launch; float32, bfloat16 or float16).

    Returns:
        N × 3 × H × W on the device of `images`. On a GPU an index out of range yields an image of NaN (fused) or stops the program
        (reference).

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or (checked on the CPU only) an offset outside [0, 2·padding] or an index out
            of range.
        BackendError: the backend does not work here.
    """
    _check_images(images, index, padding, mean, std, dtype, backend)
    count = len(images) if index is None else len(index)
    _check_draw(count, images.device, row, col, flip, brightness, padding)
    draw = Draw(row, col, flip, brightness)
    return _run(images, index, draw, None, None, padding, 0.0, False, mean, std, dtype, channels_last, backend)


def augment_drawn(
    images: Tensor,
    *,
    key: Tensor | tuple[int, int],
    numbers: Tensor,
    padding: int,
    jitter: float,
    flip: bool,
    mean: Sequence[float],
    std: Sequence[float],
    index: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    backend: str = "reference",
) -> Tensor:
    """Do what `augment` does, with the numbers that `draw_augmentation` returns; the fused backend draws them in the kernel.

    Args:
        images, mean, std, index, dtype, channels_last, backend: as for `augment`.
        key: (seed, stream), each in 0 … 2⁶³ − 1, or an int64 tensor of the two on the device of `images`. The tensor is read when the
            images are made, so a captured CUDA graph replays with its current values.
        numbers: int64, N, ≥ 0: the images' numbers in the epoch.
        padding, jitter, flip: as for `draw_augmentation`.

    Returns:
        N × 3 × H × W on the device of `images`.

    Raises:
        ValueError, BackendError: as for `augment` and `draw_augmentation`.
    """
    _check_images(images, index, padding, mean, std, dtype, backend)
    count = len(images) if index is None else len(index)
    if numbers.shape != (count,) or numbers.dtype != torch.int64 or numbers.device != images.device:
        raise ValueError(
            f"numbers must hold one int64 per image ({count}) on {images.device}; "
            f"got {numbers.dtype}, {tuple(numbers.shape)} on {numbers.device}"
        )
    if isinstance(key, Tensor) and (
        key.shape != (2,) or key.dtype != torch.int64 or key.device != images.device or not key.is_contiguous()
    ):
        raise ValueError(
            f"key must be (seed, stream) or int64 of two on {images.device}; got {key.dtype}, {tuple(key.shape)} on {key.device}"
        )
    if backend == "fused":
        if not isinstance(key, Tensor):
            draw_augmentation(*key, numbers[:0], padding=padding, jitter=jitter, flip=flip)  # checks the arguments
            key = torch.tensor(key, dtype=torch.int64).to(images.device)
        numbers = numbers.contiguous()
        return _run(images, index, None, key, numbers, padding, jitter, flip, mean, std, dtype, channels_last, backend)
    seed, stream = key.tolist() if isinstance(key, Tensor) else key
    draw = draw_augmentation(seed, stream, numbers, padding=padding, jitter=jitter, flip=flip)
    return _run(images, index, draw, None, None, padding, jitter, flip, mean, std, dtype, channels_last, backend)


def _run(
    images: Tensor,
    index: Tensor | None,
    draw: Draw | None,
    key: Tensor | None,
    numbers: Tensor | None,
    padding: int,
    jitter: float,
    flip: bool,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> Tensor:
    if backend == "reference":
        assert draw is not None
        chosen = images if index is None else images.index_select(0, index)
        return augment_reference(chosen, **draw._asdict(), padding=padding, mean=mean, std=std, dtype=dtype, channels_last=channels_last)
    triton_runtime.require(images.device, "augment")
    from der_fast.kernels.augment.triton_augment import augment_triton

    scale, shift = ([float(np.float32(value)) for value in values] for values in scale_and_shift(mean, std))
    result = augment_triton(
        images,
        index=None if index is None else index.contiguous(),
        key=key,
        numbers=numbers,
        draw=None if draw is None else Draw(*(values.contiguous() for values in draw)),
        padding=padding,
        jitter=jitter,
        flip=flip,
        scale=scale,
        shift=shift,
        dtype=dtype,
    ).permute(0, 3, 1, 2)
    return result if channels_last else result.contiguous()


def _check_images(
    images: Tensor, index: Tensor | None, padding: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, backend: str
) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8, N × H × W × 3, not {images.dtype}, {tuple(images.shape)}")
    if padding < 0:
        raise ValueError(f"padding must be ≥ 0, not {padding}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must hold three numbers, std > 0; got mean {tuple(mean)}, std {tuple(std)}")
    check_backend("augment", backend)
    if backend == "fused" and (dtype not in FUSED_DTYPES or not images.is_contiguous()):
        raise ValueError(
            "backend 'fused' takes contiguous images and returns float32, bfloat16 or float16; "
            f"got strides {images.stride()} of {tuple(images.shape)}, and {dtype}"
        )
    if index is None:
        return
    if index.dtype != torch.int64 or index.dim() != 1 or index.device != images.device:
        raise ValueError(
            f"index must be int64 of one dimension on {images.device}; got {index.dtype}, {tuple(index.shape)} on {index.device}"
        )
    if len(index) and checks.readable(index) and not 0 <= int(index.min()) <= int(index.max()) < len(images):
        raise ValueError(f"index must lie in [0, {len(images) - 1}]; got {int(index.min())} to {int(index.max())}")


def _check_draw(count: int, device: torch.device, row: Tensor, col: Tensor, flip: Tensor, brightness: Tensor, padding: int) -> None:
    for name, values, right in (
        ("row", row, row.dtype == torch.int64),
        ("col", col, col.dtype == torch.int64),
        ("flip", flip, flip.dtype == torch.bool),
        ("brightness", brightness, brightness.is_floating_point()),
    ):
        if values.shape != (count,) or not right or values.device != device:
            raise ValueError(
                f"{name} must hold one value per image ({count}) on {device}: row and col int64, flip bool, brightness floating; "
                f"got {values.dtype}, {tuple(values.shape)} on {values.device}"
            )
    if count and checks.readable(row):
        for name, offsets in (("row", row), ("col", col)):
            low, high = int(offsets.min()), int(offsets.max())
            if low < 0 or high > 2 * padding:
                raise ValueError(f"{name} must lie in [0, {2 * padding}] with padding {padding}; got {low} to {high}")
