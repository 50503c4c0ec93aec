"""The random numbers of an augmentation, from a counter instead of a state: each image's can be computed alone, anywhere, in any order.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): ten rounds that turn a 128-bit counter and a 64-bit key
into four words of 32 bits. The key is the seed; the counter is the image's number in the epoch (low half) and the stream (high half), which
tells epochs apart. From the words x0 … x3, with padding P and jitter b:

    row        = ⌊x0·(2P + 1) / 2³²⌋
    col        = ⌊x1·(2P + 1) / 2³²⌋
    flip       = the highest bit of x2
    brightness = low + (high − low)·⌊x3 / 2⁸⌋ / 2²⁴,   low = max(0, 1 − b), high = 1 + b, rounded once to float32

low and high − low are float32 numbers, so that the product is exact in float64 and a fused multiply-add gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Draw(NamedTuple):
    """The crops, flips and brightness of N images.

    Attributes:
        row, col: int64 (N,) in [0, 2·padding]: where the crop starts in the padded image.
        flip: bool (N,).
        brightness: float32 (N,).
    """

    row: Tensor
    col: Tensor
    flip: Tensor
    brightness: Tensor

    def at(self, images: Tensor) -> Draw:
        """Return the entries of the images at these positions, int64 (n,)."""
        return Draw(*(values[images] for values in self))


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-10, each int64 (N,) in [0, 2³²); key and counter are also such words."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(_ROUNDS):
        # The 64-bit product wraps into the sign; shifting and masking recover its two words.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> 32 & WORD) ^ c1 ^ k0, second & WORD
        c2, c3 = (first >> 32 & WORD) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return c0, c1, c2, c3


def bounds(jitter: float) -> tuple[float, float]:
    """Return low and high − low as float32 numbers."""
    low = max(0.0, 1.0 - jitter)
    # Numbers of the host: a step that a CUDA graph holds makes no tensors of them.
    return float(np.float32(low)), float(np.float32(1.0 + jitter - low))


def draw_augmentation(seed: int, stream: int, numbers: Tensor, *, padding: int, jitter: float, flip: bool) -> Draw:
    """Draw crops, flips and brightness for images; the formulas are in the module's docstring.

    Args:
        seed: 0 … 2⁶³ − 1.
        stream: 0 … 2⁶³ − 1; each stream gives different numbers, e.g. one per epoch.
        numbers: int64 (N,), ≥ 0: the images' numbers in the epoch. One call for a whole epoch costs little more than one for a batch.
        padding: P ≥ 0 in pixels; 0: row and col are 0.
        jitter: b ≥ 0; 0: brightness is 1.
        flip: whether to flip at all.

    Returns:
        a `Draw` on the device of `numbers`.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(seed, stream, numbers, padding, jitter)
    high = torch.full_like(numbers, stream >> 32)
    words = philox((seed & WORD, seed >> 32), (numbers & WORD, numbers >> 32, torch.full_like(numbers, stream & WORD), high))
    low, span = bounds(jitter)
    return Draw(
        row=words[0] * (2 * padding + 1) >> 32,
        col=words[1] * (2 * padding + 1) >> 32,
        flip=words[2] >> 31 == 1 if flip else torch.zeros_like(numbers, dtype=torch.bool),
        brightness=((words[3] >> 8).double() * 2.0**-24 * span + low).float(),
    )


def _check(seed: int, stream: int, numbers: Tensor, padding: int, jitter: float) -> None:
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 2**63:
            raise ValueError(f"{name} must lie in 0 … 2⁶³ − 1, not be {value}")
    if numbers.dtype != torch.int64 or numbers.dim() != 1:
        raise ValueError(f"numbers must be int64 of one dimension, not {numbers.dtype}, {tuple(numbers.shape)}")
    # With a larger one, the product of a word and a side would not fit in 63 bits.
    if not 0 <= padding < 2**29:
        raise ValueError(f"padding must be ≥ 0 (and sensible), not {padding}")
    if not jitter >= 0 or jitter == float("inf"):
        raise ValueError(f"jitter must be a number ≥ 0, not {jitter}")
