"""Random crops and flips that depend only on the epoch's key and the image, not on batches, workers or earlier draws.

Numbers come from a counter instead of a state (SplitMix64's finaliser, Steele et al. 2014), so a resumed epoch draws for image i what
the uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PER_IMAGE = 2 * ATTEMPTS + 4


def key_of(generator: torch.Generator) -> int:
    """Draw the key of an epoch, 63 bits."""
    # Decoding processes need the functions below, but not PyTorch.
    import torch

    return int(torch.randint(0, 2**63 - 1, (1,), generator=generator))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(key: int, images: Ints) -> Floats:
    """Return 24 numbers in [0, 1) for every image: (N, 24).

    Args:
        key: the epoch's key.
        images: (N,) numbers that identify the images.
    """
    with np.errstate(over="ignore"):
        start = _mixed(np.uint64(key) + _GOLDEN * (images.astype(np.uint64)[:, None] + np.uint64(1)))
        bits = _mixed(start + _GOLDEN * np.arange(1, _PER_IMAGE + 1, dtype=np.uint64)[None])
    numbers: Floats = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def random_windows(numbers: Floats, heights: Ints, widths: Ints) -> Ints:
    """Return (top, left, height, width) of a random-resized-crop for every image: (N, 4), in pixels.

    Area 8–100 %, aspect ratio 3/4–4/3, log-uniform; if none of ten attempts fits, the largest central rectangle of allowed aspect.

    Args:
        numbers: (N, 24) from `uniform`; the first 22 are used.
        heights, widths: (N,) image sizes in pixels.
    """
    area = (AREA[0] + (AREA[1] - AREA[0]) * numbers[:, :ATTEMPTS]) * (heights * widths)[:, None]
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = np.exp(low + (high - low) * numbers[:, ATTEMPTS : 2 * ATTEMPTS])
    rows, columns = np.rint(np.sqrt(area / aspect)).astype(np.int64), np.rint(np.sqrt(area * aspect)).astype(np.int64)
    fits = (columns > 0) & (columns <= widths[:, None]) & (rows > 0) & (rows <= heights[:, None])
    first, number = fits.argmax(1), np.arange(len(numbers))
    height, width = rows[number, first], columns[number, first]
    top = (numbers[:, 2 * ATTEMPTS] * (heights - height + 1)).astype(np.int64)
    left = (numbers[:, 2 * ATTEMPTS + 1] * (widths - width + 1)).astype(np.int64)
    windows = np.stack([top, left, height, width], 1)
    largest = _central(
        np.minimum(heights, np.rint(widths / ASPECT[0]).astype(np.int64)),
        np.minimum(widths, np.rint(heights * ASPECT[1]).astype(np.int64)),
        heights,
        widths,
    )
    return np.where(fits.any(1)[:, None], windows, largest)


def central_squares(heights: Ints, widths: Ints) -> Ints:
    """Return (top, left, height, width) of the largest central square of every image: (N, 4), in pixels."""
    side = np.minimum(heights, widths)
    return _central(side, side, heights, widths)


def windows_of(numbers: Floats | None, heights: Ints, widths: Ints) -> Ints:
    """Return the window (top, left, height, width) of every image to decode: random if there are numbers, else the central square."""
    return central_squares(heights, widths) if numbers is None else random_windows(numbers, heights, widths)


def _central(height: Ints, width: Ints, heights: Ints, widths: Ints) -> Ints:
    return np.stack([(heights - height) // 2, (widths - width) // 2, height, width], 1)


def flips(numbers: Floats) -> NDArray[np.bool_]:
    """Return (N,): whether to mirror, from the 23rd number."""
    mirrored: NDArray[np.bool_] = numbers[:, 2 * ATTEMPTS + 2] < 0.5
    return mirrored


def brightness(numbers: Floats, jitter: float) -> Floats:
    """Return (N,) factors in [max(0, 1 − jitter), 1 + jitter], from the 24th number."""
    low, high = max(0.0, 1.0 - jitter), 1.0 + jitter
    factors: Floats = low + (high - low) * numbers[:, 2 * ATTEMPTS + 3]
    return factors
